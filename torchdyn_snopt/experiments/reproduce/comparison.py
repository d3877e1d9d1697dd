"""Tables 4 and 6, Figures 7 and 9: what training with several optimizers comes to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn
from torchdyn.core import NeuralODE

from torchdyn_snopt.experiments.configuration import Observer
from torchdyn_snopt.experiments.curves import Run, by_label, read_run
from torchdyn_snopt.experiments.figures import PANEL, STYLES, draw_tasks
from torchdyn_snopt.experiments.optimizers import OptimizerSpec
from torchdyn_snopt.experiments.reproduce import paper
from torchdyn_snopt.experiments.reproduce.solves import solves_of
from torchdyn_snopt.experiments.reproduce.study import (
    Request,
    Study,
    Table,
    interval,
    merit,
    merit_title,
    write_study,
)
from torchdyn_snopt.experiments.storage import load_checkpoint
from torchdyn_snopt.experiments.suite import Suite, run_suite
from torchdyn_snopt.experiments.tasks import Task
from torchdyn_snopt.experiments.training import CHECKPOINT_NAME

OPTIMIZERS = ("adam", "sgd", "snopt")
DECADES = 2.0
RATES = 5  # learning rates of each optimizer
REGULARIZATION_SAMPLES = 256
REGULARIZATION_TIMES = 11
SEED = 0

Runs = dict[str, list[Run]]


@dataclass(frozen=True)
class Comparison:
    """A figure or a table of the paper about several optimizers on one task.

    Attributes:
        name: On the command line, and of its files.
        optimizers: From the task to what trains it.
        tabulate: From the runs of each label and the request to the table.
        draw: Likewise to the picture.
    """

    name: str
    optimizers: Callable[[Task], Sequence[OptimizerSpec]]
    tabulate: Callable[[Runs, Request], Table]
    draw: Callable[[Runs, Request], Figure]

    def suite(self, request: Request) -> Suite:
        """The runs that it consists of.

        Args:
            request: What to reproduce on.

        Returns:
            A suite in the output folder.
        """
        return Suite(
            task=request.task,
            optimizers=self.optimizers(request.task),
            seeds=request.seeds,
            budget=request.budget,
            out=request.out,
            device=request.device,
            data_dir=request.data_dir,
            clock=request.clock,
        )

    def run(self, request: Request, observers: Sequence[Observer] = ()) -> Study:
        """Carry out the runs, then write table and picture from their logs.

        Args:
            request: What to reproduce on.
            observers: Who is told about the runs.

        Returns:
            The study; if it was interrupted, over the runs that there are.
        """
        suite = self.suite(request)
        results, report = run_suite(
            suite, observers, resume=request.resume, overwrite=request.overwrite
        )
        folders = [folder for _, folder in suite.runs() if folder.exists()]
        runs = by_label(
            run for run in map(read_run, folders) if len(run.steps.get("iteration", ()))
        )
        table = self.tabulate(runs, request)
        files = write_study(request.out, self.name, table, self.draw(runs, request))
        return Study(table, [*files, *report.files], results)


def _paper_set(task: Task) -> list[OptimizerSpec]:
    return [OptimizerSpec(name) for name in OPTIMIZERS]


def _whole(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.status != "failed" and run.epochs]


def _draw_curves(runs: Runs, request: Request) -> Figure:
    drawn = draw_tasks([[run for group in runs.values() for run in group]] if runs else [])
    return drawn.get("figure7", Figure(figsize=PANEL))


def fraction(runs: Sequence[Run], task: Task) -> str:
    """The part of the paper's budget that was run.

    Args:
        runs: Of one optimizer.
        task: The task.

    Returns:
        The median number of iterations, relative to the paper's epochs over the data at hand.
    """
    epochs = paper.EPOCHS.get(task.name)
    if epochs is None or not runs:
        return "–"
    shares = [run.steps["iteration"][-1] / (epochs * run.header["batches"]) for run in runs]
    return f"{100 * float(np.median(shares)):.1f} %"


# --- Table 4 and Figure 7 -------------------------------------------------------------------------


def _tabulate_merit(runs: Runs, request: Request) -> Table:
    title = merit_title([run for group in runs.values() for run in group])
    head = ["optimizer", title, "the paper", "of its budget", "training loss", "seeds", "failed"]
    body = []
    for label, group in runs.items():
        whole = _whole(group)
        published = paper.TABLE4.get(request.task.name, {}).get(group[0].optimizer)
        losses = [float(run.smoothed("loss", partial=True)[-1]) for run in whole]
        body.append(
            [
                label,
                interval([merit(run) for run in whole], 2),
                "–" if published is None else f"{published:.2f}",
                fraction(whole, request.task),
                interval(losses, 4),
                str(len(group)),
                str(len(group) - len(whole)),
            ]
        )
    return Table(
        f"{request.task.title}: test performance",
        head,
        body,
        (
            "Mean ± half of Student's 95 % interval over the seeds, at the end of the budget. The "
            "share of the paper's budget is in iterations: epochs of the authors' scripts (Adam's "
            "where they differ) over the training data at hand.",
        ),
    )


TABLE4 = Comparison("table4", _paper_set, _tabulate_merit, _draw_curves)
FIGURE7 = Comparison("fig7", _paper_set, _tabulate_merit, _draw_curves)


# --- Table 6 --------------------------------------------------------------------------------------


def regularization(model: nn.Module, inputs: Tensor) -> float:
    """∫ ‖∇ₓF‖² + ‖F‖² dt of a sample, summed over the model's solves (Finlay et al. 2020).

    The Jacobian's squared Frobenius norm is estimated with random signs, the integral taken by the
    trapezoidal rule along the solution.

    Args:
        model: A model with at least one NeuralODE.
        inputs: A batch.

    Returns:
        The mean over the batch.
    """
    return sum(_along(node, x) for node, x in solves_of(model, inputs))


def _along(node: NeuralODE, x: Tensor) -> float:
    ends = torch.tensor([0.0, 1.0]) if node.t_span is None else node.t_span.detach()
    times = torch.linspace(float(ends[0]), float(ends[-1]), REGULARIZATION_TIMES).to(x)
    with torch.no_grad():
        states = node(x, times)
    values = torch.stack([_rates(node.vf, t, y) for t, y in zip(times, states, strict=True)])
    return float(torch.trapezoid(values, times))


def _rates(field: nn.Module, t: Tensor, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        f = field(t, x)
        signs = torch.randint_like(f, 2).mul_(2).sub_(1)
        (product,) = torch.autograd.grad(f, x, signs)
    total: Tensor = product.square().sum() + f.detach().square().sum()
    return total / len(x)


def _trained(run: Run, request: Request) -> nn.Module:
    model = request.task.build_model("snopt", request.task.tolerance).to(request.device)
    content = load_checkpoint(run.folder / CHECKPOINT_NAME, request.device)
    model.load_state_dict(content["model"])
    return model.eval()


def _tabulate_regularization(runs: Runs, request: Request) -> Table:
    inputs = request.task.load(request.data_dir).test.x[:REGULARIZATION_SAMPLES]
    inputs = inputs.to(request.device)
    head = ["optimizer", "NFE forward", "NFE backward", "∫‖∇F‖²+‖F‖²", "the paper's NFE",
            "the paper's ∫", "of its budget", "seeds"]  # fmt: skip
    body = []
    for label, group in runs.items():
        whole = _whole(group)
        measured = []
        for run in whole:
            torch.manual_seed(SEED)
            measured.append(regularization(_trained(run, request), inputs))
        known = paper.TABLE6.get(group[0].optimizer) if request.task.name == "svhn" else None
        body.append(
            [
                label,
                interval([_last_nfe(run, "nfe_forward") for run in whole], 1),
                interval([_last_nfe(run, "nfe_backward") for run in whole], 1),
                interval(measured, 2),
                f"{known[0]:g}" if known else "–",
                f"{known[1]:g}" if known else "–",
                fraction(whole, request.task),
                str(len(whole)),
            ]
        )
    return Table(
        f"{request.task.title}: implicit regularization",
        head,
        body,
        (
            "Mean ± half of Student's 95 % interval over the seeds. NFE: of an iteration, mean of "
            "the last epoch's worth. The integral: mean over the first "
            f"{REGULARIZATION_SAMPLES} test samples, with the trained weights. The paper's figures "
            "are those of SVHN.",
        ),
    )


def _last_nfe(run: Run, column: str) -> float:
    return float(np.mean(run.steps[column][-int(run.header["batches"]) :]))


TABLE6 = Comparison(
    "table6",
    lambda task: [OptimizerSpec("adam"), OptimizerSpec("snopt")],
    _tabulate_regularization,
    _draw_curves,
)


# --- Figure 9 -------------------------------------------------------------------------------------


def _rates_set(task: Task) -> list[OptimizerSpec]:
    specs = []
    for name in OPTIMIZERS:
        spec = OptimizerSpec(name)
        middle = float(spec.settings(task).get("lr") or spec.row.default_lr)
        spread = np.logspace(-DECADES / 2, DECADES / 2, RATES)
        specs += [OptimizerSpec(name, {"lr": float(f"{middle * factor:.2g}")}) for factor in spread]
    return specs


def _by_optimizer(runs: Runs) -> dict[str, list[list[Run]]]:
    found: dict[str, list[list[Run]]] = {}
    for group in runs.values():
        found.setdefault(group[0].optimizer, []).append(group)
    return found


def final_loss(run: Run) -> float:
    """The smoothed training loss at the end.

    Args:
        run: A run.

    Returns:
        It; for a run that failed, the highest loss that it had before.
    """
    losses = run.smoothed("loss", partial=True)
    return float(np.nanmax(losses) if run.status == "failed" else losses[-1])


def _tabulate_rates(runs: Runs, request: Request) -> Table:
    head = ["optimizer", "learning rates", "final loss, lowest", "highest", "spread",
            "spread to SNOpt's", "failed"]  # fmt: skip
    rows = {}
    for name, groups in _by_optimizer(runs).items():
        losses = [float(np.median([final_loss(run) for run in group])) for group in groups]
        rates = [float(group[0].header["config"]["settings"]["lr"]) for group in groups]
        failed = sum(run.status == "failed" for group in groups for run in group)
        rows[name] = (rates, losses, max(losses) - min(losses), failed)
    ours = rows["snopt"][2] if "snopt" in rows else math.nan
    body = [
        [
            name,
            f"{min(rates):g} – {max(rates):g}",
            f"{min(losses):.4f}",
            f"{max(losses):.4f}",
            f"{spread:.4f}",
            f"{spread / ours:.2f}" if ours else "–",
            str(failed),
        ]
        for name, (rates, losses, spread, failed) in rows.items()
    ]
    return Table(
        f"{request.task.title}: sensitivity to the learning rate",
        head,
        body,
        (
            f"{RATES} learning rates over two decades around each optimizer's own; medians over "
            "the seeds of the training loss at the end. Spread: highest less lowest; a run that "
            "failed counts with the highest loss that it had.",
        ),
    )


def _draw_rates(runs: Runs, request: Request) -> Figure:
    figure = Figure(figsize=PANEL, layout="constrained")
    axes = figure.subplots()
    handles = []
    for name, groups in _by_optimizer(runs).items():
        style = STYLES[name]
        rates = [float(group[0].header["config"]["settings"]["lr"]) for group in groups]
        losses = [[final_loss(run) for run in group] for group in groups]
        middle = [float(np.median(values)) for values in losses]
        centre = float(np.median(rates))
        relative = [rate / centre for rate in rates]
        axes.plot(relative, middle, color=style.color, linestyle=style.line, marker=style.marker)
        axes.fill_between(
            relative,
            [min(values) for values in losses],
            [max(values) for values in losses],
            color=style.color,
            alpha=0.15,
            linewidth=0,
        )
        handles.append(
            Line2D(
                [],
                [],
                color=style.color,
                linestyle=style.line,
                marker=style.marker,
                label=f"{OptimizerSpec(name).label}, around {centre:g}",
            )
        )
    axes.set_xscale("log")
    if min((final_loss(run) for group in runs.values() for run in group), default=0.0) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("learning rate, relative to the middle one")
    axes.set_ylabel("training loss at the end")
    axes.set_title(f"{request.task.title}: sensitivity to the learning rate")
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if handles:
        axes.legend(handles=handles, frameon=False, handlelength=3.5)
    return figure


FIGURE9 = Comparison("fig9", _rates_set, _tabulate_rates, _draw_rates)

COMPARISONS = (TABLE4, TABLE6, FIGURE7, FIGURE9)
