"""Table 5: training time and accuracy with a learned t1, relative to t1 = 1."""

from __future__ import annotations

from matplotlib.figure import Figure

from torchdyn_snopt.experiments.figures import PANEL
from torchdyn_snopt.experiments.horizons import HorizonChoice
from torchdyn_snopt.experiments.reproduce.study import (
    Arms,
    Reproduction,
    Table,
    differences,
    evaluations,
    horizon_path,
    interval,
    merit,
    merit_title,
    ratios,
    seconds,
)

START = 1.0
PENALTY = 0.5


def _horizons(penalty: float | None) -> list[HorizonChoice]:
    c = PENALTY if penalty is None else penalty
    return [
        HorizonChoice("fixed", START),
        HorizonChoice("gradient", START, c),
        HorizonChoice("policy", START, c),
    ]


def _tabulate(arms: Arms, title: str) -> Table:
    fixed = next((runs for horizon, runs in arms.items() if horizon.mode == "fixed"), [])
    head = ["t1", "relative time", "change", "seconds", "NFE per iteration", "final t1", "seeds"]
    if fixed:
        head.insert(2, merit_title(fixed[0]))
    body = [
        [
            horizon.label,
            interval(ratios(runs, fixed), 3),
            interval([merit(run) for run in runs], 2),
            interval(differences(runs, fixed), 2),
            interval([seconds(run) for run in runs], 1),
            interval([evaluations(run) for run in runs], 1),
            interval([float(horizon_path(run)[-1]) for run in runs], 3),
            str(len(runs)),
        ]
        for horizon, runs in arms.items()
    ]
    return Table(
        f"{title}: training with a learned t1",
        head,
        body if fixed else [],
        (
            f"Relative to t1 = {START:g} with the same seed and the same number of epochs. Mean ± "
            "half of Student's 95 % interval over the seeds. Seconds are of training alone.",
        ),
    )


def _draw(arms: Arms, title: str) -> Figure:
    figure = Figure(figsize=(2 * PANEL[0], PANEL[1]), layout="constrained")
    fixed = next((runs for horizon, runs in arms.items() if horizon.mode == "fixed"), [])
    panels = (
        ("training time relative to t1 = 1", lambda runs: ratios(runs, fixed)),
        (merit_title(fixed[0]) if fixed else "", lambda runs: [merit(run) for run in runs]),
    )
    for axes, (label, measure) in zip(figure.subplots(1, 2), panels, strict=True):
        for place, runs in enumerate(arms.values()):
            values = measure(runs)
            axes.plot([place] * len(values), values, "o", color="#0072B2", alpha=0.6)
            if values:
                axes.plot(place, sum(values) / len(values), "_", color="#D55E00", markersize=28)
        axes.set_xticks(range(len(arms)), [horizon.label for horizon in arms])
        axes.set_xlim(-0.5, len(arms) - 0.5)
        axes.set_ylabel(label)
        axes.grid(True, axis="y", color="0.9", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}: each dot is a seed, each bar a mean")
    return figure


STUDY = Reproduction("table5", "snopt", _horizons, _tabulate, _draw)
