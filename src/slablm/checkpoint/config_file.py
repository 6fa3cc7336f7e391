"""`config.json` of a compressed folder: what is read from it, and its digest.

The digest covers all of it but three entries that say nothing about the model (`VOLATILE`): an edited or damaged
`num_attention_heads` would give a model that loads and answers wrongly. It is taken of the parsed content, so layout
and line ends do not matter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slablm.checkpoint.files import CONFIG, read_json
from slablm.checkpoint.guard import GUARD, QUANT_METHOD
from slablm.errors import SlabError

# Written by whoever saved last: where the model came from, by which transformers, and the guard for other readers.
VOLATILE = ("_name_or_path", "transformers_version", "transformers_weights")


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a slablm folder.

    Raises:
        SlabError: the folder or file is missing or broken, it is not a slablm checkpoint, or it sends readers to
            other weights than its own.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise SlabError(f"{path} does not exist: {folder} is no model folder")
    config = read_json(path)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise SlabError(f"{folder} is not a slablm checkpoint (no quant_method {QUANT_METHOD!r} in {CONFIG})")
    guard = config.get("transformers_weights")
    if guard is not None and guard != GUARD:
        raise SlabError(f"{path} is damaged (transformers_weights is not what slablm writes): compress it again")
    return config


def read_quantization_config(folder: Path) -> dict[str, Any]:
    """``quantization_config`` of a slablm folder.

    Raises:
        SlabError: see `read_config`.
    """
    quantization: dict[str, Any] = read_config(folder)["quantization_config"]
    return quantization


def config_digest(config: Mapping[str, Any]) -> str:
    """Digest of the content of `config.json`, `VOLATILE` left out."""
    return json_digest({key: value for key, value in config.items() if key not in VOLATILE})


def json_digest(data: Any) -> str:
    """BLAKE2b-64 over the canonical form of JSON data: keys in order, no spaces, ASCII; 16 hexadecimal digits."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(text.encode("ascii"), digest_size=8).hexdigest()
