"""Conversations → text, by the model's own chat template.

A model that answers questions sees roles and special tokens around every message, which plain text does not have: its
inputs are then not what calibration has seen. The source ``chat:FILE`` is a file of conversations, one JSON object per
line, as fine-tuning tools write them:

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}

All of them, each written out by the template, are one text that is cut into windows as any other. Where every window
begins with a BOS token, the template's own are left out: in use there is one, at the very beginning.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from slablm.errors import SlabError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORM = '{"messages": [{"role": "user", "content": "…"}, …]}'


def chat_text(lines: str, tokenizer: PreTrainedTokenizerBase, source: str, *, bos: bool) -> str:
    """Write conversations out as the model sees them.

    Args:
        lines: the file's content.
        tokenizer: the model's, with a chat template.
        source: how errors call the file.
        bos: whether conversations keep a BOS token of the template in front.

    Raises:
        SlabError: there is no template, a line is no conversation, or the template does not take it.
    """
    if not tokenizer.chat_template:
        raise SlabError(f"text {source}: the model's tokenizer has no chat template; use plain text for a base model")
    from jinja2.exceptions import TemplateError

    texts = []
    for number, line in enumerate(lines.split("\n"), 1):  # other separators may stand in a message
        if not line.strip():
            continue
        messages, tools = _conversation(line, f"text {source}, line {number}")
        try:
            text = str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
        except TemplateError as error:
            raise SlabError(f"text {source}, line {number}: the chat template does not take it: {error}") from error
        texts.append(text if bos else text.removeprefix(tokenizer.bos_token or ""))
    return "".join(texts)


def _conversation(line: str, where: str) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """Messages of a line, and the tools that it offers to the model.

    Raises:
        SlabError: the line is something else.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        raise SlabError(f"{where} is no JSON: {error}; each line is {_FORM}") from None
    messages = row.get("messages") if isinstance(row, dict) else None
    good = isinstance(messages, list) and messages
    if not good or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages or ()):
        raise SlabError(f"{where} is no conversation; each line is {_FORM}")
    assert isinstance(messages, list)
    return messages, row.get("tools")
