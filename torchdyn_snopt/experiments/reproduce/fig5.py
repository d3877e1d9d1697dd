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
    interval,
    merit,
    merit_title,
    ratios,
    seconds,
)

REFERENCE = 1.0
GRID = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, REFERENCE)


def _horizons(penalty: float | None) -> list[HorizonChoice]:
    return [HorizonChoice("fixed", t1) for t1 in GRID]


def _tabulate(arms: Arms, title: str) -> Table:
    reference = _reference(arms)
    head = ["t1", "relative time", "seconds", "NFE per iteration", "seeds"]
    some = next(iter(arms.values()), [])
    if some:
        head.insert(2, merit_title(some[0]))
    body = [
        [
            f"{horizon.t1:g}",
            interval(ratios(runs, reference), 3),
            interval([merit(run) for run in runs], 2),
            interval([seconds(run) for run in runs], 1),
            interval([evaluations(run) for run in runs], 1),
            str(len(runs)),
        ]
        for horizon, runs in arms.items()
    ]
    return Table(
        f"{title}: training with a fixed t1",
        head,
        body,
        (
            f"Relative to t1 = {REFERENCE:g} with the same seed and the same number of epochs. "
            "Mean ± half of Student's 95 % interval over the seeds. Seconds are of training alone.",
        ),
    )


def _draw(arms: Arms, title: str) -> Figure:
    figure = Figure(figsize=(2 * PANEL[0], PANEL[1]), layout="constrained")
    reference = _reference(arms)
    some = next(iter(arms.values()), [])
    panels = (
        ("relative training time [%]", lambda runs: [100 * r for r in ratios(runs, reference)]),
        (merit_title(some[0]) if some else "", lambda runs: [merit(run) for run in runs]),
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
