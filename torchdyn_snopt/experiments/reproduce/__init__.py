"""Figures and tables of the paper, on tasks of this package: one entry of a table each."""

from __future__ import annotations

from torchdyn_snopt.errors import InvalidInputError
from torchdyn_snopt.experiments.reproduce import fig5, fig10, table5
from torchdyn_snopt.experiments.reproduce.study import Reproduction, Request, Study, Table

__all__ = ["REPRODUCTIONS", "Reproduction", "Request", "Study", "Table", "get_reproduction"]

REPRODUCTIONS: dict[str, Reproduction] = {
    study.name: study for study in (fig5.STUDY, fig10.STUDY, table5.STUDY)
}


def get_reproduction(name: str) -> Reproduction:
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
            allowed=", ".join(REPRODUCTIONS),
            do="choose one of these names",
        )
    return REPRODUCTIONS[name]
