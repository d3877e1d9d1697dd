"""The command `torchdyn-snopt`: options and what is shown; the work is done in the rooms below.

Everything heavy is imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from rich.status import Status

    from torchdyn_snopt.errors import SNOptError
    from torchdyn_snopt.experiments.bench import BenchReport
    from torchdyn_snopt.experiments.configuration import RunResult
    from torchdyn_snopt.experiments.report import Report
    from torchdyn_snopt.experiments.reproduce.measured import Measured
    from torchdyn_snopt.experiments.search import SearchOutcome, SearchRequest
    from torchdyn_snopt.experiments.tables import SummaryTable

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
UNBOUNDED = 10_000  # columns, for measuring how wide a table wants to be

app = typer.Typer(
    name="torchdyn-snopt",
    help="Second-order training of neural ODEs: run the experiments and the benchmarks.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
bench_app = typer.Typer(
    help="Measure this package against torchdyn and torchdiffeq on this machine.",
    no_args_is_help=True,
)
app.add_typer(bench_app, name="bench")

# Brackets in our texts are ranges and shapes, not rich's markup.
# Of several processes that torchrun has started, the first one speaks.
console = Console(markup=False, highlight=False, quiet=os.environ.get("RANK", "0") != "0")
error_console = Console(stderr=True, markup=False, highlight=False)


# --- options that several commands take -----------------------------------------------------------

CpuSecondsOption = Annotated[
    bool,
    typer.Option(
        "--cpu-seconds",
        help="Count seconds of this process on the CPU, where others share the machine.",
    ),
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder with data sets, for tasks that need one.",
        envvar="TORCHDYN_SNOPT_DATA",
        exists=True,
        file_okay=False,
    ),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write raw measurements and environment there.")
]
RepeatsOption = Annotated[int, typer.Option(min=1, help="Rounds of interleaved measurements.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ..., or auto.")]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on from what the output folder holds.")
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Remove the output folder's runs first.")
]
SeedsOption = Annotated[int, typer.Option(min=1, help="How many seeds to run: 0, 1, ...")]


# --- train ----------------------------------------------------------------------------------------


@app.command()
def train(
    task: Annotated[
        str,
        typer.Argument(
            help="What to train: digits, moons, japanese-vowels, spiral, circle, mnist, svhn, "
            "cifar10, spoken-arabic-digits, articulary-word, character-trajectories, gas, "
            "miniboone."
        ),
    ],
    optimizer: Annotated[
        list[str],
        typer.Option(
            help="Optimizers, parted by commas: snopt, snopt-paper, adam, adamw, sgd, muon, soap, "
            "shampoo, lbfgs. Settings "
            "follow a colon: adam:lr=3e-3:sensitivity=adjoint."
        ),
    ] = ["snopt,adam,sgd"],  # noqa: B006  (typer copies it)
    epochs: Annotated[
        int | None,
        typer.Option(help="Passes over the training data. Without it: the task's own."),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="Seconds of training for each run, besides or instead of --epochs."),
    ] = None,
    seeds: SeedsOption = 1,
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate for optimizers that name none. Without it: the task's."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples per batch. Without it: the task's own.")
    ] = None,
    learn_horizon: Annotated[
        str | None,
        typer.Option(
            help="How t1 is learned: policy (SNOpt's second-order feedback) or gradient (Adam on "
            "t1). Without it, t1 stays where it is.",
        ),
    ] = None,
    t1: Annotated[
        float | None, typer.Option(help="The first or fixed t1. Without it: 1, or the task's own.")
    ] = None,
    penalty: Annotated[
        float, typer.Option(min=0.0, help="c of c/2·t1², added to the loss where t1 is learned.")
    ] = 0.0,
    out: Annotated[
        Path | None, typer.Option(help="Output folder. Without it: runs/TASK.", file_okay=False)
    ] = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ..., or auto for CUDA where there is one.")
    ] = "cpu",
    data_dir: DataOption = None,
) -> None:
    """Train a task with several optimizers; leaves logs, a table and pictures.

    Every run of one seed starts from the same weights and sees the same batches. Ctrl-C keeps what
    was run; the same command with --resume goes on from there.
    """
    from torchdyn_snopt.experiments.configuration import Budget
    from torchdyn_snopt.experiments.horizons import horizon_choice
    from torchdyn_snopt.experiments.optimizers import parse_specs
    from torchdyn_snopt.experiments.progress import observer_for
    from torchdyn_snopt.experiments.suite import Suite, run_suite
    from torchdyn_snopt.experiments.tasks import get_task

    with _answered():
        entry = get_task(task)
        suite = Suite(
            task=entry,
            optimizers=parse_specs(optimizer, lr),
            seeds=range(seeds),
            budget=Budget(entry.epochs if epochs is None and seconds is None else epochs, seconds),
            out=out or Path("runs") / task,
            device=_device(device),
            batch_size=batch_size,
            data_dir=data_dir,
            horizons=[horizon_choice(learn_horizon, t1, penalty)],
        )
        with observer_for(suite, console) as observer:
            results, report = run_suite(suite, [observer], resume=resume, overwrite=overwrite)
    _show_report(report, suite.out)
    _conclude(results)


def _show_report(report: Report, out: Path) -> None:
    if report.table.rows:
        console.print()
        _print_table(report.table)
        for note in report.table.notes:
            console.print(note, style="dim")
    _show_files(report.files, out)


def _show_files(files: list[Path], out: Path) -> None:
    console.print(f"\nTable and pictures in {out}:")
    for path in files:
        console.print(f"  {path}", soft_wrap=True)


def _print_table(summary: SummaryTable) -> None:
    """One row per optimizer where that fits, else one column per optimizer."""
    _print_rows(summary.title, [summary.head, *summary.body()])


def _print_rows(title: str, rows: list[list[str]]) -> None:
    table = _rich_table(title, rows)
    unbounded = console.options.update(max_width=UNBOUNDED)
    if Measurement.get(console, unbounded, table).maximum > console.width:
        table = _rich_table(title, [list(column) for column in zip(*rows, strict=True)])
    console.print(table)


def _rich_table(title: str, rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if number else "left")
    for cells in rows[1:]:
        table.add_row(*cells)
    return table


def _conclude(results: list[RunResult]) -> None:
    """Say how to go on after Ctrl-C, name failures, and leave with the matching exit status."""
    for result in results:
        if result.status == "failed":
            label = f"{result.config.label}, seed {result.config.seed}"
            error_console.print(f"{label} failed: {result.reason}", style="red")
    if results and results[-1].status == "interrupted":
        command = " ".join(["torchdyn-snopt", *_resume_arguments(sys.argv[1:])])
        console.print(f"\nStopped; nothing is lost. To go on:\n  {command}")
        raise typer.Exit(INTERRUPTED)
    if results and all(result.status == "failed" for result in results):
        raise typer.Exit(1)


def _resume_arguments(arguments: list[str]) -> list[str]:
    """The same command line, with --resume."""
    kept = [shlex.quote(word) for word in arguments if word not in {"--overwrite", "--resume"}]
    return [*kept, "--resume"]


def _device(name: str) -> torch.device:
    import torch

    from torchdyn_snopt.errors import InvalidInputError

    try:
        device = torch.device(name if name != "auto" else _best_device())
    except RuntimeError as error:
        raise InvalidInputError(
            "the device has no valid name",
            got=f"--device {name}",
            allowed="auto, cpu, cuda, cuda:0, cuda:1, ...",
            do="choose one of these",
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInputError(
            "there is no CUDA device",
            got=f"--device {name}",
            allowed="cpu on this machine",
            do="leave --device out, or install a build of torch for your accelerator",
        )
    return device


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# --- data -----------------------------------------------------------------------------------------


@app.command()
def data(
    task: Annotated[str, typer.Argument(help="The task whose data to fetch, such as mnist.")],
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of data sets. Without it: torchdyn-snopt in the user's cache.",
            envvar="TORCHDYN_SNOPT_DATA",
            file_okay=False,
        ),
    ] = None,
) -> None:
    """Fetch a task's data into one .npz file; a download that broke off goes on."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from torchdyn_snopt.experiments.download import fetch

    bars: dict[str, Any] = {}
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=error_console,
    )

    def tell(name: str, done: int, total: int | None) -> None:
        if name not in bars:
            bars[name] = progress.add_task(name, total=total)
        progress.update(bars[name], completed=done, total=total)

    with _answered(), progress:
        path = fetch(task, data_dir, tell)
    console.print(f"The data of {task} are in {path}", soft_wrap=True)


