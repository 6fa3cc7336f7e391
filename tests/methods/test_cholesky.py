"""R Rᵀ = A: panel by panel as LAPACK does it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slablm.methods import cholesky
from slablm.methods.cholesky import upper_factor


def random_matrix(n, seed):
    """Symmetric, positive definite, rows of different sizes; what is below the diagonal is no part of it."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n + n // 4 + 2, n, generator=generator) * torch.randn(n, generator=generator).exp()
    matrix = inputs.T @ inputs
    return matrix, matrix.triu() + torch.full_like(matrix, torch.nan).tril(-1)


def error(triangle, matrix, addition):
    exact = matrix.double() + addition.double().diag()
    wide = triangle.double()
    return ((wide @ wide.T - exact).norm() / exact.norm()).item()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 150), st.integers(1, 18), st.integers(0, 1000))
def test_its_square_is_the_matrix(n, panel, seed):
    matrix, upper_part = random_matrix(n, seed)
    addition = torch.rand(n, generator=torch.Generator().manual_seed(seed)) + 0.01 * matrix.diagonal().mean()
    triangle = upper_factor(upper_part, addition, panel)
    assert torch.equal(triangle, triangle.triu())
    assert (triangle.diagonal() > 0).all()
    assert error(triangle, matrix, addition) < 1e-6
    assert torch.equal(upper_part.triu(), matrix.triu())


def test_panels_are_as_exact_as_lapack(monkeypatch):
    matrix, _ = random_matrix(600, 0)
    addition = (0.01 * matrix.diagonal().mean()).expand(600)
    panels = error(upper_factor(matrix, addition, 64), matrix, addition)
    monkeypatch.setattr(cholesky, "_PANELS_AT_LEAST", 1000)
    assert panels < 2 * error(upper_factor(matrix, addition, 64), matrix, addition)


@pytest.mark.parametrize("place", [0, 40, 99])
@pytest.mark.parametrize("panel", [7, 10, 99])
def test_what_is_not_positive_definite_is_refused(place, panel):
    matrix, _ = random_matrix(100, 1)
    matrix[place, place] = -1.0
    assert upper_factor(matrix, torch.zeros(100), panel) is None
    assert upper_factor(torch.zeros(100, 100), torch.zeros(100), panel) is None


@pytest.mark.parametrize("panel", [3, 100])
def test_the_addition_counts(panel):
    assert torch.equal(upper_factor(torch.zeros(50, 50), torch.full((50,), 4.0), panel), 2 * torch.eye(50))


def test_narrow_matrices_are_left_to_lapack(monkeypatch):
    calls = []
    lapack = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: calls.append(len(matrix)) or lapack(matrix))
    upper_factor(torch.eye(79), torch.ones(79), 10)
    upper_factor(torch.eye(83), torch.ones(83), 10)
    assert calls == [79, *[10] * 8, 3]
