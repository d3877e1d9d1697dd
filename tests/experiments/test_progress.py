from __future__ import annotations

import io

from rich.console import Console

from tests.experiments.tiny import BATCHES, TINY, load, tiny_config
from torchdyn_snopt.experiments.configuration import Budget, Position, RunResult
from torchdyn_snopt.experiments.optimizers import parse_specs
from torchdyn_snopt.experiments.progress import LiveBars, PlainLines, _Course, observer_for
from torchdyn_snopt.experiments.suite import Suite
from torchdyn_snopt.experiments.training import TrainingRun


def shown(tmp_path, *, terminal):
    """What a run of two epochs shows, and the display it chose."""
    suite = Suite(TINY, parse_specs(["sgd,adam"]), range(1), Budget(epochs=2), tmp_path)
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=150, markup=False)
    with observer_for(suite, console) as observer:
        TrainingRun(tiny_config("sgd", epochs=2), load(), tmp_path / "run").run([observer])
    return file.getvalue(), observer


def test_a_pipe_gets_one_line_per_epoch(tmp_path):
    text, display = shown(tmp_path, terminal=False)
    assert isinstance(display, PlainLines)
    lines = text.splitlines()
    assert lines[0] == "[1/2] SGD, seed 0"
    assert [line.split()[:2] for line in lines[1:]] == [["epoch", "1"], ["epoch", "2"]]
    for line in lines[1:]:
        assert all(word in line for word in ("train loss", "test accuracy", "%", "NFE 14+7", " s "))
    assert "\x1b" not in text


def test_a_terminal_gets_a_bar_with_loss_metric_evaluations_and_time(tmp_path):
    text, display = shown(tmp_path, terminal=True)
    assert isinstance(display, LiveBars)
    last = [line for line in text.splitlines() if "SGD" in line][-1]
    for part in ("[1/2] SGD, seed 0", "loss 0.", "accuracy", "NFE 14+7", "test loss", "0:00:"):
        assert part in last


def test_how_a_run_ended_is_shown_unless_it_is_finished(tmp_path):
    file = io.StringIO()
    display = PlainLines(Console(file=file, markup=False), runs=1)
    config = tiny_config("sgd")
    display.started(config, Position(), BATCHES)
    display.ended(RunResult(config, tmp_path, "failed", "why", Position(iteration=7)))
    assert "failed after 7 iterations" in file.getvalue()


def test_a_run_that_goes_on_says_from_where():
    file = io.StringIO()
    display = PlainLines(Console(file=file, markup=False), runs=1)
    display.started(tiny_config("sgd"), Position(iteration=5), BATCHES)
    assert "from iteration 5" in file.getvalue()


def test_the_share_that_is_done_follows_the_nearer_limit():
    course = _Course(runs=1)
    course.begin(tiny_config("sgd", epochs=2, seconds=10.0), BATCHES)
    assert course.share_done(iteration=3, seconds=2.0) == 0.5
    assert course.share_done(iteration=3, seconds=9.0) == 0.9
    assert course.share_done(iteration=3, seconds=11.0) == 1.0
