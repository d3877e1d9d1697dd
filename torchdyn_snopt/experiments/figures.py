"""Pictures of runs: medians over seeds with their range, one style per optimizer.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; line styles and markers
carry the same information, so that a print in black and white is as readable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from torchdyn_snopt.experiments.curves import Array, Run, by_label, running_mean

if TYPE_CHECKING:
    from matplotlib.typing import LineStyleType

PANEL = (6.4, 4.0)  # inches
POINTS = 400  # of the common grid on which curves over seconds are compared


@dataclass(frozen=True)
class Style:
    """How the curves of one optimizer look."""

    color: str
    line: LineStyleType
    marker: str


# Okabe and Ito's palette without yellow, which is too pale for lines.
STYLES: dict[str, Style] = {
    "snopt": Style("#009E73", "-", "o"),
    "adam": Style("#D55E00", "--", "s"),
    "sgd": Style("#0072B2", ":", "^"),
    "snopt-paper": Style("#000000", "-.", "v"),
    "adamw": Style("#CC79A7", (0, (5, 1, 1, 1, 1, 1)), "D"),
    "muon": Style("#E69F00", (0, (7, 2)), "P"),
    "soap": Style("#56B4E9", (0, (3, 1, 1, 1)), "X"),
    "shampoo": Style("#8C510A", (0, (1, 1)), ">"),
    "lbfgs": Style("#7F7F7F", (0, (7, 1, 2, 1)), "<"),
}
SPARE_STYLES = (
    Style("#A6611A", "--", "p"),
    Style("#80CDC1", "-.", "H"),
    Style("#404040", "-", "8"),
    Style("#C51B7D", ":", "1"),
    Style("#5E3C99", "--", "*"),
    Style("#1B7837", "-.", "h"),
    Style("#B2182B", "-", "d"),
)


@dataclass(frozen=True)
class Panel:
    """One kind of picture.

    Attributes:
        name: The file's name without its ending.
        title: The title.
        draw: From axes, runs and the styles of labels to the drawn axes.
    """

    name: str
    title: str
    draw: Callable[[Axes, Sequence[Run], dict[str, Style]], None]


def draw_figures(runs: Sequence[Run]) -> dict[str, Figure]:
    """All pictures of runs of one task.

    Args:
        runs: The runs, each with at least one iteration; without any there are no pictures.

    Returns:
        Figures by name: one per panel, and ``overview`` with all of them.
    """
    if not runs:
        return {}
    styles = assign_styles(runs)
    figures = {panel.name: _single(panel, runs, styles) for panel in PANELS}
    return {"overview": _overview(runs, styles), **figures}


def draw_tasks(runs_of_tasks: Sequence[Sequence[Run]]) -> dict[str, Figure]:
    """Pictures over several tasks, in the manner of the paper's Figures 1 and 7.

    Args:
        runs_of_tasks: For each task its runs, each with at least one iteration.

    Returns:
        ``figure1``: training loss against time, one panel a task; ``figure7``: below each of these
        the test set; nothing without runs.
    """
    if not runs_of_tasks:
        return {}
    styles = assign_styles([run for runs in runs_of_tasks for run in runs])
    by_name = {panel.name: panel for panel in PANELS}
    rows = {"figure1": ["loss_over_time"], "figure7": ["loss_over_time", "test"]}
    figures = {}
    for name, panels in rows.items():
        columns = len(runs_of_tasks)
        size = (0.75 * PANEL[0] * columns, 0.85 * PANEL[1] * len(panels) + 1.0)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(panels), columns, squeeze=False)
        for line, panel in zip(grid, panels, strict=True):
            for axes, runs in zip(line, runs_of_tasks, strict=True):
                by_name[panel].draw(axes, runs, styles)
                axes.set_title(runs[0].header["title"])
        figure.legend(
            handles=_handles(styles), frameon=False, handlelength=3.5, loc="outside lower center",
            ncols=min(len(styles), max(2, 3 * columns - 1)),
        )  # fmt: skip
        figures[name] = figure
    return figures


def assign_styles(runs: Sequence[Run]) -> dict[str, Style]:
    """A style for every label: the optimizer's own, or a spare one if that is taken.

    Args:
        runs: The runs.

    Returns:
        Styles by label.
    """
    styles: dict[str, Style] = {}
    spare = 0
    for label, group in by_label(runs).items():
        own = STYLES.get(group[0].optimizer)
        if own is None or own in styles.values():
            own = SPARE_STYLES[spare % len(SPARE_STYLES)]
            spare += 1
        styles[label] = own
    return styles


def _single(panel: Panel, runs: Sequence[Run], styles: dict[str, Style]) -> Figure:
    figure = Figure(figsize=PANEL, layout="constrained")
    axes = figure.subplots()
    panel.draw(axes, runs, styles)
    axes.set_title(f"{runs[0].header['title']}: {panel.title}")
    _legend(axes, styles)
    return figure


def _overview(runs: Sequence[Run], styles: dict[str, Style]) -> Figure:
    figure = Figure(figsize=(2 * PANEL[0], 2 * PANEL[1]), layout="constrained")
    for axes, panel in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        panel.draw(axes, runs, styles)
        axes.set_title(panel.title)
    _legend(figure.axes[0], styles)
    seeds = len({run.seed for run in runs})
    figure.suptitle(f"{runs[0].header['title']}, {seeds} seed{'s' if seeds > 1 else ''}")
    return figure


def _legend(axes: Axes, styles: dict[str, Style]) -> None:
    """Every optimizer, those included whose runs all failed."""
    axes.legend(handles=_handles(styles), frameon=False, handlelength=3.5)


def _handles(styles: dict[str, Style]) -> list[Line2D]:
    return [
        Line2D(
            [], [], color=s.color, linestyle=s.line, marker=s.marker, markersize=4.5, label=label
        )
        for label, s in styles.items()
    ]


# --- panels ---------------------------------------------------------------------------------------


def _loss_over(column: str, xlabel: str) -> Callable[..., None]:
    def draw(axes: Axes, runs: Sequence[Run], styles: dict[str, Style]) -> None:
        for label, group in by_label(runs).items():
            style = styles[label]
            for run in group:
                _draw_raw(axes, run.steps[column], run.steps["loss"], style)
                if run.status == "failed":
                    _mark_failure(axes, run.steps[column], run.steps["loss"], style)
            curves = [
                (run.steps[column], run.smoothed("loss", partial=True)) for run in _whole(group)
            ]
            _draw_band(axes, curves, label, style)
        header = runs[0].header
        axes.axhline(header["target_loss"], color="0.35", linewidth=0.8, linestyle=(0, (1, 2)))
        axes.annotate(
            f"target {header['target_loss']:g}",
            (1.0, header["target_loss"]),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            fontsize="small",
            color="0.35",
        )
        # The negative log-likelihood of a density may have any sign.
        if min(header["target_loss"], *(run.steps["loss"].min() for run in runs)) > 0:
            axes.set_yscale("log")
        axes.set_ylabel(f"training loss (mean of {header['window']} batches)")
        _finish(axes, xlabel)

    return draw


def _draw_nfe(axes: Axes, runs: Sequence[Run], styles: dict[str, Style]) -> None:
    for label, group in by_label(runs).items():
        curves = [(run.steps["iteration"], _smoothed_nfe(run)) for run in _whole(group)]
        _draw_band(axes, curves, label, styles[label])
    axes.set_ylabel("field evaluations per iteration")
    _finish(axes, "iteration")


def _smoothed_nfe(run: Run) -> Array:
    total = run.steps["nfe_forward"] + run.steps["nfe_backward"]
    return running_mean(total, run.header["window"], partial=True)


def _draw_test(axes: Axes, runs: Sequence[Run], styles: dict[str, Style]) -> None:
    header = runs[0].header
    metric = header["metric"]
    column, scale = ("test_loss", 1.0) if metric is None else (f"test_{metric}", _scale(header))
    for label, group in by_label(runs).items():
        curves = [
            (run.epochs["seconds"], scale * run.epochs[column])
            for run in _whole(group)
            if column in run.epochs
        ]
        _draw_band(axes, curves, label, styles[label], every=1)
    unit = f" [{header['metric_unit']}]" if metric is not None and header["metric_unit"] else ""
    axes.set_ylabel(("test loss" if metric is None else f"test {metric}") + unit)
    _finish(axes, "seconds of training")


def _scale(header: dict[str, Any]) -> float:
    return float(header["metric_scale"])


PANELS = (
    Panel(
        "loss_over_time", "training loss against time", _loss_over("seconds", "seconds of training")
    ),
    Panel(
        "loss_over_iterations",
        "training loss against iterations",
        _loss_over("iteration", "iteration"),
    ),
    Panel("nfe", "field evaluations (forward + backward)", _draw_nfe),
    Panel("test", "test set", _draw_test),
)


# --- parts ----------------------------------------------------------------------------------------


def _whole(group: Sequence[Run]) -> list[Run]:
    """The runs that did not fail: a failed one is shown by its raw curve and a cross."""
    return [run for run in group if run.status != "failed"]


def _draw_raw(axes: Axes, x: Array, y: Array, style: Style) -> None:
    axes.plot(x, y, color=style.color, linewidth=0.6, alpha=0.25)


def _mark_failure(axes: Axes, x: Array, y: Array, style: Style) -> None:
    axes.plot(x[-1:], y[-1:], marker="x", markersize=9, markeredgewidth=2, color=style.color)


def _draw_band(
    axes: Axes,
    curves: Sequence[tuple[Array, Array]],
    label: str,
    style: Style,
    every: int | None = None,
) -> None:
    """The median over seeds, and the range between the lowest and the highest."""
    x, values = _on_common_grid(curves)
    if not x.size:
        return
    axes.plot(
        x,
        np.median(values, axis=0),
        color=style.color,
        linestyle=style.line,
        marker=style.marker,
        markevery=every or max(1, len(x) // 8),
        markersize=4.5,
        linewidth=1.8,
        label=label,
    )
    if len(curves) > 1:
        low, high = values.min(axis=0), values.max(axis=0)
        axes.fill_between(x, low, high, color=style.color, alpha=0.18, linewidth=0)
        if x.size == 1:  # a band without width
            axes.vlines(x, low, high, color=style.color, alpha=0.5)


def _on_common_grid(curves: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """All curves at the same x: as they are if they share theirs, else by interpolation."""
    known = [(x[~np.isnan(y)], y[~np.isnan(y)]) for x, y in curves]
    known = [(x, y) for x, y in known if x.size]
    if not known:
        return np.empty(0), np.empty((0, 0))
    first = known[0][0]
    if all(np.array_equal(x, first) for x, _ in known):
        return first, np.stack([y for _, y in known])
    low, high = max(x[0] for x, _ in known), min(x[-1] for x, _ in known)
    points = min(POINTS, max(len(x) for x, _ in known))
    # Curves of one point each, at different x, stand side by side at their middle.
    middle = np.array([np.median([x[-1] for x, _ in known])])
    grid = np.linspace(low, high, points) if high > low else middle
    return grid, np.stack([np.interp(grid, x, y) for x, y in known])


def _finish(axes: Axes, xlabel: str) -> None:
    axes.set_xlabel(xlabel)
    if axes.has_data():  # with room for the marker of a curve that is one point
        axes.set_xlim(0, 1.03 * axes.dataLim.x1)
    axes.grid(True, which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
