"""AWQ (Lin et al. 2023, arXiv 2306.00978): weights of large inputs are scaled up before they are rounded.

With a positive scale s_j per input, W x = (W · s)(x / s). Rounding W · s and dividing by s afterwards,

    Ŵ = Q(W · s) / s

makes the steps of column j finer by s_j, as long as s hardly widens the range of its group. The paper takes s = d^α,
d_j the mean of |x_j| over the calibration tokens, and searches α between 0 (no scaling) and 1 for the smallest output
error. With G = XᵀX that error is tr ΔGΔᵀ, Δ = W − Ŵ, for all tokens at once (the paper's code runs the layer on some).

- *d* is the root mean square of x_j here, ‖X_j‖ / √tokens, which is what `LayerStats` has and what the other methods
  use. Large values count more in it than in the mean; α is searched either way. A common factor of d means nothing:
  s is divided by the root of its largest and smallest entry, as in the paper's code.
- *Clips* (`uniform`) are searched for every α by what the group adds to the output error on its own: its columns' block
  of G, not the diagonal alone. The paper's code settles α with plain grids and then the clips for it; here every α is
  judged with its own clips.
- *Size*: the paper folds 1 / s into the norm or the linear layer in front, where it is free, but then layers that read
  the same input have to share s, and some inputs have nothing in front that s could go into. Here every layer has its
  own s, in FP16, and it is counted: 16 bits per input, an upper bound that is below 0.03 bits per weight from 576
  outputs on.

In the coordinates of W · s the Gram matrix is G_ij / (s_i s_j), and everything else is plain rounding.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from slablm.config import CompressionConfig
from slablm.methods.decomposition import LayerStats
from slablm.methods.quantizers import nearest
from slablm.methods.results import QuantizedWeight
from slablm.methods.sweep import positive, required_gram
from slablm.methods.trials import output_error
from slablm.methods.uniform import clipped_grids

ALPHAS = tuple(step / 20 for step in range(21))
_SMALLEST, _LARGEST = 2.0**-14, 65504.0  # normal FP16


def awq(weight: Tensor, stats: LayerStats, config: CompressionConfig) -> QuantizedWeight:
    """Round on scaled inputs, with the best of `ALPHAS`.

    Args:
        weight: W, [m, n]; computed in float32 whatever its dtype.
        stats: `gram`, [n, n].
        config: `value_bits` and `group_size`; `ratio` and `pattern` are not used.

    Raises:
        SlabError: no Gram matrix, or a group's range does not fit into an FP16 scale.
    """
    weight, gram = weight.float(), required_gram(stats, "awq").to(weight.device, torch.float32)
    norms = positive(gram.diagonal().sqrt())
    tried = (scaled(weight, gram, input_scales(norms, alpha), config) for alpha in ALPHAS)
    return min(tried, key=lambda result: output_error(weight, result.dense(), gram))


def input_scales(norms: Tensor, alpha: float) -> Tensor:
    """The scales s = d^α, up to a factor, [n] float16.

    Args:
        norms: d up to a factor, [n], positive.
        alpha: between 0 and 1.
    """
    powers = (norms / norms.max()).pow(alpha)
    return (powers / (powers.max() * powers.min()).sqrt()).clamp(_SMALLEST, _LARGEST).half()


def scaled(weight: Tensor, gram: Tensor, scales: Tensor, config: CompressionConfig) -> QuantizedWeight:
    """Q(W · s) / s, with the clips that cost least.

    Args:
        weight: W, [m, n] float32.
        gram: G, [n, n].
        scales: s, [n] float16.
        config: `value_bits` and `group_size`.
    """
    s, size = scales.float(), config.group_size
    blocks = group_blocks(gram / s / s[:, None], size)

    def cost(lost: Tensor) -> Tensor:
        return (torch.einsum("mgi,gij->mgj", lost, blocks) * lost).sum(dim=-1)

    target = weight * s
    result = nearest(target, clipped_grids(target, config.value_bits, size, cost), config)
    return replace(result, input_scales=scales)


def group_blocks(gram: Tensor, group_size: int) -> Tensor:
    """The blocks of a Gram matrix, [n, n], along its diagonal: [⌈n / group_size⌉, group_size, group_size].

    What the last block lacks is zero.
    """
    blocks = gram.new_zeros(-(-len(gram) // group_size), group_size, group_size)
    for block, start in zip(blocks, range(0, len(gram), group_size), strict=True):
        part = gram[start : start + group_size, start : start + group_size]
        block[: len(part), : len(part)] = part
    return blocks
