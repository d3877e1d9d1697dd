"""Figure 10: t1 over the iterations, by the policy and by the gradient, from two starts."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from torchdyn_snopt.experiments.figures import PANEL
from torchdyn_snopt.experiments.horizons import HorizonChoice, Mode
from torchdyn_snopt.experiments.reproduce.study import (
    Arms,
    Reproduction,
    Table,
    horizon_path,
    interval,
    merit,
    merit_title,
)

STARTS = (1.0, 0.05)
PENALTY = 0.5
COLORS: dict[Mode, str] = {"policy": "#009E73", "gradient": "#D55E00"}
LINES = dict(zip(STARTS, ("-", "--"), strict=True))


def _horizons(penalty: float | None) -> list[HorizonChoice]:
    c = PENALTY if penalty is None else penalty
    return [HorizonChoice(mode, t1, c) for mode in COLORS for t1 in STARTS]


def _tabulate(arms: Arms, title: str) -> Table:
    some = next(iter(arms.values()), [])
    head = ["t1", "final t1", "spread", "gap between starts", "seeds"]
    head += [merit_title(some[0])] if some else []
    body = [
        [
            horizon.label,
            interval([float(horizon_path(run)[-1]) for run in runs], 3),
            f"{100 * max(_spread(horizon_path(run)) for run in runs):.1f} %",
            _gap(arms, horizon),
            str(len(runs)),
            interval([merit(run) for run in runs], 2),
        ]
        for horizon, runs in arms.items()
    ]
    return Table(
        f"{title}: t1 over training",
        head,
        body,
        (
            "Mean ± half of Student's 95 % interval over the seeds. Spread: highest less lowest t1 "
            "in the last quarter of training, relative to the final one, of the worst seed. Gap: "
            "final t1 of the two starts, their difference relative to their mean, of the worst "
            "seed.",
        ),
    )


def _spread(path: np.ndarray) -> float:
    last = path[-max(1, len(path) // 4) :]
    return float((last.max() - last.min()) / last[-1])


def _gap(arms: Arms, horizon: HorizonChoice) -> str:
    ends: list[dict[int, float]] = []
    for other, runs in arms.items():
        if other.mode == horizon.mode:
            ends.append({run.seed: float(horizon_path(run)[-1]) for run in runs})
    if len(ends) != len(STARTS):
        return "–"
    gaps = [
        abs(ends[0][seed] - ends[1][seed]) / ((ends[0][seed] + ends[1][seed]) / 2)
        for seed in ends[0].keys() & ends[1].keys()
    ]
    return f"{100 * max(gaps):.1f} %" if gaps else "–"


def _draw(arms: Arms, title: str) -> Figure:
    figure = Figure(figsize=PANEL, layout="constrained")
    axes = figure.subplots()
    for horizon, runs in arms.items():
        style = {"color": COLORS[horizon.mode], "linestyle": LINES[horizon.t1]}
        length = min(len(horizon_path(run)) for run in runs)
        paths = np.stack([horizon_path(run)[:length] for run in runs])
        iterations = np.arange(1, length + 1)
        axes.plot(iterations, np.median(paths, axis=0), label=horizon.label, linewidth=1.8, **style)
        axes.fill_between(
            iterations,
            paths.min(axis=0),
            paths.max(axis=0),
            color=COLORS[horizon.mode],
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
