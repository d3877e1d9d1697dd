"""The tasks as problems of a horizon search, and the command behind `torchdyn-snopt search`."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
import torch
from torchdyn.core import NeuralODE

from torchdyn_snopt import Horizon, solve_stats
from torchdyn_snopt.errors import SNOptError
from torchdyn_snopt.experiments.configuration import Budget, Position, RunConfig, RunResult
from torchdyn_snopt.experiments.horizons import STUDIED, HorizonChoice
from torchdyn_snopt.experiments.interrupt import StopRequest, stop_on_signal
from torchdyn_snopt.experiments.meters import SolveMeter
from torchdyn_snopt.experiments.optimizers import OptimizerSpec
from torchdyn_snopt.experiments.runlog import Record
from torchdyn_snopt.experiments.storage import locked_folder
from torchdyn_snopt.experiments.tasks import Samples, Splits, Task
from torchdyn_snopt.experiments.training import TrainingRun
from torchdyn_snopt.search import (
    Choice,
    Comparison,
    Guards,
    HorizonSearch,
    Observer,
    Progress,
    SearchSettings,
    StoppedError,
    TrialFailedError,
    default_url,
    open_storage,
    serve_dashboard,
    settings_of,
    show_on_dashboard,
    write_report,
)

SEARCH_EPOCHS = {"digits": 3}  # of every run; for other tasks those of training
VALIDATION_SHARE = 0.25  # of the training data; the test data stay out of every choice
SPLIT_SEED = 0
FIRST_ORDER = "adam"
# Learning rate of the first-order arms, where a run is shorter than those that the task's is for.
FIRST_ORDER_LR = {"digits": 1e-2}
# A diverging field can cost any number of evaluations; a sane run of a task stays far below.
GUARD_PER_ITERATION = 400
INTERRUPTED = 130  # exit status of a process that Ctrl-C or SIGTERM has stopped
WORKER_LOG = "worker-{}.log"


class TaskProblem:
    """A task whose models a search trains.

    A quarter of the training data, the same for every trial, is held out for validation.
    """

    def __init__(self, task: Task, epochs: int, device: torch.device, data_dir: Path | None):
        """Load the data.

        Args:
            task: The task.
            epochs: Of every run.
            device: Where to run.
            data_dir: A folder with data sets, for tasks that need one.
        """
        self.task, self.epochs, self.device = task, epochs, device
        self.splits = hold_out(task.load(data_dir).train)
        self.stop = StopRequest()

    def build_model(self, choice: Choice) -> TrainingRun:
        """A run that has not begun.

        Args:
            choice: Of the trial.

        Returns:
            Model and optimizer, with the horizon as chosen.
        """
        name = "snopt" if choice.mode == "policy" else FIRST_ORDER
        chosen = dict(STUDIED) if choice.mode == "policy" else self._first_order()
        chosen |= {k: v for k in ("lr", "damping") if (v := getattr(choice, k)) is not None}
        config = RunConfig(
            self.task,
            OptimizerSpec(name, chosen),
            choice.seed,
            Budget(self.epochs),
            self.device,
            horizon=HorizonChoice(choice.mode, choice.t1, choice.penalty),
        )
        folder = Path(tempfile.gettempdir()) / f"horizon-search-{uuid.uuid4()}"
        run = TrainingRun(config, self.splits, folder)
        for horizon in (m for m in run.model.modules() if isinstance(m, Horizon)):
            horizon.spec = replace(horizon.spec, bounds=choice.bounds)
        return run

    def _first_order(self) -> dict[str, Any]:
        name = self.task.name
        return {"lr": FIRST_ORDER_LR[name]} if name in FIRST_ORDER_LR else {}

    def train(self, run: TrainingRun, choice: Choice, report: Callable[[Progress], None]) -> None:
        """Train to the end of the budget.

        Args:
            run: What `build_model` returned.
            choice: Of the trial.
            report: Told after every epoch.

        Raises:
            StoppedError: The user wants the search to stop.
            TrialFailedError: The run failed.
        """
        try:
            result = run.run([_Reporter(run, report)], self.stop)
        finally:
            shutil.rmtree(run.folder, ignore_errors=True)
        if result.status == "interrupted":
            raise StoppedError
        if result.status == "failed":
            raise TrialFailedError((result.reason or "").splitlines()[0])

    def checkpoint(self, run: TrainingRun) -> Mapping[str, Any]:
        """What is kept of the best run.

        Args:
            run: A finished one.

        Returns:
            The model's weights and what the model is.
        """
        return {"config": run.config.describe(), "model": run.model.state_dict()}

    def guards(self) -> Guards:
        """Limits of a trial."""
        batches = -(-len(self.splits.train) // self.task.batch_size)
        return Guards(evaluations=GUARD_PER_ITERATION * batches * self.epochs)

    def describe(self) -> dict[str, Any]:
        """What determines its runs, as plain values."""
        return {
            "task": self.task.name,
            "training samples": len(self.splits.train),
            "validation samples": len(self.splits.test),
            "first-order optimizer": FIRST_ORDER,
            "first-order lr": FIRST_ORDER_LR.get(self.task.name),
            "device": self.device.type,
        }


def hold_out(samples: Samples) -> Splits:
    """Part training data for a search.

    Args:
        samples: All training data.

    Returns:
        What is trained on, and as ``test`` what is validated on; the same at every call.
    """
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(SPLIT_SEED))
    rows = order.split([len(samples) - (held := round(VALIDATION_SHARE * len(samples))), held])
    kept, out = (Samples(samples.x[r], samples.y[r]) for r in rows)
    return Splits(kept, out)


class _Reporter:
    """Turns the evaluations of a training run into reports."""

    def __init__(self, run: TrainingRun, report: Callable[[Progress], None]) -> None:
        self._run, self._report = run, report
        self._meter = SolveMeter(run.model)
        self._nodes = [m for m in run.model.modules() if isinstance(m, NeuralODE)]

    def started(self, config: RunConfig, position: Position, batches: int) -> None:
        """A run begins."""

    def stepped(self, record: Record) -> None:
        """An iteration is done."""

    def evaluated(self, record: Record) -> None:
        """An evaluation is done; the last solves were those of the last batch of validation."""
        metric = self._run.config.task.metric
        error = record["test_loss"] if metric is None else 1.0 - record[f"test_{metric.name}"]
        stats = [solve_stats(node) for node in self._nodes]
        self._report(
            Progress(
                epoch=record["epoch"] + 1,
                error=error,
                nfe=sum(each.nfe_forward for each in stats),
                evaluations=self._meter.evaluations(),
                seconds=record["seconds"],
                t1=float(stats[0].t1 or 0.0),
                loss=record["train_loss"],
            )
        )

    def ended(self, result: RunResult) -> None:
        """The run is over."""


# --- the command ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchRequest:
    """What the command was asked for; None takes the study's own, or else the default.

    Attributes:
        task: The task.
        out: The output folder.
        study: Name of the study.
        storage: URL, or None for a file in the output folder.
        wanted: Settings by name, where the user named them.
        jobs: Processes on this machine.
        worker: Whether this process only joins others.
        seconds: After which no trial is begun.
        device: Where to run.
        data_dir: A folder with data sets, for tasks that need one.
        dashboard: Whether to serve the web page.
        port: Of the web page; any if 0.
    """

    task: Task
    out: Path
    study: str
    storage: str | None = None
    wanted: Mapping[str, Any] = field(default_factory=dict)
    jobs: int = 1
    worker: bool = False
    seconds: float | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    data_dir: Path | None = None
    dashboard: bool = False
    port: int = 0

    @property
    def url(self) -> str:
        """Where the study lives."""
        return self.storage or default_url(self.out, workers=2 if self.shared else 1)

    @property
    def shared(self) -> bool:
        """Whether other processes write too."""
        return self.worker or self.jobs > 1


@dataclass(frozen=True)
class SearchOutcome:
    """How the command ended.

    Attributes:
        comparison: What has been found.
        files: What was written.
        finished: Whether the plan is fulfilled.
        interrupted: Whether the user stopped it.
        added: Trials that have ended since it began, by whatever process.
    """

    comparison: Comparison
    files: list[Path]
    finished: bool
    interrupted: bool
    added: int


def run_search(
    request: SearchRequest,
    observer_for: Callable[[SearchSettings], AbstractContextManager[Observer]],
    say: Callable[[str], None],
) -> SearchOutcome:
    """Search, or take part in a search, then write the report.

    Args:
        request: What is asked for.
        observer_for: From the settings to a display.
        say: Prints a line.

    Returns:
        What came of it.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # its news are shown by the display
    logging.getLogger("torchdyn_snopt.horizon").setLevel(logging.ERROR)
    # Sums depend on the number of threads in their last bits, and a trial must not on its worker.
    torch.set_num_threads(1)
    opened = open_storage(request.url, shared=request.shared)
    # A worker shares the folder with the process that it helps, if that is on the same machine.
    with nullcontext() if request.worker else locked_folder(request.out):
        known = settings_of(opened, request.study)
        settings = _settings(request, known)
        problem = TaskProblem(request.task, settings.epochs, request.device, request.data_dir)
        settings = replace(settings, problem=problem.describe())
        search: HorizonSearch[TrainingRun] = HorizonSearch(
            opened, request.study, settings, request.out, title=request.task.title
        )
        with _page(search, request, say):
            return _run(search, request, problem, observer_for)