# --- bench ----------------------------------------------------------------------------------------


@bench_app.command("adjoint")
def bench_adjoint(
    json: JsonOption = None, repeats: RepeatsOption = 25, device: DeviceOption = "cpu"
) -> None:
    """Training steps by 'snopt', by torchdyn's sensitivities and by torchdiffeq's adjoint."""
    _bench("adjoint", json, repeats, device)


@bench_app.command("refresh")
def bench_refresh(
    json: JsonOption = None, repeats: RepeatsOption = 25, device: DeviceOption = "cpu"
) -> None:
    """What collecting curvature adds to a backward solve, and to the iterations in between."""
    _bench("refresh", json, repeats, device)


@bench_app.command("memory")
def bench_memory(
    json: JsonOption = None, repeats: RepeatsOption = 3, device: DeviceOption = "cpu"
) -> None:
    """Peak memory of a training step at rtol 1e-3 and at 1e-8."""
    _bench("memory", json, repeats, device)


@bench_app.command("low-rank")
def bench_low_rank(
    seeds: SeedsOption = 5,
    task: Annotated[str | None, typer.Option(help="spiral or moons. Without it: both.")] = None,
    tune: Annotated[
        int,
        typer.Option(
            min=0,
            help="First choose every contender's settings, the best of four on this many other "
            "seeds: 100, 101, .... 0: race with those found before.",
        ),
    ] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for the table, the picture and the raw data.")
    ] = Path("runs/low-rank"),
) -> None:
    """Time to a target on the spiral and on moons: the low-rank step against its peers."""
    from torchdyn_snopt.experiments.bench.low_rank import RACES, race

    races = [entry for entry in RACES if task in (None, entry.task)]
    if not races:
        _fail(_unknown_race(task, [entry.task for entry in RACES]))
    _measure("bench low-rank", lambda tell: race(seeds, tell, races, tune), out)


