"""The experts of a mixture, each with linear layers of its own.

transformers keeps all experts of a layer in two 3-D tensors: one has gate and up, behind each other or in turns, the
other one down; in some models they are transposed. `Experts` holds the same numbers as one matrix per expert and
projection, ``experts.3.gate_proj`` and so on, so that each is a linear layer like any other: it can be calibrated,
compressed, left dense and stored by its name. What becomes of gate and up is left to the module it stands for.

Of the experts only those run that a token was sent to. Within `all_tokens`, for statistics, every token goes through
every expert, as one sees too few of its own for a Gram matrix; what leaves the module is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts")


@dataclass(frozen=True)
class Share:
    """Which part of an expert's slice of a tensor of all experts is one projection.

    Attributes:
        tensor: name of that tensor, without ``_bias``.
        transposed: whether the slice of a weight is [in, out].
        first: the first output feature of the projection.
        step: the distance to the next one.
        outputs: output features of all projections in the slice.
        shape: [out, in] of this one.
    """

    tensor: str
    transposed: bool
    first: int
    step: int
    outputs: int
    shape: tuple[int, int]

    def stored(self, part: str) -> tuple[int, ...]:
        """Shape of an expert's slice of the tensor that holds its ``weight`` or its ``bias``."""
        if part == "bias":
            return (self.outputs,)
        return (self.shape[1], self.outputs) if self.transposed else (self.outputs, self.shape[1])

    def of(self, whole: Tensor) -> Tensor:
        """The projection's weight, or its bias, out of an expert's slice; shares its memory."""
        outputs = whole.movedim(-1, 0) if self.transposed else whole
        return outputs[self.first :: self.step][: self.shape[0]]


def shares_of(experts: nn.Module) -> dict[str, Share]:
    """What every expert of a module consists of: name of the projection → its share. Empty: no such experts.

    Args:
        experts: any module. Those of transformers that follow its interface of experts say how their tensors lie.
    """
    if not all(hasattr(experts, name) for name in _FLAGS):
        return {}
    wanted = {"gate_up_proj" if experts.has_gate else "up_proj", "down_proj"}
    wanted |= {f"{name}_bias" for name in wanted} if experts.has_bias else set()
    own = dict(experts.named_parameters())
    # Anything more, such as a norm behind each expert, would be lost.
    if own.keys() != wanted or own["down_proj"].ndim != 3 or next(experts.buffers(), None) is not None:
        return {}
    turned = bool(experts.is_transposed)
    inner, outer = own["down_proj"].shape[-2:] if turned else reversed(own["down_proj"].shape[-2:])
    down = Share("down_proj", turned, 0, 1, outer, (outer, inner))
    if not experts.has_gate:
        return {"up_proj": Share("up_proj", turned, 0, 1, inner, (inner, outer)), "down_proj": down}
    step = 1 if experts.is_concatenated else 2
    gate = Share("gate_up_proj", turned, 0, step, 2 * inner, (inner, outer))
    return {"gate_proj": gate, "up_proj": replace(gate, first=inner if step == 1 else 1), "down_proj": down}


