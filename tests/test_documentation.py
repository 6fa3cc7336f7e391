"""What README and site tell people to type: every command exists with every option, and what can run here, runs."""

import io
import re
import shlex
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
import typer
from markdown_it import MarkdownIt
from transformers import LlamaForCausalLM

from slablm.cli import app
from slablm.methods import METHODS
from tests.cli.test_cli import slablm
from tests.conftest import tiny_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN_WORDS = re.compile(r"^[A-Z_]+=")
# Programs of others, which are not looked into.
OTHERS = {"cat", "curl", "export", "hf", "lm_eval", "transformers", "vllm"}
# What a verb is given on top, so that it takes a second on a model of one block.
CALIBRATED = ("--num-samples", 4, "--seq-len", 32, "--iterations", 2)
EXTRA = {
    "compress": CALIBRATED,
    "plan": CALIBRATED,
    "eval": ("--max-windows", 1, "--seq-len", 32),
    "generate": ("--max-new-tokens", 2),
    "export": (),
    "inspect": (),
    "doctor": (),
    "compare": (*CALIBRATED[:4], "--ratios", 0.5, "--patterns", "unstructured", "--max-windows", 2),
}
# These need what a test has not: a hub, texts of many windows, a tokenizer that GGUF has a name for. The verbs that are
# not above need a terminal, llama.cpp or other programs that talk to them.
NOT_HERE = {"--tasks", "--development", "--push-to-hub", "gguf"}
# Names that pages use for the same.
SAME = dict.fromkeys(("meta-llama/Llama-3.2-1B", "smollm2"), "MODEL") | {"out": "OUT", "[OUT]": "OUT"}
TEXTS = {"c4", "wikitext2", "builtin", "self"}


def blocks(page, language):
    """The code blocks of a page that are in this language, whatever they are part of."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    return [token.content for token in tokens if token.type == "fence" and token.info == language]


def commands(page):
    """Every command of a page's shell blocks, as words, without variables in front and what is left out."""
    found = []
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = [word for word in shlex.split(line, comments=True) if word not in ("...", "…")]
            while words:
                end = words.index("|") if "|" in words else len(words)
                command, words = words[:end], words[end + 1 :]
                while OWN_WORDS.match(command[0]):
                    del command[0]
                found.append(command)
    return found


def ours(command):
    """The words behind ``slablm``, in a command of ours; else None."""
    if command[0] == "slablm":
        return command[1:]
    return command[command.index("slablm") + 1 :] if command[0] == "torchrun" else None


ALL = [(page, command) for page in PAGES for command in commands(page)]


def test_there_are_commands_to_look_at():
    assert len(ALL) > 40
    assert ["slablm", "chat", "out"] in [command for _, command in ALL]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_option_of_ours_exists(page):
    group = typer.main.get_command(app)
    for command in filter(None, map(ours, commands(page))):
        with group.make_context("slablm", list(command[:1]), resilient_parsing=True) as context:
            name, verb, _ = group.resolve_command(context, command)
            verb.make_context(name, command[1:], parent=context)  # exits, naming it, where there is no such option


def test_an_option_that_is_not_there_is_found():
    group = typer.main.get_command(app)
    with pytest.raises(Exception, match="No such option.*--bits-per-wait"):
        group.commands["compress"].make_context("compress", ["MODEL", "OUT", "--bits-per-wait", "4"])


def test_what_else_is_called_exists():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    for page, command in ALL:
        program, *rest = command
        if program == "make":
            assert set(rest) <= set(targets), f"{page.name}: {command}"
        elif program == "pip":
            wanted = re.search(r"\[(\w+)\]", rest[-1])
            assert rest[0] == "install", page.name
            assert wanted is None or wanted[1] in extras, f"{page.name}: {command}"
        elif program == "python":
            file = ROOT / (rest[1].replace(".", "/") + ".py" if rest[0] == "-m" else rest[0])
            source = file.read_text(encoding="utf-8")
            assert all(word in source for word in rest if word.startswith("--")), f"{page.name}: {command}"
        else:
            assert ours(command) is not None or program in OTHERS, f"{page.name}: {command}"


@pytest.fixture(scope="module")
def dense(tokenizer, tmp_path_factory):
    """A random Llama of one block, with a chat template."""
    folder = tmp_path_factory.mktemp("documentation") / "dense"
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(num_hidden_layers=1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return folder


@pytest.fixture(scope="module")
def compressed(dense, text_file):
    """That model, compressed."""
    out = dense.with_name("compressed")
    assert slablm("compress", dense, out, "--calibration", text_file, *CALIBRATED).returncode == 0
    return out


def runnable():
    """Every command that can run here, once."""
    found = {}
    for page, command in ALL:
        words = command[1:] if command[0] == "slablm" else []
        if words and words[0] in EXTRA and not NOT_HERE & set(words):
            found.setdefault(tuple(SAME.get(word, word) for word in words), page.stem)
    return [pytest.param(words, id=f"{page}: {' '.join(words)}") for words, page in found.items()]


@pytest.mark.parametrize("words", runnable())
def test_commands_run(words, dense, compressed, text_file, tmp_path, monkeypatch):
    """Models, texts and folders replaced by those at hand, and sizes by small ones."""
    verb, *rest = words
    made = tmp_path / "made"
    folders = {"OUT": made if verb in ("compress", "plan") else compressed, "DIR": made}
    rest = [dense if word == "MODEL" else folders.get(word, word) for word in rest]
    rest = [text_file if str(word).partition("@")[0] in TEXTS or str(word).endswith(".txt") else word for word in rest]
    if verb in ("compress", "plan", "compare"):
        rest += ["--calibration", f"{text_file}@0-99"]
    if verb == "compare":
        rest += ["--text", f"{text_file}@100-110"]
    monkeypatch.chdir(tmp_path)
    Path("questions.jsonl").write_text('{"query": "The sea is", "choices": [" wet", " dry"], "gold": 0}\n')
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"What is the sea?")))
    done = slablm(verb, *rest, *(EXTRA[verb] if "--task-file" not in rest else ()))
    assert done.returncode == 0, done.stderr
    assert made.exists() == (verb in ("compress", "export", "compare"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_python_runs(page, dense, compressed, tmp_path, monkeypatch):
    """The blocks of a page one after the other, on the tiny model."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(compressed, "out" if page.stem == "start" else "OUT")
    names = {}
    with mock.patch.dict(METHODS):
        for block in blocks(page, "python"):
            if ", ...}" in block:
                continue  # a device map that leaves something out
            code = block.replace('"smollm2"', repr(str(dense)))
            code = code.replace("num_samples=8, seq_len=256", "num_samples=3, seq_len=32")
            exec(compile(code, page.name, "exec"), names)
