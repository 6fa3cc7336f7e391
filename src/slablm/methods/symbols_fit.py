"""Levels and scales of a weight in symbols.

**Before there are symbols**, by Lloyd's rounds (Lloyd 1982) on the entries, with h_j how much an error in column j
counts. A round takes each part in turn with the others known, and none raises Σ h_j (W_ij − τ_ij s_i a_c)²:

- symbols:  those of every column that are nearest (`trellis`);
- levels:   a_c = Σ h τ s W / Σ h s²  over the entries with symbol c, in the whole weight;
- scales:   s_i = Σ h τ a W / Σ h a²  over the entries of a row.

Of the entries, both need no more than Σ h τ W and Σ h over those of each row with each symbol (`symbol_sums`): P_ic and
H_ic, say, with which  a_c = Σ_i s_i P_ic / Σ_i s_i² H_ic  and  s_i = Σ_c a_c P_ic / Σ_c a_c² H_ic.

What has no entries keeps what it has. The levels to begin with are those whose union with their negatives lies evenly
in quantiles of a normal distribution √2 wider than the entries: of all widths tried, the one with the best end.

**With all symbols fixed** the output error tr (W − Ŵ) G (W − Ŵ)ᵀ, G = XᵀX, is a parabola in each scale. With p the row
of τ a, its minimum is  s_i = (w G pᵀ) / (p G pᵀ). The product with G that this takes is that of the residual,
D = (W − Ŵ) G: then Ŵ G = W G − D, and with scales s' for s the residual's becomes D − (s'/s − 1) Ŵ G, which is what
the next sweep begins with.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from slablm.errors import SlabError
from slablm.methods.symbols import TILE_ROWS, level_values, on_grid, patterns, signs
from slablm.methods.trellis import nearest_codes, trellis_columns

ROUNDS = 10


@dataclass(frozen=True)
class Problem:
    """What is approximated, and how errors count.

    Attributes:
        weight: W, [m, n] float32.
        gram: G, [n, n] float32, positive definite.
    """

    weight: Tensor
    gram: Tensor

    @cached_property
    def pull(self) -> Tensor:
        """W G, [m, n]."""
        return self.weight @ self.gram


@dataclass(frozen=True)
class Alphabet:
    """The magnitudes that symbols stand for, as they are stored.

    Attributes:
        scales: s, [m] float32, each an FP16 number.
        levels: q, [2^p] int8.
    """

    scales: Tensor
    levels: Tensor

    def values(self) -> Tensor:
        """The levels a, [2^p] float32."""
        return level_values(self.levels)

    def dense(self, codes: Tensor) -> Tensor:
        """Ŵ for symbols c, [m, n]: float32."""
        return self.scales[:, None] * patterns(codes, self.values())


def fit_alphabet(weight: Tensor, importance: Tensor, bits: int) -> Alphabet:
    """Levels and scales after `ROUNDS` rounds.

    Args:
        weight: W, [m, n] float32.
        importance: h, how much an error in a column counts, [n], positive.
        bits: p, bits of a symbol.

    Raises:
        SlabError: a scale does not fit into FP16.
    """
    # Relative, so that its scale cannot overflow, nor change the result.
    importance = importance / importance.max()
    quantiles = (torch.arange(2**bits, device=weight.device) + 0.25) / 2**bits
    levels = 2 * torch.erfinv(2 * quantiles - 1)
    scales = weight.square().mean(dim=1).sqrt()
    for _ in range(ROUNDS):
        codes = nearest_symbols(weight, scales, levels)
        products, shares = symbol_sums(weight * signs(codes), importance, codes, len(levels))
        levels = _fitted_levels(products, shares, scales, levels)
        scales = _quotient(products @ levels, shares @ levels.square(), scales).clamp_min(0)
    grid, factor = on_grid(levels)
    return Alphabet(stored_scales(scales * factor), grid)


def nearest_symbols(weight: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """The nearest symbols of every entry, [m, n] uint8.

    Args:
        weight: W, [m, n] float32.
        scales: s, [m] float32.
        levels: a, [2^p] float32, those of either parity ascending.
    """
    m, n = weight.shape
    whole = m - m % TILE_ROWS
    # All columns of whole tiles are one column of as many tiles more.
    column, one = weight[:whole].T.reshape(1, -1), weight.new_ones(1)
    codes, _, _ = trellis_columns(column, None, one[None], one, scales[:whole].repeat(n), levels)
    rest, _ = nearest_codes(weight[whole:].T, scales[whole:], levels)
    return torch.cat([codes.view(n, whole), rest], dim=1).T.contiguous()


def plain_symbol_sums(signed: Tensor, importance: Tensor, codes: Tensor, symbols: int) -> tuple[Tensor, Tensor]:
    """What the entries of each row with each symbol add up to.

    One symbol after the other: adding up wherever a symbol leads would take another order each time on some devices.

    Args:
        signed: τ W, [m, n] float32.
        importance: h, [n] float32.
        codes: symbols c, [m, n] uint8.
        symbols: 2^p.

    Returns:
        Σ h τ W and Σ h, both [m, 2^p].
    """
    products, shares = (signed.new_empty(len(signed), symbols) for _ in range(2))
    for c in range(symbols):
        chosen = (codes == c).to(signed.dtype)
        shares[:, c] = chosen @ importance
        products[:, c] = chosen.mul_(signed) @ importance
    return products, shares


symbol_sums = torch.library.custom_op("slablm::symbol_sums", plain_symbol_sums, mutates_args=())


def _fitted_levels(products: Tensor, shares: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """The best levels for these `symbol_sums` and scales."""
    fitted = _quotient(scales @ products, scales.square() @ shares, levels)
    # Those of one parity are means over intervals that follow each other, but for what has no entries.
    return fitted.view(-1, 2).sort(dim=0).values.flatten()


def refit(problem: Problem, codes: Tensor, alphabet: Alphabet) -> tuple[Alphabet, Tensor]:
    """The best scales for symbols c, [m, n] uint8, on the output error, rounded to FP16.

    Returns:
        The alphabet with these scales, and (W − Ŵ) G, [m, n] float32.

    Raises:
        SlabError: a scale does not fit into FP16.
    """
    approximation = alphabet.dense(codes)
    residual = (problem.weight - approximation) @ problem.gram
    image = problem.pull - residual
    # Of ŵ = s p, so that the quotient is that of the new scale to the old one. A scale has no sign: a row that is
    # better at zero is zero.
    products, squares = (problem.pull * approximation).sum(dim=1), (image * approximation).sum(dim=1)
    factors = _quotient(products, squares, torch.ones_like(products)).clamp_min(0)
    scales = stored_scales(alphabet.scales * factors)
    # As stored, rounded.
    factors = _quotient(scales, alphabet.scales, torch.ones_like(scales))
    return Alphabet(scales, alphabet.levels), residual.sub_(image.mul_(factors[:, None] - 1))


def stored_scales(scales: Tensor) -> Tensor:
    """Rounded to FP16, still float32.

    Raises:
        SlabError: one does not fit.
    """
    halves = scales.half()
    if not torch.isfinite(halves).all():
        raise SlabError("a weight does not fit into FP16 scales: ignore this layer")
    return halves.float()


def _quotient(products: Tensor, squares: Tensor, otherwise: Tensor) -> Tensor:
    """The least-squares factor; what has no entries keeps what it has."""
    return torch.where(squares > 0, products / squares, otherwise)
