"""What is typed arrives in the settings under its own name."""

import inspect
import subprocess
import sys
from dataclasses import fields
from unittest import mock

import pytest

from slablm import CompressionConfig, cli
from slablm.cli import options
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
    "eval": "MODEL",
    "export": "OUT DIR",
    "generate": "MODEL [PROMPT]",
    "inspect": "OUT",
    "plan": "MODEL [OUT]",
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