def _run(
    search: HorizonSearch[TrainingRun],
    request: SearchRequest,
    problem: TaskProblem,
    observer_for: Callable[[SearchSettings], AbstractContextManager[Observer]],
) -> SearchOutcome:
    before = search.comparison().ended
    with (
        stop_on_signal() as stop,
        _helpers(request, stop),
        observer_for(search.settings) as observer,
    ):
        problem.stop = stop
        finished = search.work(
            problem.build_model,
            problem.train,
            checkpoint=problem.checkpoint,
            guards=problem.guards(),
            observer=observer,
            stop=lambda: stop.asked,
            seconds=request.seconds,
        )
    comparison = search.comparison()
    files = []
    if not request.worker:
        files = write_report(comparison, request.out)
        show_on_dashboard(search, comparison, request.out)
    return SearchOutcome(comparison, files, finished, stop.asked, comparison.ended - before)


def _settings(request: SearchRequest, known: SearchSettings | None) -> SearchSettings:
    base = known or SearchSettings(epochs=SEARCH_EPOCHS.get(request.task.name, request.task.epochs))
    return replace(base, **request.wanted)


@contextmanager
def _page(
    search: HorizonSearch[TrainingRun], request: SearchRequest, say: Callable[[str], None]
) -> Iterator[None]:
    """The web page while the search runs, and after it until Ctrl-C."""
    if not request.dashboard:
        yield
        return
    with serve_dashboard(search, request.port) as address:
        say(f"Dashboard: {address}")
        yield
        say(f"The search is over; the dashboard stays at {address} until Ctrl-C.")
        with stop_on_signal() as stop:
            while not stop.asked:
                time.sleep(0.2)


