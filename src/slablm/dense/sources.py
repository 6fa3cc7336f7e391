"""Where a dense model's tensors are: its safetensors files, one or sharded, by their headers alone.

What cannot be streamed (GGUF and pickle files, adapters, names that transformers changes while it loads) is no error
here: such a model is read as a whole, by transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slablm.checkpoint.files import CONFIG, INDEX, SINGLE, read_index
from slablm.checkpoint.shards import Piece, TensorFile
from slablm.dense.loading import explained
from slablm.errors import SlabError

_ADAPTER = "adapter_config.json"


def model_files(source: str, revision: str | None) -> list[Path]:
    """The safetensors files of a model, downloaded if need be; empty if it has none.

    Args:
        source: hub id or local folder.
        revision: branch, tag or commit on the hub.

    Raises:
        SlabError: the index is damaged, or a file that it names is not there.
    """
    if _find(source, _ADAPTER, revision) is not None:
        return []
    single = _find(source, SINGLE, revision)
    if single is not None:
        return [single]
    index = _find(source, INDEX, revision)
    if index is None:
        return []
    files = []
    for name in sorted(set(read_index(index).values())):
        file = _find(source, name, revision)
        if file is None:
            raise SlabError(f"{index} names {name}, which is missing: download the model again")
        files.append(file)
    return files


def open_weights(files: list[Path], source: str, revision: str | None) -> dict[str, Piece]:
    """All tensors of a model by name.

    Args:
        files: from `model_files`.
        source: hub id or local folder.
        revision: branch, tag or commit on the hub.

    Raises:
        SlabError: a file is truncated or damaged, or does not hold what the index says.
    """
    opened = {file.name: TensorFile.open(file).pieces for file in files}
    index = _find(source, INDEX, revision) if SINGLE not in opened else None
    if index is not None:
        for name, file_name in read_index(index).items():
            if name not in opened[file_name]:
                raise SlabError(f"{index} names tensor {name!r}, which {file_name} lacks: download the model again")
    return {name: piece for pieces in opened.values() for name, piece in pieces.items()}


def other_file_name(source: str) -> bool:
    """Whether the config of a local model sends transformers to weights under another name."""
    path = Path(source) / CONFIG
    if not path.is_file():
        return False
    config: Any = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(config, dict) and config.get("transformers_weights") is not None


def _find(source: str, name: str, revision: str | None) -> Path | None:
    """A file of a model, downloaded if need be; None if the model has no such file.

    Raises:
        SlabError: the hub does not let us know.
    """
    from transformers.utils.hub import cached_file

    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.exists() else None
    try:
        with explained(source):
            found = cached_file(source, name, revision=revision)
    except SlabError as error:
        # What transformers says by itself is that there is no such file; all else has a cause.
        said = error.__cause__
        missing = type(said) is OSError and said.__cause__ is None and said.errno is None
        if missing or (name in (_ADAPTER, SINGLE, INDEX) and _cached(source, revision)):
            return None
        raise
    return None if found is None else Path(found)


def _cached(source: str, revision: str | None) -> bool:
    """Whether the hub's cache holds weights of a model: then what is not beside them does not exist."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(source, CONFIG, revision=revision)
    except ValueError:  # no possible name of a model
        return False
    return isinstance(config, str) and any(
        path.suffix in {".safetensors", ".bin"} for path in Path(config).parent.iterdir()
    )
