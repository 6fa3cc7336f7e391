"""Which modules are compressed.

Only linear layers inside the decoder blocks are candidates; embeddings and the head never are. A pattern matches a
module by its full name (``model.layers.0.mlp.up_proj``), by a name suffix at a dot (``up_proj``, ``mlp.up_proj``), by
``re:`` and a regular expression that must match the full name, or, for ``all-linear``, whenever it is linear.

Whatever holds a weight matrix in a block and is not compressed is reported with the reason, never skipped in silence.
The experts of a mixture are linear layers by then, each with a name of its own (`slablm.runtime.experts`); what sends
tokens to them stays dense.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from slablm.config import ALL_LINEAR, CompressionConfig
from slablm.errors import SlabError
from slablm.runtime.experts import Experts, separate_experts

# Of the blocks' weights, at least so many have to be in layers that can be compressed.
LEAST_SHARE = 0.5


@dataclass(frozen=True)
class Targets:
    """The outcome of target selection.

    Attributes:
        names: full names of the linear layers to compress, grouped by block, in the order of the model.
        left_dense: full name → reason, for every other matrix in a block.
        out_of_reach: reason → weights of the matrices that cannot be targets.
        weights: of all matrices in the blocks.
    """

    names: tuple[tuple[str, ...], ...]
    left_dense: dict[str, str]
    out_of_reach: dict[str, int]
    weights: int

    def check_reach(self) -> None:
        """Refuse a model of which most would stay dense whatever is chosen.

        Raises:
            SlabError: naming the share that can be compressed, and what holds the rest.
        """
        share = 1 - sum(self.out_of_reach.values()) / self.weights
        if share < LEAST_SHARE:
            reason = max(self.out_of_reach, key=self.out_of_reach.__getitem__)
            raise SlabError(
                f"only {100 * share:.1f} % of the blocks' weights can be compressed ({reason}): "
                "give --mostly-dense to go on with these"
            )


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
    out_of_reach: Counter[str] = Counter()
    weights = 0
    chosen = []
    for index, block in enumerate(blocks):
        inside = []
        routers = _routers(block)
        for name, module in block.named_modules(prefix=f"{prefix}.{index}"):
            matrices = [p for p in module.parameters(recurse=False) if p.ndim >= 2]
            if not matrices:
                continue
            held = sum(p.numel() for p in matrices)
            weights += held
            reason = _reason_not_chosen(name, config, used) if type(module) is nn.Linear else ""
            if obstacle := _obstacle(module, routers):
                out_of_reach[obstacle] += held
            if obstacle or reason:
                left_dense[name] = obstacle or reason
            else:
                inside.append(name)
        chosen.append(tuple(inside))
    _check_patterns((*config.targets, *config.ignore), used, chosen, left_dense)
    return Targets(tuple(chosen), left_dense, dict(out_of_reach), weights)


def _routers(block: nn.Module) -> list[nn.Module]:
    """Linear layers beside some experts that choose among them, or that weigh one shared by all tokens."""
    return [
        layer
        for mixture in block.modules()
        for experts in mixture.children()
        if isinstance(experts, Experts)
        for layer in mixture.children()
        if isinstance(layer, nn.Linear) and layer.out_features in (1, experts.num_experts)
    ]


def _obstacle(module: nn.Module, routers: list[nn.Module]) -> str:
    """Why a module with a matrix can never be a target; empty if it can."""
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is not a plain nn.Linear"
    return "it gates experts" if any(module is router for router in routers) else ""


def _reason_not_chosen(name: str, config: CompressionConfig, used: set[str]) -> str:
    """Why the settings leave a linear layer out; empty if they do not. Adds matching patterns to `used`."""
    wanted = [p for p in config.targets if matches(name, p)]
    unwanted = [p for p in config.ignore if matches(name, p)]
    used.update(wanted, unwanted)
    if unwanted:
        return f"ignored by {unwanted[0]!r}"
    return "" if wanted else "not a target"


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
