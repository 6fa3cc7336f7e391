"""Where text comes from: a file, a hub data set or one of two sources that need no network.

- ``builtin``: the English reference text that ships with CPython (`pydoc_data.topics`). The first 4/5 calibrate, the
  last 1/5 is for evaluation, so that the two never overlap.
- ``self``: text sampled from the model itself (`slablm.calibration.windows.sample_windows`).

A file may hold conversations instead of text (``chat:FILE``): see `slablm.calibration.chat`.

All text of a source is joined with blank lines, as the pruning literature does it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slablm.config import Excerpt
from slablm.errors import SlabError

BUILTIN_CALIBRATION_SHARE = 0.8
# Characters read per wanted token from a streamed data set; English needs 4 to 5.
CHARACTERS_PER_TOKEN = 8


def load_text(source: str, *, split: str, num_tokens: int | None = None) -> str:
    """Read a text source.

    Args:
        source: ``c4``, ``wikitext2``, ``builtin``, a file path, or ``chat:`` and one.
        split: ``"calibration"`` or ``"evaluation"``.
        num_tokens: about how many tokens are wanted (streams stop there); None for all.

    Raises:
        SlabError: the file is missing, empty or no text, or the hub cannot be reached.
    """
    if source == "builtin":
        return _builtin_text(split)
    if source in ("c4", "wikitext2"):
        return _hub_text(source, split, num_tokens)
    return _file_text(Excerpt(source).file)


def _builtin_text(split: str) -> str:
    # CPython's own documentation: plain English, present wherever Python is.
    from pydoc_data.topics import topics

    pages = [topics[name] for name in sorted(topics)]
    cut = round(len(pages) * BUILTIN_CALIBRATION_SHARE)
    return "\n\n".join(pages[:cut] if split == "calibration" else pages[cut:])


def _file_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = "c4, wikitext2, self, builtin, chat:FILE"
        raise SlabError(f"text file {path} does not exist (known sources besides files: {known})") from None
    except (UnicodeDecodeError, IsADirectoryError, PermissionError) as error:
        raise SlabError(f"text file {path} cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise SlabError(f"text file {path} is empty")
    return text


def _hub_text(source: str, split: str, num_tokens: int | None) -> str:
    """C4 or WikiText-2 as the pruning literature reads them, streamed from the hub."""
    from datasets import load_dataset

    try:
        if source == "wikitext2":
            name = "train" if split == "calibration" else "test"
            rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=name)
            return "\n\n".join(row["text"] for row in rows)
        name = "train" if split == "calibration" else "validation"
        stream = load_dataset("allenai/c4", "en", split=name, streaming=True)
        return _take(stream, num_tokens)
    except Exception as error:
        # datasets, huggingface_hub, httpx and fsspec each have their own idea of "no network".
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        way_out = "--text builtin or a text file"
        if split == "calibration":
            way_out = "--calibration builtin (or self, or a text file)"
        raise SlabError(
            f"text source {source!r} needs the Hugging Face hub, which failed ({reason}): without it use {way_out}"
        ) from error


def _take(stream: Any, num_tokens: int | None) -> str:
    """The first documents of a stream, about `num_tokens` tokens' worth."""
    limit = None if num_tokens is None else num_tokens * CHARACTERS_PER_TOKEN
    documents: list[str] = []
    length = 0
    for row in stream:
        documents.append(row["text"])
        length += len(row["text"])
        if limit is not None and length >= limit:
            break
    return "\n\n".join(documents)
