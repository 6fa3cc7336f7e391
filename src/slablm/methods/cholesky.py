"""R, upper triangular with R Rᵀ = A: LAPACK's factorisation, of wide matrices on the CPU panel by panel.

Panels come from the last to the first. With the later columns of R known, those of a panel B are (D on the diagonal)

    [C; D] = A_B − R_later (rows B of R_later)ᵀ,      R_B R_Bᵀ = D,      R_above B = C R_B⁻ᵀ

so all but the factors R_B and their inverses are products of matrices, which torch can leave to the fastest library
there is; those inside LAPACK are MKL's, which on AMD CPUs does not use AVX-512. Threads wait for each other a few times
per panel, so the matrix must be many panels wide.
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 768
# On a busy machine two threads gain nothing with 5632 columns, 7 % with 6144, a third with 8192; on a calm one half.
_PANELS_AT_LEAST = 8


def upper_factor(matrix: Tensor, addition: Tensor, panel: int = PANEL) -> Tensor | None:
    """R with R Rᵀ = A = matrix + diag(addition); None where that is not positive definite.

    Args:
        matrix: [n, n], symmetric: what is below the diagonal is not looked at.
        addition: [n].
        panel: columns of a panel.
    """
    if matrix.device.type != "cpu" or len(matrix) < _PANELS_AT_LEAST * panel:
        return _by_lapack(matrix, addition)
    result = matrix.clone()
    result.diagonal().add_(addition)
    identity = torch.eye(panel, dtype=matrix.dtype, device=matrix.device)
    for stop in range(len(matrix), 0, -panel):
        start = max(stop - panel, 0)
        columns, later = result[:stop, start:stop], result[:stop, stop:]
        columns.addmm_(later, later[start:].T, alpha=-1)
        corner = _by_lapack(columns[start:])
        if corner is None:
            return None
        columns[start:] = corner
        inverse = torch.linalg.solve_triangular(corner, identity[: stop - start, : stop - start], upper=True)
        columns[:start] = columns[:start] @ inverse.T
        result[stop:, start:stop] = 0
    return result


def _by_lapack(matrix: Tensor, addition: Tensor | None = None) -> Tensor | None:
    """LAPACK's triangle is a lower one, so rows and columns are turned round."""
    turned = matrix.flip(0, 1)
    if addition is not None:
        turned.diagonal().add_(addition.flip(0))
    lower, failed = torch.linalg.cholesky_ex(turned)
    del turned  # as large as the largest thing there is: no more of them than needed
    return None if failed else lower.flip(0, 1)
