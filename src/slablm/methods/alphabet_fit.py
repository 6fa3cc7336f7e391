"""The first alphabet of a weight: Lloyd's rounds on its magnitudes.

What is minimised is Σ h_j (|W_ij| − m_ij)², m_ij = u_i v_j or s_ig a_c: signs are free, so those of W are the best. A
round takes each part in turn with the others known (Lloyd 1982, with a scale per group and one level that is low-rank):

- levels:      a_c = Σ h s |W| / Σ h s²  over the entries with index c, in the whole weight;
- scales:      s_ig = Σ h a |W| / Σ h a²  over the entries of a row and a group whose index is not 0;
- background:  u_i = Σ h v |W| / Σ h v²  and  v_j = Σ u |W| / Σ u²  over the entries with index 0: a step of a power
               iteration in which the other entries are missing;
- indices:     each entry takes its nearest magnitude.

No part raises the error. What has no entries keeps what it has. Levels stay in order: those of a round are means over
intervals of |W| / s that follow each other.

The first indices come from |W| over the root mean square of its group, cut as is best for normally distributed weights
and many levels: a cell is narrow where the density is high, with width ∝ density^(−1/3) (Panter and Dite 1951), and
the cube root of a normal density is one that is √3 wider.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from slablm.methods.alphabet import Alphabet, level_count

ROUNDS = 10


def fit_alphabet(weight: Tensor, importance: Tensor, bits: int, group_size: int) -> Alphabet:
    """The alphabet after `ROUNDS` rounds, [m, n] float32, not yet rounded to FP16.

    Args:
        weight: W, [m, n] float32.
        importance: h, how much an error in a column counts, [n], positive.
        bits: p, bits of a symbol.
        group_size: columns that share a scale.
    """
    sizes = weight.abs()
    alphabet, codes = _start(sizes, bits, group_size)
    # Relative, so that its scale cannot overflow, nor change the result.
    importance = importance / importance.max()
    for _ in range(ROUNDS):
        alphabet = fitted_levels(sizes, importance, codes, alphabet)
        alphabet = fitted_scales(sizes, importance, codes, alphabet)
        alphabet = fitted_background(sizes, importance, codes, alphabet)
        codes = alphabet.nearest(sizes)
    return alphabet


def _start(sizes: Tensor, bits: int, group_size: int) -> tuple[Alphabet, Tensor]:
    """An alphabet to fit from, and the first indices."""
    m, n = sizes.shape
    padded = functional.pad(sizes.square(), (0, -n % group_size)).view(m, -1, group_size)
    counts = functional.pad(sizes.new_ones(n), (0, -n % group_size)).view(-1, group_size).sum(dim=1)
    count = level_count(bits)
    cuts = 6**0.5 * torch.erfinv(torch.arange(1, count + 1, device=sizes.device) / (count + 1))
    left = sizes.square().mean(dim=1).sqrt()
    scales = (padded.sum(dim=2) / counts).sqrt()
    alphabet = Alphabet(left, sizes.new_ones(n), scales, cuts, group_size)
    relative = sizes / alphabet.wide_scales().clamp_min(torch.finfo(sizes.dtype).tiny)
    return alphabet, torch.bucketize(relative, cuts).to(torch.uint8)


def fitted_levels(sizes: Tensor, importance: Tensor, codes: Tensor, alphabet: Alphabet) -> Alphabet:
    """The best levels for these indices and scales.

    Args:
        sizes: |W|, [m, n] float32.
        importance: h, [n].
        codes: c, [m, n] uint8.
        alphabet: what the rest is.
    """
    scales = alphabet.wide_scales()
    weighted = scales * importance
    products, squares = weighted * sizes, weighted.mul_(scales)
    levels = alphabet.levels.clone()
    for c in range(1, len(levels) + 1):
        chosen = (codes == c).to(sizes.dtype)
        levels[c - 1] = _quotient((products * chosen).sum(), (squares * chosen).sum(), levels[c - 1])
    return replace(alphabet, levels=levels)


def fitted_scales(sizes: Tensor, importance: Tensor, codes: Tensor, alphabet: Alphabet) -> Alphabet:
    """The best scales for these indices and levels; arguments as of `fitted_levels`."""
    m, n = sizes.shape
    levels = functional.pad(alphabet.levels, (1, 0))[codes.long()]
    weighted = levels * importance
    products, squares = (
        functional.pad(terms, (0, -n % alphabet.group_size)).view(m, -1, alphabet.group_size).sum(dim=2)
        for terms in (weighted * sizes, weighted * levels)
    )
    return replace(alphabet, scales=_quotient(products, squares, alphabet.scales))


def fitted_background(sizes: Tensor, importance: Tensor, codes: Tensor, alphabet: Alphabet) -> Alphabet:
    """The best u, then the best v, for these indices; arguments as of `fitted_levels`."""
    inside = (codes == 0).to(sizes.dtype)
    sizes, right = sizes * inside, alphabet.right
    left = _quotient(sizes @ (importance * right), inside @ (importance * right.square()), alphabet.left)
    right = _quotient(left @ sizes, left.square() @ inside, right)
    return replace(alphabet, left=left, right=right)


def _quotient(products: Tensor, squares: Tensor, otherwise: Tensor) -> Tensor:
    """The least-squares factor; what has no entries keeps what it has."""
    return torch.where(squares > 0, products / squares, otherwise)
