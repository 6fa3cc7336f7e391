"""Which modules are compressed.

Only linear layers inside the decoder blocks are candidates; embeddings and the head never are. A pattern matches a
module by its full name (``model.layers.0.mlp.up_proj``), by a name suffix at a dot (``up_proj``, ``mlp.up_proj``), by
``re:`` and a regular expression that must match the full name, or, for ``all-linear``, whenever it is linear.

Whatever holds a weight matrix in a block and is not compressed is reported with the reason, never skipped in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from slablm.config import ALL_LINEAR, CompressionConfig
from slablm.errors import SlabError
from slablm.runtime.experts import separate_experts


@dataclass(frozen=True)
class Targets:
    """The outcome of target selection.

    Attributes:
        names: full names of the linear layers to compress, grouped by block, in the order of the model.
        left_dense: full name → reason, for every other matrix in a block.
    """

    names: tuple[tuple[str, ...], ...]
    left_dense: dict[str, str]


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks.

    Transformers models name the classes that must not be split over devices (`_no_split_modules`); the blocks are the
    `nn.ModuleList` made of them. Models without that hint: the longest list of equal modules.

    Args:
        model: a causal language model.

    Returns:
        Its name in the model and the list itself.

    Raises:
        SlabError: there is no such list.
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    # transformers 5 keeps the hint as a set, a list or None.
    unsplit: set[str] = set(getattr(model, "_no_split_modules", None) or ())
    hinted = [(name, m) for name, m in lists if all(type(block).__name__ in unsplit for block in m)]
    alike = [(name, m) for name, m in lists if len({type(block) for block in m}) == 1]
    candidates = hinted or alike
    if not candidates:
        raise SlabError(f"no decoder blocks found in {type(model).__name__}: it is not a supported causal LM")
    return max(candidates, key=lambda item: len(item[1]))


def matches(name: str, pattern: str) -> bool:
    """Whether a target or ignore pattern names this module.

    Raises:
        SlabError: the regular expression is not valid.
    """
    if pattern == ALL_LINEAR:
        return True
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise SlabError(f"pattern {pattern!r} is no valid regular expression: {error}") from error
    return name == pattern or name.endswith("." + pattern)


def select_targets(model: nn.Module, config: CompressionConfig) -> Targets:
    """Choose the layers to compress; experts that are one tensor get linear layers of their own first, in place.

    Args:
        model: a causal language model.
        config: `targets` and `ignore`.

    Raises:
        SlabError: a pattern matches nothing (a typing error would otherwise go unnoticed).
    """
    separate_experts(model)
    prefix, blocks = find_blocks(model)
    used: set[str] = set()
    left_dense: dict[str, str] = {}
    chosen = []
    for index, block in enumerate(blocks):
        inside = []
        for name, module in block.named_modules(prefix=f"{prefix}.{index}"):
            if (reason := _reason_to_leave(name, module, config, used)) is None:
                inside.append(name)
            elif reason:
                left_dense[name] = reason
        chosen.append(tuple(inside))
    _check_patterns((*config.targets, *config.ignore), used, chosen, left_dense)
    return Targets(tuple(chosen), left_dense)


def _reason_to_leave(name: str, module: nn.Module, config: CompressionConfig, used: set[str]) -> str | None:
    """None: compress it; empty: no matrix here; otherwise why it stays dense. Adds matching patterns to `used`."""
    matrices = [p for p in module.parameters(recurse=False) if p.ndim >= 2]
    if not matrices:
        return ""
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is not a plain nn.Linear"
    wanted = [p for p in config.targets if matches(name, p)]
    unwanted = [p for p in config.ignore if matches(name, p)]
    used.update(wanted, unwanted)
    if unwanted:
        return f"ignored by {unwanted[0]!r}"
    return None if wanted else "not a target"


def _check_patterns(
    patterns: Iterable[str], used: set[str], chosen: list[tuple[str, ...]], left_dense: dict[str, str]
) -> None:
    for pattern in patterns:
        if pattern not in used:
            names = [name for block in chosen for name in block] or list(left_dense)
            example = f"; linear layers are called like {names[0]!r}" if names else ""
            raise SlabError(f"pattern {pattern!r} matches no linear layer of the decoder blocks{example}")
    if not any(chosen):
        raise SlabError("nothing to compress: every linear layer of the decoder blocks is ignored")
