"""Greedy text generation, the same on every run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from slablm.errors import SlabError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    *,
    chat: bool = False,
) -> str:
    """Continue a prompt.

    Args:
        model: any causal language model.
        tokenizer: the model's.
        prompt: text to continue; with `chat`, what the user says.
        max_new_tokens: tokens to write at most.
        chat: wrap the prompt in the tokenizer's chat template.

    Returns:
        Prompt and continuation; with `chat` the answer alone.

    Raises:
        SlabError: the prompt is empty or no text, or there is no chat template.
    """
    if not prompt:
        raise SlabError("the prompt is empty: give the text to continue")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise SlabError("the prompt is no UTF-8 text")
    if chat and not tokenizer.chat_template:
        raise SlabError("the tokenizer has no chat template: leave out --chat")
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    # A chat template writes its special tokens itself.
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(model.device)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output: Any = model.generate(  # type: ignore[operator]
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=padding
    )
    start = inputs["input_ids"].shape[1] if chat else 0
    return str(tokenizer.decode(output[0, start:], skip_special_tokens=True))
