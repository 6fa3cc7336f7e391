"""A model without its weights: from the headers of its files, or from its config.json alone.

Unlike `slablm.compression.streaming.open_dense`, nothing here reads a weight or downloads one: of a model on the
hub only the config and the tokenizer are fetched, its weights are looked at if they are on this machine already.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slablm.checkpoint.files import CONFIG
from slablm.checkpoint.shards import Piece
from slablm.dense import loading, sources
from slablm.dense.conversion import by_own_names
from slablm.dense.opening import empty_model, own_dtypes, why_whole
from slablm.errors import SlabError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Skeleton:
    """What is known of a model before its weights are read.

    Attributes:
        model: on the meta device.
        tokenizer: None if there is none.
        whole_because: why it cannot be streamed; empty if it can.
        file_bytes: bytes of its files.
        stored_itemsize: bytes of a weight in its files.
        notes: what is worth telling.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    whole_because: str
    file_bytes: int
    stored_itemsize: int
    notes: tuple[str, ...]


def open_skeleton(source: str, dtype: str, revision: str | None, *, trust_remote_code: bool) -> Skeleton:
    """Find a model's config, tokenizer and headers.

    Args:
        source: as for `slablm.dense.loading.load`; a folder may hold no weights.
        dtype: as for `slablm.dense.loading.load`.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run model code from the hub.

    Raises:
        SlabError: there is no config, or files are damaged or missing.
    """
    from transformers import AutoConfig

    loading.check_dense(source)
    where, gguf = loading.locate(source)
    if Path(where).is_dir() and not gguf and not (Path(where) / CONFIG).is_file():
        raise SlabError(f"{where} holds no {CONFIG}: it is no model folder")
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    wanted = loading.wanted_dtype(dtype, bool(gguf))
    files, weights = _headers(where, gguf, revision)
    with loading.explained(source):
        config = AutoConfig.from_pretrained(where, **options, **gguf)
        if getattr(config, "quantization_config", None) is not None and not gguf:
            raise SlabError("the model is already quantized: start from the unquantized model")
        if wanted == "auto":
            wanted = next(iter(own_dtypes(config, weights)), torch.float32)
        model = empty_model(config, wanted, trust_remote_code=trust_remote_code)
        model.config.name_or_path = where
    weights = by_own_names(model, weights)
    notes = []
    if not files:
        notes.append("no weights here: shapes come from config.json alone")
    tokenizer = _tokenizer(where, options | gguf)
    if tokenizer is None:
        notes.append("no tokenizer here: its memory and its files are not counted")
    whole = "GGUF files are read as a whole" if gguf else why_whole(model, weights) if weights else ""
    itemsize = max((p.meta().dtype.itemsize for p in weights.values()), default=wanted.itemsize)
    return Skeleton(model, tokenizer, whole, sum(f.stat().st_size for f in files), itemsize, tuple(notes))


def _headers(where: str, gguf: dict[str, Any], revision: str | None) -> tuple[list[Path], dict[str, Piece]]:
    if gguf:
        return [Path(where, gguf["gguf_file"])], {}
    try:
        with _offline(where):
            files = sources.model_files(where, revision)
            return files, sources.open_weights(files, where, revision) if files else {}
    except SlabError as error:
        if not loading.hub_problem(where, error):
            raise
        return [], {}  # not downloaded before


@contextmanager
def _offline(where: str) -> Iterator[None]:
    """Within it, nothing of a hub model is downloaded."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _tokenizer(where: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(where, **options)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError):  # transformers' ways to say no
        return None
