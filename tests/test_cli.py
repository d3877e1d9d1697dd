"""The command, driven as from a shell, on a task that trains in milliseconds."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import stat

import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from tests.experiments.tiny import BATCHES, TINY
from torchdyn_snopt import cli
from torchdyn_snopt.experiments import report
from torchdyn_snopt.experiments.bench import BENCHMARKS, low_rank
from torchdyn_snopt.experiments.bench.report import BenchReport, BenchTable
from torchdyn_snopt.experiments.curves import read_run, read_runs
from torchdyn_snopt.experiments.reproduce import MEASUREMENTS, Measured
from torchdyn_snopt.experiments.storage import locked_folder
from torchdyn_snopt.experiments.tasks import TASKS
from torchdyn_snopt.experiments.training import TrainingRun


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(TASKS, "tiny", TINY)


@pytest.fixture
def _no_pictures(monkeypatch):
    monkeypatch.setattr(report, "draw_figures", lambda runs: {})


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def plain(text):
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", "", text))


# --- train ----------------------------------------------------------------------------------------


def test_a_training_ends_with_table_logs_and_pictures(tmp_path):
    out = tmp_path / "out"
    result = invoke("train", "tiny", "--epochs", 2, "--out", out)
    assert result.exit_code == 0, result.output
    assert [run.optimizer for run in read_runs(out)] == ["snopt", "adam", "sgd"]
    assert {path.name for path in out.iterdir() if path.is_file()} >= {
        "table.md",
        "table.csv",
        "overview.png",
        "loss_over_time.png",
        "loss_over_iterations.png",
        "nfe.png",
    }
    assert "[1/3] SNOpt, seed 0" in result.output
    assert result.output.count("epoch ") == 6
    assert "time to loss 0.5" in plain(result.output)
    assert str(out / "overview.png") in result.output.replace("\n", "")


@pytest.mark.usefixtures("_no_pictures")
def test_options_reach_the_runs(tmp_path):
    out = tmp_path / "out"
    options = ["--optimizer", "adam:lr=0.5", "--optimizer", "sgd", "--lr", 0.25, "--seeds", 2]
    result = invoke("train", "tiny", *options, "--epochs", 1, "--batch-size", 11, "--out", out)
    assert result.exit_code == 0, result.output
    runs = read_runs(out)
    assert [(run.optimizer, run.seed) for run in runs] == [
        ("adam", 0),
        ("adam", 1),
        ("sgd", 0),
        ("sgd", 1),
    ]
    assert [run.header["config"]["settings"]["lr"] for run in runs] == [0.5, 0.5, 0.25, 0.25]
    assert all(len(run.steps["iteration"]) == 2 for run in runs)


@pytest.mark.usefixtures("_no_pictures")
def test_the_default_budget_and_folder_are_the_tasks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke("train", "tiny", "--optimizer", "sgd").exit_code == 0
    (run,) = read_runs(tmp_path / "runs" / "tiny")
    assert len(run.steps["iteration"]) == TINY.epochs * BATCHES


@pytest.mark.usefixtures("_no_pictures")
def test_seconds_alone_are_a_budget(tmp_path):
    result = invoke("train", "tiny", "--optimizer", "sgd", "--seconds", 1e-9, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert len(read_runs(tmp_path)[0].steps["iteration"]) == 1


@pytest.mark.usefixtures("_no_pictures")
def test_the_horizon_is_learned_as_asked(tmp_path):
    options = ["--optimizer", "snopt", "--t1", 0.5, "--penalty", 0.1, "--epochs", 1]
    for mode in ("policy", "gradient"):
        out = tmp_path / mode
        result = invoke("train", "tiny", "--learn-horizon", mode, *options, "--out", out)
        assert result.exit_code == 0, result.output
        (run,) = read_runs(out)
        wanted = {"mode": mode, "t1": 0.5, "penalty": 0.1, "lr": 0.01}
        assert run.header["config"]["horizon"] == wanted
        assert run.steps["t1"][0] == 0.5
        assert f"t1 {run.steps['t1'][-1]:.3g}" in result.output
    wrong = invoke("train", "tiny", "--learn-horizon", "policy", "--optimizer", "sgd")
    assert wrong.exit_code == 2
    assert "only SNOpt has a feedback policy" in plain(wrong.output)


@pytest.mark.usefixtures("_no_pictures")
def test_a_fixed_horizon_needs_t1_alone(tmp_path):
    options = ["--optimizer", "sgd", "--t1", 0.25, "--epochs", 1, "--out", tmp_path]
    assert invoke("train", "tiny", *options).exit_code == 0
    assert set(read_runs(tmp_path)[0].steps["t1"]) == {0.25}


def interrupt_at(iteration, monkeypatch, signals=1):
    """Ctrl-C in the middle of one iteration, once or more often."""
    iterate = TrainingRun._iterate

    def interrupted(self, rows):
        if self.position.iteration + 1 == iteration:
            for _ in range(signals):
                signal.raise_signal(signal.SIGINT)
        return iterate(self, rows)

    monkeypatch.setattr(TrainingRun, "_iterate", interrupted)


@pytest.mark.usefixtures("_no_pictures")
def test_ctrl_c_keeps_what_was_run_and_resume_goes_on(tmp_path, monkeypatch):
    arguments = ["train", "tiny", "--optimizer", "sgd,adam", "--epochs", 2, "--out"]
    assert invoke(*arguments, tmp_path / "whole").exit_code == 0

    words = ["torchdyn-snopt", *map(str, arguments), str(tmp_path / "parts")]
    monkeypatch.setattr(cli.sys, "argv", words)
    with monkeypatch.context() as patch:
        interrupt_at(5, patch)
        result = invoke(*arguments, tmp_path / "parts")
    assert result.exit_code == 130
    command = " ".join([*words, "--resume"])
    assert command.replace(" ", "") in re.sub(r"\s+", "", result.output)
    assert read_run(tmp_path / "parts" / "sgd" / "seed-0").status == "interrupted"
    assert len(read_run(tmp_path / "parts" / "sgd" / "seed-0").steps["loss"]) == 5
    assert not (tmp_path / "parts" / "adam").exists()
    assert (tmp_path / "parts" / "table.md").exists()

    assert invoke(*arguments, tmp_path / "parts", "--resume").exit_code == 0
    for parts, whole in zip(
        read_runs(tmp_path / "parts"), read_runs(tmp_path / "whole"), strict=True
    ):
        assert parts.steps["loss"].tolist() == whole.steps["loss"].tolist()


@pytest.mark.usefixtures("_no_pictures")
def test_a_second_ctrl_c_does_not_wait_and_loses_the_epoch_at_most(tmp_path, monkeypatch):
    arguments = ["train", "tiny", "--optimizer", "sgd", "--epochs", 2, "--out", tmp_path]
    with monkeypatch.context() as patch:
        interrupt_at(5, patch, signals=2)
        assert invoke(*arguments).exit_code != 0
    assert invoke(*arguments, "--resume").exit_code == 0
    assert len(read_runs(tmp_path)[0].steps["loss"]) == 2 * BATCHES


def test_signal_handlers_are_put_back(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(report, "draw_figures", lambda runs: {})
    invoke("train", "tiny", "--optimizer", "sgd", "--epochs", 1, "--out", tmp_path)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.usefixtures("_no_pictures")
def test_a_failed_run_is_named_and_the_others_count(tmp_path):
    arguments = ["--optimizer", "sgd:lr=1e30,adam", "--epochs", 3, "--out", tmp_path]
    result = invoke("train", "tiny", *arguments)
    assert result.exit_code == 0, result.output
    assert "SGD lr=1e+30, seed 0 failed:" in plain(result.output)
    assert {run.optimizer: run.status for run in read_runs(tmp_path)} == {
        "adam": "finished",
        "sgd": "failed",
    }


@pytest.mark.usefixtures("_no_pictures")
def test_if_every_run_fails_so_does_the_command(tmp_path):
    result = invoke("train", "tiny", "--optimizer", "sgd:lr=1e30", "--epochs", 3, "--out", tmp_path)
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "no such task got: 'nonsense' allowed: digits, moons, "),
        (["tiny", "--optimizer", "adagrad"], "no such optimizer got: 'adagrad'"),
        (["tiny", "--optimizer", "adam:rate=1"], "adam has no such setting got: rate"),
        (["tiny", "--optimizer", "sgd:lr=-1"], "SGD does not accept these settings"),
        (["tiny", "--epochs", "0"], "no positive amount got: epochs=0"),
        (["tiny", "--seconds", "-1"], "no positive amount"),
        (["tiny", "--device", "abacus"], "no valid name got: --device abacus"),
    ],
)
def test_a_wrong_request_is_answered_before_anything_is_written(tmp_path, arguments, message):
    result = invoke("train", *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in plain(result.output)
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--batch-size", "0"], ["--seeds", "x"]])
def test_numbers_out_of_range_are_refused_with_the_option(tmp_path, arguments):
    result = invoke("train", "tiny", *arguments, "--out", tmp_path)
    assert result.exit_code == 2
    assert arguments[0] in plain(result.output)


@pytest.mark.usefixtures("_no_pictures")
def test_a_folder_with_runs_needs_a_word_what_to_do_with_them(tmp_path):
    arguments = ["train", "tiny", "--optimizer", "sgd", "--epochs", 1, "--out", tmp_path]
    assert invoke(*arguments).exit_code == 0
    again = invoke(*arguments)
    assert again.exit_code == 2
    assert "--resume to go on, --overwrite to start anew" in plain(again.output)
    assert invoke(*arguments, "--overwrite").exit_code == 0


def test_two_runs_into_one_folder_are_refused_with_the_process(tmp_path):
    with locked_folder(tmp_path):
        result = invoke("train", "tiny", "--out", tmp_path)
    assert result.exit_code == 2
    assert f"held by process {os.getpid()}" in plain(result.output)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    result = invoke("train", "tiny", "--out", tmp_path / "out")
    tmp_path.chmod(stat.S_IRWXU)
    assert result.exit_code == 1
    assert str(tmp_path / "out") in result.output.replace("\n", "")


@pytest.mark.usefixtures("_no_pictures")
def test_a_full_disk_ends_the_command_with_what_to_do(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device", "checkpoint.pt")

    monkeypatch.setattr("torchdyn_snopt.experiments.training.save_checkpoint", full)
    result = invoke("train", "tiny", "--optimizer", "sgd", "--out", tmp_path)
    assert result.exit_code == 1
    assert "checkpoint.pt: No space left on device" in plain(result.output)
    assert "--resume" in result.output


# --- reproduce ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_no_pictures")
def test_a_reproduction_prints_its_table_and_goes_on(tmp_path):
    out = tmp_path / "out"
    words = ["reproduce", "table5", "--task", "tiny", "--epochs", 1, "--penalty", 0.5, "--out", out]
    result = invoke(*words, "--seeds", 1)
    assert result.exit_code == 0, result.output
    studied = "SNOpt preconditioner=kfe_adam lr=0.01"
    assert f"[3/3] {studied}, policy from t1=1, c=0.5, seed 0" in plain(result.output)
    assert "difference" in plain(result.output)
    assert "table5.png" in result.output.replace("\n", "")
    refused = invoke(*words, "--seeds", 2)
    assert refused.exit_code == 2
    assert "--resume" in refused.output
    assert invoke(*words, "--seeds", 2, "--resume").exit_code == 0
    assert len(read_runs(out)) == 6


def test_an_unknown_reproduction_is_refused():
    result = invoke("reproduce", "fig99")
    assert result.exit_code == 2
    assert "fig5, fig10, table5" in plain(result.output)


# --- bench and the rest ---------------------------------------------------------------------------


def test_a_benchmark_is_shown_and_written(tmp_path, monkeypatch):
    def measured(repeats, device, tell):
        tell("working")
        table = BenchTable("Title", ["contender", "ratio"], [["snopt", "0.50 [0.25, 2.00]"]])
        return BenchReport("adjoint", [table], "A [note].", {"cpus": 2}, [{"repeats": repeats}])

    monkeypatch.setitem(BENCHMARKS, "adjoint", measured)
    path = tmp_path / "raw.json"
    result = invoke("bench", "adjoint", "--repeats", 3, "--json", path)
    assert result.exit_code == 0, result.output
    assert "0.50 [0.25, 2.00]" in result.output
    assert "A [note]." in result.output
    assert json.loads(path.read_text())["measurements"] == [{"repeats": 3}]


def test_every_benchmark_has_a_command():
    names = {command.name for command in cli.bench_app.registered_commands}
    assert names == {*BENCHMARKS, "low-rank", "optimizers"}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_measurement_tells_its_progress_and_leaves_table_data_and_picture(
    tmp_path, monkeypatch, name
):
    def measured(tell):
        tell("half done")
        table = BenchTable("Title", ["field", "error"], [["timed", "1.0e-05"]])
        return Measured(BenchReport(name, [table], "A note.", {}, [{"error": 1e-5}]), Figure())

    monkeypatch.setitem(MEASUREMENTS, name, measured)
    out = tmp_path / "out"
    result = invoke("reproduce", name, "--out", out)
    assert result.exit_code == 0, result.output
    for words in ("half done", "1.0e-05", "A note."):
        assert words in result.output
    assert {path.name for path in out.iterdir()} == {
        f"{name}.{end}" for end in ("md", "json", "png")
    }
    assert "| timed | 1.0e-05 |" in (out / f"{name}.md").read_text()
    assert json.loads((out / f"{name}.json").read_text())["measurements"] == [{"error": 1e-5}]
    assert (out / f"{name}.png").stat().st_size > 0


def test_the_race_s_settings_are_tuned_first_where_asked(tmp_path, monkeypatch):
    """On a target that the initial weights reach: one turn a contender."""
    (moons,) = (race for race in low_rank.RACES if race.task == "moons")
    quick = dataclasses.replace(moons, target=10.0, peers=moons.peers[:2])
    monkeypatch.setattr(low_rank, "RACES", (quick,))
    words = ["bench", "low-rank", "--task", "moons", "--seeds", 1, "--out", tmp_path]
    result = invoke(*words, "--tune", 1)
    assert result.exit_code == 0, result.output
    assert result.output.count("moons, trial of ") == 16  # a grid of eight for both
    assert "moons, seed 0: Adam reached the target" in result.output
    raw = json.loads((tmp_path / "low-rank.json").read_text())["measurements"]
    trials = [row for row in raw if "trial" in row]
    assert len(trials) == 16
    assert [row["optimizer"] for row in trials if row["chosen"]] == ["SNOpt low_rank", "Adam"]
    refused = invoke("bench", "low-rank", "--task", "digits")
    assert refused.exit_code == 2
    assert "no race is run on this task got: --task digits allowed: moons" in plain(refused.output)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["train", "search", "bench"]),
        (["search", "--help"], ["--arms", "--trials", "--storage", "--worker", "--dashboard"]),
        (["train", "--help"], ["--optimizer", "--resume", "--seeds", "runs/TASK"]),
        (["bench", "--help"], ["adjoint", "refresh", "memory"]),
        (["bench", "adjoint", "--help"], ["--json", "--repeats"]),
    ],
)
def test_help_names_what_there_is(arguments, words):
    result = invoke(*arguments)
    assert result.exit_code == 0
    for word in words:
        assert word in plain(result.output)


def test_the_help_lists_every_task_and_optimizer(monkeypatch):
    from torchdyn_snopt.experiments.optimizers import OPTIMIZERS

    monkeypatch.delitem(TASKS, "tiny")
    text = plain(invoke("train", "--help").output)
    for name in (*TASKS, *OPTIMIZERS):
        assert re.search(rf"\b{name}\b", text), name
