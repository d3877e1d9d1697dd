"""Random faults in the midst of a study: the trial that was hit is lost at most, and nothing else.

60 injections, each drawn by its own seed: at one epoch of one trial training meets NaN, a failed
solve, the end of memory, an interrupt or a defect.
"""

from __future__ import annotations

import dataclasses
import math
import random

import optuna
import pytest
from optuna.trial import TrialState

from tests.search.toy import SETTINGS, memory, outcomes, progress, run
from torchdyn_snopt.search.objective import TrialFailedError

INJECTIONS = 60
SMALL = dataclasses.replace(SETTINGS, arms=("policy", "tpe", "joint"), trials=3, epochs=3, batch=2)
PLACES = 1 + 2 * 3
EPOCHS = PLACES * SMALL.epochs

# What ends the trial alone, as failed.
OF_TRIALS = {
    "nan": None,
    "solve": TrialFailedError("the forward solve failed"),
    "memory": MemoryError("no memory is left"),
}
# What ends the work; started again it goes on as if nothing had been.
OF_WORKERS = {"ctrl-c": KeyboardInterrupt(), "defect": ValueError("of the user's training")}


def training(at=None, fault=""):
    """The toy's, with a fault at its at-th epoch counted over all trials."""
    countdown = [at]

    def train(model, choice, report):
        for epoch in range(1, SMALL.epochs + 1):
            spoiled = {}
            if countdown[0] is not None:
                countdown[0] -= 1
                if countdown[0] == 0:
                    error = {**OF_TRIALS, **OF_WORKERS}[fault]
                    if error is not None:
                        raise error
                    spoiled = {"error": math.nan}
            report(progress(choice, epoch, **spoiled))

    return train


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return outcomes(run(tmp_path_factory.mktemp("whole"), SMALL, train=training()))


@pytest.mark.parametrize("seed", range(INJECTIONS))
def test_a_fault_costs_the_trial_that_it_hits(seed, undisturbed, tmp_path):
    draw = random.Random(seed)
    at, fault = draw.randrange(1, EPOCHS + 1), draw.choice([*OF_TRIALS, *OF_WORKERS])
    storage, disturbed = memory(), {"train": training(at, fault)}
    if fault in OF_WORKERS:
        with pytest.raises(type(OF_WORKERS[fault])):
            run(tmp_path, SMALL, storage=storage, **disturbed)
        again = run(tmp_path, SMALL, storage=storage, train=training())
        assert outcomes(again) == undisturbed
        assert sum(record.state == "abandoned" for record in again.records) == 1
    else:
        found = run(tmp_path, SMALL, storage=storage, **disturbed)
        assert found.ended == found.planned == PLACES
        (failed,) = [record for record in found.records if record.state == "fail"]
        assert failed.reason
        # What came before the fault is as it would have been.
        before = [r.place.key for r in found.records if r.number < failed.number]
        assert all(
            outcomes(found)[key] == undisturbed[key]
            for key in before
            if key in undisturbed and key.split("/")[0] == failed.place.key.split("/")[0]
        )
    states = {
        trial.state
        for summary in optuna.get_all_study_summaries(storage.storage)
        for trial in optuna.load_study(
            study_name=summary.study_name, storage=storage.storage
        ).trials
    }
    assert TrialState.RUNNING not in states
