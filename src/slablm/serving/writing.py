"""Letting a model write while one watches: greedily or sampled, up to a stop word, with the time it took."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from slablm.errors import SlabError
from slablm.serving.kv_cache import check_backend, new_cache
from slablm.serving.text import Decoder, StopWords

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

OnText = Callable[[str], None]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, when writing ends, and how what was read is kept.

    Attributes:
        max_new_tokens: tokens to write at most.
        temperature: 0 takes the likeliest token, above it one is drawn.
        top_p: tokens are drawn from the likeliest with this much probability together.
        seed: of the draws; None for another one each time.
        stop: words at which writing ends; they are not part of the text.
        kv_cache: one of `slablm.serving.kv_cache.BACKENDS`; None keeps keys and values as they are.

    Raises:
        SlabError: one is out of range, or cannot be used here.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    kv_cache: str | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SlabError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise SlabError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise SlabError(f"top_p must lie above 0 and be at most 1, got {self.top_p}")
        if not all(self.stop):
            raise SlabError("a stop word is empty: it would end every text before it begins")
        if self.kv_cache is not None:
            check_backend(self.kv_cache)

    def arguments(self) -> dict[str, Any]:
        """As transformers' `generate` takes them, but for the length."""
        if self.temperature == 0:
            return {"do_sample": False}
        # From all tokens, unless top_p says otherwise: transformers' own default is the best 50.
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass(frozen=True)
class Written:
    """What a model has written.

    Attributes:
        text: without the prompt and without a stop word.
        tokens: the new ones' ids.
        prompt_tokens: tokens of the prompt that were read; those in a cache were not.
        first_seconds: reading them, and writing the first token.
        seconds: writing the others.
        interrupted: by Ctrl-C, in the middle of a token; a cache is of no use then.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    first_seconds: float
    seconds: float
    interrupted: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens behind the first one; 0 where there are none."""
        return (len(self.tokens) - 1) / self.seconds if len(self.tokens) > 1 else 0.0

    def timing(self) -> str:
        """One line for people."""
        rate = f" at {self.tokens_per_second:.1f} tokens/s" if len(self.tokens) > 1 else ""
        return (
            f"{self.prompt_tokens} tokens read and the first written in {self.first_seconds:.2f} s, "
            f"{len(self.tokens)} written{rate}"
        )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """Token ids of a text to continue, [1, tokens].

    Raises:
        SlabError: it is empty, or no text.
    """
    check_text(prompt, "the prompt")
    ids: Tensor = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return ids


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> Tensor:
    """Token ids of a conversation up to where the model answers, [1, tokens].

    Args:
        tokenizer: the model's.
        messages: each a ``role`` and a ``content``.

    Raises:
        SlabError: there is no chat template, or it does not take these messages.
    """
    if not tokenizer.chat_template:
        raise SlabError("the tokenizer has no chat template: use `slablm generate` without --chat")
    from jinja2.exceptions import TemplateError

    try:
        # A chat template writes its special tokens itself.
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise SlabError(f"the model's chat template does not take this conversation: {error}") from error
    ids: Tensor = tokenizer(str(text), return_tensors="pt", add_special_tokens=False)["input_ids"]
    return ids


def check_text(text: str, what: str) -> None:
    """Refuse what no tokenizer can read.

    Args:
        text: what somebody has typed.
        what: how the error calls it.

    Raises:
        SlabError: it is empty, or no UTF-8.
    """
    if not text:
        raise SlabError(f"{what} is empty: give a text")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise SlabError(f"{what} is no UTF-8 text")


def room_for_text(model: PreTrainedModel, tokens: int) -> int | None:
    """Tokens that a model can write behind a prompt; None where its config names no limit.

    Args:
        model: any causal language model.
        tokens: of the prompt.

    Raises:
        SlabError: none, the prompt is too long.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is None:
        return None
    if tokens >= longest:
        raise SlabError(f"the text has {tokens} tokens, and the model reads at most {longest}: shorten it")
    return int(longest) - tokens


@torch.no_grad()
def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    sampling: Sampling,
    on_text: OnText = lambda text: None,
    cache: Cache | None = None,
) -> Written:
    """Write behind a prompt; Ctrl-C ends it with what is there.

    Args:
        model: any causal language model.
        tokenizer: the model's.
        ids: the prompt, [1, tokens], from `prompt_ids` or `chat_ids`.
        sampling: see there.
        on_text: told each piece of text as soon as it is there.
        cache: of the model for a beginning of the prompt, shorter than it; filled.

    Raises:
        SlabError: the prompt is too long.
    """
    if cache is None and sampling.kv_cache is not None:
        cache = new_cache(model, sampling.kv_cache)
    room, cached = room_for_text(model, ids.shape[1]), 0 if cache is None else cache.get_seq_length()
    ids = ids.to(model.device)
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    elif sampling.temperature > 0:
        torch.seed()
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    watcher = Watcher(Decoder(tokenizer, ids[0].tolist()), StopWords(sampling.stop), on_text)
    # The name has changed in transformers 5.2x.
    cached_as = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    interrupted = False
    try:
        model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.max_new_tokens if room is None else min(room, sampling.max_new_tokens),
            pad_token_id=padding,
            stopping_criteria=StoppingCriteriaList([watcher]),
            **sampling.arguments(),
            **{cached_as: cache},
        )
    except KeyboardInterrupt:
        interrupted = True
    return watcher.written(ids.shape[1] - cached, interrupted)


class Watcher(StoppingCriteria):
    """What `generate` asks after each token whether to stop; it sees the token on this occasion.

    Args:
        decoder: of the text.
        stop: words at which the text ends.
        on_text: told each piece of the text.
    """

    def __init__(self, decoder: Decoder, stop: StopWords, on_text: OnText = lambda text: None) -> None:
        self._decoder, self._stop, self._on_text = decoder, stop, on_text
        self.cancelled = False  # by whoever no longer wants the text, from any thread
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._times = [time.perf_counter()]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether a stop word has come, or the text is not wanted, [sequences]; the tokens so far are [1, tokens]."""
        self._tokens.append(int(input_ids[0, -1]))
        self._times.append(time.perf_counter())
        self._show(self._stop.feed(self._decoder.feed(self._tokens[-1])))
        return torch.full(input_ids.shape[:1], self._stop.found or self.cancelled, device=input_ids.device)

    def written(self, prompt_tokens: int, interrupted: bool) -> Written:
        """All of it; once."""
        self._show(self._stop.feed(self._decoder.finish()) + self._stop.finish())
        first = self._times[min(1, len(self._times) - 1)]
        return Written(
            "".join(self._text),
            tuple(self._tokens),
            prompt_tokens,
            first - self._times[0],
            self._times[-1] - first,
            interrupted,
        )

    def _show(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._on_text(text)
