"""Several ranks give the files of one process, byte by byte, and end with one message when something goes wrong.

The ranks are processes of their own that talk through gloo; this process keeps the store for them, as torchrun does.
"""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from slablm import SlabError
from slablm.api import compress_folder
from slablm.calibration.capture import collect_stats
from slablm.calibration.statistics import Use
from slablm.compression.options import RunOptions
from slablm.system.distributed import ALONE, World, _start_name, assign, join
from tests.compression.folders import assert_same_folders, build

ROOT = Path(__file__).resolve().parents[2]


@given(st.lists(st.integers(1, 50), max_size=6), st.integers(1, 3))
def test_assignment_is_within_a_third_of_the_best(costs, size):
    named = {str(number): cost for number, cost in enumerate(costs)}

    def longest(owners):
        return max(sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == r) for r in range(size))

    owners = assign(named, size)
    best = min(map(longest, product(range(size), repeat=len(costs))))
    assert owners.keys() == named.keys()
    assert set(owners.values()) <= set(range(size))
    assert 3 * longest([owners[name] for name in named]) <= 4 * best


def test_a_llama_block_is_divided_evenly_between_two():
    """SmolLM2's shapes."""
    shapes = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
    shapes |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
    costs = {name: m * n for name, (m, n) in shapes.items()}
    owners = assign(costs, 2)
    loads = [sum(cost for name, cost in costs.items() if owners[name] == rank) for rank in range(2)]
    assert loads[0] == loads[1]


@given(st.integers(0, 40), st.integers(1, 7))
def test_shares_are_contiguous_and_even(count, size):
    shares = [World(rank, size).share(count) for rank in range(size)]
    assert [index for share in shares for index in share] == list(range(count))
    assert len(shares[0]) == min(map(len, shares)) == count // size
    assert max(map(len, shares)) - len(shares[0]) <= 1


@dataclass(frozen=True)
class Threads(World):
    """Ranks that are threads of this process."""

    table: list | None = None
    barrier: threading.Barrier | None = None

    def gather(self, notes, tensors):
        self.table[self.rank] = (notes, {name: tensor.clone() for name, tensor in tensors.items()})
        self.barrier.wait(30)
        told = list(self.table)
        self.barrier.wait(30)
        return told

    def deliver(self, tensors, readers):
        told = self.gather(readers, tensors)
        tensors.clear()
        for name, rank in sorted((name, rank) for rank, (theirs, _) in enumerate(told) for name in theirs):
            if self.rank in told[rank][0][name]:
                yield rank, name, told[rank][1][name].clone()


