"""Logs written by hand, and the figures that must come out of them."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest

from tests.experiments.tiny import write_log
from torchdyn_snopt.errors import InvalidInputError
from torchdyn_snopt.experiments.curves import by_label, read_run, read_runs, running_mean
from torchdyn_snopt.experiments.tables import Spread, summarize
from torchdyn_snopt.experiments.training import LOG_NAME


def test_a_running_mean_covers_its_window_and_those_before_only_if_asked():
    values = np.array([4.0, 2.0, 6.0, 0.0])
    np.testing.assert_allclose(running_mean(values, 2), [np.nan, 3.0, 4.0, 3.0])
    np.testing.assert_allclose(running_mean(values, 3, partial=True), [4.0, 3.0, 4.0, 8 / 3])
    assert np.isnan(running_mean(values, 5)).all()


def test_the_target_is_reached_when_the_mean_of_the_window_falls_below_it(tmp_path):
    # Means of two: -, 0.85, 0.5, 0.45, 0.55: the single 0.3 does not count, 0.5 is not below 0.5.
    write_log(tmp_path / "run", [1.0, 0.7, 0.3, 0.6, 0.5], seconds_per_step=0.25)
    run = read_run(tmp_path / "run")
    assert run.target_iteration() == 4
    assert run.target_seconds() == 1.0


def test_a_target_that_is_not_reached_has_no_time(tmp_path):
    write_log(tmp_path / "run", [1.0, 0.9])
    run = read_run(tmp_path / "run")
    assert run.target_iteration() is None
    assert run.target_seconds() is None


def test_a_log_without_an_end_is_of_an_interrupted_run(tmp_path):
    write_log(tmp_path / "run", [1.0], status=None)
    assert read_run(tmp_path / "run").status == "interrupted"


def test_columns_that_come_later_are_nan_before(tmp_path):
    write_log(tmp_path / "run", [1.0, 0.9], status=None)
    with (tmp_path / "run" / LOG_NAME).open("a") as log:
        log.write(
            '{"kind": "step", "iteration": 3, "seconds": 1.5, "loss": null, "damping": 2.0}\n'
        )
    steps = read_run(tmp_path / "run").steps
    np.testing.assert_allclose(steps["damping"], [np.nan, np.nan, 2.0])
    np.testing.assert_allclose(steps["loss"], [1.0, 0.9, np.nan])


def test_a_log_without_a_header_is_refused(tmp_path):
    (tmp_path / LOG_NAME).write_text('{"kind": "step", "loss": 1.0}\n')
    with pytest.raises(InvalidInputError, match="no header"):
        read_run(tmp_path)


def test_runs_come_in_the_order_of_the_optimizers_and_seeds(tmp_path):
    for optimizer, seed in [("sgd", 1), ("sgd", 0), ("adam", 0), ("snopt", 0)]:
        write_log(tmp_path / optimizer / f"seed-{seed}", [1.0], optimizer=optimizer, seed=seed)
    runs = read_runs(tmp_path)
    assert [(run.optimizer, run.seed) for run in runs] == [
        ("snopt", 0),
        ("adam", 0),
        ("sgd", 0),
        ("sgd", 1),
    ]
    assert list(by_label(runs)) == ["snopt", "adam", "sgd"]


# --- the table ------------------------------------------------------------------------------------


def table_of(tmp_path):
    out = tmp_path / "out"
    fast, slow, never = [1.0, 0.4, 0.4], [1.0, 1.0, 0.8, 0.1], [1.0, 1.0, 1.0]
    write_log(out / "adam" / "seed-0", fast, label="Adam", seconds_per_step=1.0, accuracy=0.9)
    write_log(out / "adam" / "seed-1", slow, label="Adam", seed=1, seconds_per_step=2.0)
    write_log(out / "adam" / "seed-2", never, label="Adam", seed=2, status="failed")
    write_log(out / "sgd" / "seed-0", fast, optimizer="sgd", label="SGD", seconds_per_step=0.5)
    return summarize(read_runs(out))


def test_the_table_holds_medians_and_ranges_over_seeds(tmp_path):
    table = table_of(tmp_path)
    cells = {row[0]: dict(zip(table.head, row, strict=True)) for row in table.body()}
    adam, sgd = cells["Adam"], cells["SGD"]
    # Adam reaches 0.5 after 3 iterations of 1 s, after 4 of 2 s, and never.
    assert adam["time to loss 0.5 [s]"] == "8.00 [3.00, not reached]"
    assert adam["iterations to loss 0.5"] == "4 [3, not reached]"
    assert adam["final training loss"] == "0.4250 [0.4000, 0.4500]"  # the failed run has none
    assert adam["test accuracy [%]"] == "75.00 [75.00, 90.00]"
    assert adam["ms per iteration"] == "1000.0 [500.0, 2000.0]"
    assert adam["NFE forward"] == "16.0 [16.0, 16.5]"
    assert adam["NFE backward"] == "7.0 [7.0, 7.0]"
    assert (adam["runs"], adam["failed"]) == ("3", "1")
    assert sgd["time to loss 0.5 [s]"] == "1.50"
    assert (sgd["runs"], sgd["failed"]) == ("1", "0")


def test_the_markdown_has_every_cell_the_definitions_and_the_failures(tmp_path):
    table = table_of(tmp_path)
    text = table.markdown()
    for row in table.body():
        assert "| " + " | ".join(row) + " |" in text
    assert "last 2 batches first falls below 0.5" in text
    assert "without evaluation, logging and checkpoints" in text
    assert "- Adam: seed 2: SolverError: it exploded; got: t=0.5" in text


def test_the_csv_holds_numbers(tmp_path):
    rows = list(csv.DictReader(table_of(tmp_path).csv().splitlines()))
    assert [row["optimizer"] for row in rows] == ["Adam", "SGD"]
    assert float(rows[0]["seconds_to_target_median"]) == 8.0
    assert float(rows[0]["seconds_to_target_max"]) == math.inf
    assert float(rows[1]["milliseconds_min"]) == 500.0


def test_a_target_that_no_run_reached_is_said_once():
    assert Spread((math.inf, math.inf)).show(2) == "not reached"


def test_half_of_the_runs_is_not_enough_for_a_median_time():
    assert Spread((1.0, math.inf)).median == math.inf
    assert Spread((1.0, 3.0, math.inf)).median == 3.0


def test_a_quantity_that_no_run_has_is_a_dash():
    assert Spread(()).show(2) == "–"


def test_no_runs_make_an_empty_table():
    assert summarize([]).body() == []
