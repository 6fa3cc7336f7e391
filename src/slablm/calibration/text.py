"""Text → token windows.

A source is a file, a hub data set or one of two that need no network:

- ``builtin``: the English reference text that ships with CPython (`pydoc_data.topics`). The first 4/5 calibrate, the
  last 1/5 is for evaluation, so that the two never overlap.
- ``self``: text sampled from the model itself, starting from its begin-of-sequence token.

All text of a source is joined, tokenised once and cut into consecutive windows from the start. No token is dropped:
the first token of a window carries the attention sink's massive activations, and they belong into the statistics.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slablm.config import CompressionConfig
from slablm.errors import SlabError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Windows after those that calibrate: with them errors are measured on text that nothing was fitted to.
UNSEEN_WINDOWS = 2
BUILTIN_CALIBRATION_SHARE = 0.8
# Characters read per wanted token from a streamed data set; English needs 4 to 5.
CHARACTERS_PER_TOKEN = 8


def load_text(source: str, *, split: str, num_tokens: int | None = None) -> str:
    """Read a text source.

    Args:
        source: ``c4``, ``wikitext2``, ``builtin`` or a file path.
        split: ``"calibration"`` or ``"evaluation"``.
        num_tokens: about how many tokens are wanted (streams stop there); None for all.

    Raises:
        SlabError: the file is missing, empty or no text, or the hub cannot be reached.
    """
    if source == "builtin":
        return _builtin_text(split)
    if source in ("c4", "wikitext2"):
        return _hub_text(source, split, num_tokens)
    return _file_text(Path(source))


def windows_from_text(
    text: str, tokenizer: PreTrainedTokenizerBase, seq_len: int, num_windows: int | None, what: str, more: int = 0
) -> Tensor:
    """Tokenise and cut into consecutive, non-overlapping windows.

    Args:
        text: all text.
        tokenizer: the model's; special tokens are added as it does by default.
        seq_len: tokens per window.
        num_windows: windows wanted from the start, all of them needed; None for as many as fit.
        what: how the error calls this text.
        more: windows beyond `num_windows` that are welcome where there are as many.

    Returns:
        Token ids, [windows, seq_len] int64.

    Raises:
        SlabError: too little text.
    """
    # verbose=False: "sequence longer than the model" is no news for a corpus.
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
    available = len(ids) // seq_len
    wanted = 1 if num_windows is None else num_windows
    if available < wanted:
        raise SlabError(
            f"{what} is too short: {len(ids)} tokens make {available} windows of {seq_len}, {wanted} are needed; "
            "give more text, fewer windows or a shorter --seq-len"
        )
    count = available if num_windows is None else min(num_windows + more, available)
    return ids[: count * seq_len].view(count, seq_len)


@torch.no_grad()
def sample_windows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seq_len: int, num_windows: int, seed: int
) -> Tensor:
    """Let the model write its own calibration text (plain sampling, temperature 1).

    Args:
        model: the dense model.
        tokenizer: gives the token to start from.
        seq_len: tokens per window, the start token included.
        num_windows: number of windows.
        seed: seed of the sampling.

    Returns:
        Token ids, [num_windows, seq_len] int64.

    Raises:
        SlabError: the tokenizer has neither a begin- nor an end-of-sequence token.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise SlabError("calibration 'self' needs a begin-of-sequence token, the tokenizer has none: give a text file")
    prompt = torch.full((num_windows, 1), start, dtype=torch.long, device=model.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokens: Any = model.generate(  # type: ignore[operator]
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=seq_len - 1,
            max_new_tokens=seq_len - 1,
            pad_token_id=start,
        )
    return torch.as_tensor(tokens).cpu()


def calibration_windows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: CompressionConfig
) -> Tensor:
    """Token windows of the configured calibration source, [num_samples + 2, seq_len] int64.

    The last `UNSEEN_WINDOWS` calibrate nothing: they are for measuring errors. A text may be too short for them.

    Args:
        model: the dense model (used by source ``self`` and for the longest possible window).
        tokenizer: the model's.
        config: `calibration`, `num_samples`, `seq_len` and, for source ``self``, `seed`.

    Raises:
        SlabError: see `load_text`, `windows_from_text`, `sample_windows`; or a window longer than the model allows.
    """
    count, seq_len = config.num_samples, config.seq_len
    check_length(model, seq_len)
    if config.calibration == "self":
        # Apart: windows of one batch share a stream of random numbers, and what calibrates must not depend on the rest.
        parts = ((count, config.seed), (UNSEEN_WINDOWS, config.seed + 1))
        return torch.cat([sample_windows(model, tokenizer, seq_len, windows, seed) for windows, seed in parts])
    text = load_text(config.calibration, split="calibration", num_tokens=windows_wanted(config) * seq_len)
    what = f"calibration text {config.calibration}"
    return windows_from_text(text, tokenizer, seq_len, count, what, UNSEEN_WINDOWS)


def windows_wanted(config: CompressionConfig) -> int:
    """How many windows go through the blocks, unless the text is too short for those that calibrate nothing."""
    return config.num_samples + UNSEEN_WINDOWS


def check_length(model: PreTrainedModel, seq_len: int) -> None:
    """Refuse windows longer than the model's position range.

    Raises:
        SlabError: `seq_len` is above `max_position_embeddings`.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and seq_len > longest:
        raise SlabError(f"seq_len {seq_len} is longer than the model's {longest} positions: use --seq-len {longest}")


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
        known = "c4, wikitext2, self, builtin"
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
        raise SlabError(
            f"text source {source!r} needs the Hugging Face hub, which failed ({reason}): "
            "use builtin, self (calibration only) or a text file"
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