class Routed(nn.Module):
    """Two layers share their inputs; a third one sees only some of the windows, or shares as well."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.rare = (nn.Linear(6, 6, bias=False) for _ in range(3))

    def forward(self, x, rare):
        total = self.a(x) + self.b(x)
        return total + self.rare(x if rare == "same" else x + 1) if rare else total


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("rare", [[None, None, "own", "own", None], ["same", "own", "same", "same", "own"]])
def test_statistics_are_those_of_one_process(size, rare):
    """Also where ranks have not seen the same layers; each has those of its own layers, and no others."""
    if rare[0] == "same":  # shared in some windows only is refused, by one process as well
        rare = ["same"] * 5
    windows = torch.randn(5, 1, 7, 6, generator=torch.Generator().manual_seed(0))
    uses = [Use.FIT, Use.FIT, Use.FIT, Use.HOLD_BACK, Use.MEASURE]
    owners = {"a": size - 1, "b": 0, "rare": 0}

    def stats(world):
        block = Routed()  # hooks of several threads would meet on one
        layers = {"a": block.a, "b": block.b, "rare": block.rare}
        start = world.share(5).start
        return collect_stats(
            block,
            layers,
            lambda i: block(windows[start + i], rare[start + i]),
            uses,
            with_gram=True,
            seed=0,
            world=world,
            owners=owners if world.size > 1 else None,
        )

    wanted = stats(ALONE)
    table, barrier, found = [None] * size, threading.Barrier(size), [None] * size

    def run(rank):
        with torch.no_grad():
            found[rank] = stats(Threads(rank, size, table=table, barrier=barrier))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank, mine in enumerate(found):
        assert mine.keys() == wanted.keys()
        for name, one in wanted.items():
            if owners[name] != rank:
                assert mine[name] is None
                continue
            assert torch.equal(mine[name].input_norms, one.input_norms)
            assert torch.equal(mine[name].sample, one.sample)
            assert mine[name].tokens == one.tokens
            for kind in ("gram", "held_out", "unseen"):
                theirs, wanted_tensor = getattr(mine[name], kind), getattr(one, kind)
                assert (theirs is None) == (wanted_tensor is None)
                assert theirs is None or torch.equal(theirs, wanted_tensor)


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    preload = [
        "slablm.compression.run",
        "slablm.checkpoint.inspection",
        "torch.distributed",
        "transformers.models.llama.modeling_llama",
    ]
    context.set_forkserver_preload(preload)
    return context


def rank_main(environment, log, arguments, fate):
    """One rank: the command line with stderr in a file. `fate`: what befalls rank r at which layer it decomposes."""
    os.environ.update(environment)
    sys.stderr = Path(log).open("w", encoding="utf-8", buffering=1)  # noqa: SIM115
    sys.argv = ["slablm", *arguments]
    torch.set_num_threads(1)
    misfortune(fate)
    from slablm.cli import main

    main()


def misfortune(fate):
    from slablm.compression import blocks

    if fate is None or fate[0] != int(os.environ["RANK"]):
        return
    _, what, fatal = fate
    if what == "threads":
        torch.set_num_threads(fatal)
    original, count = blocks.compress_layer, iter(range(1000))

    def unlucky(*args):
        if next(count) == fatal:
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "fail":
                raise SlabError("out of luck")
            if what == "crash":
                raise MemoryError
        return original(*args)

    blocks.compress_layer = unlucky


@pytest.fixture
def launch(processes, tmp_path):
    """Run a command with several ranks; returns their exit codes and what each has said on stderr."""

    def run(size, *arguments, fate=None):
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        children = []
        for rank in range(size):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "COLUMNS": "1000",
            }
            log = str(tmp_path / f"rank-{rank}.log")
            child = processes.Process(target=rank_main, args=(environment, log, [str(a) for a in arguments], fate))
            child.start()
            children.append((child, Path(log)))
        for child, _ in children:
            child.join(120)
        logs = []
        for _, log in children:
            logs.append(log.read_text(encoding="utf-8"))
            log.unlink()
        return [child.exitcode for child, _ in children], logs

    return run


@pytest.fixture
def settings(text_file):
    """The options of the fixture `quick`."""
    return ["--method", "slab", "--calibration", text_file, "--num-samples", 4, "--seq-len", 32, "--iterations", 4]


def errors(logs):
    """All error lines."""
    return re.findall(r"^slablm: error: .*", "\n".join(logs), re.MULTILINE)


@pytest.mark.parametrize(
    ("family", "size", "more"),
    [
        ("llama", 2, {}),
        ("llama-tied", 3, {"max_memory": "1B"}),
        ("llama-tied headless", 2, {}),
        ("llama", 3, {"rank": 2}),
        ("llama-tied", 2, {"head_bits": 8}),
        ("llama", 2, {"method": "slab+", "ratio": None, "bits_per_weight": 5.0}),
        ("llama", 3, {"method": "slab+", "ratio": None}),
    ],
)
def test_any_number_of_ranks_gives_the_files_of_one_process(launch, settings, quick, tmp_path, family, size, more):
    """So the masks are identical, and the values. A model without its head is read as a whole."""
    source, out = build(tmp_path / "dense", family), tmp_path / "out"
    config = replace(quick, **{name: value for name, value in more.items() if name != "max_memory"})
    given = {f"--{name.replace('_', '-')}": value for name, value in more.items() if value is not None}
    more = [part for option in given.items() for part in option]
    compress_folder(str(source), tmp_path / "one", config, RunOptions())
    codes, logs = launch(size, "compress", source, out, *settings, *more)
    assert codes == [0] * size
    assert_same_folders(out, tmp_path / "one")
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
    assert all(log == "" for log in logs[1:])
    codes, logs = launch(size, "compress", source, out, *settings, *more, "--resume")
    assert codes == [0] * size
    assert "is complete, there is nothing to go on with" in logs[0]


@pytest.mark.parametrize(("victim", "size", "then"), [(1, 2, 2), (0, 2, 2), (2, 3, 1), (1, 2, 3)])
def test_a_killed_rank_costs_one_block(launch, settings, quick, tmp_path, victim, size, then):
    """SIGKILL in the second block; then the run goes on, be it with another number of ranks."""
    source, out = build(tmp_path / "dense", "llama"), tmp_path / "out"
    per_block = 14 // 2 // size
    codes, logs = launch(size, "compress", source, out, *settings, fate=(victim, "kill", per_block + 1))
    assert codes == [-signal.SIGKILL if rank == victim else 1 for rank in range(size)]
    said = errors(logs)
    assert len(said) == 1
    assert "another rank has ended or cannot be reached (" in said[0]
    assert said[0].endswith("finished blocks are kept, run the same command with --resume to go on")
    assert not out.exists()
    assert (tmp_path / ".out.unfinished" / "block-00000.safetensors").is_file()
    if then == 1:
        result = compress_folder(str(source), out, quick, RunOptions(resume=True))
        assert result.resumed_blocks == 1
    else:
        codes, logs = launch(then, "compress", source, out, *settings, "--resume")
        assert codes == [0] * then
        assert "Going on after 1 finished blocks" in logs[0]
    compress_folder(str(source), tmp_path / "one", quick, RunOptions())
    assert_same_folders(out, tmp_path / "one")


@pytest.mark.parametrize(
    ("changes", "fate", "message"),
    [
        (["--num-samples", 2], None, "2 calibration windows cannot be divided among 3 ranks: use --num-samples 3 or"),
        (["--ratio", 2], None, "ratio must lie strictly between 0 and 1"),
        (["--targets", "nonsense"], None, "pattern 'nonsense' matches no linear layer"),
        (["--device", "cpu:1"], None, "device 'cpu:1' is one for all ranks: write cpu"),
        ([], (2, "fail", 0), r"rank 2 on \S+: out of luck"),
        ([], (0, "fail", 3), "out of luck; 1 finished blocks are kept"),
        ([], (1, "crash", 0), "out of memory"),
        ([], (1, "threads", 2), r"rank 1 on \S+: another number of threads than on rank 0 \(there 1, here 2\)"),
    ],
)
def test_what_goes_wrong_is_said_once(launch, settings, tiny_folder, tmp_path, changes, fate, message):
    codes, logs = launch(3, "compress", tiny_folder, tmp_path / "out", *settings, *changes, fate=fate)
    assert codes == [1, 1, 1]
    if changes[:1] == ["--device"]:  # the ranks have not met
        assert len(set(errors(logs))) == 1
    else:
        assert len(errors(logs)) == 1
    assert re.search(f"slablm: error: (rank . on [^:]*: )?{message}", errors(logs)[0])
    assert not (tmp_path / "out").exists()


def test_what_only_rank_0_sees_ends_all(launch, settings, tiny_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    codes, logs = launch(2, "compress", tiny_folder, tmp_path / "out", *settings)
    assert codes == [1, 1]
    assert len(errors(logs)) == 1
    assert "--overwrite" in errors(logs)[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


def test_no_store_to_meet_at(monkeypatch):
    monkeypatch.setattr("slablm.system.distributed._MEETING", timedelta(seconds=1))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(SlabError, match="the other ranks cannot be reached"), join("cpu"):
        pass


def test_torchrun_restarts_and_goes_on(settings, quick, tmp_path):
    source, out = build(tmp_path / "dense", "llama"), tmp_path / "out"
    compress_folder(str(source), tmp_path / "one", quick, RunOptions())
    script = tmp_path / "unlucky.py"
    script.write_text(
        "import os, sys, torch\n"
        "from tests.compression.test_distributed import misfortune\n"
        "misfortune((1, 'kill', 5) if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' else None)\n"
        "from slablm.cli import main\n"
        "main()\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", script, "compress", source, out, *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        list(map(str, command)), check=False, env=environment, stderr=subprocess.PIPE, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert len(errors([done.stderr])) == 1
    assert "1 finished blocks are kept" in done.stderr
    assert "Going on after 1 finished blocks" in done.stderr
    assert_same_folders(out, tmp_path / "one")


def test_what_dead_ranks_left_in_the_store_is_not_believed():
    """torchrun's store outlives the ranks: knocks, answers and names of earlier starts are still in it."""
    store = torch.distributed.HashStore()
    store.set_timeout(timedelta(seconds=20))
    names = []
    for _ in range(3):
        store.set("slablm/knock/2", "of one that died at once")
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda rank: _start_name(store, rank, 3), range(3)))
        assert len(set(found)) == 1
        names += found[:1]
    assert len(set(names)) == 3
