"""SNOpt's settings: the defaults of each preconditioner as a table, and the checks."""

from __future__ import annotations

import math
from typing import Any

from torchdyn_snopt.errors import InvalidInputError

PRECONDITIONERS = ("trust_region", "kfe_adam", "kfac", "ekfac", "low_rank")

# Settings of 'low_rank' as the others carry them; their fallback has the learning rate itself.
_UNUSED: dict[str, Any] = {
    "max_columns": 4096,
    "inner_steps": 1,
    "damping_decay": 1.0,
    "fallback_scale": 1.0,
}

# What an argument left at None becomes.
DEFAULTS: dict[str, dict[str, Any]] = {
    "trust_region": {
        "lr": 1.0,
        "momentum": 0.6,
        "damping": 3e-3,
        "update_freq": 20,
        "alpha": 0.95,
        "factor_decay": 0.6,
        "kl_clip": 2e-2,
        "fallback": "adam",
        "weight_sharing": "expand",
        "curvature": "auto",
        **_UNUSED,
        "fallback_scale": 1e-2,
    },
    "kfe_adam": {
        "lr": 1e-2,
        "momentum": 0.9,
        "damping": 1e-8,
        "update_freq": 5,
        "alpha": 0.95,
        "factor_decay": 0.9,
        "kl_clip": None,
        "fallback": "adam",
        "weight_sharing": "expand",
        "curvature": "empirical",
        **_UNUSED,
    },
    "kfac": {
        "lr": 0.1,
        "momentum": 0.9,
        "damping": 3e-2,
        "update_freq": 5,
        "alpha": 0.95,
        "factor_decay": 0.9,
        "kl_clip": 1e-3,
        "fallback": "sgd",
        "weight_sharing": "expand",
        "curvature": "empirical",
        **_UNUSED,
    },
    "ekfac": {
        "lr": 0.1,
        "momentum": 0.9,
        "damping": 5e-2,
        "update_freq": 10,
        "alpha": 0.75,
        "factor_decay": 0.0,
        "kl_clip": None,
        "fallback": "sgd",
        "weight_sharing": "expand",
        "curvature": "empirical",
        **_UNUSED,
    },
    "low_rank": {
        "lr": 1.0,
        "momentum": 0.0,
        "damping": 1e-2,
        "update_freq": 1,
        "alpha": 0.95,
        "factor_decay": 0.9,
        "kl_clip": None,
        "fallback": "adam",
        "weight_sharing": "expand",
        "curvature": "ggn",
        "max_columns": 4096,
        "inner_steps": 1,
        "damping_decay": 0.97,
        "fallback_scale": 1e-3,
    },
}

# Algorithms 1 and 2 with the values of the paper's experiments.
PAPER: dict[str, Any] = {
    "preconditioner": "ekfac",
    "momentum": 0.0,
    "damping": 0.05,
    "update_freq": 100,
    "alpha": 0.75,
    "factor_decay": 0.0,
    "kl_clip": None,
    "fallback": "sgd",
    "weight_sharing": "expand",
}

_CHOICES: dict[str, tuple[Any, ...]] = {
    "preconditioner": PRECONDITIONERS,
    "curvature": ("auto", "empirical", "mc", "ggn"),
    "weight_sharing": ("expand", "reduce"),
    "fallback": ("sgd", "adam"),
    "reduction": ("mean", "sum"),
    "maximize": (False, True),
    "foreach": (None, False, True),
}

# name: (what is wrong, an example)
_COUNTS: dict[str, tuple[str, int]] = {
    "update_freq": ("the interval between curvature refreshes is no count of steps", 5),
    "max_columns": ("the limit on columns is no count", 4096),
    "inner_steps": ("the number of steps on one batch is no count", 5),
}

# name: (lowest, lowest allowed, highest, highest allowed)
_RANGES: dict[str, tuple[float, bool, float, bool]] = {
    "lr": (0.0, True, math.inf, False),
    "momentum": (0.0, True, 1.0, False),
    "weight_decay": (0.0, True, math.inf, False),
    "damping": (0.0, False, math.inf, False),
    "alpha": (0.0, True, 1.0, False),
    "factor_decay": (0.0, True, 1.0, False),
    "damping_decay": (0.0, False, 1.0, True),
    "fallback_scale": (0.0, True, math.inf, False),
    "kl_clip": (0.0, False, math.inf, True),
}


def resolve(settings: dict[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of the preconditioner and check everything.

    Args:
        settings: SNOpt's keyword arguments, None where left out.

    Returns:
        A new dictionary without None, except for kl_clip (no trust region) and foreach.
    """
    check_choice("preconditioner", settings["preconditioner"])
    defaults = DEFAULTS[settings["preconditioner"]]
    full = {k: defaults.get(k) if v is None else v for k, v in settings.items()}
    check(full)
    if full["kl_clip"] == math.inf:
        full["kl_clip"] = None
    return full


def check(settings: dict[str, Any]) -> None:
    """Check the settings that are present.

    Args:
        settings: names and values, e.g. a parameter group.

    Raises:
        InvalidInputError: a value outside what is allowed.
    """
    for name, value in settings.items():
        if name in _CHOICES:
            check_choice(name, value)
        elif name in _RANGES and not (name == "kl_clip" and value is None):
            _check_range(name, value)
    for name, (what, example) in _COUNTS.items():
        value = settings.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InvalidInputError(
                what,
                got=f"{name}={value!r}",
                allowed="a whole number of at least 1",
                do=f"pass {name}={example}",
            )
    curvature = settings.get("curvature")
    if settings.get("preconditioner") == "low_rank" and curvature in ("auto", "empirical"):
        raise InvalidInputError(
            "the low-rank step needs the seeds of a loss",
            got=f"preconditioner='low_rank', curvature={curvature!r}",
            allowed="curvature='ggn' or 'mc'",
            do="leave curvature out, and use one of torchdyn_snopt's losses",
        )


def check_choice(name: str, value: object) -> None:
    """Check one value against its choices.

    Args:
        name: of the setting.
        value: of the setting.

    Raises:
        InvalidInputError: not among the choices.
    """
    allowed = _CHOICES[name]
    if value not in allowed:
        raise InvalidInputError(
            f"unknown {name}",
            got=f"{name}={value!r}",
            allowed=", ".join(map(repr, allowed)),
            do=f"pass {name}={allowed[0]!r}",
        )


def _check_range(name: str, value: object) -> None:
    low, low_ok, high, high_ok = _RANGES[name]
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    if ok:
        assert isinstance(value, int | float)
        ok = (value > low or (low_ok and value == low)) and (
            value < high or (high_ok and value == high)
        )
    if not ok:
        interval = f"{'[' if low_ok else '('}{low:g}, {high:g}{']' if high_ok else ')'}"
        raise InvalidInputError(
            f"{name} is out of range",
            got=f"{name}={value!r}",
            allowed=f"a number in {interval}",
            do=f"leave {name} at its default",
        )
