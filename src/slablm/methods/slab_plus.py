"""`slab+`: SLaB with one symbol per weight (`alphabet`), found with error feedback and judged on held-out tokens.

With G = XᵀX the output error of a weight is tr (W − Ŵ) G (W − Ŵ)ᵀ.

1. *Alphabet.* Background, scales and levels by Lloyd's rounds on |W| (`alphabet_fit`), in FP16: from here on all
   numbers are those that are stored. Columns count by d_j, not d_j²: what a column with large inputs loses, others will
   make up for in part.
2. *Error feedback.* One column sweep (`sweep`) over the columns in order of falling d: each entry becomes the nearest
   of its 2 (L + 1) values, and the columns to come make up for the error.
3. *Refit.* v, then u and scales of each row together, by least squares (`alphabet_refit`).
4. *Descent.* `DESCENTS` times: every entry is looked at again with all others known (`descent`), then step 3 again.

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
from slablm.methods.alphabet import Alphabet, SymbolWeight, written
from slablm.methods.alphabet_fit import fit_alphabet
from slablm.methods.alphabet_refit import Draft, Problem, drafted, refit
from slablm.methods.budget import symbol_budget
from slablm.methods.decomposition import LayerStats
from slablm.methods.descent import descent_sweep
from slablm.methods.nearest_columns import nearest_columns
from slablm.methods.rotation import Rotation, largest_block
from slablm.methods.sweep import (
    BLOCK_SIZE,
    Block,
    Plan,
    check_finite,
    column_sweep,
    damped,
    positive,
    required_gram,
)
from slablm.methods.trials import output_error, trial_rows

# Shares of the mean diagonal that are added to G: little trust in G, and more.
DAMPINGS = (0.1, 0.01)
DESCENTS = 4


@dataclass(frozen=True)
class Way:
    """How a weight is approximated.

    Attributes:
        bits: p, bits of a symbol.
        group_size: columns that share a scale.
        rotation: of the inputs, or None.
        damping: share of the mean diagonal that is added to G.
    """

    bits: int
    group_size: int
    rotation: Rotation | None = None
    damping: float = DAMPINGS[0]


def slab_plus(weight: Tensor, stats: LayerStats, config: CompressionConfig) -> SymbolWeight:
    """Decompose one weight.

    Args:
        weight: W, [m, n]; computed in float32 whatever its dtype.
        stats: `gram`, and `held_out`, the Gram matrix of tokens that are not in `gram`. Without the latter nothing is
            chosen: inputs are not rotated, and the damping is the first.
        config: `bits_per_weight`, `group_size`, and `seed`, of a rotation's signs and of the rows that are tried.

    Raises:
        SlabError: the budget is too small; no Gram matrix, or none that can be factored; weights that are not finite,
            or do not fit into FP16.
    """
    weight, gram = weight.float(), required_gram(stats, "slab+").to(weight.device, torch.float32)
    m, n = weight.shape
    assert config.bits_per_weight is not None
    bits = symbol_budget((m, n), config.bits_per_weight, config.group_size).bits
    check_finite(gram)
    if not torch.isfinite(weight).all():
        raise SlabError("a weight holds infinity or NaN: load the model in float32, or ignore this layer")
    if not gram.any():
        # Without any input all errors are 0: let all entries count alike.
        gram = torch.eye(n, device=gram.device)
    if stats.held_out is None:
        return Trial.of(weight, gram, Way(bits, config.group_size)).descended()
    held_out = stats.held_out.to(gram)
    sample = weight[trial_rows(m, config.seed).to(weight.device)]

    def tried(way: Way) -> float:
        trial = Trial.of(sample, gram, way)
        return output_error(sample, trial.result(trial.draft).dense(), held_out)

    best = Trial.of(weight, gram, min(_ways(n, bits, config), key=tried))
    return min(best.descended(), best.plain(), key=lambda result: output_error(weight, result.dense(), held_out))


def _ways(n: int, bits: int, config: CompressionConfig) -> list[Way]:
    """What is tried."""
    block = largest_block(n)
    rotations = [None, Rotation(n, block, config.seed % 2**64)] if block > 1 else [None]
    return [Way(bits, config.group_size, rotation, damping) for rotation in rotations for damping in DAMPINGS]


@dataclass(frozen=True)
class Trial:
    """What came of steps 1 to 3.

    Attributes:
        problem: W and the damped G, both rotated.
        alphabet: of step 1.
        draft: of step 3.
        rotation: of the inputs.
    """

    problem: Problem
    alphabet: Alphabet
    draft: Draft
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
        alphabet = fit_alphabet(weight, positive(gram.diagonal().sqrt()), way.bits, way.group_size).stored()
        problem = Problem(weight, damped(gram, way.damping))
        draft = refit(problem, feedback(weight, gram, alphabet, way.damping))
        return cls(problem, alphabet, draft, way.rotation)

    def result(self, draft: Draft) -> SymbolWeight:
        """A draft as it is stored."""
        return written(draft.codes, draft.signs < 0, draft.alphabet, self.rotation)

    def plain(self) -> SymbolWeight:
        """Step 1 alone: every weight at its nearest value."""
        return self.result(drafted(rounded(self.problem.weight, self.alphabet), self.alphabet))

    def descended(self) -> SymbolWeight:
        """Step 4."""
        draft = self.draft
        for _ in range(DESCENTS):
            draft = refit(self.problem, descent(self.problem, draft))
        return self.result(draft)


def rounded(weight: Tensor, alphabet: Alphabet) -> Tensor:
    """Every entry of a weight at its nearest value, [m, n] float32."""
    return torch.copysign(alphabet.magnitudes(alphabet.nearest(weight.abs())), weight)


def feedback(weight: Tensor, gram: Tensor, alphabet: Alphabet, damping: float) -> Draft:
    """Step 2.

    Args:
        weight: W, [m, n] float32.
        gram: G, [n, n].
        alphabet: of step 1.
        damping: share of the mean diagonal that is added to G.
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    swept = column_sweep(weight[:, order], gram[order][:, order], _plan(alphabet, order), BLOCK_SIZE, damping)
    return drafted(swept[:, order.argsort()], alphabet)


def descent(problem: Problem, draft: Draft) -> Draft:
    """One sweep of coordinate descent."""
    alphabet = draft.alphabet
    order = torch.arange(alphabet.shape[1], device=problem.gram.device)
    return drafted(descent_sweep(problem.weight, draft.dense(), problem.gram, _plan(alphabet, order)), alphabet)


def _plan(alphabet: Alphabet, order: Tensor) -> Plan:
    """What the columns become in either sweep: entry by entry the nearest value.

    Args:
        alphabet: u, v, s and a.
        order: the column of the weight behind each column of the sweep, [n].
    """
    scales, groups, right = alphabet.scales.T.contiguous(), alphabet.groups()[order], alphabet.right[order]

    def plan(block: Block) -> tuple[Tensor, Tensor]:
        own = slice(block.start, block.start + len(block.divisors))
        settled: tuple[Tensor, Tensor] = nearest_columns(
            block.weight.T,
            block.before,
            block.coefficients,
            block.divisors,
            alphabet.left,
            right[own],
            scales,
            groups[own],
            alphabet.levels,
        )
        return settled

    return plan