def _unknown_race(task: str | None, known: list[str]) -> SNOptError:
    from torchdyn_snopt.errors import InvalidInputError

    return InvalidInputError(
        "no race is run on this task",
        got=f"--task {task}",
        allowed=", ".join(known),
        do="choose one of these, or leave --task out for all of them",
    )


@bench_app.command("optimizers")
def bench_optimizers(
    tasks: Annotated[list[str], typer.Argument(help="Tasks to train, one after the other.")],
    seconds: Annotated[float, typer.Option(help="Seconds of training for each run.")] = 30.0,
    seeds: SeedsOption = 5,
    trials: Annotated[
        int,
        typer.Option(
            min=0,
            help="Runs of half the seconds to tune each learning rate with; 0: the tasks' own.",
        ),
    ] = 5,
    optimizer: Annotated[
        list[str] | None,
        typer.Option(help="Optimizers as for train. Without it: SNOpt and all its peers."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Output folder.", file_okay=False)] = Path(
        "runs/bench-optimizers"
    ),
    json: JsonOption = None,
    cpu_seconds: CpuSecondsOption = False,
    memory: Annotated[bool, typer.Option(help="Measure peak memory as well.")] = True,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "cpu",
    data_dir: DataOption = None,
) -> None:
    """Time to target, loss at equal time, test metric, NFE and memory against tuned peers."""
    from torchdyn_snopt.experiments.bench.optimizers import CONTENDERS, Contest
    from torchdyn_snopt.experiments.bench.optimizers import bench_optimizers as run

    try:
        with _answered():
            contest = Contest(
                tasks=tasks,
                out=out,
                seconds=seconds,
                seeds=seeds,
                trials=trials,
                optimizers=optimizer or [CONTENDERS],
                device=_device(device),
                data_dir=data_dir,
                clock="cpu" if cpu_seconds else "wall",
                memory=memory,
                resume=resume,
                overwrite=overwrite,
            )
            with console.status("bench optimizers") as status:
                report = run(contest, _teller(status))
            _show_benchmark(report)
            report.write(json or out / "optimizers.json")
            _show_files([*sorted(out.glob("*.png")), json or out / "optimizers.json"], out)
    except KeyboardInterrupt:
        console.print("\nStopped; the same command with --resume goes on from here.")
        raise typer.Exit(INTERRUPTED) from None


def _teller(status: Status) -> Callable[[str], None]:
    """On a terminal the status line, elsewhere a line each time."""
    if console.is_terminal:
        return status.update
    return _say


def _bench(kind: str, json: Path | None, repeats: int, device: str) -> None:
    from torchdyn_snopt.experiments.bench import BENCHMARKS

    with _answered():
        with console.status(f"bench {kind}") as status:
            report = BENCHMARKS[kind](repeats, _device(device), status.update)
        _show_benchmark(report)
        if json is not None:
            report.write(json)
            console.print(f"Raw measurements in {json}")


def _show_benchmark(report: BenchReport) -> None:
    for part in report.tables:
        console.print(_rich_table(part.title, [part.head, *part.body]))
    console.print(report.note, style="dim")


# --- reproduce ------------------------------------------------------------------------------------


@app.command()
def reproduce(
    name: Annotated[
        str,
        typer.Argument(
            help="fig5: training with fixed t1. fig10: a learned t1 over training, by SNOpt's "
            "policy and by the gradient. table5: time and accuracy with a learned t1. table4: test "
            "performance. fig7: training curves. table6: NFE and regularization. fig8: time and "
            "memory of an iteration. fig9: sensitivity to the learning rate. fig11: the recursive "
            "adjoint. table1: errors of derivatives by solver. table2: memory and time of the "
            "derivations' stages. factors: distance of A ⊗ B from exact blocks. The last three "
            "train nothing and take --out alone."
        ),
    ],
    task: Annotated[str, typer.Option(help="The task to reproduce it on.")] = "digits",
    seeds: SeedsOption = 5,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the data. Without it: the task's own.")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="Seconds of training for each run, besides or instead of --epochs."),
    ] = None,
    penalty: Annotated[
        float | None, typer.Option(min=0.0, help="c of c/2·t1². Without it: the study's own.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Output folder. Without it: runs/NAME-TASK.", file_okay=False),
    ] = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "cpu",
    cpu_seconds: CpuSecondsOption = False,
    data_dir: DataOption = None,
) -> None:
    """Run a figure or a table of the paper on a task; leaves logs, a table and pictures."""
    from torchdyn_snopt.experiments.progress import observer_for
    from torchdyn_snopt.experiments.reproduce import (
        MEASUREMENTS,
        Request,
        Timing,
        get_reproduction,
    )
    from torchdyn_snopt.experiments.tasks import get_task

    if name in MEASUREMENTS:
        _measure(f"reproduce {name}", MEASUREMENTS[name], out or Path("runs") / name)
        return
    with _answered():
        study = get_reproduction(name)
        request = Request(
            task=get_task(task),
            out=out or Path("runs") / f"{name}-{task}",
            seeds=range(seeds),
            epochs=epochs,
            seconds=seconds,
            penalty=penalty,
            device=_device(device),
            data_dir=data_dir,
            resume=resume,
            overwrite=overwrite,
            clock="cpu" if cpu_seconds else "wall",
        )
        if isinstance(study, Timing):
            with console.status(name) as status:
                outcome = study.run(request, _teller(status))
        else:
            with observer_for(study.suite(request), console) as observer:
                outcome = study.run(request, [observer])
    console.print(_rich_table(outcome.table.title, [outcome.table.head, *outcome.table.body]))
    for note in outcome.table.notes:
        console.print(note, style="dim")
    _show_files(outcome.files, request.out)
    _conclude(outcome.results)


