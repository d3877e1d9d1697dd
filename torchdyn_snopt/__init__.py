"""Second-order training for neural ODEs in torchdyn (Liu, Chen & Theodorou, NeurIPS 2021)."""

from torchdyn_snopt.adjoint.low_rank import low_rank_adjoint
from torchdyn_snopt.adjoint.problem import SNOptSensitivity
from torchdyn_snopt.adjoint.recursive import recursive_adjoint
from torchdyn_snopt.adjoint.second_order import second_order_adjoint
from torchdyn_snopt.checks import GradientReport, check_gradient
from torchdyn_snopt.curvature.losses import CrossEntropyLoss, GaussianNLLLoss, MSELoss
from torchdyn_snopt.curvature.record import record_curvature
from torchdyn_snopt.errors import (
    CurvatureError,
    InvalidInputError,
    SNOptError,
    SolverError,
    UnsupportedError,
)
from torchdyn_snopt.horizon import Horizon, learn_horizon
from torchdyn_snopt.optim.horizon_policy import HorizonPolicy
from torchdyn_snopt.optim.snopt import SNOpt
from torchdyn_snopt.solvers import SolveStats
from torchdyn_snopt.torchdiffeq_api import odeint_snopt
from torchdyn_snopt.torchdyn_plugin import register, solve_stats, unregister

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyLoss",
    "CurvatureError",
    "GaussianNLLLoss",
    "GradientReport",
    "Horizon",
    "HorizonPolicy",
    "InvalidInputError",
    "MSELoss",
    "SNOpt",
    "SNOptError",
    "SNOptSensitivity",
    "SolveStats",
    "SolverError",
    "UnsupportedError",
    "check_gradient",
    "learn_horizon",
    "low_rank_adjoint",
    "odeint_snopt",
    "record_curvature",
    "recursive_adjoint",
    "register",
    "second_order_adjoint",
    "solve_stats",
    "unregister",
]

register()
