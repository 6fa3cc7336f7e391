"""``slablm compare`` as a user meets it: a table, a report, and a run that can be killed and continued."""

import contextlib
import io
import json
import re
import signal
import subprocess
import sys
import textwrap
from unittest import mock

import pytest

from slablm.cli import main
from slablm.compression import blocks

LAYERS = 14  # of the tiny model


def compare(*arguments):
    """Run the command in this process: (exit status, stdout, stderr)."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["slablm", "compare", *map(str, arguments)]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as stop,
    ):
        main()
    return stop.value.code, stdout.getvalue(), stderr.getvalue()


@pytest.fixture(scope="module")
def arguments(tiny_folder, text_file):
    """Model and options: dense, 3 × slab and wanda, 2 × rtn, on 4 windows."""
    return [
        *(tiny_folder, "--methods", "slab,wanda,rtn", "--ratios", "0.5, 0.7", "--patterns", "unstructured,2:4"),
        *("--bits", "4,8", "--group-size", 64, "--calibration", text_file, "--num-samples", 2, "--seq-len", 32),
        *("--text", "builtin", "--max-windows", 4),
    ]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """An uninterrupted run: (folder, stdout, stderr)."""
    out = tmp_path_factory.mktemp("compare") / "deep" / "out"
    status, stdout, stderr = compare(*arguments, "--out", out)
    assert status == 0, stderr
    return out, stdout, stderr


def lines(out):
    return (out / "results.jsonl").read_bytes().splitlines(keepends=True)


def table(stdout):
    """The table without the lines that name the folder."""
    return [line for line in stdout.splitlines() if not line.startswith("report:")]


def test_it_ends_with_a_table_of_every_cell(finished):
    out, stdout, _ = finished
    rows = [line.split() for line in stdout.splitlines() if re.search(r"\b(dense|slab|wanda|rtn)\s+0\.\d{3}", line)]
    names = [" ".join(row[: row.index(next(word for word in row if re.fullmatch(r"0\.\d{3}", word)))]) for row in rows]
    assert names == [
        "dense",
        *(f"{setting} {method}" for setting in ("50 % unstructured", "70 % unstructured", "50 % 2:4")
          for method in ("slab", "wanda")),
        "4 bit, group 64 rtn",
        "8 bit, group 64 rtn",
    ]  # fmt: skip
    for line, row in zip(lines(out), rows, strict=True):
        record = json.loads(line)
        for number in (f"{record['compression_ratio']:.3f}", f"{record['bits_per_weight']:.2f}"):
            assert number in row
        assert f"{record['texts']['builtin']['perplexity']:.1f}" in row
        assert f"{record['texts']['builtin']['ratio_to_dense']:.2f}" in row
    assert len([row for row in rows if "[" in " ".join(row)]) == 3  # wanda against slab, three times
    assert "Lowest perplexity among the pruners" in stdout


def test_it_writes_results_report_and_plots(finished):
    out, _, stderr = finished
    assert {path.name for path in out.iterdir()} == {"results.jsonl", "report.html", "plots"}
    assert {path.suffix for path in (out / "plots").iterdir()} == {".png", ".svg"}
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "slablm compare" in report
    assert "--num-samples 2" in report
    assert "4 of 32 tokens" in report
    assert "9 cells, 0 of them finished before" in stderr
    assert re.search(r"\[9/9\] rtn 8 bit, group 64: perplexity .* true bits per weight, ETA 0:00:00", stderr)


def test_running_it_again_computes_nothing(finished, arguments):
    out, stdout, _ = finished
    before = lines(out)
    with mock.patch.object(blocks, "compress_layer", side_effect=AssertionError("compressed again")):
        status, again, stderr = compare(*arguments, "--out", out)
    assert status == 0, stderr
    assert (lines(out), again) == (before, stdout)
    assert "9 cells, 9 of them finished before" in stderr


def test_json(finished, arguments):
    out, *_ = finished
    status, stdout, _ = compare(*arguments, "--out", out, "--json")
    assert status == 0
    result = json.loads(stdout)
    assert [row["method"] for row in result["rows"]] == [json.loads(line)["method"] for line in lines(out)]
    wanda = result["rows"][2]
    low, high = wanda["log_loss_difference"]["interval"]
    assert low < wanda["log_loss_difference"]["mean"] < high
    assert result["report"] == str(out / "report.html")


KILLED = """
    import os, signal, sys
    from slablm.compression import blocks

    compress_layer, calls = blocks.compress_layer, 0

    def killed_at_the_33rd_layer(*arguments):
        global calls
        calls += 1
        if calls == 33:
            os.kill(os.getpid(), signal.SIGKILL)
        return compress_layer(*arguments)

    blocks.compress_layer = killed_at_the_33rd_layer
    from slablm.cli import main
    main()
