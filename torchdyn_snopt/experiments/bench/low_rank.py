"""`bench low-rank`: time to a target with the low-rank step and with its peers.

All contenders of one task and seed start from the same weights and take turns on one process, a
fraction of a second each, until each has reached the target or spent its budget: a machine that is
slow for a while is slow for all. What counts is the process's CPU time on one thread, training
steps alone; the target is looked at between them.

Every contender's settings come from a grid of eight, four of its own settings times two batch
sizes, tried on seeds 100, 101, … that the race does not use (`tune`). Those in `RACES` were found
by ``torchdyn-snopt bench low-rank --tune 1`` (spiral) and ``--tune 2`` (moons).
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from torchdyn_snopt import CrossEntropyLoss, SNOpt, SNOptSensitivity
from torchdyn_snopt.errors import SolverError
from torchdyn_snopt.experiments.bench.report import BenchReport, BenchTable
from torchdyn_snopt.experiments.environment import describe_environment
from torchdyn_snopt.experiments.figures import SPARE_STYLES, STYLES
from torchdyn_snopt.experiments.reproduce.measured import Measured
from torchdyn_snopt.experiments.tasks import TASKS
from torchdyn_snopt.experiments.tasks.base import Samples

TUNING_SEED = 100  # the first of those that settings are found on
# Training between looks at the target: seconds, and a share of those spent already.
LOOK_EVERY, LOOK_SHARE = 0.05, 0.05
HEAD = ["task", "optimizer", "settings", "seconds to target", "steps", "reached", "ratio"]
TRIALS_HEAD = ["task", "optimizer", "settings", "seconds to target", ""]
NOTE = (
    "Seconds of CPU time on one thread until the target, median [range] over seeds; ratio: the "
    "median over that of the low-rank step. Targets: spiral, MSE 1e-4 on the windows of another "
    "trajectory; moons, training loss 0.05 over all points. All with the checkpoint adjoint at "
    "rtol = atol = 1e-3, float32. A budget that is spent counts as infinite. Settings: the best of "
    "eight for each contender, found on seeds from 100 on."
)
TRIALS_NOTE = (
    " Trials: seconds summed over the seeds; '>': given up, having spent more than the best so far "
    "or the budget."
)


@dataclass(frozen=True)
class Peer:
    """An optimizer with its settings and the grid that they were chosen from.

    Attributes:
        name: In the table.
        build: From a model to the optimizer.
        settings: What was chosen, besides the batch.
        batch_size: Samples a step; all of them when None.
        values: The grid's own settings.
        batch_sizes: The grid's batch sizes.
        closure: Whether a step is given the closure.
    """

    name: str
    build: Callable[..., torch.optim.Optimizer]
    settings: Mapping[str, Any]
    batch_size: int | None
    values: tuple[Mapping[str, Any], ...] = ()
    batch_sizes: tuple[int | None, ...] = ()
    closure: bool = False

    def grid(self) -> list[Peer]:
        """Every setting of the grid.

        Returns:
            Copies of this contender.
        """
        return [
            replace(self, settings=settings, batch_size=size)
            for settings, size in itertools.product(self.values, self.batch_sizes)
        ]

    @property
    def described(self) -> str:
        """Settings and batch, for a table."""
        settings = {**self.settings, "batch": self.batch_size or "all"}
        return ", ".join(f"{key} {value}" for key, value in settings.items())


@dataclass(frozen=True)
class Race:
    """A task with its target and contenders.

    Attributes:
        task: Name of the task.
        loss: The loss, which seeds curvature.
        target: Value to reach.
        on_test: Whether the test set decides, or the training set.
        budget: Seconds for each contender.
        peers: The contenders; the first is what the others are compared with.
    """

    task: str
    loss: Callable[[Tensor, Tensor], Tensor]
    target: float
    on_test: bool
    budget: float
    peers: tuple[Peer, ...]


def _low_rank(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return SNOpt(model, preconditioner="low_rank", **settings)


def _on_parameters(kind: Callable[..., Any], **fixed: Any) -> Callable[..., torch.optim.Optimizer]:
    def build(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = kind(model.parameters(), **fixed, **settings)
        return optimizer

    return build


_ADAM = _on_parameters(torch.optim.Adam)
_RMSPROP = _on_parameters(torch.optim.RMSprop)
_LBFGS = _on_parameters(torch.optim.LBFGS, line_search_fn="strong_wolfe")


def _soap(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP  # of the extra 'experiments'

    optimizer: torch.optim.Optimizer = SOAP(model.parameters(), **settings)
    return optimizer


def _values(name: str, *values: float) -> tuple[dict[str, float], ...]:
    return tuple({name: value} for value in values)


_RATES = _values("lr", 3e-3, 1e-2, 3e-2, 1e-1)
_ITERATIONS = _values("max_iter", 5, 10, 15, 20)


def _dampings(*values: float) -> tuple[dict[str, float], ...]:
    return tuple({"damping": value, "inner_steps": k} for value in values for k in (1, 5))


RACES: tuple[Race, ...] = (
    Race(
        "spiral",
        TASKS["spiral"].loss,
        1e-4,
        on_test=True,
        budget=4.0,
        peers=(
            Peer(
                "SNOpt low_rank",
                _low_rank,
                {"damping": 1e-3, "inner_steps": 1},
                20,
                _dampings(1e-4, 1e-3),
                (20, 50),
                True,
            ),
            Peer("Adam", _ADAM, {"lr": 3e-3}, 50, _RATES, (20, 50)),
            Peer("RMSprop", _RMSPROP, {"lr": 3e-3}, 50, _RATES, (20, 50)),
            Peer("L-BFGS", _LBFGS, {"max_iter": 15}, 50, _ITERATIONS, (50, 200), True),
            Peer("SOAP", _soap, {"lr": 3e-2}, 50, _RATES, (20, 50)),
        ),
    ),
    Race(
        "moons",
        CrossEntropyLoss(),
        0.05,
        on_test=False,
        budget=6.0,
        peers=(
            Peer(
                "SNOpt low_rank",
                _low_rank,
                {"damping": 1.0, "inner_steps": 5},
                128,
                _dampings(1.0, 3.0),
                (64, 128),
                True,
            ),
            Peer("Adam", _ADAM, {"lr": 3e-2}, 64, _RATES, (64, 128)),
            Peer("RMSprop", _RMSPROP, {"lr": 1e-2}, 128, _RATES, (64, 128)),
            Peer("L-BFGS", _LBFGS, {"max_iter": 20}, 128, _ITERATIONS, (128, 512), True),
            Peer("SOAP", _soap, {"lr": 1e-1}, 64, _RATES, (64, 128)),
        ),
    ),
)


@dataclass
class Run:
    """One contender on one seed, advanced step by step.

    Attributes:
        peer: Who.
        seconds: Spent on training steps.
        steps: Taken.
        curve: Seconds and values at each look.
        reached: Seconds at the target, or None.
        finished: Whether it takes no further turn.
    """

    race: Race
    peer: Peer
    seed: int
    seconds: float = 0.0
    steps: int = 0
    curve: list[tuple[float, float]] = field(default_factory=list)
    reached: float | None = None
    finished: bool = False

    def __post_init__(self) -> None:
        task = TASKS[self.race.task]
        splits = task.load(None)
        self._train, self._judge = splits.train, splits.test if self.race.on_test else splits.train
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self._model = task.build_model(SNOptSensitivity(adjoint="checkpoint"), task.tolerance)
        self._optimizer = self.peer.build(self._model, **self.peer.settings)
        self._batches = _batches(self._train, self.peer.batch_size, self.seed)

    def turn(self) -> None:
        """Train for a while, at least one step, then look at the target."""
        until = self.seconds + max(LOOK_EVERY, LOOK_SHARE * self.seconds)
        try:
            while self.seconds < until:
                self._step()
            with torch.no_grad():
                value = float(self.race.loss(self._model(self._judge.x), self._judge.y))
        except SolverError:  # a field that cannot be solved any more: lost
            value = math.inf
        self.curve.append((self.seconds, value))
        if value <= self.race.target:
            self.reached = self.seconds
        broken = not math.isfinite(value)
        self.finished = self.reached is not None or broken or self.seconds > self.race.budget

    def _step(self) -> None:
        batch = next(self._batches)

        def closure() -> Tensor:
            self._optimizer.zero_grad()
            loss = self.race.loss(self._model(batch.x), batch.y)
            loss.backward()
            return loss

        started = time.process_time()
        if self.peer.closure:
            self._optimizer.step(closure)  # type: ignore[arg-type]
        else:
            closure()
            self._optimizer.step()
        self.seconds += time.process_time() - started
        self.steps += 1


def race(
    seeds: int, tell: Callable[[str], None], races: Sequence[Race] = RACES, tuning_seeds: int = 0
) -> Measured:
    """Race the low-rank step against its peers, on the CPU.

    Args:
        seeds: How many.
        tell: Told about the progress.
        races: Which tasks.
        tuning_seeds: On how many other seeds to choose the settings first; with 0 the races' own
            are taken.

    Returns:
        Tables and curves.
    """
    raw: list[dict[str, Any]] = []
    trials: list[dict[str, Any]] = []
    if tuning_seeds:
        tuned = [tune(entry, tuning_seeds, tell) for entry in races]
        races = [entry for entry, _ in tuned]
        trials = [trial for _, own in tuned for trial in own]
    for entry in races:
        for seed in range(seeds):
            raw += [_describe(run) for run in _run(entry, seed, tell)]
    body = [row for entry in races for row in _rows(entry, raw)]
    tables, note = [BenchTable("Time to target", HEAD, body)], NOTE
    if trials:
        tables.append(BenchTable("Trials", TRIALS_HEAD, _trial_rows(trials)))
        note += TRIALS_NOTE
    environment = describe_environment(torch.device("cpu"))
    report = BenchReport("low-rank", tables, note, environment, raw + trials)
    return Measured(report, _draw(raw, races))


def tune(race: Race, seeds: int, tell: Callable[[str], None]) -> tuple[Race, list[dict[str, Any]]]:
    """Choose every contender's settings: least total time over seeds from 100 on.

    A trial is given up once it has spent more than the best one of its contender; that cannot
    change the choice.

    Args:
        race: With a grid of the same size for each contender.
        seeds: How many.
        tell: Told about the progress.

    Returns:
        The race with the settings chosen, and a dictionary for each trial.
    """
    chosen, trials = [], []
    for peer in race.peers:
        best, best_total = peer, math.inf
        own = []
        for candidate in peer.grid():
            total, reached = _trial(race, candidate, seeds, best_total)
            outcome = f"{'' if reached else '> '}{total:.2f} s"
            tell(f"{race.task}, trial of {candidate.name}, {candidate.described}: {outcome}")
            own.append((candidate, total, reached))
            if reached and total < best_total:
                best, best_total = candidate, total
        chosen.append(best)
        trials += [
            {
                "task": race.task,
                "optimizer": peer.name,
                "trial": candidate.described,
                "seconds": total,
                "reached": reached,
                "chosen": candidate is best,
            }
            for candidate, total, reached in own
        ]
    return replace(race, peers=tuple(chosen)), trials


def _trial(race: Race, peer: Peer, seeds: int, limit: float) -> tuple[float, bool]:
    """Seconds over all seeds, and whether every one reached the target within the limit."""
    total = 0.0
    for seed in range(TUNING_SEED, TUNING_SEED + seeds):
        run = Run(race, peer, seed)
        while not run.finished and total + run.seconds <= limit:
            run.turn()
        total += run.seconds
        if run.reached is None:
            return total, False
    return total, True


def _trial_rows(trials: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            trial["task"],
            trial["optimizer"],
            trial["trial"],
            f"{'' if trial['reached'] else '> '}{trial['seconds']:.2f}",
            "chosen" if trial["chosen"] else "",
        ]
        for trial in trials
    ]


def _run(race: Race, seed: int, tell: Callable[[str], None]) -> list[Run]:
    runs = [Run(race, peer, seed) for peer in race.peers]
    racing = list(runs)
    tell(f"{race.task}, seed {seed}: {len(racing)} contenders")
    while racing:
        for run in racing:
            run.turn()
            if run.finished:
                outcome = "gave up" if run.reached is None else "reached the target"
                tell(f"{race.task}, seed {seed}: {run.peer.name} {outcome}, {run.seconds:.2f} s")
        racing = [run for run in racing if not run.finished]
        racing = racing[1:] + racing[:1]
    return runs


def _batches(train: Samples, size: int | None, seed: int) -> Iterator[Samples]:
    """Random batches, the same for every contender with the same size."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        if size is None:
            yield train
            continue
        rows = torch.randint(len(train), (size,), generator=generator)
        yield Samples(train.x[rows], train.y[rows])


