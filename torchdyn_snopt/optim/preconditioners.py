"""What is done with A and B: 'kfe_adam', 'kfac', 'ekfac'.

Each preconditioner refreshes a layer's state from its averaged factors and turns the gradients of
all layers into updates. All state lives in the layer's dictionary, so that it is saved and loaded
with the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

import torch

from torchdyn_snopt.errors import CurvatureError
from torchdyn_snopt.optim.eigenbasis import damped_inverse, follow_basis, symmetric_eigen
from torchdyn_snopt.optim.moments import absorb, corrections, deviations

if TYPE_CHECKING:
    from torch import Tensor

    from torchdyn_snopt.optim.layers import Layer

Group = dict[str, Any]
Parts: TypeAlias = "dict[str, Tensor]"
Report = dict[str, "Tensor | float"]

# A factorization may fail this often in a row before the run is stopped.
MAX_FAILURES = 5
# Refreshes between full eigendecompositions; in between the basis is followed by cheap updates.
FULL_EVERY = 20


class Preconditioner(Protocol):
    """How gradients become updates."""

    #: What `decompose` returns: each name with the factor whose shape it has, and how many of that
    #: factor's last two dimensions: 2 for a matrix, 1 for its eigenvalues.
    PARTS: ClassVar[Mapping[str, tuple[str, int]]]
    #: Of factors wider than this only blocks on the diagonal are used; None: of none.
    WIDEST: ClassVar[int | None] = None

    def recall(self, state: Group) -> None:
        """Put the averages A and B back into a layer's state, if they do not stay there.

        Args:
            state: of the layer.
        """
        return None  # they stay

    def decompose(self, layer: Layer, group: Group) -> Parts:
        """The costly part of a refresh; changes nothing.

        Args:
            layer: with new A and B in its state.
            group: its settings.

        Returns:
            Decompositions of the factors, by the names of `PARTS`.
        """

    def install(self, layer: Layer, parts: Parts) -> None:
        """Put decompositions, computed here or elsewhere, into the layer's state.

        Args:
            layer: they belong to.
            parts: what `decompose` returned.
        """

    def refresh(self, layer: Layer, group: Group) -> None:
        """Both at once, or raise and leave all as it was.

        Args:
            layer: with new A and B in its state.
            group: its settings.
        """
        self.install(layer, self.decompose(layer, group))

    def updates(
        self, layers: list[Layer], gradients: list[Tensor], group: Group, report: Report
    ) -> list[Tensor]:
        """Turn gradients into updates; θ moves by −lr times these.

        Args:
            layers: refreshed at least once.
            gradients: one matrix each.
            group: their settings.
            report: takes figures worth logging, by name.

        Returns:
            One matrix each.
        """


def guarded_refresh(preconditioner: Preconditioner, layer: Layer, group: Group) -> bool:
    """Refresh; keep the last good state when a factorization fails.

    Args:
        preconditioner: does the work.
        layer: to refresh.
        group: its settings.

    Returns:
        Whether it succeeded.

    Raises:
        CurvatureError: too many failures in a row, or the first refresh failed.
    """
    try:
        parts = preconditioner.decompose(layer, group)
    except torch.linalg.LinAlgError as error:
        keep_last_good(layer, error)
        return False
    install(preconditioner, layer, parts)
    return True


def install(preconditioner: Preconditioner, layer: Layer, parts: Parts) -> None:
    """Take new decompositions, which makes the layer ready.

    Args:
        preconditioner: they are for.
        layer: they are of.
        parts: them.
    """
    preconditioner.install(layer, parts)
    layer.state["failures"], layer.state["ready"] = 0, True


def keep_last_good(layer: Layer, error: Exception) -> None:
    """Count a failed factorization, and drop the factors that it failed on.

    Args:
        layer: whose factors.
        error: why.

    Raises:
        CurvatureError: too many failures in a row, or the first refresh failed.
    """
    state = layer.state
    state["failures"] = state.get("failures", 0) + 1
    norms = {key: float(torch.linalg.vector_norm(state.pop(key))) for key in ("A", "B")}
    del state["factor_weight"]
    if state["failures"] >= MAX_FAILURES or not state.get("ready", False):
        raise CurvatureError(
            "the curvature of a layer cannot be factorized",
            layer=layer.name,
            failures=state["failures"],
            norms=norms,
            got=str(error),
            allowed=f"finite factors, up to {MAX_FAILURES - 1} failures in a row",
            do="look for non-finite activations or gradients, raise damping, or use float64",
        ) from error


def rotated(states: list[Group], gradients: list[Tensor]) -> list[Tensor]:
    """U_Bᵀ G U_A: gradients in the eigenbases of their layers.

    Args:
        states: with U_A and U_B.
        gradients: one matrix each.

    Returns:
        One matrix each.
    """
    pairs = zip(states, gradients, strict=True)
    return [state["U_B"].mT @ g @ state["U_A"] for state, g in pairs]


def rotated_back(states: list[Group], updates: list[Tensor]) -> list[Tensor]:
    """U_B X U_Aᵀ, the way back.

    Args:
        states: with U_A and U_B.
        updates: X, one matrix each.

    Returns:
        One matrix each.
    """
    pairs = zip(states, updates, strict=True)
    return [state["U_B"] @ u @ state["U_A"].mT for state, u in pairs]


def eigen_parts(state: Group) -> Parts:
    """Eigenvectors and eigenvalues (ascending) of both factors.

    Args:
        state: with A and B.

    Returns:
        U_A, values_A, U_B and values_B.

    Raises:
        LinAlgError: a factor is not finite.
    """
    parts: Parts = {}
    for factor in "AB":
        parts[f"values_{factor}"], parts[f"U_{factor}"] = symmetric_eigen(state[factor])
    return parts


def turn_moments(state: Group, parts: Parts, squares: Sequence[str]) -> None:
    """Rotate a layer's moments from the eigenbasis in its state to a new one.

    With R = U_newᵀ U_old the first moment is rotated along, and second ones by the squares of R's
    entries, which is exact for uncorrelated coordinates.

    Args:
        state: of a layer; nothing happens before its first step.
        parts: the new U_A and U_B.
        squares: keys of the second moments.
    """
    if "exp_avg" not in state:
        return
    turn_a, turn_b = (parts[basis].mT @ state[basis] for basis in ("U_A", "U_B"))
    state["exp_avg"] = turn_b @ state["exp_avg"] @ turn_a.mT
    turn_a, turn_b = turn_a.square(), turn_b.square()
    for key in squares:
        state[key] = turn_b @ state[key] @ turn_a.mT


class KFEAdam(Preconditioner):
    """Adam's moments in the Kronecker eigenbasis of the curvature.

    With U_A, U_B the eigenvectors of A and B, Adam runs on U_Bᵀ G U_A. The idea of running Adam in
    a Kronecker eigenbasis is SOAP's (Vyas et al. 2024); there the basis comes from the gradients'
    own moments, here from the curvature of the backward solve (the KFE of George et al. 2018),
    which is of full rank from the first batch on. When the basis turns, the moments turn along.
    """

    PARTS: ClassVar[Mapping[str, tuple[str, int]]] = {"U_A": ("A", 2), "U_B": ("B", 2)}

    def decompose(self, layer: Layer, group: Group) -> Parts:
        """Update the basis; see `Preconditioner`.

        Args:
            layer: with new factors.
            group: its settings.

        Returns:
            U_A and U_B.
        """
        state, bases = layer.state, {}
        full = state.get("refreshes", 0) % FULL_EVERY == 0
        for factor, basis in (("A", "U_A"), ("B", "U_B")):
            old = state.get(basis)
            if old is None or full:
                bases[basis] = symmetric_eigen(state[factor])[1].flip(-1)
            else:
                bases[basis] = follow_basis(state[factor], old)
        return bases

    def install(self, layer: Layer, parts: Parts) -> None:
        """Rotate the moments along with the basis; see `Preconditioner`.

        Args:
            layer: they belong to.
            parts: U_A and U_B.
        """
        turn_moments(layer.state, parts, squares=("exp_avg_sq",))
        layer.state.update(parts, refreshes=layer.state.get("refreshes", 0) + 1)

    def updates(
        self, layers: list[Layer], gradients: list[Tensor], group: Group, report: Report
    ) -> list[Tensor]:
        """Adam's update in the eigenbasis; see `Preconditioner`.

        Args:
            layers: refreshed.
            gradients: one matrix each.
            group: momentum is β₁, alpha is β₂, damping is Adam's ε.
            report: takes figures worth logging.

        Returns:
            Updates.
        """
        states = [layer.state for layer in layers]
        absorb(states, rotated(states, gradients), group["momentum"], group["alpha"])
        scale = deviations(states, group["alpha"], group["damping"])
        torch._foreach_mul_(scale, corrections(states, group["momentum"]))
        directions = torch._foreach_div([state["exp_avg"] for state in states], scale)
        return rotated_back(states, list(directions))


class KFAC(Preconditioner):
    """(B + √λ/π)⁻¹ G (A + π√λ)⁻¹ with factored Tikhonov damping (Martens & Grosse 2015, 6.3)."""

    PARTS: ClassVar[Mapping[str, tuple[str, int]]] = {"A_inv": ("A", 2), "B_inv": ("B", 2)}

    def decompose(self, layer: Layer, group: Group) -> Parts:
        """Invert the damped factors; see `Preconditioner`.

        Args:
            layer: with new factors.
            group: damping λ (weight decay γ is added to it).

        Returns:
            Both inverses.

        Raises:
            LinAlgError: a factor is not finite.
        """
        a, b = layer.state["A"], layer.state["B"]
        share_a, share_b = damping_shares(a, b, group)
        return {"A_inv": damped_inverse(a, share_a), "B_inv": damped_inverse(b, share_b)}

    def install(self, layer: Layer, parts: Parts) -> None:
        """Keep the inverses; see `Preconditioner`.

        Args:
            layer: they belong to.
            parts: both inverses.
        """
        layer.state.update(parts)

    def updates(
        self, layers: list[Layer], gradients: list[Tensor], group: Group, report: Report
    ) -> list[Tensor]:
        """B⁻¹ G A⁻¹, clipped, with momentum; see `Preconditioner`.

        Args:
            layers: refreshed.
            gradients: one matrix each.
            group: their settings.
            report: takes figures worth logging.

        Returns:
            Updates.
        """
        natural = [
            layer.state["B_inv"] @ g @ layer.state["A_inv"]
            for layer, g in zip(layers, gradients, strict=True)
        ]
        return _clip_and_gather(layers, gradients, natural, group, report)


class EKFAC(Preconditioner):
    """Algorithm 2: eigenbasis of the factors, eigenvalues re-estimated from the gradients.

    The running second moments S of the gradient in the eigenbasis replace the factors' own
    eigenvalues (George et al. 2018); G ↦ U_B [(U_Bᵀ G U_A) / (S + ε)] U_Aᵀ.
    """

    PARTS: ClassVar[Mapping[str, tuple[str, int]]] = {
        "U_A": ("A", 2),
        "U_B": ("B", 2),
        "values_A": ("A", 1),
        "values_B": ("B", 1),
    }

    def decompose(self, layer: Layer, group: Group) -> Parts:
        """Decompose the factors; see `Preconditioner`.

        Args:
            layer: with new factors.
            group: its settings.

        Returns:
            Eigenvectors and eigenvalues of both.
        """
        return eigen_parts(layer.state)

    def install(self, layer: Layer, parts: Parts) -> None:
        """Start over in the new basis; see `Preconditioner`.

        Args:
            layer: they belong to.
            parts: eigenvectors and eigenvalues.
        """
        state = layer.state
        state["U_A"], state["U_B"] = parts["U_A"], parts["U_B"]
        # The factors' eigenvalues are the first estimate in the new basis.
        state["S"] = parts["values_B"].unsqueeze(-1) * parts["values_A"].unsqueeze(-2)

    def updates(
        self, layers: list[Layer], gradients: list[Tensor], group: Group, report: Report
    ) -> list[Tensor]:
        """Precondition in the eigenbasis, clip, add momentum; see `Preconditioner`.

        Args:
            layers: refreshed.
            gradients: one matrix each.
            group: alpha is the decay of S, damping is ε (weight decay γ is added to it).
            report: takes figures worth logging.

        Returns:
            Updates.
        """
        alpha, epsilon = group["alpha"], group["damping"] + group["weight_decay"]
        states = [layer.state for layer in layers]
        natural = []
        for state, g in zip(states, rotated(states, gradients), strict=True):
            state["S"].mul_(alpha).addcmul_(g, g, value=1.0 - alpha)
            natural.append(g / (state["S"] + epsilon))
        natural = rotated_back(states, natural)
        return _clip_and_gather(layers, gradients, natural, group, report)


def damping_shares(a: Tensor, b: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """π√λ and √λ/π, what factored Tikhonov damping adds to A and B (Martens & Grosse 2015, 6.3).

    Args:
        a: A.
        b: B.
        group: damping λ (weight decay γ is added to it).

    Returns:
        Both ``[..., 1, 1]``.

    Raises:
        LinAlgError: a factor is not finite.
    """
    root = (group["damping"] + group["weight_decay"]) ** 0.5
    pi = (_mean_eigenvalue(a) / _mean_eigenvalue(b)).sqrt().clamp(1e-6, 1e6)
    if not bool(torch.isfinite(pi).all()):
        raise torch.linalg.LinAlgError("a factor is not finite")
    return root * pi, root / pi


def _mean_eigenvalue(matrix: Tensor) -> Tensor:
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    return diagonal.mean(-1).clamp_min(torch.finfo(matrix.dtype).tiny)[..., None, None]


def _clip_and_gather(
    layers: list[Layer],
    gradients: list[Tensor],
    natural: list[Tensor],
    group: Group,
    report: Report,
) -> list[Tensor]:
    """Trust region, then heavy-ball momentum."""
    if group["kl_clip"] is not None:
        clip = trust_factor(product(natural, gradients), group["lr"], group["kl_clip"])
        report["clip_factor"] = clip
        natural = [u * clip for u in natural]
    if group["momentum"] == 0.0:
        return natural
    for layer, u in zip(layers, natural, strict=True):
        buffer = layer.state.get("momentum_buffer")
        if buffer is None:
            layer.state["momentum_buffer"] = u.clone()
        else:
            buffer.mul_(group["momentum"]).add_(u)
    return [layer.state["momentum_buffer"] for layer in layers]


def trust_factor(squared: Tensor, lr: float, kl_clip: float) -> Tensor:
    """Factor ν ≤ 1 with lr² ν² ‖d‖² ≤ kl_clip (Ba, Grosse & Martens 2017).

    Args:
        squared: ‖d‖², the squared length of the update in the metric of the curvature, 0-d.
        lr: learning rate.
        kl_clip: bound on the predicted change, half of the KL divergence in its units.

    Returns:
        0-d tensor.
    """
    return (kl_clip / (lr * lr * squared).clamp_min(1e-30)).sqrt().clamp_max(1.0)


def product(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """The inner product of two lists of matrices.

    Args:
        left: some.
        right: as many, of the same shapes.

    Returns:
        0-d tensor.
    """
    return torch.stack([torch.sum(a * b) for a, b in zip(left, right, strict=True)]).sum()