@contextmanager
def _helpers(request: SearchRequest, stop: StopRequest) -> Iterator[None]:
    """Further processes on this machine; they end with the plan, or when this one is stopped."""
    helpers: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(1, request.jobs):
            with (request.out / WORKER_LOG.format(number)).open("ab") as log:
                helpers.append(subprocess.Popen(_worker_command(request), stdout=log, stderr=log))
        yield
    except BaseException:
        stop.ask()
        raise
    finally:
        for process in helpers:
            if stop.asked:
                process.terminate()
        failed = [process for process in helpers if process.wait() not in {0, INTERRUPTED}]
    if failed:
        raise SNOptError(
            "a further process has failed; what it left is taken up by the next start",
            got=f"{len(failed)} of {len(helpers)} processes",
            allowed="processes that end with the plan",
            do=f"read {request.out / WORKER_LOG.format('*')}, then start the same command again",
        )


def _worker_command(request: SearchRequest) -> list[str]:
    words = [sys.executable, "-m", "torchdyn_snopt", "search", request.task.name, "--worker"]
    words += ["--storage", request.url, "--study", request.study, "--out", os.fspath(request.out)]
    words += ["--device", str(request.device)]
    for name, value in request.wanted.items():
        shown = ",".join(value) if isinstance(value, tuple) else str(value)
        words += [f"--{name.replace('_', '-')}", shown]
    if request.seconds is not None:
        words += ["--seconds", str(request.seconds)]
    if request.data_dir is not None:
        words += ["--data-dir", os.fspath(request.data_dir)]
    return words


def parse_arms(texts: list[str] | None) -> tuple[str, ...] | None:
    """Arms as written on the command line.

    Args:
        texts: Each one or several names parted by commas.

    Returns:
        The names in their order, without repetitions; None if nothing was written.
    """
    from torchdyn_snopt.search.arms import get_arm

    if not texts:
        return None
    names = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    for name in names:
        get_arm(name)
    return tuple(dict.fromkeys(names))