def _describe(run: Run) -> dict[str, Any]:
    return {
        "task": run.race.task,
        "optimizer": run.peer.name,
        "settings": {**run.peer.settings, "batch_size": run.peer.batch_size},
        "seed": run.seed,
        "seconds": run.reached,
        "steps": run.steps,
        "curve": run.curve,
    }


def _rows(race: Race, raw: list[dict[str, Any]]) -> list[list[str]]:
    rows, first = [], math.nan
    for number, peer in enumerate(race.peers):
        runs = [r for r in raw if r["task"] == race.task and r["optimizer"] == peer.name]
        times = [math.inf if r["seconds"] is None else r["seconds"] for r in runs]
        median = statistics.median(times)
        first = median if number == 0 else first
        rows.append(
            [
                race.task,
                peer.name,
                peer.described,
                f"{median:.2f} [{min(times):.2f}, {max(times):.2f}]",
                f"{statistics.median(r['steps'] for r in runs):.0f}",
                f"{sum(math.isfinite(t) for t in times)} of {len(times)}",
                f"{median / first:.2f}",
            ]
        )
    return rows


def _draw(raw: Sequence[dict[str, Any]], races: Sequence[Race]) -> Figure:
    """Curves of every run: the judged loss over seconds."""
    figure = Figure(figsize=(5.2 * len(races), 4.0), layout="constrained")
    (axes,) = figure.subplots(1, len(races), squeeze=False)
    styles = [*STYLES.values(), *SPARE_STYLES]
    for axis, race in zip(axes, races, strict=True):
        for peer, style in zip(race.peers, styles, strict=False):
            runs = [
                r
                for r in raw
                if r["task"] == race.task and r["optimizer"] == peer.name and r["curve"]
            ]
            for number, run in enumerate(runs):
                x, y = zip(*run["curve"], strict=True)
                axis.loglog(
                    x,
                    y,
                    color=style.color,
                    linestyle=style.line,
                    marker=style.marker,
                    markevery=[len(x) - 1],
                    linewidth=0.9,
                    label=peer.name if number == 0 else None,
                )
        axis.axhline(race.target, color="black", linewidth=0.8, linestyle=(0, (1, 3)))
        axis.set_xlabel("CPU time [s]")
        axis.set_ylabel("test MSE" if race.on_test else "training loss")
        axis.set_title(race.task)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    return figure
