"""Figures and tables of the paper, on tasks of this package: one entry of a table each."""

from __future__ import annotations

from collections.abc import Callable

from torchdyn_snopt.errors import InvalidInputError
from torchdyn_snopt.experiments.reproduce import fig5, fig10, table5
from torchdyn_snopt.experiments.reproduce.comparison import COMPARISONS, Comparison
from torchdyn_snopt.experiments.reproduce.factors import run_factors
from torchdyn_snopt.experiments.reproduce.measured import Measured
from torchdyn_snopt.experiments.reproduce.study import Reproduction, Request, Study, Table
from torchdyn_snopt.experiments.reproduce.table1 import run_table1
from torchdyn_snopt.experiments.reproduce.table2 import run_table2
from torchdyn_snopt.experiments.reproduce.timing import TIMINGS, Timing

__all__ = [
    "MEASUREMENTS",
    "REPRODUCTIONS",
    "AnyReproduction",
    "Comparison",
    "Measured",
    "Reproduction",
    "Request",
    "Study",
    "Table",
    "Timing",
    "get_reproduction",
]

AnyReproduction = Reproduction | Comparison | Timing

REPRODUCTIONS: dict[str, AnyReproduction] = {
    study.name: study for study in (fig5.STUDY, fig10.STUDY, table5.STUDY, *COMPARISONS, *TIMINGS)
}

# Those that train nothing, from whom to tell about the progress.
MEASUREMENTS: dict[str, Callable[[Callable[[str], None]], Measured]] = {
    "table1": run_table1,
    "table2": run_table2,
    "factors": run_factors,
}


def get_reproduction(name: str) -> AnyReproduction:
    """Look a reproduction up.

    Args:
        name: Its name in `REPRODUCTIONS`.

    Returns:
        The reproduction.

    Raises:
        InvalidInputError: There is none of that name.
    """
    if name not in REPRODUCTIONS:
        raise InvalidInputError(
            "there is no such reproduction",
            got=f"{name!r}",
            allowed=", ".join([*REPRODUCTIONS, *MEASUREMENTS]),
            do="choose one of these names",
        )
    return REPRODUCTIONS[name]
