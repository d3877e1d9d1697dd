"""Decompositions and inverses against numpy, on factors that are indefinite, singular or huge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.linalg import LinAlgError

from tests.optim.problems import spd
from tests.reference import relative_error
from torchdyn_snopt.optim import eigenbasis
from torchdyn_snopt.optim.eigenbasis import damped_inverse, follow_basis, symmetric_eigen

pytestmark = pytest.mark.usefixtures("float64")

NAN, INF = float("nan"), float("inf")


def with_eigenvalues(*values: float) -> torch.Tensor:
    q = torch.linalg.qr(torch.randn(len(values), len(values))).Q
    return (q * torch.tensor(values)) @ q.T


def refuse_float32(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Make torch's eigh fail on float32, as LAPACK does on some matrices; returns its calls."""
    original, calls = torch.linalg.eigh, []

    def eigh(matrix: torch.Tensor) -> object:
        calls.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise LinAlgError("failed to converge")
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    return calls


# --- symmetric_eigen ------------------------------------------------------------------------------


def test_eigen_of_an_ill_conditioned_matrix() -> None:
    matrix = spd(7, 1e-10, 1e4)
    values, vectors = symmetric_eigen(matrix)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix.numpy()), rtol=1e-6, atol=1e-10)
    torch.testing.assert_close((vectors * values) @ vectors.T, matrix, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(7), rtol=0, atol=1e-14)


def test_eigenvalues_are_clamped_at_zero() -> None:
    values, vectors = symmetric_eigen(with_eigenvalues(-0.5, -1e-3, 0.0, 2.0, 3.0))
    torch.testing.assert_close(values, torch.tensor([0.0, 0.0, 0.0, 2.0, 3.0]), atol=1e-14, rtol=0)
    assert (values >= 0).all()
    clamped = (vectors * values) @ vectors.T
    assert torch.linalg.eigvalsh(clamped).min() > -1e-14


def test_eigen_of_zero_and_of_a_single_entry() -> None:
    values, vectors = symmetric_eigen(torch.zeros(3, 3))
    assert values.tolist() == [0.0] * 3
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(3))
    values, vectors = symmetric_eigen(torch.tensor([[4.0]]))
    assert values.tolist() == [4.0]
    assert vectors.abs().tolist() == [[1.0]]


def test_eigen_of_several_groups_at_once() -> None:
    matrices = torch.stack([spd(4), spd(4, 1e-2, 1.0)])
    values, vectors = symmetric_eigen(matrices)
    for i in range(2):
        single, basis = symmetric_eigen(matrices[i])
        torch.testing.assert_close(values[i], single)
        torch.testing.assert_close(vectors[i].abs(), basis.abs())


def test_eigen_falls_back_to_float64_and_returns_the_dtype(monkeypatch) -> None:
    matrix = spd(5).float()
    calls = refuse_float32(monkeypatch)
    values, vectors = symmetric_eigen(matrix)
    assert calls == [torch.float32, torch.float64]
    assert values.dtype == vectors.dtype == torch.float32
    assert relative_error((vectors * values) @ vectors.T, matrix) < 1e-6


def test_eigen_fails_if_float64_does_not_help(monkeypatch) -> None:
    def eigh(matrix: torch.Tensor) -> object:
        raise LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    with pytest.raises(LinAlgError, match="failed to converge"):
        symmetric_eigen(spd(3))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("entry", [(0, 0), (2, 1), (1, 2)])
def test_what_is_not_finite_is_an_error(bad: float, entry: tuple[int, int]) -> None:
    matrix = spd(3)
    matrix[entry] = matrix[entry[::-1]] = bad
    with pytest.raises(LinAlgError, match="not finite"):
        symmetric_eigen(matrix)
    with pytest.raises(LinAlgError, match="not finite"):
        damped_inverse(matrix, torch.tensor(0.1))
    with pytest.raises(LinAlgError, match="not finite"):
        follow_basis(matrix, torch.linalg.qr(torch.randn(3, 3)).Q)


# --- damped_inverse -------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [1e-4, 0.3, 50.0])
def test_inverse_of_an_ill_conditioned_matrix(damping: float) -> None:
    matrix = spd(6, 1e-8, 1e3)
    expected = np.linalg.inv(matrix.numpy() + damping * np.eye(6))
    inverse = damped_inverse(matrix, torch.tensor(damping))
    np.testing.assert_allclose(inverse, expected, rtol=1e-7, atol=1e-9 / damping)


def test_inverse_of_a_singular_matrix_is_bounded_by_the_damping() -> None:
    z = torch.randn(2, 5)
    inverse = damped_inverse(z.T @ z, torch.tensor(1e-3))
    np.testing.assert_allclose(np.linalg.eigvalsh(inverse.numpy())[-3:], np.full(3, 1e3), rtol=1e-9)


