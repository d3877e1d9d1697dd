"""Explicit Runge–Kutta solvers: tableaus, one stepping loop, step-size control, statistics.

This room knows nothing of gradients, layers or torchdyn.
"""

from torchdyn_snopt.solvers.control import DEFAULT_MAX_STEPS, NO_ERROR, Tolerances
from torchdyn_snopt.solvers.dense import interpolate
from torchdyn_snopt.solvers.stats import PhaseStats, SolveStats
from torchdyn_snopt.solvers.stepping import PROBE, Step, Stepper, System, check_segments
from torchdyn_snopt.solvers.tableaus import (
    DOPRI5,
    TABLEAUS,
    TORCHDIFFEQ_NAMES,
    TORCHDYN_NAMES,
    Tableau,
    tableau_named,
)

__all__ = [
    "DEFAULT_MAX_STEPS",
    "DOPRI5",
    "NO_ERROR",
    "PROBE",
    "TABLEAUS",
    "TORCHDIFFEQ_NAMES",
    "TORCHDYN_NAMES",
    "PhaseStats",
    "SolveStats",
    "Step",
    "Stepper",
    "System",
    "Tableau",
    "Tolerances",
    "check_segments",
    "interpolate",
    "tableau_named",
]