def _say(text: str) -> None:
    console.print(text, style="dim", highlight=False, soft_wrap=True)


def _measure(title: str, run: Callable[[Callable[[str], None]], Measured], out: Path) -> None:
    """Run a measurement that hands back tables and a picture, and write them."""
    with _answered():
        with console.status(title) as status:
            # A log keeps every line of the progress, a terminal shows the last.
            measured = run(_teller(status))
        _show_benchmark(measured.report)
        _show_files(measured.write(out), out)


# --- search ---------------------------------------------------------------------------------------


@app.command()
def search(
    task: Annotated[str, typer.Argument(help="The task whose horizon is searched: digits, ...")],
    arms: Annotated[
        list[str] | None,
        typer.Option(
            help="Arms, parted by commas: policy, gradient, tpe, grid, hyperband, median, joint, "
            "joint-tpe. Without it: policy, gradient, tpe, hyperband, joint."
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            min=1, help="Trials of each searching arm and seed, in total over all starts."
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Repetitions of everything: 0, 1, ...")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the training data in each run.")
    ] = None,
    penalty: Annotated[
        float | None, typer.Option(min=0.0, help="c of c/2·t1², where t1 moves.")
    ] = None,
    nfe_weight: Annotated[
        float | None,
        typer.Option(min=0.0, help="Weight of NFE in the objective, error + weight × NFE."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Trials of an arm that are proposed together."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    storage: Annotated[
        str | None,
        typer.Option(
            help="sqlite:///FILE for one process, journal:FILE for several, postgresql://... for "
            "many machines. Without it: a file in the output folder."
        ),
    ] = None,
    worker: Annotated[
        bool, typer.Option("--worker", help="Join the others on --storage, and write no report.")
    ] = False,
    study: Annotated[
        str | None, typer.Option(help="Name of the study. Without it: the task's.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.0, help="Begin no trial after so many seconds.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Output folder. Without it: runs/search-TASK.", file_okay=False),
    ] = None,
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="Serve the study's web page on this machine.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, help="Of the web page. 0: any.")] = 0,
    device: DeviceOption = "cpu",
    data_dir: DataOption = None,
) -> None:
    """Compare SNOpt's policy for t1 with Optuna's searches; leaves a table, a report and pictures.

    Started again, it goes on where it was, and adds nothing once all trials have ended. Ctrl-C
    leaves a study that goes on.
    """
    from torchdyn_snopt.experiments.search import SearchRequest, parse_arms, run_search
    from torchdyn_snopt.experiments.search_display import search_display
    from torchdyn_snopt.experiments.tasks import get_task

    with _answered():
        wanted = {
            "arms": parse_arms(arms),
            "trials": trials,
            "seeds": seeds,
            "epochs": epochs,
            "penalty": penalty,
            "nfe_weight": nfe_weight,
            "batch": batch,
        }
        request = SearchRequest(
            task=get_task(task),
            out=out or Path("runs") / f"search-{task}",
            study=study or task,
            storage=storage,
            wanted={name: value for name, value in wanted.items() if value is not None},
            jobs=jobs,
            worker=worker,
            seconds=seconds,
            device=_device(device),
            data_dir=data_dir,
            dashboard=dashboard,
            port=port,
        )
        outcome = run_search(request, search_display(console), lambda line: console.print(line))
    _show_search(outcome, request)


def _show_search(outcome: SearchOutcome, request: SearchRequest) -> None:
    from torchdyn_snopt.search import arm_table

    table = arm_table(outcome.comparison)
    if table.body and not request.worker:
        console.print()
        _print_rows(table.title, [table.head, *table.body])
        for note in table.notes:
            console.print(note, style="dim")
        _show_files(outcome.files, request.out)
    if not outcome.finished:
        why = "Stopped" if outcome.interrupted else "The time is up"
        command = shlex.join(["torchdyn-snopt", *sys.argv[1:]])
        console.print(f"\n{why}; nothing is lost. To go on:\n  {command}", soft_wrap=True)
        if outcome.interrupted:
            raise typer.Exit(INTERRUPTED)
    elif not outcome.added:
        console.print(
            f"Nothing was added: all {outcome.comparison.planned} trials of study "
            f"'{request.study}' had ended before. A larger --trials or --seeds adds some.",
            soft_wrap=True,
        )


# --- errors ---------------------------------------------------------------------------------------


@contextmanager
def _answered() -> Iterator[None]:
    """What the user has to mend ends the command in a message."""
    from torchdyn_snopt.errors import SNOptError

    try:
        yield
    except SNOptError as error:
        _fail(error)
    except OSError as error:
        _fail_on_file(error)


def _fail(error: SNOptError) -> NoReturn:
    """A wrong request is answered by its message, without a traceback."""
    error_console.print(f"Error: {error}", style="red")
    raise typer.Exit(2)


def _fail_on_file(error: OSError) -> NoReturn:
    """A full disk or a folder that cannot be written is no defect of the program."""
    place: Any = error.filename or "a file"
    error_console.print(
        f"Error: cannot write or read {place}: {error.strerror or error}. What was complete before "
        "is kept; free space or choose another folder with --out, then go on with --resume.",
        style="red",
    )
    raise typer.Exit(1)
