"""The pictures of a comparison.

Colours are Okabe and Ito's; line styles and markers carry the same information.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from torchdyn_snopt.search.arms import DEPTH_SEARCH, get_arm
from torchdyn_snopt.search.results import Comparison, TrialRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.typing import LineStyleType

PANEL = (6.4, 4.4)  # inches


@dataclass(frozen=True)
class Style:
    """How an arm looks."""

    color: str
    line: LineStyleType
    marker: str


STYLES = {
    "policy": Style("#009E73", "-", "o"),
    "gradient": Style("#D55E00", "--", "s"),
    "tpe": Style("#0072B2", "-.", "^"),
    "grid": Style("#56B4E9", ":", "v"),
    "hyperband": Style("#CC79A7", (0, (5, 1, 1, 1, 1, 1)), "D"),
    "median": Style("#8C510A", (0, (3, 1, 1, 1)), "P"),
    "joint": Style("#000000", (0, (6, 2)), "X"),
    "joint-tpe": Style("#7F7F7F", (0, (1, 1)), "*"),
}


def plot_comparison(comparison: Comparison) -> dict[str, Figure]:
    """Draw a comparison.

    Args:
        comparison: With at least one trial that has reported; without any there are no pictures.

    Returns:
        Figures by name: 'cost' (best objective against field evaluations), 'horizon' (t1 over
        training), 'pareto' (error against NFE), and 'comparison', all three side by side.
    """
    if not any(record.history for record in comparison.records):
        return {}
    panels = {"cost": _draw_cost, "horizon": _draw_horizon, "pareto": _draw_pareto}
    figures = {}
    for name, draw in panels.items():
        figures[name] = Figure(figsize=PANEL, layout="constrained")
        axes = figures[name].subplots()
        draw(axes, comparison)
        axes.set_title(f"{comparison.title}: {axes.get_title()}")
    whole = Figure(figsize=(3 * PANEL[0], PANEL[1]), layout="constrained")
    for axes, draw in zip(whole.subplots(1, 3), panels.values(), strict=True):
        draw(axes, comparison)
    seeds = comparison.settings.seeds
    whole.suptitle(f"{comparison.title}, {seeds} seed{'s' if seeds > 1 else ''}")
    return {"comparison": whole, **figures}


# --- best objective against cost ------------------------------------------------------------------


def _draw_cost(axes: Axes, comparison: Comparison) -> None:
    for arm in comparison.settings.arms:
        style = STYLES[arm]
        label: str | None = get_arm(arm).title
        for seed in range(comparison.settings.seeds):
            cost, best = _best_so_far(comparison.of(arm, seed))
            if not cost:
                continue
            axes.plot(
                cost,
                best,
                drawstyle="steps-post",
                color=style.color,
                linestyle=style.line,
                marker=style.marker,
                markersize=5,
                linewidth=1.5,
                alpha=0.85,
                label=label,
            )
            label = None
    axes.set_xscale("log")
    axes.set_yscale("log")
    _label_few(axes.xaxis, "{x:,.0f}", (1.0, 2.0, 5.0))
    _label_few(axes.yaxis, "{x:g}")
    axes.set_ylabel(f"best error + {comparison.settings.nfe_weight:g}·NFE so far")
    axes.set_title("objective against cost")
    _finish(axes, "field evaluations of all trials so far")


def _best_so_far(records: Sequence[TrialRecord]) -> tuple[list[float], list[float]]:
    """Cost and best objective after each trial, from the first completed one on."""
    cost, best = 0.0, float("inf")
    costs, bests = [], []
    for record in records:
        cost += record.last("evaluations") or 0.0
        best = min(best, best if record.objective is None else record.objective)
        if np.isfinite(best) and record.history:
            costs.append(cost)
            bests.append(best)
    return costs, bests


# --- t1 over training -----------------------------------------------------------------------------


def _draw_horizon(axes: Axes, comparison: Comparison) -> None:
    for arm in ("policy", "gradient"):
        label: str | None = get_arm(arm).title
        for record in comparison.of(arm):
            if record.history:
                _draw_path(axes, record, comparison.settings.t1, arm, label)
                label = None
    for arm in DEPTH_SEARCH:
        _draw_interval(axes, comparison, arm)
    axes.set_yscale("log")
    _label_few(axes.yaxis, "{x:g}")
    axes.set_ylabel("t1")
    axes.set_title("t1 over training")
    _finish(axes, "epoch")


def _draw_path(axes: Axes, record: TrialRecord, start: float, arm: str, label: str | None) -> None:
    epochs = [0, *[row["epoch"] for row in record.history]]
    times = [start, *[row["t1"] for row in record.history]]
    style = STYLES[arm]
    axes.plot(
        epochs,
        times,
        color=style.color,
        linestyle=style.line,
        marker=style.marker,
        markersize=5,
        label=label,
    )


def _draw_interval(axes: Axes, comparison: Comparison, arm: str) -> None:
    """The t1 of a search's best quarter of trials, as a bar beside the curves; its best dotted."""
    summaries = [s for s in comparison.summaries() if s.arm == arm and s.interval]
    place = comparison.settings.epochs + 0.35 * (1 + DEPTH_SEARCH.index(arm))
    style, label = STYLES[arm], f"{get_arm(arm).title}: best quarter"
    for shift, summary in enumerate(summaries):
        assert summary.interval is not None
        assert summary.best is not None
        x = place + 0.05 * shift
        axes.plot([x, x], summary.interval, color=style.color, linewidth=2.5, alpha=0.6)
        best = summary.best.final("t1")
        axes.plot(
            [x],
            [best],
            color=style.color,
            marker=style.marker,
            markersize=6,
            linestyle="none",
            label=label if shift == 0 else None,
        )


# --- error against NFE ----------------------------------------------------------------------------


def _draw_pareto(axes: Axes, comparison: Comparison) -> None:
    for arm in comparison.settings.arms:
        done = [r for r in comparison.of(arm) if r.state == "complete" and r.history]
        if done:
            style = STYLES[arm]
            axes.plot(
                [r.final("nfe") for r in done],
                [100.0 * r.final("error") for r in done],
                linestyle="none",
                marker=style.marker,
                color=style.color,
                markersize=6,
                alpha=0.75,
                label=get_arm(arm).title,
            )
    front = comparison.pareto()
    axes.plot(
        [r.final("nfe") for r in front],
        [100.0 * r.final("error") for r in front],
        drawstyle="steps-post",
        color="0.3",
        linewidth=1.2,
        zorder=0,
        label="Pareto front",
    )
    axes.set_ylabel("validation error [%]")
    axes.set_ylim(bottom=0)
    axes.set_title("error against evaluations")
    _finish(axes, "field evaluations of a forward solve (NFE)")


def _label_few(axis: Axis, form: str, subs: Sequence[float] = (1.0, 2.0, 3.0, 5.0, 7.0)) -> None:
    """Ticks at some multiples of the powers of ten, in plain figures."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(form)
    axis.set_minor_formatter(NullFormatter())


def _finish(axes: Axes, xlabel: str) -> None:
    axes.set_xlabel(xlabel)
    axes.grid(True, which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(framealpha=0.7, edgecolor="none", fontsize="small", handlelength=3.0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
