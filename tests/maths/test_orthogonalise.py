"""The polar factor: exact by SVD, close by Newton-Schulz, safe where a matrix is zero, thin, tiny or not finite."""

import math

import pytest
import torch

from archopt.optim.orthogonalise import (
    METHODS,
    newton_schulz,
    newton_schulz_bfloat16,
    orthogonalise,
    svd,
    unit_frobenius,
)

SHAPES = [(5, 5), (3, 8), (8, 3), (2, 4, 6), (2, 3, 6, 4)]


def singular_values(matrices: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(matrices)


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_gives_the_nearest_semi_orthogonal_matrix(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, dtype=torch.float64)
    polar = svd(matrices)
    assert torch.allclose(singular_values(polar), torch.ones(1, dtype=torch.float64), atol=1e-12)
    # U^T G is symmetric and positive semi-definite exactly for the polar factor.
    wide = shape[-2] <= shape[-1]
    product = matrices @ polar.mT if wide else polar.mT @ matrices
    assert torch.allclose(product, product.mT, atol=1e-12)
    assert (torch.linalg.eigvalsh(product) > -1e-12).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_keeps_singular_vectors_and_evens_values(shape: tuple[int, ...]) -> None:
    """Muon's five steps end between 0.68 and 1.21 for singular values above a hundredth of the norm."""
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.linspace(1, 0.1, u.size(-1), dtype=torch.float64)
    result = newton_schulz(7.0 * (u * values) @ vh)
    inside = u.mT @ result @ vh.mT
    diagonal = inside.diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(inside, torch.diag_embed(diagonal), atol=1e-10)
    assert (diagonal > 0.68).all()
    assert (diagonal < 1.21).all()


def test_newton_schulz_is_muons_polynomial() -> None:
    """On a scaled identity the five steps act on one number, worked out here by hand."""
    x = 0.5  # the entry of a 4 x 4 identity over its Frobenius norm
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    assert torch.allclose(newton_schulz(3 * torch.eye(4, dtype=torch.float64)), x * torch.eye(4).double())


@pytest.mark.parametrize("shape", [(64, 128), (2, 96, 32)])
def test_products_in_bfloat16_are_close(shape: tuple[int, ...]) -> None:
    """The result differs by some per cent of its norm; it has the type of what was given."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact, rough = newton_schulz(matrices), newton_schulz_bfloat16(matrices)
    assert rough.dtype == torch.float32
    gap = float((rough - exact).norm() / exact.norm())
    assert 1e-4 < gap < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_batches_equal_single_matrices(method: str) -> None:
    matrices = torch.randn(3, 4, 6, dtype=torch.float64)
    single = torch.stack([orthogonalise(matrix, method) for matrix in matrices])
    tolerance = 0.05 if "bfloat16" in method else 1e-12
    assert torch.allclose(orthogonalise(matrices, method), single, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1)])
def test_a_single_row_or_column_is_normalised(method: str, shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    assert torch.allclose(orthogonalise(matrix, method), matrix / matrix.norm(), rtol=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_zero_matrices_and_zero_rows_stay_zero(method: str) -> None:
    matrices = torch.randn(2, 4, 6)
    matrices[0] = 0
    matrices[1, 2] = 0
    result = orthogonalise(matrices, method)
    assert not result[0].any()
    assert result[1, 2].abs().max() < 1e-6
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_the_scale_of_a_matrix_does_not_matter(scale: float) -> None:
    matrix = torch.eye(4) + 0.1
    assert torch.allclose(newton_schulz(scale * matrix), newton_schulz(matrix), atol=1e-2)
    assert torch.allclose(newton_schulz(0.25 * matrix), newton_schulz(matrix), rtol=0, atol=0)


def test_svd_leaves_out_directions_that_are_not_there() -> None:
    u, v = torch.randn(5, 1, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    rank_one = svd(u @ v)
    assert torch.allclose(rank_one, u @ v / (u.norm() * v.norm()), atol=1e-12)


def test_svd_of_what_is_not_finite_does_not_raise() -> None:
    """The step that asked for it is discarded on the device, after the fact."""
    assert torch.isfinite(svd(torch.full((3, 3), float("nan")))).all()


@pytest.mark.parametrize("method", METHODS)
def test_autocast_does_not_reach_the_products(method: str) -> None:
    matrix = torch.randn(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = orthogonalise(matrix, method)
    assert torch.equal(result, orthogonalise(matrix, method))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_has_faded_away_leaves_no_subnormal_numbers(dtype: torch.dtype) -> None:
    """They would make the products of a CPU many times slower: rows of neurons that died long ago."""
    tiny = torch.finfo(dtype).tiny
    fading = torch.logspace(0, math.log10(tiny), 12, dtype=dtype)
    faded = torch.randn(12, 16, dtype=dtype) * fading[:, None]
    unit = unit_frobenius(faded)
    assert (unit == 0).any()
    assert (unit[unit != 0].square() >= tiny).all()
    polar = orthogonalise(faded)
    assert polar.isfinite().all()
    assert (polar[0] != 0).all()
    assert (polar[-1] == 0).all()
