"""Table 5: training time and accuracy with a learned t1, relative to t1 = 1."""

from __future__ import annotations

from matplotlib.figure import Figure

from torchdyn_snopt.experiments.curves import Run
from torchdyn_snopt.experiments.figures import PANEL
from torchdyn_snopt.experiments.horizons import HorizonChoice
from torchdyn_snopt.experiments.reproduce.study import (
    PENALTY,
    Arms,
    Reproduction,
    Table,
    differences,
    evaluations,
    horizon_path,
    merit,
    merit_title,
    over_seeds,
    ratios,
    seconds,
    seconds_per_iteration,
    tabulate,
)

START = 1.0
NOTE = (
    "Trained by SNOpt with preconditioner='kfe_adam', lr=0.01. Time and field evaluations "
    f"(forward, backward, the policy's own) are of an iteration, relative to t1 = "
    f"{START:g} with the same seed, and the difference is that to its test result. Mean ± half of "
    "Student's 95 % interval over the seeds. Seconds are of training alone."
)


def _horizons(penalty: float | None) -> list[HorizonChoice]:
    c = PENALTY if penalty is None else penalty
    return [
        HorizonChoice("fixed", START),
        HorizonChoice("gradient", START, c),
        HorizonChoice("policy", START, c),
    ]


def _tabulate(arms: Arms, title: str) -> Table:
    fixed = _fixed(arms)
    columns = (
        over_seeds("relative time", lambda r: ratios(r, fixed, seconds_per_iteration), 3),
        over_seeds("relative NFE", lambda r: ratios(r, fixed, evaluations), 3),
        over_seeds(
            merit_title(run for runs in arms.values() for run in runs),
            lambda r: [merit(run) for run in r],
            2,
        ),
        over_seeds("difference", lambda r: differences(r, fixed), 2),
        over_seeds("seconds", lambda r: [seconds(run) for run in r], 1),
        over_seeds("NFE per iteration", lambda r: [evaluations(run) for run in r], 1),
        over_seeds("final t1", lambda r: [float(horizon_path(run)[-1]) for run in r], 3),
    )
    return tabulate(f"{title}: training with a learned t1", arms, columns, (NOTE,))


def _draw(arms: Arms, title: str) -> Figure:
    figure = Figure(figsize=(2 * PANEL[0], PANEL[1]), layout="constrained")
    fixed = _fixed(arms)

    def relative_time(runs: list[Run]) -> list[float]:
        return [100 * ratio for ratio in ratios(runs, fixed, seconds_per_iteration)]

    def merits(runs: list[Run]) -> list[float]:
        return [merit(run) for run in runs]

    panels = (
        ("training time relative to t1 = 1 [%]", relative_time),
        (merit_title(run for runs in arms.values() for run in runs), merits),
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


def _fixed(arms: Arms) -> list[Run]:
    return next((runs for horizon, runs in arms.items() if horizon.mode == "fixed"), [])


STUDY = Reproduction("table5", "snopt", _horizons, _tabulate, _draw)
