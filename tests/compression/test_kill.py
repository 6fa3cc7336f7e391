"""SIGKILL at many moments, then --resume: in the end the files are those of a run that was left alone.

The victims run in processes of their own, forked from one that has done the imports. They count the moments that
matter to a journal (every sync and rename, every finished layer) and kill themselves at a chosen one.
"""

import multiprocessing
import os
import signal

import pytest

from slablm.api import compress_folder
from slablm.compression.options import RunOptions
from tests.compression.folders import assert_same_folders, build

MOMENTS = 400  # more than a run has


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["slablm.compression.run", "transformers.models.llama.modeling_llama"])
    return context


def victim(source, out, config, options, fatal):
    """Compress, and die at moment number `fatal`."""
    import torch

    torch.set_num_threads(1)
    moments = iter(range(MOMENTS))

    def moment(*_):
        if next(moments) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def noticed(function):
        def call(*args, **kwargs):
            moment()
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "rename", "unlink", "rmdir"):
        setattr(os, name, noticed(getattr(os, name)))
    compress_folder(source, out, config, options, moment)


def survives(processes, *arguments):
    process = processes.Process(target=victim, args=arguments)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


@pytest.mark.parametrize("overwrite", [False, True])
def test_kill_and_resume_until_it_is_through(processes, overwrite, quick, tmp_path):
    source, out = str(build(tmp_path / "dense", "llama-tied", max_shard_size="60KB")), tmp_path / "out"
    compress_folder(source, tmp_path / "straight", quick, RunOptions(max_shard_size=30_000))
    if overwrite:
        compress_folder(source, out, quick, RunOptions(max_shard_size=20_000))
    options = RunOptions(resume=True, overwrite=overwrite, max_shard_size=30_000, max_memory=1)
    kills = 0
    while not survives(processes, source, out, quick, options, 7 * kills + 3 * overwrite):
        kills += 1
    assert kills >= 5
    assert_same_folders(out, tmp_path / "straight")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out", "straight"]


def test_kill_once_and_resume(processes, quick, tmp_path):
    """One kill per run, at moments all over it."""
    source = str(build(tmp_path / "dense", "llama"))
    compress_folder(source, tmp_path / "straight", quick, RunOptions())
    fatal, finished = 0, False
    while not finished:
        out = tmp_path / f"out-{fatal}"
        finished = survives(processes, source, out, quick, RunOptions(), fatal)
        if not finished:
            assert survives(processes, source, out, quick, RunOptions(resume=True), MOMENTS)
        assert_same_folders(out, tmp_path / "straight")
        fatal += 7
    assert fatal > 50
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