"""


def test_a_killed_run_is_continued(finished, arguments, tmp_path):
    out, stdout, _ = finished
    command = [sys.executable, "-c", textwrap.dedent(KILLED), "compare", *map(str, arguments), "--out", str(tmp_path)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = lines(tmp_path)
    # Dense and two cells of 14 layers; the third was at its fifth layer.
    assert [json.loads(line)["method"] for line in kept] == ["dense", "slab", "wanda"]
    # As if it had also been killed while writing.
    with (tmp_path / "results.jsonl").open("ab") as file:
        file.write(lines(out)[3][:200])

    with mock.patch.object(blocks, "compress_layer", wraps=blocks.compress_layer) as compress_layer:
        status, continued, stderr = compare(*arguments, "--out", tmp_path)
    assert status == 0, stderr
    assert "9 cells, 3 of them finished before" in stderr
    assert compress_layer.call_count == 6 * LAYERS
    assert lines(tmp_path)[:3] == kept
    assert len(lines(tmp_path)) == 9
    assert table(continued) == table(stdout)
    for ours, theirs in zip(map(json.loads, lines(tmp_path)), map(json.loads, lines(out)), strict=True):
        for result in (ours, theirs):
            del result["seconds"], result["peak_memory_bytes"]
        assert ours == theirs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "magic"], r"unknown method 'magic'"),
        (["--ratios", "0.5,half"], r"--ratios: 'half' is no number"),
        (["--bits", "4.5", "--methods", "rtn"], r"--bits: '4\.5' is no number"),
        (["--methods", ""], r"nothing to compare"),
        (["--patterns", "4:2"], r"pattern '4:2' keeps 4 of every 2"),
        (["--text", "nowhere.txt"], r"text file nowhere\.txt does not exist"),
        (["--task-file", "nowhere.jsonl"], r"task file nowhere\.jsonl cannot be read"),
        (["--targets", "nothing"], r"'nothing' matches no linear layer"),
        (["--text", "builtin"], r"two evaluation texts are called builtin"),
        (["--text", "builtin@9-3"], r"'builtin@9-3' names no window"),
        (["--development", "builtin@9"], r"evaluation on builtin and development on builtin@9-9 share windows"),
        (["--eval-seq-len", "4096"], r"seq_len 4096 is longer than the model's 128 positions"),
    ],
)
def test_bad_input_is_one_line(tiny_folder, text_file, tmp_path, options, message):
    out = tmp_path / "out"
    quick = ["--calibration", text_file, "--num-samples", 2, "--seq-len", 32, "--text", "builtin"]
    status, stdout, stderr = compare(tiny_folder, "--out", out, *quick, *options)
    assert (status, stdout) == (1, "")
    assert re.search(rf"slablm: error: .*{message}", stderr.strip().splitlines()[-1])
    assert not out.exists()


def test_a_compressed_model_is_refused(compressed_folder, tmp_path):
    status, _, stderr = compare(compressed_folder, "--out", tmp_path)
    assert status == 1
    assert "is already compressed by slablm: start from the dense model" in stderr


def test_missing_matplotlib_is_found_before_the_model_is_loaded(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, stderr = compare(tiny_folder, "--out", tmp_path)
    assert status == 1
    assert stderr == "slablm: error: plots need matplotlib: pip install 'slablm[report]'\n"


def test_help_is_instant():
    """No heavy import for ``--help``."""
    script = "import sys; from slablm.cli import app\ntry: app(['compare', '--help'])\nexcept SystemExit: pass\n"
    script += "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules), 'imported'"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--methods" in done.stdout
