"""SLaB with one symbol per weight (`alphabet`), found with error feedback and judged on held-out tokens.

With G = XᵀX the output error of a weight is tr (W − Ŵ) G (W − Ŵ)ᵀ.

1. *Alphabet.* Background, scales and levels by Lloyd's rounds on |W| (`symbols_fit`), in FP16: from here on all numbers
   are those that are stored. Columns count by d_j, not d_j²: what a column with large inputs loses, others will make up
   for in part.
2. *Error feedback.* One column sweep (`sweep`) over the columns in order of falling d: each entry becomes the nearest
   of its 2 (L + 1) values, and the columns to come make up for the error.
3. *Refit.* v, then u and scales of each row together, by least squares (`symbols_refit`).
4. *Held-out choice.* G is an estimate from some tokens; feedback fits their noise too. Steps 1 to 3 are tried with each
   rotation of the inputs (`rotation`) that is given, or none, and with each of `DAMPINGS` added to G; what has the
   smallest error on tokens that were held back goes on.
5. *Descent.* `DESCENTS` times: every entry is looked at again with all others known (`descent`), then step 3 again. The
   result is that, unless on the tokens held back step 1 alone is better: there feedback never does harm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slablm.config import CompressionConfig
from slablm.errors import SlabError
from slablm.methods.alphabet import FEWEST_BITS, MOST_BITS, Alphabet, SymbolWeight, nearest_level, written
from slablm.methods.decomposition import LayerStats
from slablm.methods.descent import descent_sweep
from slablm.methods.rotation import Rotation, largest_block
from slablm.methods.slab_plus import damped, positive
from slablm.methods.sweep import BLOCK_SIZE, Block, Plan, check_finite, column_sweep, required_gram
from slablm.methods.symbols_fit import fit_alphabet
from slablm.methods.symbols_refit import Draft, Problem, drafted, refit

# Shares of the mean diagonal that are added to G: little trust in G, and more.
DAMPINGS = (0.1, 0.01)
DESCENTS = 4


def symbols(
    weight: Tensor,
    stats: LayerStats,
    bits: int,
    group_size: int = 128,
    rotations: Sequence[Rotation | None] = (None,),
) -> SymbolWeight:
    """Decompose one weight.

    Args:
        weight: W, [m, n]; computed in float32 whatever its dtype.
        stats: `gram`, and `held_out`, the Gram matrix of tokens that are not in `gram`. Without the latter nothing is
            chosen: the result is that of the first rotation and the first damping.
        bits: p, bits of a symbol, 2 to 5.
        group_size: columns that share a scale.
        rotations: of the inputs, that are tried; None for none.

    Raises:
        SlabError: no Gram matrix, or none that can be factored; weights that are not finite, or do not fit into FP16.
    """
    if not FEWEST_BITS <= bits <= MOST_BITS:
        raise SlabError(f"symbols have {FEWEST_BITS} to {MOST_BITS} bits, not {bits}")
    weight, gram = weight.float(), required_gram(stats, "symbols").to(weight.device, torch.float32)
    check_finite(gram)
    if not torch.isfinite(weight).all():
        raise SlabError("a weight holds infinity or NaN: load the model in float32, or ignore this layer")
    if not gram.any():
        # Without any input all errors are 0: let all entries count alike.
        gram = torch.eye(len(gram), device=gram.device)
    trials = (trial for rotation in rotations for trial in _trials(weight, gram, bits, group_size, rotation))
    if stats.held_out is None:
        return next(trials).descended()
    judge = Problem(weight, stats.held_out.to(gram))
    # One after the other, and only the best is kept: each holds matrices of its own.
    best = min(trials, key=lambda trial: judge.error(trial.result(trial.draft).dense()))
    return min(best.descended(), best.plain(), key=lambda result: judge.error(result.dense()))


def plain_symbols(weight: Tensor, stats: LayerStats, config: CompressionConfig) -> SymbolWeight:
    """`symbols` as a method: bits and group size from `value_bits` and `group_size`, no rotation."""
    return symbols(weight, stats, config.value_bits, config.group_size)


def rotated_symbols(weight: Tensor, stats: LayerStats, config: CompressionConfig) -> SymbolWeight:
    """The same with the inputs rotated in the largest blocks there are; the signs come from `seed`."""
    required_gram(stats, "symbols-rotated")
    n = weight.shape[1]
    rotation = Rotation(n, largest_block(n), config.seed % 2**64)
    return symbols(weight, stats, config.value_bits, config.group_size, (rotation,))


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

    def result(self, draft: Draft) -> SymbolWeight:
        """A draft as it is stored."""
        return written(draft.codes, draft.signs < 0, draft.alphabet, self.rotation)

    def plain(self) -> SymbolWeight:
        """Step 1 alone: every weight at its nearest value."""
        return self.result(drafted(rounded(self.problem.weight, self.alphabet), self.alphabet))

    def descended(self) -> SymbolWeight:
        """Step 5."""
        draft = self.draft
        for _ in range(DESCENTS):
            draft = refit(self.problem, descent(self.problem, draft))
        return self.result(draft)


def _trials(weight: Tensor, gram: Tensor, bits: int, group_size: int, rotation: Rotation | None) -> Iterator[Trial]:
    """Steps 1 to 3 with each damping; arguments as of `symbols`."""
    if rotation is not None:
        weight, gram = rotation.rotate(weight), rotation.rotate_gram(gram)
    alphabet = fit_alphabet(weight, positive(gram.diagonal().sqrt()), bits, group_size).stored()
    for damping in DAMPINGS:
        problem = Problem(weight, damped(gram, damping))
        yield Trial(problem, alphabet, refit(problem, feedback(weight, gram, alphabet, damping)), rotation)


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
    """What a column becomes in either sweep: entry by entry the nearest value.

    Args:
        alphabet: u, v, s and a.
        order: the column of the weight behind each column of the sweep, [n].
    """
    scales, levels = alphabet.scales.T.contiguous(), alphabet.levels
    groups, right = alphabet.groups()[order].tolist(), alphabet.right[order].tolist()

    def plan(block: Block) -> Callable[[int], Tensor]:
        def replace_column(j: int) -> Tensor:
            column, at = block.weight[:, j], block.start + j
            background = alphabet.left * right[at]
            keep, _, kept = nearest_level(column.abs(), background, scales[groups[at]], levels)
            return torch.where(keep, kept, background).copysign_(column)

        return replace_column

    return plan
