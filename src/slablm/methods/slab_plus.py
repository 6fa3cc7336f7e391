"""`slab+`: one symbol per weight (`symbols`), found with error feedback in a trellis and judged on held-out tokens.

With G = XᵀX the output error of a weight is tr (W − Ŵ) G (W − Ŵ)ᵀ.

1. *Alphabet.* Scales and levels by Lloyd's rounds (`symbols_fit`), as they are stored: from here on all numbers are
   those that a reader will find. Columns count by d_j, not d_j²: what a column with large inputs loses, others will
   make up for in part.
2. *Error feedback.* One column sweep (`sweep`) over the columns in order of falling d: the entries of a column become
   what is nearest to them together (`trellis`), and the columns to come make up for the error.
3. *Refit.* The scale of each row, by least squares.
4. *Descent.* `DESCENTS` times: every column is looked at again with all others known (`descent`), then step 3 again.

G is an estimate from some tokens, and feedback fits their noise too. So two things are left to tokens that were held
back (`trials`): on some rows, steps 1 to 3 are tried with the inputs rotated (`rotation`) and not, and with each of
`DAMPINGS` added to G; what has the smallest error is done with all rows. The result is that, unless step 1 alone is
better: on those tokens feedback never does harm.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from slablm.config import CompressionConfig
from slablm.errors import SlabError
from slablm.methods.budget import symbol_budget
from slablm.methods.decomposition import LayerStats
from slablm.methods.descent import descent_sweep
from slablm.methods.rotation import Rotation, largest_block
from slablm.methods.sweep import (
    Block,
    Factor,
    check_finite,
    column_sweep,
    damped,
    factored,
    falling,
    positive,
    required_gram,
)
from slablm.methods.symbols import SymbolWeight
from slablm.methods.symbols_fit import Alphabet, Problem, fit_alphabet, nearest_symbols, refit
from slablm.methods.trellis import trellis_columns
from slablm.methods.trials import output_error, trial_rows

# Shares of the mean diagonal that are added to G: little trust in G, and more.
DAMPINGS = (0.1, 0.01)
DESCENTS = 4


def slab_plus(weight: Tensor, stats: LayerStats, config: CompressionConfig) -> SymbolWeight:
    """Decompose one weight.

    Args:
        weight: W, [m, n]; computed in float32 whatever its dtype.
        stats: `gram`, and `held_out`, the Gram matrix of tokens that are not in `gram`. Without the latter nothing is
            chosen: inputs are not rotated, and the damping is the first.
        config: `bits_per_weight`, and `seed`, of a rotation's signs and of the rows that are tried.

    Raises:
        SlabError: the budget is too small; no Gram matrix, or none that can be factored; weights that are not finite,
            or do not fit into FP16.
    """
    weight, gram = weight.float(), required_gram(stats, "slab+").to(weight.device, torch.float32)
    m, n = weight.shape
    assert config.bits_per_weight is not None
    bits = symbol_budget((m, n), config.bits_per_weight).bits
    check_finite(gram)
    if not torch.isfinite(weight).all():
        raise SlabError("a weight holds infinity or NaN: load the model in float32, or ignore this layer")
    if not gram.any():
        # Without any input all errors are 0: let all entries count alike.
        gram = torch.eye(n, device=gram.device)
    if stats.held_out is None:
        return Trial.of(Start.of(weight, Inputs(stats, gram), bits), DAMPINGS[0]).descended()
    held_out = stats.held_out.to(gram)
    sample = weight[trial_rows(m, config.seed).to(weight.device)]
    least, best = float("inf"), (Inputs(stats, gram), DAMPINGS[0])
    for rotation in _rotations(n, config.seed):
        inputs = Inputs.of(stats, gram, rotation)
        start = Start.of(sample, inputs, bits)
        for damping in DAMPINGS:
            error = output_error(sample, Trial.of(start, damping).result().dense(), held_out)
            if error < least:
                least, best = error, (inputs, damping)
        del inputs, start  # as large as G, and of use only where they are the best
    trial = Trial.of(Start.of(weight, best[0], bits), best[1])
    return min(trial.descended(), trial.plain(), key=lambda result: output_error(weight, result.dense(), held_out))


def _rotations(n: int, seed: int) -> list[Rotation | None]:
    """Of the inputs, that are tried."""
    block = largest_block(n)
    return [None, Rotation(n, block, seed % 2**64)] if block > 1 else [None]


@dataclass(frozen=True)
class Inputs:
    """What is known of inputs, as they are or rotated.

    Attributes:
        stats: of the inputs as they are; what is made here of `gram` alone is kept there.
        gram: G, rotated as the inputs are, [n, n] float32.
        rotation: of the inputs, or None.
    """

    stats: LayerStats
    gram: Tensor
    rotation: Rotation | None = None

    @classmethod
    def of(cls, stats: LayerStats, gram: Tensor, rotation: Rotation | None) -> Inputs:
        """Rotate inputs.

        Args:
            stats: of the inputs as they are.
            gram: G of the inputs as they are, [n, n] float32.
            rotation: of them, or None.
        """
        if rotation is not None:
            gram = stats.once(("rotated", rotation), partial(rotation.rotate_gram, gram))
        return cls(stats, gram, rotation)

    def factor(self, order: Tensor, damping: float) -> Factor:
        """Of G.

        Args:
            order: `falling`, that of its columns.
            damping: share of the mean diagonal that is added to G.
        """

        def make() -> Factor:
            return factored(self.gram[order][:, order], damping)

        return self.stats.once(("factor", self.rotation, damping), make)


@dataclass(frozen=True)
class Start:
    """Step 1, and what the steps behind it work on.

    Attributes:
        weight: W, rotated as the inputs are, [m, n] float32.
        inputs: what is known of them.
        alphabet: scales and levels.
    """

    weight: Tensor
    inputs: Inputs
    alphabet: Alphabet

    @classmethod
    def of(cls, weight: Tensor, inputs: Inputs, bits: int) -> Start:
        """Step 1.

        Args:
            weight: W, [m, n] float32.
            inputs: what is known of them.
            bits: p, bits of a symbol.
        """
        if inputs.rotation is not None:
            weight = inputs.rotation.rotate(weight)
        return cls(weight, inputs, fit_alphabet(weight, positive(inputs.gram.diagonal().sqrt()), bits))


@dataclass(frozen=True)
class Trial:
    """What came of steps 1 to 3.

    Attributes:
        start: step 1.
        problem: W and the damped G.
        codes: symbols, [m, n] uint8.
        alphabet: with the scales of step 3.
        residual: (W − Ŵ) G, [m, n] float32.
    """

    start: Start
    problem: Problem
    codes: Tensor
    alphabet: Alphabet
    residual: Tensor

    @classmethod
    def of(cls, start: Start, damping: float) -> Trial:
        """Steps 2 and 3.

        Args:
            start: step 1.
            damping: share of the mean diagonal that is added to G.
        """
        codes = feedback(start, damping)
        problem = Problem(start.weight, damped(start.inputs.gram, damping))
        return cls(start, problem, codes, *refit(problem, codes, start.alphabet))

    def result(self) -> SymbolWeight:
        """What there is now, as it is stored."""
        return self._written(self.codes, self.alphabet)

    def plain(self) -> SymbolWeight:
        """Step 1 alone: every weight at its nearest value."""
        first = self.start.alphabet
        return self._written(nearest_symbols(self.start.weight, first.scales, first.values()), first)

    def descended(self) -> SymbolWeight:
        """Step 4."""
        codes, alphabet, residual = self.codes, self.alphabet, self.residual
        for _ in range(DESCENTS):
            codes = descent(self.problem.gram, codes, alphabet, residual)
            alphabet, residual = refit(self.problem, codes, alphabet)
        return self._written(codes, alphabet)

    def _written(self, codes: Tensor, alphabet: Alphabet) -> SymbolWeight:
        return SymbolWeight(codes, alphabet.scales.half(), alphabet.levels, self.start.inputs.rotation)


def feedback(start: Start, damping: float) -> Tensor:
    """Step 2: symbols, [m, n] uint8.

    Args:
        start: step 1.
        damping: share of the mean diagonal that is added to G.
    """
    order, coder = falling(start.inputs.gram), Coder(start.alphabet)
    column_sweep(start.weight[:, order], start.inputs.factor(order, damping), coder)
    return coder.codes()[:, order.argsort()]


def descent(gram: Tensor, codes: Tensor, alphabet: Alphabet, residual: Tensor) -> Tensor:
    """One sweep of coordinate descent: symbols, [m, n] uint8.

    Args:
        gram: the damped G, [n, n].
        codes: symbols so far, [m, n] uint8.
        alphabet: scales and levels.
        residual: (W − Ŵ) G of both, [m, n] float32.
    """
    coder = Coder(alphabet)
    descent_sweep(residual, alphabet.dense(codes), gram, coder)
    return coder.codes()


class Coder:
    """What the columns become in either sweep, a `Plan`: the nearest values. The symbols are kept.

    Args:
        alphabet: scales and levels.
    """

    def __init__(self, alphabet: Alphabet) -> None:
        self._scales, self._levels = alphabet.scales, alphabet.values()
        self._codes: list[Tensor] = []

    def __call__(self, block: Block) -> tuple[Tensor, Tensor]:
        """Settle the next block of columns."""
        given = block.weight.T, block.before, block.coefficients, block.divisors
        codes, columns, errors = trellis_columns(*given, self._scales, self._levels)
        self._codes.append(codes)
        return columns, errors

    def codes(self) -> Tensor:
        """The symbols of all blocks, in the order of the sweep, [m, n] uint8."""
        return torch.cat(self._codes).T.contiguous()
