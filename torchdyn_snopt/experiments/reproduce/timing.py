"""Figures 8 and 11: time and memory of iterations, contenders taking turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure

from torchdyn_snopt import SNOpt
from torchdyn_snopt.adjoint.recursive import recursive_product
from torchdyn_snopt.experiments.bench.steps import Iterations, peak_bytes
from torchdyn_snopt.experiments.bench.timing import Timings, interleave, whole
from torchdyn_snopt.experiments.figures import PANEL
from torchdyn_snopt.experiments.meters import Clock
from torchdyn_snopt.experiments.optimizers import OptimizerSpec
from torchdyn_snopt.experiments.reproduce import paper
from torchdyn_snopt.experiments.reproduce.solves import solves_of
from torchdyn_snopt.experiments.reproduce.study import Request, Study, Table, write_study

BLOCK = 10  # iterations of a turn: refreshes of the curvature are spread over them
ROUNDS = (3, 50)
SECONDS = 60.0
MEGABYTE = 1e6
OURS = "SNOpt"
TORCHDYN = "Adam, torchdyn adjoint"
TORCHDIFFEQ = "Adam, torchdiffeq adjoint"
SPECS = {
    OURS: OptimizerSpec("snopt"),
    TORCHDYN: OptimizerSpec("adam", sensitivity="adjoint"),
    TORCHDIFFEQ: OptimizerSpec("adam", sensitivity="torchdiffeq"),
    "Adam, this package's adjoint": OptimizerSpec("adam"),
}
# Training changes the field, and with it what a solve costs: here both solve the same one.
FOLLOWER = f"{TORCHDYN}, from SNOpt's weights"
RECURSION = "recursive adjoint"
COLOR = "#009E73"

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Timing:
    """A figure of the paper about time.

    Attributes:
        name: On the command line, and of its files.
        measure: From the request, and whom to tell, to table and picture.
    """

    name: str
    measure: Callable[[Request, Tell], tuple[Table, Figure]]

    def run(self, request: Request, tell: Tell) -> Study:
        """Measure, then write table and picture.

        Args:
            request: What to measure on.
            tell: Told about the progress.

        Returns:
            The study, without runs.
        """
        request.out.mkdir(parents=True, exist_ok=True)
        table, figure = self.measure(request, tell)
        return Study(table, write_study(request.out, self.name, table, figure), [])


def take_turns(
    contenders: Mapping[str, Callable[[], object]], seconds: float, clock: Clock
) -> Timings:
    """Let contenders take turns for about so many seconds.

    Args:
        contenders: A turn of each.
        seconds: For all turns together.
        clock: The clock.

    Returns:
        The measurements, of at least three rounds.
    """
    measured = {name: whole(turn) for name, turn in contenders.items()}
    once = sum(contender(clock) for contender in measured.values())
    low, high = ROUNDS
    return interleave(measured, min(high, max(low, int(seconds / once))), clock)


# --- Figure 8 -------------------------------------------------------------------------------------


def _measure_iterations(request: Request, tell: Tell) -> tuple[Table, Figure]:
    task, device = request.task, request.device
    train = task.load(request.data_dir).train
    clock = Clock(device, request.clock)
    contenders = {name: Iterations(task, spec, train, device) for name, spec in SPECS.items()}
    contenders[FOLLOWER] = Iterations(task, SPECS[TORCHDYN], train, device)
    turns = _turns(contenders)
    tell(f"{task.name}: {', '.join(turns)} take turns")
    timings = take_turns(turns, request.seconds or SECONDS, clock)
    evaluations = {name: turn.evaluations / BLOCK for name, turn in turns.items()}
    peaks = {}
    for name, spec in SPECS.items():
        tell(f"{task.name}: memory of {name}")
        peaks[name] = peak_bytes(task, spec, device, request.data_dir)
    head = ["contender", "ms per iteration", "NFE", "SNOpt takes"]
    head += ["MB", "SNOpt's memory", "the paper"]
    published = paper.FIGURE8.get(task.name)
    body = [
        [
            name,
            f"{timings.milliseconds(name) / BLOCK:.1f}",
            f"{evaluations[name]:.0f}",
            "–" if name == OURS else timings.ratio(OURS, name).show(),
            f"{peaks[name] / MEGABYTE:.1f}" if name in peaks else "–",
            f"{peaks[OURS] / peaks[name]:.2f}" if name in peaks and name != OURS else "–",
            f"{published:.2f}, memory {paper.FIGURE8_MEMORY}"
            if name == TORCHDIFFEQ and published is not None
            else "–",
        ]
        for name in turns
    ]
    table = Table(
        f"{task.title}: time and memory of an iteration",
        head,
        body,
        (
            f"Turns of {BLOCK} training iterations on the same batches, refreshes of the curvature "
            "included. Each contender trains its own model, all from the same weights, but for the "
            "last one, whose turns start from those that SNOpt's last turn started from. NFE: "
            "field evaluations of an iteration, forward and backward, in the last turn. SNOpt "
            "takes: its time relative to the contender's, median [minimum, maximum] of the ratios "
            "within rounds. MB: peak of a few iterations in a process of its own, beyond model and "
            "data; SNOpt's memory: relative to the contender's. The paper: SNOpt relative to Adam, "
            "both by torchdiffeq.",
        ),
    )
    times = {name: timings.ratio(OURS, name).median for name in turns if name != OURS}
    memory = {name: peaks[OURS] / peaks[name] for name in peaks if name != OURS}
    panels = {"time per iteration": times, "peak memory": memory}
    return table, _bars(f"{task.title}: SNOpt relative to", panels)


class _Turn:
    """A turn of a contender: so many iterations.

    Attributes:
        weights: What the last one started from.
        evaluations: Of the field, in the last one.
    """

    def __init__(self, iterations: Iterations, leader: _Turn | None = None) -> None:
        self._iterations, self._leader = iterations, leader
        self.weights, self.evaluations = iterations.weights(), 0

    def __call__(self) -> None:
        if self._leader is not None:
            self._iterations.start_from(self._leader.weights)
        self.weights = self._iterations.weights()
        before = self._iterations.evaluations()
        self._iterations(BLOCK)
        self.evaluations = self._iterations.evaluations() - before


def _turns(contenders: Mapping[str, Iterations]) -> dict[str, _Turn]:
    turns = {name: _Turn(contenders[name]) for name in SPECS}
    turns[FOLLOWER] = _Turn(contenders[FOLLOWER], turns[OURS])
    return turns


def _bars(title: str, panels: Mapping[str, Mapping[str, float]]) -> Figure:
    figure = Figure(figsize=(PANEL[0] * len(panels), PANEL[1]), layout="constrained")
    for axes, (label, values) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        bars = axes.barh(list(values), list(values.values()), color=COLOR, edgecolor="black")
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.axvline(1.0, color="black", linestyle="--", linewidth=1)
        axes.set_xlabel(f"{label}, relative")
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return figure


FIGURE8 = Timing("fig8", _measure_iterations)


# --- Figure 11 ------------------------------------------------------------------------------------


def _measure_recursion(request: Request, tell: Tell) -> tuple[Table, Figure]:
    task = request.task
    torch.manual_seed(0)
    model = task.build_model("snopt", task.tolerance).to(request.device)
    train = task.load(request.data_dir).train.to(request.device)
    node, x = solves_of(model, train.x[: task.batch_size])[0]
    ends = [0.0, 1.0] if node.t_span is None else [float(t) for t in node.t_span]
    # lr=0: every turn sees the same field. 'kfe_adam' refreshes at equal intervals even so; the
    # default would find its curvature as good as new.
    optimizer = SNOpt(node, lr=0.0, preconditioner="kfe_adam")
    parameters = [p for p in node.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    signs = [
        torch.randint(2, p.shape, generator=generator).to(p).mul_(2).sub_(1) for p in parameters
    ]

    def ours() -> None:
        for _ in range(BLOCK):
            optimizer.zero_grad()
            node(x)[-1].square().mean().backward()
            optimizer.step()

    def recursive() -> None:
        recursive_product(
            node.vf,
            x,
            ends,
            lambda state: state.square().mean(),
            signs,
            rtol=float(node.rtol),
            atol=float(node.atol),
        )

    tell(f"{task.name}: SNOpt and the recursive adjoint take turns")
    turns: dict[str, Callable[[], Any]] = {OURS: ours, RECURSION: recursive}
    timings = take_turns(turns, request.seconds or SECONDS, Clock(request.device, request.clock))
    per_step = {
        OURS: timings.milliseconds(OURS) / BLOCK,
        RECURSION: timings.milliseconds(RECURSION),
    }
    ratios = [BLOCK * ratio for ratio in timings.ratio(RECURSION, OURS).values]
    shown = f"{sorted(ratios)[len(ratios) // 2]:.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
    body = [
        [OURS, f"{per_step[OURS]:.1f}", "–", "–"],
        [RECURSION, f"{per_step[RECURSION]:.1f}", shown, paper.FIGURE11],
    ]
    table = Table(
        f"{task.title}: a second-order step of the neural ODE",
        ["by", "ms per step", "relative to SNOpt", "the paper"],
        body,
        (
            "SNOpt with 'kfe_adam': forward, backward and update, refreshes of the curvature "
            f"included, mean over {BLOCK} steps. The recursive adjoint: gradient and one product "
            "with the Hessian, the least that a second-order step by recursion needs. Both on the "
            "task's first solve at the task's tolerance; median [minimum, maximum] of the ratios "
            "within rounds.",
        ),
    )
    ratio = sorted(ratios)[len(ratios) // 2]
    return table, _bars(
        f"{task.title}: recursive adjoint relative to SNOpt", {"time per step": {RECURSION: ratio}}
    )


FIGURE11 = Timing("fig11", _measure_recursion)

TIMINGS = (FIGURE8, FIGURE11)
