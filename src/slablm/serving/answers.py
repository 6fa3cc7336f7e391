"""How transformers' server generates, with what its own way lacks.

One text is written at a time, in the order of the requests, so that many clients get the answers that one would get.
Added here: a prompt must fit the model; a text ends in front of a stop word, not behind it; a temperature draws tokens,
whatever the model's own settings say; and what nobody waits for any more is not written to its end.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from fastapi import HTTPException
from torch import Tensor
from transformers.cli.serving.utils import GenerateManager

from slablm.serving.text import Decoder, StopWords
from slablm.serving.writing import Watcher


class Answers(GenerateManager):
    """Generation for one model.

    Args:
        longest: tokens that a prompt and its continuation can have together.
    """

    def __init__(self, longest: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.longest = longest

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> tuple[Any, Any]:
        """Begin to write; the queue of pieces of text, and what can cancel it.

        Raises:
            HTTPException: with status 400, the prompt or a setting is none that the model can take.
        """
        words = _prepare(inputs, gen_config, self.longest)
        watched = {**inputs, "stopping_criteria": [_watcher(processor, inputs, words)]}
        queue, streamer = super().generate_streaming(
            model, processor, watched, gen_config, request_id, response_parser=response_parser
        )
        return UpToStopWord(queue, words), streamer

    async def generate_non_streaming(  # type: ignore[override] # of one kind of manager it is a list
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, Tensor]:
        """The text, the number of the prompt's tokens, and the text's tokens, [tokens].

        Raises:
            HTTPException: as for `generate_streaming`.
        """
        words = _prepare(inputs, gen_config, self.longest)
        watcher = _watcher(processor, inputs, words)
        watched = {**inputs, "stopping_criteria": [watcher]}
        writing = asyncio.ensure_future(
            super().generate_non_streaming(model, processor, watched, gen_config, request_id)
        )
        try:
            text, count, tokens = await asyncio.shield(writing)
        except asyncio.CancelledError:
            watcher.cancelled = True
            writing.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody else asks
            raise
        stop = StopWords(words)
        shown = stop.feed(text) + stop.finish()
        return (shown, count, _tokens_of(processor, tokens, shown)) if stop.found else (text, count, tokens)


class UpToStopWord:
    """The queue of a text as its reader sees it: up to the first stop word.

    Args:
        queue: of pieces of text, and other things that pass as they are; None is its end.
        words: the stop words.
    """

    def __init__(self, queue: asyncio.Queue[Any], words: list[str]) -> None:
        self._queue, self._stop = queue, StopWords(words)
        self._ready: deque[Any] = deque()

    async def get(self) -> Any:
        """The next item, as soon as there is one."""
        while not self._ready:
            self._take(await self._queue.get())
        return self._ready.popleft()

    def get_nowait(self) -> Any:
        """The next item.

        Raises:
            asyncio.QueueEmpty: there is none yet.
        """
        while not self._ready:
            self._take(self._queue.get_nowait())
        return self._ready.popleft()

    def _take(self, item: Any) -> None:
        if type(item) is str:  # not the tagged kinds of text
            item = self._stop.feed(item)
        elif item is None and (rest := self._stop.finish()):
            self._ready.append(rest)
        if item != "":
            self._ready.append(item)


def _prepare(inputs: Any, config: Any, longest: int) -> list[str]:
    """Check a request, and complete what it left open; the stop words.

    Raises:
        HTTPException: with status 400.
    """
    tokens = inputs["input_ids"].shape[-1]
    words = [config.stop_strings] if isinstance(config.stop_strings, str) else config.stop_strings or []
    if tokens == 0:
        _refuse("the prompt is empty")
    if tokens >= longest:
        _refuse(f"the prompt has {tokens} tokens, and prompt and answer can have {longest} together: shorten it")
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        _refuse("stop must be a text or a list of texts, none of them empty")
    if config.max_new_tokens is not None and config.max_new_tokens < 1:
        _refuse(f"the number of new tokens must be 1 or more, got {config.max_new_tokens}")
    if (config.num_beams or 1) != 1 or (config.num_return_sequences or 1) != 1:
        _refuse("only one text is written for each request: leave out num_beams and num_return_sequences")
    if config.top_p is not None and not 0 < config.top_p <= 1:
        _refuse(f"top_p must lie above 0 and be at most 1, got {config.top_p}")
    if config.temperature is not None and not 0 <= config.temperature < float("inf"):
        _refuse(f"temperature must be 0 or more, got {config.temperature}")
    room = longest - tokens
    config.max_new_tokens = min(config.max_new_tokens or room, room)
    config.do_sample = config.temperature > 0 if config.temperature is not None else config.do_sample
    config.stop_strings = None  # looking through the whole vocabulary for them takes transformers seconds
    return list(words)


def _refuse(why: str) -> None:
    raise HTTPException(400, why)


def _watcher(processor: Any, inputs: Any, words: list[str]) -> Watcher:
    return Watcher(Decoder(processor, inputs["input_ids"][0].tolist()), StopWords(words))


def _tokens_of(processor: Any, tokens: Tensor, text: str) -> Tensor:
    """The tokens of a text that has been cut: as they were as far as they belong to it, [tokens]."""
    count, kept = len(tokens), text + "."
    while count > 0 and not text.startswith(kept):
        count -= 1
        kept = processor.decode(tokens[:count], skip_special_tokens=True)
    rest = processor(text[len(kept) :], add_special_tokens=False)["input_ids"]
    return tokens.new_tensor([*tokens[:count].tolist(), *rest])