@pytest.mark.parametrize(
    "lowest",
    [
        pytest.param(-2.0, id="Cholesky fails"),
        pytest.param(-0.1, id="singular with the damping"),
        pytest.param(-0.0999999, id="Cholesky passes and would amplify a million times"),
    ],
)
def test_an_indefinite_matrix_is_inverted_as_if_clamped(lowest: float) -> None:
    q = torch.linalg.qr(torch.randn(4, 4)).Q
    values = torch.tensor([lowest, 0.0, 1.0, 20.0])
    inverse = damped_inverse((q * values) @ q.T, torch.tensor(0.1))
    expected = (q / (values.clamp_min(0.0) + 0.1)) @ q.T
    torch.testing.assert_close(inverse, expected, rtol=1e-6, atol=1e-6)


def test_inverse_of_groups_each_with_its_damping() -> None:
    matrices = torch.stack([spd(4), with_eigenvalues(-0.2, 0.1, 1.0, 2.0)])
    damping = torch.tensor([0.5, 0.1]).view(2, 1, 1)
    inverses = damped_inverse(matrices, damping)
    for i in range(2):
        torch.testing.assert_close(inverses[i], damped_inverse(matrices[i], damping[i]))


def test_inverse_of_an_indefinite_matrix_where_float32_fails(monkeypatch) -> None:
    matrix = with_eigenvalues(-1.0, 0.5, 2.0)
    expected = damped_inverse(matrix, torch.tensor(0.1))
    calls = refuse_float32(monkeypatch)
    inverse = damped_inverse(matrix.float(), torch.tensor(0.1, dtype=torch.float32))
    assert calls == [torch.float32, torch.float64]
    assert inverse.dtype == torch.float32
    assert relative_error(inverse.double(), expected) < 1e-5


# --- follow_basis ---------------------------------------------------------------------------------


def test_following_converges_to_the_eigenvectors_largest_first() -> None:
    matrix = with_eigenvalues(0.01, 0.1, 1.0, 5.0, 25.0)
    basis = torch.linalg.qr(torch.randn(5, 5)).Q
    errors = []
    exact = torch.linalg.eigh(matrix).eigenvectors.flip(-1)
    for _ in range(20):
        basis = follow_basis(matrix, basis)
        errors.append(float(((exact.T @ basis).abs() - torch.eye(5)).abs().max()))
    torch.testing.assert_close(basis.T @ basis, torch.eye(5), rtol=0, atol=1e-14)
    assert errors[-1] < 1e-10
    # Linear convergence by the ratio of neighbouring eigenvalues, 1/5 at the slowest.
    assert errors[9] / errors[5] == pytest.approx((1 / 5) ** 4, rel=0.5)


def test_following_from_the_eigenvectors_stays_there() -> None:
    matrix = spd(6, 1e-3, 1e1)
    exact = symmetric_eigen(matrix)[1].flip(-1)
    followed = follow_basis(matrix, exact)
    torch.testing.assert_close(followed.abs(), exact.abs(), rtol=0, atol=1e-10)


def test_following_tracks_a_drifting_matrix() -> None:
    start, end = with_eigenvalues(1.0, 4.0, 16.0, 64.0), with_eigenvalues(1.0, 4.0, 16.0, 64.0)
    basis = symmetric_eigen(start)[1].flip(-1)
    for i in range(50):
        matrix = start + (end - start) * min(1.0, i / 30)
        basis = follow_basis(matrix, basis)
    off = basis.T @ end @ basis
    assert relative_error(torch.diag(torch.diag(off)), off) < 1e-6


def test_following_a_singular_and_a_zero_matrix_keeps_the_basis_orthogonal() -> None:
    basis = torch.linalg.qr(torch.randn(5, 5)).Q
    z = torch.randn(2, 5)
    for matrix in (z.T @ z, torch.zeros(5, 5)):
        followed = follow_basis(matrix, basis)
        torch.testing.assert_close(followed.T @ followed, torch.eye(5), rtol=0, atol=1e-13)


def test_following_groups_is_following_each() -> None:
    matrices, bases = torch.stack([spd(4), spd(4)]), torch.linalg.qr(torch.randn(2, 4, 4)).Q
    together = follow_basis(matrices, bases)
    for i in range(2):
        torch.testing.assert_close(together[i], follow_basis(matrices[i], bases[i]))


def test_the_slack_for_rounding_covers_float32() -> None:
    """A semidefinite matrix in float32 takes Cholesky, not the eigenvalues."""
    z = torch.randn(20, 60).float()
    matrix, damping = z.T @ z, torch.tensor(1e-3, dtype=torch.float32)
    eye = torch.eye(60, dtype=torch.float32)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix + damping * eye))
    assert inverse.diagonal().max() <= (1 + eigenbasis.SLACK) / damping
    assert torch.equal(damped_inverse(matrix, damping), inverse)
