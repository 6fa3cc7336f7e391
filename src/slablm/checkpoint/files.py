"""Which files hold a model's weights: one, or several that an index names.

The names in an index are whatever its writer put there. Only a file that lies in the model's own folder is meant, so a
name with a separator in it is refused before anything is opened.

A *variant* is transformers' word for a second set of weights in one folder: ``model.fp16.safetensors``,
``model.fp16-00001-of-00002.safetensors`` and ``model.safetensors.index.fp16.json`` belong to variant ``fp16``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from glob import escape
from pathlib import Path
from typing import Any

from slablm.errors import SlabError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WAY_OUT = "download or compress it again"
_DOWNLOAD = "download the model again"
_SEPARATORS = frozenset("/\\:\0")
_LONGEST_NAME = 255


def with_variant(name: str, variant: str | None) -> str:
    """The name that transformers gives a file of a variant."""
    stem, _, suffix = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{suffix}"


def weights_in(folder: Path, variant: str | None = None) -> Iterator[Path]:
    """All files of a variant's weights that lie in a folder, index included, whether they belong together or not."""
    shards = escape(with_variant(SINGLE, variant).removesuffix(".safetensors")) + "-*-of-*.safetensors"
    for pattern in (escape(with_variant(SINGLE, variant)), escape(with_variant(INDEX, variant)), shards):
        yield from folder.glob(pattern)


def variant_of(name: str) -> str | None:
    """The variant that a safetensors file belongs to, by its name."""
    middle = name.removeprefix("model").removesuffix(".safetensors")
    middle = re.sub(r"-\d{5}-of-\d{5}$", "", middle)
    return middle.removeprefix(".") or None


def variants_in(folder: Path) -> list[str]:
    """Names of the variants in a folder, the one without a name left out."""
    single, index = SINGLE.removesuffix(".safetensors"), INDEX.removesuffix(".json")
    names = {path.name[len(single) + 1 : -len(".safetensors")] for path in folder.glob(f"{single}.*.safetensors")}
    names |= {path.name[len(index) + 1 : -len(".json")] for path in folder.glob(f"{index}.*.json")}
    return sorted(name for name in names if "-of-" not in name)


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a model folder: those that transformers reads.

    Args:
        folder: the model.
        variant: of its weights.

    Raises:
        SlabError: there are none, the index is damaged or names a file that is not there.
    """
    single, index = (folder / with_variant(name, variant) for name in (SINGLE, INDEX))
    if single.is_file():
        return [single]
    if index.is_file():
        return [folder / name for name in sorted(set(read_index(index).values()))]
    other = ", ".join(variants_in(folder))
    hint = f": its variants are {other}" if other else ""
    raise SlabError(f"{folder} holds no safetensors files{f' of variant {variant!r}' if variant else ''}{hint}")


def read_index(path: Path) -> dict[str, str]:
    """The ``weight_map`` of an index: tensor name → file name.

    Raises:
        SlabError: it is damaged, or names what cannot be a file of its folder.
    """
    index = read_json(path, _DOWNLOAD)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SlabError(f"{path} is damaged (no weight_map): {_DOWNLOAD}")
    for tensor, name in weight_map.items():
        if not _is_file_name(name):
            raise SlabError(
                f"{path} names {name!r} for tensor {tensor!r}, which is no file of its own folder: {_DOWNLOAD}"
            )
    return weight_map


def check_index(path: Path, inside: Mapping[str, frozenset[str]]) -> None:
    """Refuse an index that says something else than the files it names.

    Args:
        path: the index.
        inside: names of the tensors in each file, by file name.

    Raises:
        SlabError: naming the tensor.
    """
    weight_map = read_index(path)
    if not isinstance(read_json(path).get("metadata"), dict):  # transformers cannot do without
        raise SlabError(f"{path} is damaged (no metadata): {WAY_OUT}")
    for tensor, name in weight_map.items():
        if tensor not in inside.get(name, ()):
            raise SlabError(f"{path} names tensor {tensor!r}, which {name} lacks: {WAY_OUT}")
    for name, tensors in inside.items():
        if unknown := sorted(tensors - weight_map.keys()):
            raise SlabError(f"{path} does not name tensor {unknown[0]!r}, which {name} holds: {WAY_OUT}")


def read_json(path: Path, way_out: str = WAY_OUT) -> dict[str, Any]:
    """A file that holds a JSON object.

    Raises:
        SlabError: it cannot be read, or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SlabError(f"{path} is damaged ({reason}): {way_out}") from error
    if not isinstance(data, dict):
        raise SlabError(f"{path} is damaged (it holds no JSON object): {way_out}")
    return data


def _is_file_name(name: Any) -> bool:
    if not isinstance(name, str) or name in {"", ".", ".."} or not _SEPARATORS.isdisjoint(name):
        return False
    try:
        return len(name.encode()) <= _LONGEST_NAME
    except UnicodeEncodeError:  # half a surrogate pair
        return False
