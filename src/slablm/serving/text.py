"""From tokens to text as they come: pieces that are whole characters, and an end at a stop word.

A character may take several tokens, and a tokenizer may write a token differently at the beginning of a text than in it
(a space in front, or none). So the tokens before are decoded with the new ones, and what is new is what has been added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens in front of a text that decide how it begins.
_CONTEXT = 8
# What a decoder writes for bytes that are no character yet.
_UNFINISHED = "\ufffd"


class Decoder:
    """Text of tokens that come one by one.

    Args:
        tokenizer: the model's.
        prompt: ids in front of the first token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT:])
        self._known = len(self._ids)

    def feed(self, token: int) -> str:
        """The text that one more token completes; empty in the middle of a character."""
        self._ids.append(token)
        return self._new(finished=False)

    def finish(self) -> str:
        """What is left, an unfinished character included."""
        return self._new(finished=True)

    def _new(self, finished: bool) -> str:
        before, now = self._decode(self._ids[: self._known]), self._decode(self._ids)
        if len(now) <= len(before) or (now.endswith(_UNFINISHED) and not finished):
            return ""
        self._ids = self._ids[-_CONTEXT:]
        self._known = len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


class StopWords:
    """Lets a text through up to the first of some words; holds back what may become one.

    Args:
        words: not empty ones.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = tuple(words)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """What of the text so far can be shown now."""
        if self.found:
            return ""
        self._held += text
        places = [place for word in self._words if (place := self._held.find(word)) >= 0]
        self.found = bool(places)
        return self._show(min(places) if places else len(self._held) - self._beginning())

    def finish(self) -> str:
        """What was held back and became no stop word."""
        return "" if self.found else self._show(len(self._held))

    def _beginning(self) -> int:
        """Characters at the end that a stop word begins with."""
        for length in range(min(len(self._held), max(map(len, self._words), default=0)), 0, -1):
            if any(word.startswith(self._held[-length:]) for word in self._words):
                return length
        return 0

    def _show(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        return shown
