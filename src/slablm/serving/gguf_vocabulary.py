"""A Hugging Face tokenizer as GGUF has it, for two kinds of byte-pair encodings.

- *Byte level* (GPT-2, Llama 3, Qwen, SmolLM): tokens, merges, and the name of the rule that cuts a text before merging,
  which llama.cpp knows by heart. A tokenizer with another rule is refused: it would be cut in another way.
- *With a fallback to bytes* (Llama 2, Mistral, Gemma; once SentencePiece): llama.cpp merges the pair whose result has
  the highest score. The scores are gone, but the merges are in their order, so minus the place of a token's first merge
  ranks as they did.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import gguf

from slablm.calibration.windows import adds_bos
from slablm.checkpoint.files import read_json
from slablm.errors import SlabError

WAY_OUT = "use --format dense and llama.cpp's own convert_hf_to_gguf.py"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The rules by the regular expression that cuts, and how llama.cpp calls them: digits by threes, or one by one.
_RULES = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    """Write a tokenizer.

    Args:
        writer: of the file.
        folder: with a ``tokenizer.json``.
        size: rows of the embedding; tokens that the tokenizer has not are written as unused.

    Raises:
        SlabError: it has none, or one that llama.cpp would not read as it is.
    """
    from transformers import AutoTokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise SlabError(f"{folder} has no tokenizer.json: {WAY_OUT}")
    content = read_json(path)
    model = content["model"]
    if model.get("type") != "BPE":
        raise SlabError(f"{path} is no byte-pair encoding: {WAY_OUT}")
    texts, kinds = _tokens(content, size)
    by_bytes = bool(model.get("byte_fallback"))
    if by_bytes:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(model, texts))
        writer.add_add_space_prefix(_prepends_a_space(content))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_rule(content.get("pre_tokenizer"), path))
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)  # it warns of templates of pairs, which are not written
    special = gguf.SpecialVocab(folder, load_merges=not by_bytes, n_vocab=size)
    special.add_special_token["bos"] = adds_bos(AutoTokenizer.from_pretrained(folder))
    special.add_to_gguf(writer, quiet=True)


def _tokens(content: dict[str, Any], size: int) -> tuple[list[str], list[gguf.TokenType]]:
    """Text and kind of every token."""
    texts = [f"[PAD{number}]" for number in range(size)]
    kinds = [gguf.TokenType.UNUSED] * size
    for text, number in content["model"]["vocab"].items():
        is_byte = content["model"].get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", text)
        texts[number], kinds[number] = text, gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL
    for token in content.get("added_tokens") or []:
        if token["id"] < size:
            texts[token["id"]] = token["content"]
            kinds[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    return texts, kinds


def _scores(model: dict[str, Any], texts: list[str]) -> list[float]:
    places: dict[str, int] = {}
    for place, merge in enumerate(model["merges"]):
        first, second = merge if isinstance(merge, list) else merge.split(" ")
        places.setdefault(first + second, place)
    return [-float(places.get(text, 0)) for text in texts]


def _prepends_a_space(content: dict[str, Any]) -> bool:
    """Whether a space is put in front of every text."""
    steps = [step for key in ("normalizer", "pre_tokenizer") for step in _steps(content.get(key))]
    schemes = ("always", "first")
    return any(step["type"] == "Prepend" or step.get("prepend_scheme") in schemes for step in steps)


def _rule(pre_tokenizer: Any, path: Path) -> str:
    """How llama.cpp calls the rule that cuts a text.

    Raises:
        SlabError: it is none that is known here.
    """
    kinds = [step["type"] for step in _steps(pre_tokenizer)]
    steps = dict(zip(kinds, _steps(pre_tokenizer), strict=True))
    level = steps.get("ByteLevel", {})
    if not level.get("add_prefix_space", True):
        by_itself = level.get("use_regex", True)
        if kinds == ["ByteLevel"] and by_itself:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and by_itself and steps["Digits"].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not by_itself:
            rule = _RULES.get(steps["Split"]["pattern"].get("Regex", ""))
            if rule is not None and steps["Split"]["behavior"] == "Isolated":
                return rule
    raise SlabError(f"{path} cuts texts by a rule that is not known here: {WAY_OUT}")


def _steps(step: Any) -> list[dict[str, Any]]:
    """The single steps of a normalizer or pre-tokenizer."""
    if step is None:
        return []
    return list(step.get("pretokenizers") or step.get("normalizers") or [step])