class Expert(nn.Module):
    """One expert's linear layers; `Experts` runs them."""

    def __init__(self, layers: dict[str, nn.Linear]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


class Experts(nn.Module):
    """Drop-in replacement for the experts of a model of transformers; made by `Experts.of`.

    Its children ``0``, ``1``, … are the experts.

    Args:
        experts: one after the other.
        shares: see `shares_of`.
        fused: the module it stands for, without its tensors.

    Attributes:
        num_experts: how many there are.
        note: told of the experts of each token, [tokens, k], within `all_tokens`; else None.
    """

    def __init__(self, experts: Sequence[Expert], shares: dict[str, Share], fused: nn.Module) -> None:
        super().__init__()
        self.num_experts, self.shares = len(experts), shares
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)
        self.note: Callable[[Tensor], None] | None = None
        # No submodule: whoever walks over a model's modules would look for its tensors.
        vars(self)["_fused"] = fused

    @classmethod
    def of(cls, fused: nn.Module) -> Experts:
        """The experts of a module that has some (`shares_of`); it loses its tensors.

        Args:
            fused: the module; on the meta device it gives empty experts.
        """
        shares = shares_of(fused)
        own = {name: parameter.detach() for name, parameter in fused.named_parameters()}
        experts = []
        for number in range(len(own["down_proj"])):
            layers = {}
            for name, share in shares.items():
                bias = own[f"{share.tensor}_bias"][number] if fused.has_bias else None
                layers[name] = _linear(share, own[share.tensor][number], bias)
            experts.append(Expert(layers))
        for name in own:
            delattr(fused, name)
        return cls(experts, shares, fused).train(fused.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What the chosen experts make of every token, added up.

        Args:
            hidden_states: [tokens, n].
            top_k_index: the experts of each token, [tokens, k].
            top_k_weights: what their outputs are multiplied with, [tokens, k].

        Returns:
            [tokens, n], in the type of the hidden states.
        """
        if self.note is not None:
            self.note(top_k_index)
            return self._through_all(hidden_states, top_k_index, top_k_weights)
        k = top_k_index.shape[-1]
        order = top_k_index.flatten().argsort(stable=True)
        inputs = torch.split(hidden_states[order // k], self._counts(top_k_index))
        outputs = torch.cat([self._run(number, rows) for number, rows in enumerate(inputs) if len(rows)])
        outputs = outputs * top_k_weights.flatten()[order, None]
        # Back in the order of the tokens, and then one sum: adding in place would round in between.
        return outputs[order.argsort()].view(*top_k_index.shape, -1).sum(dim=1).to(hidden_states.dtype)

    def _through_all(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden_states, dtype=top_k_weights.dtype)
        for number in range(self.num_experts):
            share = (top_k_weights * (top_k_index == number)).sum(dim=-1, keepdim=True)
            result = result + self._run(number, hidden_states) * share
        return result.to(hidden_states.dtype)

    def _counts(self, top_k_index: Tensor) -> list[int]:
        """How many tokens each expert gets; where tensors have no values, as many as any other."""
        from torch._subclasses.fake_tensor import FakeTensor

        total = top_k_index.numel()
        if top_k_index.is_meta or isinstance(top_k_index, FakeTensor):
            ends = [total * (number + 1) // self.num_experts for number in range(self.num_experts)]
            return [end - start for start, end in zip([0, *ends], ends, strict=False)]
        counts: list[int] = top_k_index.flatten().bincount(minlength=self.num_experts).tolist()
        return counts

    def _run(self, number: int, inputs: Tensor) -> Tensor:
        """One expert: [tokens, n] → [tokens, n]."""
        expert: Any = self._modules[str(number)]
        fused = vars(self)["_fused"]
        if fused.has_gate:
            both = expert.gate_proj(inputs), expert.up_proj(inputs)
            joined = torch.cat(both, dim=-1) if fused.is_concatenated else torch.stack(both, dim=-1).flatten(-2)
            inner = fused._apply_gate(joined)
        else:
            inner = fused.act_fn(expert.up_proj(inputs))
        outputs: Tensor = expert.down_proj(inner)
        return outputs


def separate_experts(model: nn.Module) -> None:
    """Give the experts of a model linear layers of their own, in place; a model without any stays as it is."""
    for name, module in list(model.named_modules()):
        if shares_of(module):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Experts.of(module))


def all_experts(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """The `Experts` of a model with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Experts))


@contextmanager
def all_tokens(
    block: nn.Module, note: Callable[[Experts, Tensor], None] = lambda experts, chosen: None
) -> Iterator[None]:
    """Within it, every token goes through every expert of a block, and only what is sent to it counts in the output.

    Args:
        block: any module.
        note: told of every run of some experts, and of which were chosen for each token, [tokens, k].
    """
    mixtures = [experts for _, experts in all_experts(block)]
    for experts in mixtures:
        experts.note = partial(note, experts)
    try:
        yield
    finally:
        for experts in mixtures:
            experts.note = None


def _linear(share: Share, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with memory of its own: views of one tensor would be taken for tied ones."""
    layer = nn.Linear(share.shape[1], share.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(share.of(weight).clone(memory_format=torch.contiguous_format), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(share.of(bias).clone(memory_format=torch.contiguous_format), requires_grad=False)
    return layer
