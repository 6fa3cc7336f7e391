"""What is typed arrives in the settings under its own name."""

import inspect
import re
import subprocess
import sys
from dataclasses import fields
from unittest import mock

import pytest
from typer.models import OptionInfo

from slablm import CompressionConfig, cli
from slablm.cli import options
from slablm.config import CALIBRATION_SOURCES
from slablm.methods import METHODS
from tests.cli.test_cli import slablm

SHARED = {
    "calibration": "builtin",
    "num_samples": 3,
    "seq_len": 5,
    "targets": ("q_proj", "k_proj"),
    "ignore": ("re:.*0.*", "k_proj"),
}
SETTINGS = SHARED | {"method": "wanda", "ratio": 0.3, "pattern": "2:4", "rank": 2, "iterations": 7}
SETTINGS |= {"value_dtype": "bfloat16"}
SYMBOLS = {"method": "slab+", "bits_per_weight": 4.5, "head_bits": 8}
SEED = {"seed": 4}
VERBS = {
    "compress": ("slablm.cli.compress.run", "model", "out"),
    "plan": ("slablm.planning.plan.plan", "model"),
    "compare": ("slablm.cli.compare.run", "model", "--out", "out"),
}


USAGE = {
    "bench": "MODEL",
    "chat": "MODEL",
    "compare": "MODEL",
    "compress": "MODEL OUT",
    "demo": "[MODEL]",
    "eval": "MODEL",
    "export": "OUT DIR",
    "generate": "MODEL [PROMPT]",
    "inspect": "OUT",
    "plan": "MODEL [OUT]",
    "push": "OUT USER/NAME",
    "serve": "MODEL",
    "doctor": "",
}


@pytest.mark.parametrize("verb", cli.VERBS)
def test_usage_names_the_arguments_as_the_text_does(verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    done = slablm(verb, "--help")
    assert done.returncode == 0
    usage = done.stdout.splitlines()[1].strip()  # with the name of this process
    assert usage.endswith(f" {verb} [OPTIONS] {USAGE[verb]}".rstrip())


@pytest.mark.parametrize("verb", ["compress", "plan"])
def test_options_are_declared_once(verb):
    """The verbs that share options have them all, under the names and with the defaults of the declaration."""
    signature = inspect.signature(cli.VERBS[verb]).parameters
    for group in (options.Settings, options.Source):
        for field in fields(group):
            assert signature[field.name].default == field.default


def test_methods_and_texts_are_those_that_there_are():
    """Help and completion name them without loading what reads them."""
    assert set(options.METHODS) == {name for name, method in METHODS.items() if method.packable}
    (calibration,) = (part for part in options.Calibration.__metadata__ if isinstance(part, OptionInfo))
    assert set(calibration.autocompletion()) == set(CALIBRATION_SOURCES)


def test_every_option_of_compress_has_its_heading(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = slablm("compress", "--help").stdout
    panels = re.split(r"╭─ ([^─]+?) ─+╮", text)[1:]
    under = {
        name: set(re.findall(r"^│ +(?:\* +)?(--[\w-]+)", body, re.M))
        for name, body in zip(panels[::2], panels[1::2], strict=True)
    }
    assert {"--help"} == under.pop("Options")
    assert set(under) == {"Arguments", *options.PANELS}
    named = {f"--{name.replace('_', '-')}" for names in options.PANELS.values() for name in names}
    assert set().union(*under.values()) == named
    assert "(default: 4)" in " ".join(text.split())  # no markup of rich


def test_a_shell_completes_verbs_and_methods(monkeypatch):
    def completed(line):
        words = line.split(" ")
        monkeypatch.setenv("_SLABLM_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        return slablm().stdout.split()

    assert completed("slablm com") == ["compress", "compare"]
    assert completed("slablm compress M OUT --method wa") == ["wanda"]
    assert completed("slablm compare M --calibration b") == ["builtin"]


def test_quick_is_other_defaults_and_no_more(tmp_path):
    with mock.patch("slablm.cli.compress.run", side_effect=SystemExit) as called:
        slablm("compress", "model", tmp_path / "out", "--quick")
        slablm("compress", "model", tmp_path / "out", "--quick", "--seq-len", 2048, "--calibration", "c4")
    plain, told = (call.args[2] for call in called.call_args_list)
    assert plain == CompressionConfig(**options.QUICK)
    assert told == CompressionConfig(num_samples=options.QUICK["num_samples"])


def test_help_loads_no_torch():
    code = "import sys, slablm.cli; sys.argv[1:] = ['compress', '--help']; sys.exit(slablm.cli.main())"
    probe = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); {code}"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "False\n")


@pytest.mark.parametrize(
    ("verb", "settings"),
    [(verb, {}) for verb in VERBS]
    + [("compress", SETTINGS | SEED), ("plan", SETTINGS), ("compare", SHARED | SEED)]
    + [("compress", SYMBOLS), ("plan", SYMBOLS)],
)
def test_settings(verb, settings):
    function, *arguments = VERBS[verb]
    for name, value in settings.items():
        option = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, tuple) else [value]:
            arguments += [option] if one is True else [option, one]
    with mock.patch(function, side_effect=SystemExit) as called:
        slablm(verb, *arguments)
    assert CompressionConfig(**settings) in called.call_args.args
