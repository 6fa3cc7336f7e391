"""Text → token windows: cut, chosen, and each begun as the model expects.

A text is tokenised once and cut into consecutive windows of `seq_len` tokens from its start; what is left at the end is
dropped. Where the tokenizer begins every text with a BOS token, each window begins with one, which takes one of its
places: such models have seen hardly any text without, and are far worse on it (Gemma-3-270M has a perplexity of 33.7
instead of 17.8 on WikiText-2). Without `bos` the text is cut as the pruning literature does it, a BOS token at its very
start at most.

Which windows are used can be said behind the name of a text:

    c4.txt            all of them
    c4.txt@0-113      windows 0 to 113, both included
    c4.txt@114-/16    16 windows, spread evenly over 114 to the last

Calibration takes `num_samples` of the windows it is given, drawn at random by `seed`, and two more that calibrate
nothing, so that errors can be measured on text to which nothing was fitted. No token of a window is dropped: the first
one carries the attention sink's massive activations, and they belong into the statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slablm.calibration.chat import chat_text
from slablm.calibration.text import load_text
from slablm.config import CompressionConfig, Excerpt
from slablm.errors import SlabError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnToken = Callable[[int, int], None]

# Windows after those that calibrate: with them errors are measured on text that nothing was fitted to.
UNSEEN_WINDOWS = 2


@dataclass(frozen=True)
class Windows:
    """Windows of one text.

    Attributes:
        ids: token ids, [windows, seq_len] int64.
        spans: first token and first token after it, in the text, of each window.
        text: the text.
    """

    ids: Tensor
    spans: tuple[tuple[int, int], ...]
    text: str

    def overlap(self, other: Windows) -> bool:
        """Whether both have a piece of the same text; of texts that are different in any way it is not found out."""
        return self.text == other.text and any(
            start < end and begin < stop for start, stop in self.spans for begin, end in other.spans
        )


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins every text with a BOS token."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def cut(text: str, tokenizer: PreTrainedTokenizerBase, seq_len: int, excerpt: Excerpt, *, bos: bool = True) -> Windows:
    """Tokenise a text, cut it, and take some of the windows.

    Args:
        text: all text; of conversations the file's content.
        tokenizer: the model's.
        seq_len: tokens per window.
        excerpt: which windows; its source is how errors call the text.
        bos: whether each window begins with a BOS token where the tokenizer begins texts with one.

    Raises:
        SlabError: too little text, or too few windows for the excerpt; see `chat_text`.
    """
    each = bos and adds_bos(tokenizer)
    # verbose=False: "sequence longer than the model" is no news for a corpus. A chat template writes special tokens.
    options: dict[str, Any] = {"verbose": False}
    if each or excerpt.is_chat:
        options["add_special_tokens"] = False
    if excerpt.is_chat:
        text = chat_text(text, tokenizer, excerpt.source, bos=not each)
    ids = torch.tensor(tokenizer(text, **options)["input_ids"], dtype=torch.long)
    length = seq_len - each
    available = len(ids) // length
    if not available:
        raise SlabError(
            f"text {excerpt.source} is too short: {len(ids)} tokens make no window of {seq_len}; "
            "give more text or a shorter --seq-len"
        )
    chosen = excerpt.chosen(available)
    windows = ids[: available * length].view(available, length)[chosen]
    if each:
        windows = torch.cat([torch.full((len(chosen), 1), tokenizer.bos_token_id), windows], dim=1)
    return Windows(windows, tuple((i * length, (i + 1) * length) for i in chosen), text)


@dataclass(frozen=True)
class EvaluationText:
    """A text to evaluate on, read but not yet cut.

    Attributes:
        excerpt: which windows.
        content: the text.
        max_windows: only the first of them; None for all.
    """

    excerpt: Excerpt
    content: str
    max_windows: int | None = None

    @classmethod
    def read(cls, text: str, seq_len: int, max_windows: int | None = None) -> EvaluationText:
        """Read a text, perhaps with a range of windows, as far as it is needed.

        Raises:
            SlabError: see `Excerpt.parse` and `load_text`.
        """
        excerpt = Excerpt.parse(text)
        last = excerpt.last
        if last is None and max_windows is not None and excerpt.spread is None:
            last = excerpt.first + max_windows - 1
        num_tokens = None if last is None else (last + 1) * seq_len
        return cls(excerpt, load_text(excerpt.source, split="evaluation", num_tokens=num_tokens), max_windows)

    def cut(self, tokenizer: PreTrainedTokenizerBase, seq_len: int, *, bos: bool = True) -> Windows:
        """Its windows; arguments and errors as for `cut`."""
        windows = cut(self.content, tokenizer, seq_len, self.excerpt, bos=bos)
        return Windows(windows.ids[: self.max_windows], windows.spans[: self.max_windows], windows.text)


def calibration_pool(tokenizer: PreTrainedTokenizerBase, config: CompressionConfig) -> Windows:
    """All windows from which those that calibrate are drawn.

    Args:
        tokenizer: the model's.
        config: `calibration` (a text, perhaps with a range of windows), `num_samples`, `seq_len` and `bos`.

    Raises:
        SlabError: see `load_text` and `cut`.
    """
    excerpt = Excerpt.parse(config.calibration)
    stop = excerpt.first + windows_wanted(config) if excerpt.last is None else excerpt.last + 1
    text = load_text(excerpt.source, split="calibration", num_tokens=stop * config.seq_len)
    return cut(text, tokenizer, config.seq_len, excerpt, bos=config.bos)


def draw(pool: Tensor, config: CompressionConfig) -> Tensor:
    """Windows of a pool in random order: those that calibrate, then those with which errors are measured.

    Args:
        pool: token ids, [windows, seq_len].
        config: `num_samples` and `seed`.

    Returns:
        Token ids, [up to num_samples + 2, seq_len].

    Raises:
        SlabError: there are fewer than `num_samples`.
    """
    if len(pool) < config.num_samples:
        raise SlabError(
            f"calibration text {config.calibration} is too short: it has {len(pool)} windows of {config.seq_len} "
            f"tokens, {config.num_samples} are needed; give more text, fewer windows or a shorter --seq-len"
        )
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(config.seed))
    return pool[order[: windows_wanted(config)]]


def calibration_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: CompressionConfig,
    on_token: OnToken | None = None,
) -> Tensor:
    """Token windows of the configured calibration source, [num_samples + 2, seq_len] int64.

    The last `UNSEEN_WINDOWS` calibrate nothing: they are for measuring errors. A text may be too short for them.

    Args:
        model: the dense model (used by source ``self`` and for the longest possible window).
        tokenizer: the model's.
        config: `calibration`, `num_samples`, `seq_len`, `bos` and `seed`.
        on_token: for source ``self``, called after each token of all windows with (tokens done, tokens in all).

    Raises:
        SlabError: see `calibration_pool`, `draw` and `sample_windows`; or a window longer than the model allows.
    """
    count, seq_len = config.num_samples, config.seq_len
    check_length(model, seq_len)
    if config.calibration == "self":
        # Apart: windows of one batch share a stream of random numbers, and what calibrates must not depend on the rest.
        parts = ((count, config.seed), (UNSEEN_WINDOWS, config.seed + 1))
        counted = None if on_token is None else _Counted(on_token, len(parts) * (seq_len - 1))
        return torch.cat([sample_windows(model, tokenizer, seq_len, windows, seed, counted) for windows, seed in parts])
    return draw(calibration_pool(tokenizer, config).ids, config)


@torch.no_grad()
def sample_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    num_windows: int,
    seed: int,
    streamer: Any = None,
) -> Tensor:
    """Let the model write its own calibration text (plain sampling, temperature 1).

    Args:
        model: the dense model.
        tokenizer: gives the token to start from.
        seq_len: tokens per window, the start token included.
        num_windows: number of windows.
        seed: seed of the sampling.
        streamer: transformers', told about every token.

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
            streamer=streamer,
        )
    return torch.as_tensor(tokens).cpu()


class _Counted:
    """A streamer of transformers that counts the tokens that come; the first of each text is what it starts from."""

    def __init__(self, on_token: OnToken, total: int) -> None:
        self.on_token, self.total, self.done, self.begun = on_token, total, 0, False

    def put(self, tokens: Tensor) -> None:
        if self.begun:
            self.done += 1
            self.on_token(self.done, self.total)
        self.begun = True

    def end(self) -> None:
        self.begun = False


def check_disjoint(named: Sequence[tuple[str, Windows]]) -> None:
    """Refuse windows that share text: what was fitted to or chosen on a text looks better there than it is.

    Args:
        named: what the windows are for, and the windows.

    Raises:
        SlabError: naming two that overlap.
    """
    for i, (name, windows) in enumerate(named):
        for other, more in named[i + 1 :]:
            if windows.overlap(more):
                raise SlabError(
                    f"{name} and {other} share windows of one text: keep them apart, "
                    "for instance as TEXT@0-99 and TEXT@100-"
                )


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
