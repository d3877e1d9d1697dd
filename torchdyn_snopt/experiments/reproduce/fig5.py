"""Figures 5 and 12: training time and accuracy against a fixed t1."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from torchdyn_snopt.experiments.curves import Run
from torchdyn_snopt.experiments.figures import PANEL
from torchdyn_snopt.experiments.horizons import HorizonChoice
from torchdyn_snopt.experiments.reproduce.study import (
    Arms,
    Reproduction,
    Table,
    evaluations,
    merit,
    merit_title,
    over_seeds,
    ratios,
    seconds,
    seconds_per_iteration,
    tabulate,
)

REFERENCE = 1.0
NOTE = (
    "Trained by Adam, as in the paper. Time and field evaluations are of an iteration, relative "
    f"to t1 = {REFERENCE:g} with the same seed. Mean ± half of Student's 95 % interval over the "
    "seeds. Seconds are of training alone."
)
GRID = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, REFERENCE)


def _horizons(penalty: float | None) -> list[HorizonChoice]:
    return [HorizonChoice("fixed", t1) for t1 in GRID]


def _tabulate(arms: Arms, title: str) -> Table:
    reference = _reference(arms)
    columns = (
        over_seeds("relative time", lambda r: ratios(r, reference, seconds_per_iteration), 3),
        over_seeds("relative NFE", lambda r: ratios(r, reference, evaluations), 3),
        over_seeds(
            merit_title(run for runs in arms.values() for run in runs),
            lambda r: [merit(run) for run in r],
            2,
        ),
        over_seeds("seconds", lambda r: [seconds(run) for run in r], 1),
        over_seeds("NFE per iteration", lambda r: [evaluations(run) for run in r], 1),
    )
    return tabulate(f"{title}: training with a fixed t1", arms, columns, (NOTE,))


def _draw(arms: Arms, title: str) -> Figure:
    figure = Figure(figsize=(2 * PANEL[0], PANEL[1]), layout="constrained")
    reference = _reference(arms)

    def relative_time(runs: list[Run]) -> list[float]:
        return [100 * ratio for ratio in ratios(runs, reference, seconds_per_iteration)]

    def merits(runs: list[Run]) -> list[float]:
        return [merit(run) for run in runs]

    panels = (
        ("relative training time [%]", relative_time),
        (merit_title(run for runs in arms.values() for run in runs), merits),
    )
    for axes, (label, measure) in zip(figure.subplots(1, 2), panels, strict=True):
        known = [(h.t1, measure(runs)) for h, runs in arms.items() if measure(runs)]
        if known:
            t1 = [t for t, _ in known]
            axes.plot(t1, [np.mean(v) for _, v in known], "-o", color="#0072B2", linewidth=1.8)
            low, high = [min(v) for _, v in known], [max(v) for _, v in known]
            axes.fill_between(t1, low, high, color="#0072B2", alpha=0.15, linewidth=0)
        axes.set_xlabel("t1")
        axes.set_ylabel(label)
        axes.set_xlim(left=0)
        axes.grid(True, color="0.9", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}: training with a fixed t1")
    return figure


def _reference(arms: Arms) -> list[Run]:
    return next((runs for horizon, runs in arms.items() if horizon.t1 == REFERENCE), [])


STUDY = Reproduction("fig5", "adam", _horizons, _tabulate, _draw)
