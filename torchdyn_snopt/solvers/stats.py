"""What a solve cost: counts of field evaluations and steps."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class PhaseStats:
    """Counts of one solve in one direction.

    Attributes:
        nfe: field evaluations.
        accepted: accepted steps.
        rejected: rejected steps.
    """

    nfe: int = 0
    accepted: int = 0
    rejected: int = 0


@dataclass
class SolveStats:
    """Counts of the last forward solve and of its backward solve.

    Attributes:
        forward: counts of the forward solve.
        backward: counts of the backward solve; zero until it has run.
        t1: the last time of the solve, in the units of t.
        status: 'running', 'ok', or the message of the error that ended the solve.
    """

    forward: PhaseStats = field(default_factory=PhaseStats)
    backward: PhaseStats = field(default_factory=PhaseStats)
    t1: float = float("nan")
    status: str = "running"

    @property
    def nfe_forward(self) -> int:
        """Field evaluations of the forward solve."""
        return self.forward.nfe

    @property
    def nfe_backward(self) -> int:
        """Field evaluations of the backward solve, each with its vector-Jacobian product."""
        return self.backward.nfe

    @property
    def accepted(self) -> int:
        """Accepted steps, forward and backward."""
        return self.forward.accepted + self.backward.accepted

    @property
    def rejected(self) -> int:
        """Rejected steps, forward and backward."""
        return self.forward.rejected + self.backward.rejected
