"""`bench optimizers`, from logs made by hand and on a task that trains in milliseconds."""

from __future__ import annotations

import math

import pytest
import torch

from tests.experiments.tiny import TINY, write_log
from torchdyn_snopt.experiments.bench import optimizers as bench
from torchdyn_snopt.experiments.bench.optimizers import Contest, bench_optimizers, loss_at
from torchdyn_snopt.experiments.bench.steps import Iterations, peak_bytes
from torchdyn_snopt.experiments.bench.steps_worker import measure
from torchdyn_snopt.experiments.curves import by_label, read_run
from torchdyn_snopt.experiments.optimizers import OptimizerSpec
from torchdyn_snopt.experiments.tasks import TASKS, get_task

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(TASKS, "tiny", TINY)
    monkeypatch.setattr("torchdyn_snopt.experiments.report.draw_figures", lambda runs: {})


def _result(folder, losses, **also):
    runs = []
    for name, series in losses.items():
        for seed, values in enumerate(series):
            place = folder / name.replace(" ", "-") / f"seed-{seed}"
            optimizer = name.split()[0]
            write_log(place, values, optimizer=optimizer, label=name, seed=seed, **also)
            run = read_run(place)
            run.header["config"] |= {"sensitivity": "snopt", "settings": {}}
            runs.append(run)
    return bench._Result(TINY, 2.0, by_label(runs), {})


def test_times_and_ratios_are_those_of_the_logs(tmp_path):
    # Half a second a step, a window of two, target 0.5.
    result = _result(
        tmp_path,
        {
            "snopt": [[0.4, 0.4, 0.1, 0.1]],
            "adam": [[0.9, 0.8, 0.4, 0.4]],
            "sgd": [[0.9, 0.9, 0.9, 0.9]],
        },
    )
    assert result.times(result.ours).values == (1.0,)
    assert result.ratio(result.runs["adam"]) == pytest.approx(0.5)
    assert result.ratio(result.runs["sgd"]) == 0.0
    assert result.best_peer() == "adam"
    table = result.table()
    assert [row[0] for row in table.body] == ["snopt", "adam", "sgd"]
    assert [row[2] for row in table.body] == ["–", "0.50", "only SNOpt arrives"]
    assert table.body[0][3] == "0.400"  # after one second: the first two steps
    overall = bench._overall([result])
    assert overall.body == [["tiny", "1.00", "2.00", "0.50", "adam", "2.00", "0.50"]]


def test_who_does_not_arrive_is_said(tmp_path):
    result = _result(tmp_path, {"snopt": [[0.9, 0.9]], "adam": [[0.1, 0.1]], "sgd": [[0.9, 0.9]]})
    assert bench.show_ratio(result.ratio(result.runs["adam"])) == "SNOpt does not arrive"
    assert bench.show_ratio(result.ratio(result.runs["sgd"])) == "neither arrives"
    alone = _result(tmp_path / "alone", {"snopt": [[0.1, 0.1]], "sgd": [[0.9, 0.9]]})
    assert alone.best_peer() is None
    assert bench._overall([alone]).body[0][4] == "none arrives"


def test_failed_runs_are_counted_and_left_out_of_losses(tmp_path):
    result = _result(tmp_path, {"snopt": [[0.4, 0.4]]})
    failed = _result(tmp_path / "failed", {"adam": [[0.4, 9.0]]}, status="failed")
    row = bench._Result(TINY, 2.0, {**result.runs, **failed.runs}, {}).table().body[1]
    assert row[-1] == "1"
    assert row[4] == "–"


def test_the_loss_at_a_time_is_the_mean_of_the_last_batches_before_it(tmp_path):
    write_log(tmp_path / "run", [4.0, 2.0, 1.0])
    run = read_run(tmp_path / "run")
    assert [loss_at(run, t) for t in (0.5, 1.0, 1.4, 1.5, 9.0)] == [4.0, 3.0, 3.0, 1.5, 1.5]
    assert loss_at(run, 0.1) == 4.0


def test_a_contest_tunes_trains_and_reports(tmp_path):
    contest = Contest(
        ["tiny"],
        tmp_path,
        seconds=0.05,
        seeds=2,
        trials=2,
        optimizers=["snopt,adam,adam:sensitivity=adjoint,sgd:lr=0.1"],
        memory=False,
    )
    told = []
    report = bench_optimizers(contest, told.append)
    assert len(report.tables) == 2
    labels = [row[0] for row in report.tables[0].body]
    adam = [label for label in labels if label.startswith("Adam")]
    assert labels[0] == "SNOpt"
    assert labels[-1] == "SGD lr=0.1"
    assert adam[1] == f"{adam[0]} sensitivity=adjoint"  # one learning rate for both
    assert {row["label"] for row in report.raw} == set(labels)
    assert len(report.raw) == 8
    assert sum("tuning Adam" in text for text in told) == 2
    assert {path.name for path in tmp_path.glob("*.png")} == {"figure1.png", "figure7.png"}
    tuned = (tmp_path / "tiny" / "tuning" / "adam" / "tuned.json").stat().st_mtime_ns
    again = bench_optimizers(Contest(**{**vars(contest), "resume": True}), told.append)
    assert (tmp_path / "tiny" / "tuning" / "adam" / "tuned.json").stat().st_mtime_ns == tuned
    assert [row[0] for row in again.tables[0].body] == labels


def test_iterations_train_and_their_memory_is_measured():
    task = get_task("moons")
    train = task.load(None).train
    torch.manual_seed(0)
    losses = []
    for spec in (OptimizerSpec("snopt"), OptimizerSpec("lbfgs", {"lr": 0.1})):
        iterations = Iterations(task, spec, train, CPU)
        before = task.loss(iterations.model(train.x), train.y).item()
        iterations(4)
        losses.append(before - task.loss(iterations.model(train.x), train.y).item())
    assert min(losses) > 0.05
    request = {
        "task": "moons",
        "optimizer": "adam",
        "chosen": {},
        "sensitivity": "adjoint",
        "device": "cpu",
        "data_dir": None,
        "iterations": 1,
    }
    assert measure(request) >= 0


@pytest.mark.parametrize("name", ["moons", "spiral"])
def test_torchdiffeq_computes_the_same_step_as_torchdyn(name):
    task = get_task(name)
    train = task.load(None).train.head(64)
    gradients = []
    for sensitivity in ("torchdiffeq", "snopt"):
        iterations = Iterations(task, OptimizerSpec("sgd", {}, sensitivity), train, CPU)
        iterations()
        gradients.append(torch.cat([p.grad.flatten() for p in iterations.model.parameters()]))
    assert torch.allclose(gradients[0], gradients[1], atol=2e-3 * gradients[1].norm())


def test_peak_memory_is_measured_in_a_process_of_its_own():
    peak = peak_bytes(get_task("moons"), OptimizerSpec("adam"), CPU)
    assert 0 <= peak < 1e9
    assert math.isfinite(peak)
