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

import torch
from torch import Tensor

from slablm.config import CompressionConfig
from slablm.errors import SlabError
from slablm.methods.budget import symbol_budget
from slablm.methods.decomposition import LayerStats
from slablm.methods.descent import descent_sweep
from slablm.methods.rotation import Rotation, largest_block
from slablm.methods.sweep import (
    BLOCK_SIZE,
    Block,
    check_finite,
    column_sweep,
    damped,
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


@dataclass(frozen=True)
class Way:
    """How a weight is approximated.

    Attributes:
        bits: p, bits of a symbol.
        rotation: of the inputs, or None.
        damping: share of the mean diagonal that is added to G.
    """

    bits: int
    rotation: Rotation | None = None
    damping: float = DAMPINGS[0]


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
        return Trial.of(weight, gram, Way(bits)).descended()
    held_out = stats.held_out.to(gram)
    sample = weight[trial_rows(m, config.seed).to(weight.device)]

    def tried(way: Way) -> float:
        trial = Trial.of(sample, gram, way)
        return output_error(sample, trial.result().dense(), held_out)

    best = Trial.of(weight, gram, min(_ways(n, bits, config), key=tried))
    return min(best.descended(), best.plain(), key=lambda result: output_error(weight, result.dense(), held_out))


def _ways(n: int, bits: int, config: CompressionConfig) -> list[Way]:
    """What is tried."""
    block = largest_block(n)
    rotations = [None, Rotation(n, block, config.seed % 2**64)] if block > 1 else [None]
    return [Way(bits, rotation, damping) for rotation in rotations for damping in DAMPINGS]


@dataclass(frozen=True)
class Trial:
    """What came of steps 1 to 3.

    Attributes:
        problem: W and the damped G, both rotated.
        first: the alphabet of step 1.
        codes: symbols, [m, n] uint8.
        alphabet: with the scales of step 3.
        rotation: of the inputs.
    """

    problem: Problem
    first: Alphabet
    codes: Tensor
    alphabet: Alphabet
    rotation: Rotation | None

    @classmethod
    def of(cls, weight: Tensor, gram: Tensor, way: Way) -> Trial:
        """Steps 1 to 3.

        Args:
            weight: W, [m, n] float32.
            gram: G, [n, n] float32.
            way: how.
        """
        if way.rotation is not None:
            weight, gram = way.rotation.rotate(weight), way.rotation.rotate_gram(gram)
        first = fit_alphabet(weight, positive(gram.diagonal().sqrt()), way.bits)
        codes = feedback(weight, gram, first, way.damping)
        problem = Problem(weight, damped(gram, way.damping))
        return cls(problem, first, codes, refit(problem, codes, first), way.rotation)

    def result(self) -> SymbolWeight:
        """What there is now, as it is stored."""
        return self._written(self.codes, self.alphabet)

    def plain(self) -> SymbolWeight:
        """Step 1 alone: every weight at its nearest value."""
        codes = nearest_symbols(self.problem.weight, self.first.scales, self.first.values())
        return self._written(codes, self.first)

    def descended(self) -> SymbolWeight:
        """Step 4."""
        codes, alphabet = self.codes, self.alphabet
        for _ in range(DESCENTS):
            codes = descent(self.problem, codes, alphabet)
            alphabet = refit(self.problem, codes, alphabet)
        return self._written(codes, alphabet)

    def _written(self, codes: Tensor, alphabet: Alphabet) -> SymbolWeight:
        return SymbolWeight(codes, alphabet.scales.half(), alphabet.levels, self.rotation)


def feedback(weight: Tensor, gram: Tensor, alphabet: Alphabet, damping: float) -> Tensor:
    """Step 2: symbols, [m, n] uint8.

    Args:
        weight: W, [m, n] float32.
        gram: G, [n, n].
        alphabet: of step 1.
        damping: share of the mean diagonal that is added to G.
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    coder = Coder(alphabet)
    column_sweep(weight[:, order], gram[order][:, order], coder, BLOCK_SIZE, damping)
    return coder.codes()[:, order.argsort()]


def descent(problem: Problem, codes: Tensor, alphabet: Alphabet) -> Tensor:
    """One sweep of coordinate descent: symbols, [m, n] uint8."""
    coder = Coder(alphabet)
    descent_sweep(problem.weight, alphabet.dense(codes), problem.gram, coder)
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
