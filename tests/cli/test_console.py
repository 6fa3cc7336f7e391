"""Names out of paths and files are shown as they are, and never steer the terminal."""

import contextlib
import functools
import io
import json
import re
import shlex
import shutil

import pytest
from rich.console import Console

from slablm.checkpoint import integrity
from slablm.checkpoint.config_file import config_digest
from slablm.checkpoint.description import Description
from slablm.checkpoint.guard import FORMAT_VERSION
from slablm.checkpoint.shards import open_all, write_tensors
from slablm.cli import console
from tests.cli.test_cli import refused, slablm

HOSTILE = "[/x]\x1b[31m"
SHOWN = r"[/x]\x1b[31m"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HOSTILE, SHOWN),
        ("a\nb\tc\r\x07\x9b", r"a\nb\tc\r\x07\x9b"),
        ("exe.\u202etxt \u2028 \udcff", r"exe.\u202etxt \u2028 \udcff"),
        ("Größe 4×4 → 👩\u200d💻 :smile:", "Größe 4×4 → 👩\u200d💻 :smile:"),
    ],
)
def test_printable(text, shown):
    assert console.printable(text) == shown
    assert console.printable("a\n\x1b", keep="\n") == "a\n\\x1b"


def test_a_folder_with_brackets_in_its_name(tiny_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    source, out = tmp_path / "[v1]" / "m", tmp_path / "[v1]" / ":smile:"
    shutil.copytree(tiny_folder, source)
    done = slablm(
        "compress", source, out, "--calibration", text_file, "--num-samples", 2, "--seq-len", 16, "--method", "wanda"
    )
    assert done.returncode == 0, done.stderr
    assert f"Reading {source}\n" in done.stderr
    assert f"written to{' ' * 18}{out}\n" in done.stdout


def test_a_layer_with_a_hostile_name(compressed_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out"
    shutil.copytree(compressed_folder, out)
    old, new = "model.layers.0.mlp.up_proj", f"model.layers.0.mlp.{HOSTILE}"
    config = json.loads((out / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    modules[new] = modules.pop(old)
    (out / "config.json").write_text(json.dumps(config))
    known = Description.from_json(modules, "float16", FORMAT_VERSION)
    pieces = {name.replace(old, new): piece for name, piece in open_all([out / "model.safetensors"]).items()}
    digests = {name: integrity.digest(piece.read()) for name, piece in pieces.items()}
    metadata = integrity.sealed(integrity.record(digests), known.digest, config_digest(config))
    write_tensors(tmp_path / "renamed", pieces, {"format": "pt", **metadata})
    (tmp_path / "renamed").replace(out / "model.safetensors")
    done = slablm("inspect", out)
    assert done.returncode == 0, done.stderr
    assert f" model.layers.0.mlp.{SHOWN} " in done.stdout
    assert "\x1b" not in done.stdout


def test_error_lines():
    done = slablm("inspect", f"/nowhere\n/{HOSTILE}")
    refused(done, "is no model folder")
    assert done.stderr.count("\n") == 1
    assert rf"/nowhere\n/{SHOWN}/config.json does not exist" in done.stderr


def test_progress_and_tables_take_text_for_text(monkeypatch):
    terminal, stdout = io.StringIO(), io.StringIO()
    monkeypatch.setattr(console, "log", Console(file=terminal, force_terminal=True, width=200))
    with console.progress(HOSTILE) as step:
        step(1, 1)
    with contextlib.redirect_stdout(stdout):
        console.print_table("[/x]", ("a\nb", HOSTILE), [("[/x]", HOSTILE)])
    assert SHOWN in terminal.getvalue()
    assert stdout.getvalue().count(SHOWN) == 2
    assert "\x1b" not in stdout.getvalue()


def test_without_a_terminal_progress_is_a_line_each_tenth(monkeypatch):
    """And none about what is done at once, as nobody waits for it."""
    file, now = io.StringIO(), [0.0]
    monkeypatch.setattr(console, "log", Console(file=file, width=200))
    clocked = functools.partial(console.Tenths, clock=lambda: now[0])
    monkeypatch.setattr(console, "Tenths", clocked)
    with console.progress("Compressing") as step:
        for done in range(1, 201):
            now[0] += 1.0
            step(done, 200, "report")
        step.describe("Saving")
        for done in range(1, 201):
            now[0] += 0.005
            step(done, 200)
    lines = file.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0] == "Compressing: 10 % after 0:00:20, about 0:03:00 left"
    assert lines[-1] == "Compressing: 100 % after 0:03:20"


def test_a_verb_ends_with_what_can_be_typed_next(compressed_folder, tiny_folder, text_file, tmp_path, monkeypatch):
    """On a terminal; and what is typed then works."""

    def following(*arguments):
        shown = io.StringIO()
        monkeypatch.setattr(console, "log", Console(file=shown, force_terminal=True, highlight=False, width=500))
        done = slablm(*arguments)
        assert done.returncode == 0, done.stderr + shown.getvalue()
        # A bar may stand in front.
        return re.findall(r"next: (?:slablm )?(.*)$", shown.getvalue(), re.MULTILINE)

    text = ["--calibration", str(text_file), "--num-samples", "4", "--seq-len", "32", "--method", "wanda"]
    (command,) = following("plan", tiny_folder, *text)
    assert shlex.split(command) == ["compress", str(tiny_folder), *text, "out"]
    for ranks in (["--ranks", "2"], ["--ranks=2"]):
        (several,) = following("plan", tiny_folder, *ranks, *text)
        assert several == f"torchrun --standalone --nproc-per-node 2 -m slablm {command}"
    monkeypatch.chdir(tmp_path)
    commands = following(*shlex.split(command))
    assert commands == ["inspect out", "generate out 'The capital of France is'"]
    assert following(*shlex.split(commands[0])) == ["eval out", commands[1]]
    assert following(*shlex.split(commands[1]), "--max-new-tokens", 2) == ["serve out"]
    (tmp_path / "out" / "chat_template.jinja").write_text("{{ messages }}")
    assert following("inspect", "out")[-1] == "chat out"
    assert following("eval", tiny_folder, "--text", text_file, "--seq-len", 32, "--max-windows", 1) == [
        f"compress {tiny_folder} OUT"
    ]
    assert following("export", compressed_folder, tmp_path / "dense") == [f"eval {tmp_path / 'dense'}"]
    assert following("doctor") == ["demo"]
