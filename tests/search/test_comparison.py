"""The comparison's figures on hand-made trials, its report and pictures; reproducibility."""

from __future__ import annotations

import csv
import dataclasses

import optuna
import pytest
from matplotlib.image import imread

from tests.search.toy import PLACES, SETTINGS, memory, outcomes, progress, run, train
from torchdyn_snopt.errors import InvalidInputError
from torchdyn_snopt.search import ARMS, SearchSettings, arm_table, plot_comparison, write_report
from torchdyn_snopt.search.arms import get_arm
from torchdyn_snopt.search.plan import ABANDONED, KEY, Place, needed_before, places
from torchdyn_snopt.search.results import read_comparison

ONE = SearchSettings(arms=("policy", "tpe"), trials=8, seeds=1)


def trial(key, error=None, nfe=20, evaluations=100, t1=1.0, state="COMPLETE", **attributes):
    row = {"epoch": 4, "error": error, "nfe": nfe, "evaluations": evaluations, "seconds": 2.0}
    history = [] if error is None else [{**row, "t1": t1, "loss": 0.1}]
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState[state],
        value=1.0 if state == "COMPLETE" else None,
        user_attrs={KEY: key, "history": history, **attributes},
    )


def made(policy=0.05, policy_t1=1.0):
    errors = [0.30, 0.10, 0.20, 0.08, 0.40, 0.50, 0.60, 0.70]
    times = [0.1, 0.9, 0.2, 1.4, 0.3, 2.0, 2.5, 3.0]
    found = [
        trial(f"tpe/0/{i}", e, 20, 1000, t)
        for i, (e, t) in enumerate(zip(errors, times, strict=True))
    ]
    lost = trial("tpe/0/3", 0.9, 20, 500, 1.4, state="FAIL", **{ABANDONED: "its worker died"})
    return read_comparison(
        [trial("policy/0/0", policy, 26, 700, policy_t1), *found, lost, trial("", 0.0)], ONE, "Made"
    )


# --- figures --------------------------------------------------------------------------------------


def test_cost_counts_every_trial_and_the_interval_is_that_of_the_best_quarter():
    summary = made().summary("tpe", 0)
    assert summary.evaluations == 8 * 1000 + 500
    assert summary.seconds == 9 * 2.0
    assert summary.counts == {"complete": 8, "abandoned": 1}
    assert summary.best.place.index == 3
    assert summary.best.objective == pytest.approx(0.08 + 1e-3 * 20)
    assert summary.interval == (0.9, 1.4)


@pytest.mark.parametrize(
    ("policy", "t1", "reached", "inside"),
    [(0.05, 1.0, True, True), (0.08, 1.5, False, False)],
)
def test_the_verdict_compares_one_run_with_the_search(policy, t1, reached, inside):
    (verdict,) = made(policy, t1).verdicts("tpe")
    assert (verdict.reached, verdict.inside) == (reached, inside)
    assert verdict.share == 700 / 8500
    assert verdict.policy_objective == pytest.approx(policy + 0.026)


def test_the_pareto_front_holds_what_nothing_beats():
    front = made().pareto()
    assert [(r.last("nfe"), r.last("error")) for r in front] == [(20, 0.08), (26, 0.05)]


def test_the_tidy_table_has_a_row_per_trial(tmp_path):
    comparison = made()
    assert len(comparison.rows()) == 10
    frame = pytest.importorskip("pandas") and comparison.to_pandas()
    assert frame.groupby("arm")["evaluations"].sum().to_dict() == {"policy": 700, "tpe": 8500}
    assert frame.loc[frame.state == "abandoned", "reason"].tolist() == ["its worker died"]


def test_the_table_says_what_was_won():
    text = arm_table(made()).markdown()
    assert "0.0760" in text
    assert "8500" in text
    assert "1 abandoned, 8 complete" in text
    assert "objective -0.0240 of the search's best (at most it in 1 of 1 seeds) at 8.2 %" in text
    assert "([0.90, 1.40]) in 1 of 1" in text


def test_the_report_has_its_pictures_and_table(tmp_path):
    files = write_report(made(), tmp_path)
    names = ["report.md", "trials.csv", "comparison.png", "cost.png", "horizon.png", "pareto.png"]
    assert [path.name for path in files] == names
    assert "![comparison](comparison.png)" in files[0].read_text()
    assert "its worker died" in files[0].read_text()
    with files[1].open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 10
    for path in files[2:]:
        pixels = imread(path)[..., :3]
        assert pixels.std() > 0.05
        grey = pixels.mean(axis=2)
        assert (grey < 0.5).mean() > 0.002  # readable without colours


