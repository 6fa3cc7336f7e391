"""Tiny dense models, what the Python API makes of them, and runs that stop in the middle."""

import torch

from slablm.api import compress_model
from slablm.calibration.windows import calibration_windows
from slablm.checkpoint import save
from slablm.checkpoint.card import model_card
from slablm.checkpoint.inspection import inspect_folder
from slablm.compression import blocks
from slablm.dense import loading
from slablm.dense.targets import select_targets
from tests.compression.test_architectures import FAMILIES, SMALL
from tests.conftest import byte_tokenizer

# What a run notes beside its result, and a model that was in memory has nothing to say about.
NOTE = {save.RUN}


def in_memory(source, out, config, dtype="auto", max_shard_size="50GB"):
    """What the Python API writes: the truth here."""
    model, tokenizer = loading.load(str(source), dtype=dtype)
    targets = select_targets(model, config)
    reports = compress_model(model, targets, calibration_windows(model, tokenizer, config), config)
    described = model.config.quantization_config
    left_dense = targets.left_dense | blocks.unreached(targets, reports)
    with save.staged(out) as folder:
        save._write_model(model, folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
        bits = inspect_folder(folder).model_bits_per_weight
        card = model_card(
            str(source), described.compression, reports, left_dense, drift=described.drift, model_bits=bits
        )
        (folder / "README.md").write_text(card, encoding="utf-8")


def assert_same_folders(a, b, besides=()):
    names = sorted(path.name for path in a.iterdir() if path.name not in besides)
    assert names == sorted(path.name for path in b.iterdir())
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def build(folder, family, **save_options):
    """A tiny model of a family; one called headless is saved without its head, so that it is read as a whole."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, _, headless = family.partition(" ")
    torch.manual_seed(0)
    sizes = SMALL | {"vocab_size": 258} | FAMILIES[family]
    config = AutoConfig.for_model(family.removesuffix("-tied"), **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=save_options.pop("dtype", torch.float32))
    (model.base_model if headless else model).save_pretrained(folder, **save_options)
    byte_tokenizer().save_pretrained(folder)
    return folder


class Stop(Exception):  # noqa: N818
    """The run is over here."""


def stop_after(layers):
    def on_layer(done, total, report):
        if done == layers:
            raise Stop

    return on_layer


def unfinished(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
