"""Refinement of one block: the numbers of its stored form, moved towards what the dense block does.

Every layer was fitted alone, to its own outputs; what follows depends on the block as a whole. With the dense block f,
the compressed one f̂, and hidden states x_t in front of it (those that the compressed blocks before produce), the loss
is the mean squared relative error behind the block,

    1 / tokens · Σ_t ‖f̂(x_t) − f(x_t)‖² / ‖f(x_t)‖²

(relative, since residual connections and norms make only that matter; see also `slablm.calibration.sensitivity`). Adam
lowers it in `STEPS` steps, one piece of text each. Positions and signs stay. What moves are u, v and the kept entries:

    u, v, scales, or values in 16 bits   x₀ exp(a): a step is in proportion to the number, and its sign stays
    codes of a grid                      real numbers that are rounded where they are used, while the gradient passes as
                                         if they were not (the straight-through estimator)

As with every fit to a few tokens, the outcome is tried on pieces that were held back, and kept only if it is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from slablm.calibration.activations import Activations
from slablm.errors import SlabError
from slablm.methods.decomposition import Decomposition
from slablm.methods.grid import SMALLEST_SCALE, ValueGrid
from slablm.methods.select import kept_columns
from slablm.packing import PackedWeight, pack

STEPS = 128
WARM_UP = 8
# Step sizes at their largest: of exponents, and of codes.
RATE, CODE_RATE = 6e-3, 6e-2
_BETAS = (0.9, 0.95)
# One piece in so many decides whether the outcome is kept.
HELD_OUT_SHARE = 9

Run = Callable[[dict[str, Tensor], Tensor], Tensor]


def refine(
    packed: dict[str, PackedWeight], run: Run, inputs: Activations, outputs: Activations, seed: int
) -> dict[str, PackedWeight]:
    """Refine the layers of one block together.

    Args:
        packed: its packed weights by name.
        run: the block: (weights by name [m, n] float32, hidden states in front) → hidden states behind,
            [1, tokens, hidden_size]; differentiable in the weights.
        inputs: hidden states in front of the block, one per piece.
        outputs: those behind the dense block.
        seed: of the order of the pieces.

    Returns:
        Packed weights of the same sizes: the refined ones, or those given if they are no better on the pieces that were
        held back, or have diverged, or if there are too few pieces to hold one back.
    """
    trained = len(inputs) - max(1, len(inputs) // HELD_OUT_SHARE)
    if not packed or trained < 1:
        return packed

    def loss(weights: dict[str, Tensor], piece: int) -> Tensor:
        wanted = outputs[piece].float()
        difference = run(weights, inputs[piece]).float() - wanted
        size = wanted.square().sum(dim=-1)
        # A token without an output, such as padding, has no relative error.
        return (difference.square().sum(dim=-1) / size.where(size > 0, torch.inf)).mean()

    def held_out_loss(candidate: dict[str, PackedWeight]) -> float:
        weights = {name: weight.dense() for name, weight in candidate.items()}
        return sum(loss(weights, piece).item() for piece in range(trained, len(inputs)))

    movable = {name: _Movable(weight.unpack()) for name, weight in packed.items()}
    _descend(movable, loss, _order(trained, seed))
    try:
        refined = {name: pack(movable[name].rounded(), weight.left.dtype, name) for name, weight in packed.items()}
    except SlabError:  # it has diverged: a number does not fit into its type
        return packed
    return refined if held_out_loss(refined) < held_out_loss(packed) else packed


def _order(pieces: int, seed: int) -> list[int]:
    """Which piece each step sees: all of them, shuffled, before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(pieces, generator=generator) for _ in range(-(-STEPS // pieces))]
    order: list[int] = torch.cat(rounds)[:STEPS].tolist()
    return order


@torch.enable_grad()
def _descend(movable: dict[str, _Movable], loss: Callable[[dict[str, Tensor], int], Tensor], order: list[int]) -> None:
    """Adam, with a short warm-up and a cosine decay to zero."""
    numbers = [number for weight in movable.values() for number in weight.numbers]
    codes = [weight.codes for weight in movable.values() if weight.codes is not None]
    groups = [{"params": numbers, "lr": RATE}, {"params": codes, "lr": CODE_RATE}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], betas=_BETAS)

    def share(step: int) -> float:
        return min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / len(order))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    moved = numbers + codes
    for piece in order:
        value = loss({name: weight.current().dense() for name, weight in movable.items()}, piece)
        # Not `backward`: the block has parameters of its own, which get no gradients.
        for number, gradient in zip(moved, torch.autograd.grad(value, moved), strict=True):
            number.grad = gradient
        optimizer.step()
        schedule.step()


class _Movable:
    """A decomposition whose numbers can be moved.

    Args:
        start: as `PackedWeight.unpack` gives it.

    Attributes:
        numbers: exponents a, of u, v, and scales or values.
        codes: [m, k] float32; None without a grid.
    """

    def __init__(self, start: Decomposition) -> None:
        self._start = start
        grid = start.grid
        kept = start.values if grid is None else grid.scales
        self._left, self._right, self._kept = exponents = [
            torch.zeros(tensor.shape, device=tensor.device, requires_grad=True)
            for tensor in (start.left, start.right, kept)
        ]
        self.numbers = [tensor for tensor in exponents if tensor.numel()]  # there need not be factors
        self.codes: Tensor | None = None
        if grid is not None:
            self._columns = kept_columns(start.mask, start.kept)
            self.codes = grid.codes(start.values.float().abs(), self._columns).float().requires_grad_()

    def current(self) -> Decomposition:
        """The decomposition now, in float32 and differentiable."""
        start, grid = self._start, self._start.grid
        left, right = start.left.float() * self._left.exp(), start.right.float() * self._right.exp()
        if grid is None:
            return replace(start, left=left, right=right, values=start.values.float() * self._kept.exp())
        scales = (grid.scales.float() * self._kept.exp()).clamp_min(SMALLEST_SCALE)
        grid = replace(grid, scales=scales)
        return replace(start, left=left, right=right, values=self._on(grid), grid=grid)

    @torch.no_grad()
    def rounded(self) -> Decomposition:
        """The decomposition now, with scales as they are stored."""
        result = self.current()
        if result.grid is None:
            return result
        grid = replace(result.grid, scales=result.grid.scales.half())
        return replace(result, values=self._on(grid), grid=grid)

    def _on(self, grid: ValueGrid) -> Tensor:
        """Kept entries with the codes of now on a grid."""
        assert self.codes is not None
        codes = self.codes + (self.codes.round().clamp(0, 2**grid.bits - 1) - self.codes).detach()
        return torch.copysign(grid.magnitudes(codes, self._columns), self._start.values.float())
