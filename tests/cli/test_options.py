"""What is typed arrives in the settings under its own name."""

from unittest import mock

import pytest

from slablm import CompressionConfig
from tests.cli.test_cli import slablm

SHARED = {
    "calibration": "builtin",
    "num_samples": 3,
    "seq_len": 5,
    "targets": ("q_proj", "k_proj"),
    "ignore": ("re:.*0.*", "k_proj"),
}
SETTINGS = SHARED | {"method": "wanda", "ratio": 0.3, "pattern": "2:4", "rank": 2, "iterations": 7, "group_size": 32}
SETTINGS |= {"value_dtype": "bfloat16"}
FEW_BITS = {"method": "slab+", "bits_per_weight": 4.5, "magnitude_bits": 3}
SEED = {"seed": 4}
VERBS = {
    "compress": ("slablm.cli.compress.run", "model", "out"),
    "plan": ("slablm.planning.plan.plan", "model"),
    "compare": ("slablm.cli.compare.run", "model", "--out", "out"),
}


@pytest.mark.parametrize(
    ("verb", "settings"),
    [(verb, {}) for verb in VERBS]
    + [("compress", SETTINGS | SEED), ("plan", SETTINGS), ("compare", SHARED | SEED)]
    + [("compress", FEW_BITS), ("plan", FEW_BITS), ("compress", {"refine": True})],
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
