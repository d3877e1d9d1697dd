"""Eigenbases and damped inverses of the factors, with the failure budget that they need."""

from __future__ import annotations

import torch
from torch import Tensor

# By how much rounding may lift an inverse above its bound.
SLACK = 1e-2


def symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending, clamped at 0) and eigenvectors; float64 after a failure.

    Args:
        matrix: symmetric ``[..., d, d]``.

    Returns:
        Eigenvalues ``[..., d]`` and eigenvectors in the columns of ``[..., d, d]``.

    Raises:
        torch.linalg.LinAlgError: not even float64 helps, or the matrix is not finite.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise torch.linalg.LinAlgError("the factor is not finite")
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        values, vectors = (part.to(matrix) for part in torch.linalg.eigh(_double(matrix)))
    return values.clamp_min_(0.0), vectors


def damped_inverse(matrix: Tensor, damping: Tensor) -> Tensor:
    """(M + damping·I)⁻¹ by Cholesky; by eigenvalues clamped at 0 where M is clearly indefinite.

    Args:
        matrix: symmetric ``[..., d, d]``.
        damping: positive, broadcastable to ``[..., 1, 1]``.

    Returns:
        The inverse ``[..., d, d]``.
    """
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    root, info = torch.linalg.cholesky_ex(matrix + damping * eye)
    if not bool(info.any()):
        inverse = torch.cholesky_inverse(root)
        # Its entries lie in (0, 1/damping] unless M is indefinite, or not finite: that fails below.
        diagonal = inverse.diagonal(dim1=-2, dim2=-1)
        bound = (1.0 + SLACK) / damping.squeeze(-1)
        if bool(((diagonal > 0.0) & (diagonal <= bound)).all()):
            return inverse
    values, vectors = symmetric_eigen(matrix)
    return (vectors / (values.unsqueeze(-2) + damping)) @ vectors.mT


def follow_basis(matrix: Tensor, basis: Tensor) -> Tensor:
    """One step of orthogonal iteration from a known basis (as SOAP does, Vyas et al. 2024).

    Args:
        matrix: symmetric ``[..., d, d]``, close to the one that the basis belongs to.
        basis: orthogonal ``[..., d, d]``.

    Returns:
        A basis closer to the matrix's eigenvectors, largest eigenvalues first.

    Raises:
        torch.linalg.LinAlgError: the matrix is not finite.
    """
    image = matrix @ basis
    rayleigh = (basis * image).sum(-2)
    if not bool(torch.isfinite(rayleigh).all()):
        raise torch.linalg.LinAlgError("the factor is not finite")
    order = rayleigh.argsort(dim=-1, descending=True)
    image = image.take_along_dim(order.unsqueeze(-2), dim=-1)
    q: Tensor = torch.linalg.qr(image).Q
    return q


def _double(matrix: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    device = "cpu" if matrix.device.type == "mps" else matrix.device
    return matrix.to(device=device, dtype=torch.float64)
