"""The same function in other weights: a quantised model off the grid of its file, by rescalings that cancel.

Dequantised weights lie on a grid: every 16 or 32 neighbours of a row on a few levels, which a method that rounds may
find again, so that it looks better, or worse, than on weights as training leaves them. With positive factors c and d,
one per channel, they move off it:

1. Norm and the linears behind it. RMSNorm(x) = g ⊙ x / rms(x), so with D = diag(d)

       W (g ⊙ z) = (W D) (D⁻¹ g ⊙ z):

   the gain is divided by d and the columns of the linears are multiplied by it: the norm in front of attention with q,
   k and v; the one in front of the MLP with gate and up. Gemma keeps g − 1 as its weight, which becomes (1 + w)/d − 1.
2. Value and output. A head's output is a weighted mean of v over positions, channel by channel, so rows of v times c
   and columns of o divided by it cancel. With grouped queries a channel of a key-value head is read by all query heads
   of its group, and they share its factor.
3. Up and down. act(gate) ⊙ up is linear in up: rows of up times c, columns of down divided by c. The gate's rows stay,
   its activation is not linear.

In floating point each weight is rounded once more, so the function is the same to float32 rounding. Biases of v and up
follow their rows. All seven linears of a block get factors that differ from column to column (q, k, v, gate, up by 1,
o by 2, down by 3), so no group of neighbours in a row keeps a grid. ln c and ln d are drawn from N(0, 0.2²).

What is left alone: norms behind o and down, and those of q and k (Gemma 3), because RMS norm is not linear in single
channels and rotary embedding mixes them in pairs; the last norm, embeddings and the head, which are no targets of
compression and often one tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slablm.dense.targets import find_blocks
from slablm.errors import SlabError

SIGMA = 0.2


@torch.no_grad()
def off_the_grid(model: nn.Module, seed: int = 0, sigma: float = SIGMA) -> None:
    """Rescale a model's weights in place, without changing its function; the module docstring has the equations.

    Args:
        model: a Llama-like or Gemma 3 causal language model.
        seed: seed of the factors.
        sigma: their logarithms' standard deviation.

    Raises:
        SlabError: its blocks have other parts than those this knows to cancel.
    """
    generator = torch.Generator().manual_seed(seed)

    def factors(count: int) -> Tensor:
        return (torch.randn(count, generator=generator, dtype=torch.float64) * sigma).exp()

    for block in find_blocks(model)[1]:
        attention, mlp, first, second = _parts(block)
        q, k, v, o = (getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
        for norm, linears in ((first, (q, k, v)), (second, (mlp.gate_proj, mlp.up_proj))):
            d = factors(linears[0].in_features)
            _divide_gain(norm, d)
            for linear in linears:
                _scale(linear.weight, d)
        c = factors(v.out_features)
        _scale_rows(v, c)
        heads = c.view(-1, attention.head_dim)  # one line per key-value head
        _scale(o.weight, 1 / heads.repeat_interleave(o.in_features // c.numel(), dim=0).flatten())
        c = factors(mlp.up_proj.out_features)
        _scale_rows(mlp.up_proj, c)
        _scale(mlp.down_proj.weight, 1 / c)


def _parts(block: Any) -> tuple[Any, Any, nn.Module, nn.Module]:
    """A block's attention, its MLP, and the norms in front of them.

    Raises:
        SlabError: it is built in another way.
    """
    try:
        # In Gemma 3 the norm of Llama's name stands behind attention, and another one in front of the MLP.
        second = getattr(block, "pre_feedforward_layernorm", None) or block.post_attention_layernorm
        found = block.self_attn, block.mlp, block.input_layernorm, second
        known = {*"qkvo", "gate", "up", "down"} == {
            name.removesuffix("_proj") for part in found[:2] for name, m in part.named_children() if _has_matrix(m)
        }
    except AttributeError:
        known = False
    if not known:
        raise SlabError(f"{type(block).__name__} is not built like a block of Llama or Gemma 3")
    return found


def _has_matrix(module: nn.Module) -> bool:
    """Whether it is a layer such as those to be scaled."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2


def _divide_gain(norm: Any, d: Tensor) -> None:
    """Divide an RMS norm's gain by [n] factors, whether its weight is the gain (Llama) or the gain − 1 (Gemma)."""
    ones = torch.ones_like(norm.weight)
    # With a weight of zero the first has no output at all.
    offset = float(torch.func.functional_call(norm, {"weight": torch.zeros_like(ones)}, (ones,))[0].round())
    norm.weight.copy_((norm.weight.double() + offset) / d - offset)


def _scale(weight: Tensor, factors: Tensor) -> None:
    """Multiply the columns of [m, n] by [n] factors, or whatever else they broadcast to, rounding once."""
    weight.copy_(weight.double() * factors)


def _scale_rows(linear: nn.Linear, factors: Tensor) -> None:
    """Multiply all outputs of a linear layer, its bias included, by [m] factors."""
    _scale(linear.weight, factors[:, None])
    if linear.bias is not None:
        _scale(linear.bias, factors)