def test_without_reports_there_are_no_pictures():
    assert plot_comparison(read_comparison([], ONE)) == {}
    assert arm_table(read_comparison([], ONE)).body == []


# --- the plan -------------------------------------------------------------------------------------


def test_the_plan_has_one_run_of_some_arms_and_all_trials_of_others():
    settings = SearchSettings(arms=("policy", "grid"), trials=3, seeds=2)
    assert [place.key for place in places(settings)] == [
        *["policy/0/0", "grid/0/0", "grid/0/1", "grid/0/2"],
        *["policy/1/0", "grid/1/0", "grid/1/1", "grid/1/2"],
    ]


def test_a_place_needs_all_earlier_batches():
    settings = SearchSettings(batch=3)
    assert needed_before(Place("tpe", 0, 2), settings) == []
    needed = needed_before(Place("tpe", 1, 5), settings)
    assert needed == [Place("tpe", 1, index) for index in range(3)]


@pytest.mark.parametrize(
    "changes",
    [{"arms": ()}, {"trials": 0}, {"low": 3.0}, {"t1": 5.0}, {"penalty": -1.0}, {"batch": 0}],
)
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(InvalidInputError, match="out of range"):
        dataclasses.replace(SETTINGS, **changes)


def test_an_unknown_arm_is_refused():
    with pytest.raises(InvalidInputError, match="policy, gradient, tpe"):
        get_arm("bayes")


# --- reproducibility ------------------------------------------------------------------------------


def test_two_runs_are_equal_and_another_seed_proposes_otherwise(tmp_path):
    all_arms = dataclasses.replace(SETTINGS, arms=tuple(ARMS))
    first, second = run(tmp_path, all_arms), run(tmp_path, all_arms)
    assert outcomes(first) == outcomes(second)
    other = outcomes(run(tmp_path, dataclasses.replace(all_arms, seed=1)))
    for arm in ("tpe", "hyperband", "joint", "joint-tpe"):
        assert other[f"{arm}/0/0"][1] != outcomes(first)[f"{arm}/0/0"][1]
    assert other["grid/0/3"] == outcomes(first)["grid/0/3"]


def test_what_is_proposed_depends_on_earlier_results(tmp_path):
    """TPE, NSGA-II and pruning see the earlier batches, and nothing else."""

    def worse_at_long_times(model, choice, report):
        for epoch in range(1, SETTINGS.epochs + 1):
            report(progress(choice, epoch, error=0.1 + choice.t1 + 0.1 / epoch))

    usual, changed = outcomes(run(tmp_path)), outcomes(run(tmp_path, train=worse_at_long_times))
    for arm in ("tpe", "joint"):
        first_batch = [f"{arm}/0/{i}" for i in range(SETTINGS.batch)]
        later = [f"{arm}/0/{i}" for i in range(SETTINGS.batch, SETTINGS.trials)]
        assert all(usual[key][1] == changed[key][1] for key in first_batch)
        assert any(usual[key][1] != changed[key][1] for key in later)


def test_hyperband_and_the_median_prune_in_later_batches_only(tmp_path):
    settings = dataclasses.replace(SETTINGS, arms=("hyperband", "median"), trials=12)
    comparison = run(tmp_path, settings)
    for arm in ("hyperband", "median"):
        pruned = [r.place.index for r in comparison.of(arm) if r.state == "pruned"]
        assert pruned
        assert min(pruned) >= settings.batch


def test_numbers_of_trials_and_seeds_are_noted(tmp_path):
    storage = memory()
    assert run(tmp_path, storage=storage).ended == PLACES
    study = optuna.load_study(study_name="horizon", storage=storage.storage)
    attributes = [trial.user_attrs for trial in study.trials]
    assert {each["name"] for each in attributes} >= {"SNOpt policy (one run), seed 0, no. 0"}
    seeds = [each["sampler_seed"] for each in attributes]
    assert seeds == [SETTINGS.sampler_seed(each[KEY]) for each in attributes]
    assert len(set(seeds)) == len(seeds)


def test_a_foreign_trial_in_the_study_is_left_alone(tmp_path):
    storage = memory()
    one = dataclasses.replace(SETTINGS, arms=("policy",))
    run(tmp_path, one, storage=storage, stop=lambda: True)
    study = optuna.load_study(study_name="horizon", storage=storage.storage)
    study.enqueue_trial({"t1": 1.0})
    assert run(tmp_path, one, storage=storage, train=train).ended == 1
    assert study.trials[0].state is optuna.trial.TrialState.WAITING
