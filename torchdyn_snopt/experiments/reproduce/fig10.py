"""Figure 10: t1 over the iterations, by the policy and by the gradient, from two starts."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from torchdyn_snopt.experiments.curves import Array, Run
from torchdyn_snopt.experiments.figures import PANEL
from torchdyn_snopt.experiments.horizons import HorizonChoice, Mode
from torchdyn_snopt.experiments.reproduce.study import (
    PENALTY,
    Arms,
    Column,
    Reproduction,
    Table,
    horizon_path,
    merit,
    merit_title,
    over_seeds,
    tabulate,
)

STARTS = (1.0, 0.05)
NOTE = (
    "Trained by SNOpt with preconditioner='kfe_adam', lr=0.01. Mean ± half of Student's 95 % "
    "interval over the seeds. Spread: highest less lowest t1 in the last quarter of training, "
    "relative to the last one, of the worst seed. Gap: difference of the final t1 of the two "
    "starts relative to their mean, of the worst seed."
)
COLORS: dict[Mode, str] = {"policy": "#009E73", "gradient": "#D55E00"}
MARKERS: dict[Mode, str] = {"policy": "o", "gradient": "s"}
LINES = dict(zip(STARTS, ("-", "--"), strict=True))


def _horizons(penalty: float | None) -> list[HorizonChoice]:
    c = PENALTY if penalty is None else penalty
    return [HorizonChoice(mode, t1, c) for mode in COLORS for t1 in STARTS]


def _tabulate(arms: Arms, title: str) -> Table:
    columns = (
        over_seeds("final t1", lambda r: [float(horizon_path(run)[-1]) for run in r], 3),
        Column("spread", lambda r: f"{100 * max(spread(horizon_path(run)) for run in r):.1f} %"),
        Column("gap between starts", lambda r: _percent(_gaps(arms, r))),
        over_seeds(
            merit_title(run for runs in arms.values() for run in runs),
            lambda r: [merit(run) for run in r],
            2,
        ),
    )
    return tabulate(f"{title}: t1 over training", arms, columns, (NOTE,))


def spread(path: Array) -> float:
    """How much t1 still moves at the end.

    Args:
        path: t1 in each iteration.

    Returns:
        Highest less lowest of the last quarter, relative to the last.
    """
    last = path[-max(1, len(path) // 4) :]
    return float((last.max() - last.min()) / last[-1])


def _gaps(arms: Arms, runs: list[Run]) -> list[float]:
    """Difference of the final t1 of both starts, relative to their mean, for each seed."""
    mode = next(horizon.mode for horizon, some in arms.items() if some is runs)
    ends = [
        {run.seed: float(horizon_path(run)[-1]) for run in some}
        for horizon, some in arms.items()
        if horizon.mode == mode
    ]
    if len(ends) != len(STARTS):
        return []
    one, other = ends
    return [
        abs(one[seed] - other[seed]) / ((one[seed] + other[seed]) / 2)
        for seed in one.keys() & other.keys()
    ]


def _percent(shares: list[float]) -> str:
    return f"{100 * max(shares):.1f} %" if shares else "–"


def _draw(arms: Arms, title: str) -> Figure:
    figure = Figure(figsize=PANEL, layout="constrained")
    axes = figure.subplots()
    for horizon, runs in arms.items():
        color, line = COLORS[horizon.mode], LINES[horizon.t1]
        length = min(len(horizon_path(run)) for run in runs)
        paths = np.stack([horizon_path(run)[:length] for run in runs])
        iterations = np.arange(1, length + 1)
        median = np.median(paths, axis=0)
        axes.plot(
            iterations,
            median,
            label=horizon.label,
            color=color,
            linestyle=line,
            linewidth=1.8,
            marker=MARKERS[horizon.mode],
            markevery=max(1, length // 8),
            markersize=4.5,
        )
        axes.fill_between(
            iterations,
            paths.min(axis=0),
            paths.max(axis=0),
            color=color,
            alpha=0.15,
            linewidth=0,
        )
    axes.set_xlabel("iteration")
    axes.set_ylabel("t1")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{title}: t1 over training")
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, handlelength=3.5)
    return figure


STUDY = Reproduction("fig10", "snopt", _horizons, _tabulate, _draw)
