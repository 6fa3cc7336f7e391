"""A conversation with a model: what was said, and what of it the model has read.

What a model has read stays in its cache of keys and values. Of the next question's text only what is behind the longest
common beginning is read; a template that rewrites earlier answers costs their reading, nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from slablm.serving.kv_cache import new_cache
from slablm.serving.writing import OnText, Sampling, Written, chat_ids, check_text, write

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Conversation:
    """Questions and answers.

    Args:
        model: any causal language model.
        tokenizer: the model's, with a chat template.
        sampling: how answers are written.
        system: instructions in front of all; empty for none.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, system: str = ""
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.reset(system)

    def reset(self, system: str) -> None:
        """Begin anew.

        Args:
            system: as for the class.

        Raises:
            SlabError: it is no text.
        """
        if system:
            check_text(system, "the instruction")
        self.system = system
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self._forget()

    def ask(self, question: str, on_text: OnText = lambda text: None) -> Written:
        """The model's answer; both are part of the conversation then.

        Args:
            question: what the user says.
            on_text: told each piece of the answer as soon as it is there.

        Raises:
            SlabError: the question is no text, the template does not take it, or the conversation has become too long;
                the conversation is as it was before.
        """
        check_text(question, "the question")
        messages = [*self.messages, {"role": "user", "content": question}]
        ids = chat_ids(self.tokenizer, messages)
        self._forget_behind(ids)
        try:
            written = write(self.model, self.tokenizer, ids, self.sampling, on_text, self._cache)
        except BaseException:
            self._forget()
            raise
        # The last token that was written has not been read.
        self._read = [*ids[0].tolist(), *written.tokens][: self._cache.get_seq_length()]
        if written.interrupted:
            self._forget()
        self.messages = [*messages, {"role": "assistant", "content": written.text}]
        return written

    def _forget_behind(self, ids: Tensor) -> None:
        """Cut the cache to what it has in common with a text; the text's last token has to be read."""
        common, new = 0, ids[0].tolist()
        while common < min(len(self._read), len(new) - 1) and self._read[common] == new[common]:
            common += 1
        if common < len(self._read):
            # Other layers have forgotten what is in front of a window, or cannot go back.
            if common > 0 and all(type(layer) is DynamicLayer for layer in self._cache.layers):
                self._cache.crop(common - len(self._read))
            else:
                self._forget()
        self._read = new[: self._cache.get_seq_length()]

    def _forget(self) -> None:
        """Read all of it again the next time."""
        self._cache, self._read = new_cache(self.model, self.sampling.kv_cache), list[int]()
