"""A training that takes no time, and workers of their own process on it.

A worker with a trap says so by a file when it comes to that place for the first time, and waits to
be killed.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import time
from pathlib import Path

import optuna

from torchdyn_snopt.search import (
    Choice,
    HorizonSearch,
    Progress,
    SearchSettings,
    StudyStorage,
    compare_horizon_search,
    open_storage,
)
from torchdyn_snopt.search.liveness import Watch

ARMS = ("policy", "gradient", "tpe", "grid", "hyperband", "joint")
SETTINGS = SearchSettings(penalty=0.1, arms=ARMS, trials=7, epochs=4, batch=3)
PLACES = 2 + 4 * 7
SHARED = dataclasses.replace(SETTINGS, trials=4, batch=2)
SHARED_PLACES = 2 + 4 * 4


class Toy:
    """The model: a choice."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice

    def state_dict(self):
        return {"t1": self.choice.t1}


def build_model(choice):
    return Toy(choice)


def progress(choice, epoch, **changes):
    """A landscape with its best t1 near 1, on which t1 moves there by itself where it may."""
    moves = choice.mode != "fixed"
    t1 = choice.t1 * 0.9**epoch if moves else choice.t1
    rate = {"policy": 1.5, "gradient": 0.6, "fixed": 0.5}[choice.mode]
    error = 0.02 + 0.05 * math.log(t1) ** 2 + 0.4 * math.exp(-rate * epoch) + 1e-3 * choice.seed
    figures = Progress(
        epoch=epoch,
        error=error,
        nfe=8 + 6 * math.ceil(3 * t1),
        evaluations=round(100 * epoch * (1 + t1)),
        seconds=0.1 * epoch,
        t1=t1,
        loss=error,
    )
    return dataclasses.replace(figures, **changes)


def train(model, choice, report):
    for epoch in range(1, SETTINGS.epochs + 1):
        report(progress(choice, epoch))


def memory():
    """A storage that costs nothing."""
    return StudyStorage("memory", optuna.storages.InMemoryStorage())


def run(out, settings=SETTINGS, **changes):
    """A whole search in this process."""
    changes = {"train": train, "title": "Toy", "storage": memory(), **changes}
    return compare_horizon_search(build_model, out=out, settings=settings, **changes)


def outcomes(comparison):
    """What two runs of a search must agree in, by place."""
    found = {}
    for record in comparison.records:
        if record.state != "abandoned":
            assert record.place.key not in found
            found[record.place.key] = (
                record.state,
                dict(record.params),
                record.objective,
                [dict(row) for row in record.history],
            )
    return found


def start_worker(url, name, out, trap=""):
    """A process of its own; forked, for torch takes long to import."""
    context = multiprocessing.get_context("fork")
    worker = context.Process(target=main, args=(url, name, str(out), trap))
    worker.start()
    return worker


def finish(workers, timeout=120):
    for worker in workers:
        worker.join(timeout)
        assert worker.exitcode == 0


def wait_for(path, workers, timeout=120):
    until = time.monotonic() + timeout
    while not path.exists():
        assert time.monotonic() < until
        assert all(worker.is_alive() for worker in workers)
        time.sleep(0.02)


def main(url, name, out, trap=""):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    caught = Path(out) / "caught"

    def careful(model, choice, report):
        time.sleep(0.05)  # so that every worker gets something to do
        if trap == key_of(choice) and not caught.exists():
            report(progress(choice, 1))
            caught.touch()
            time.sleep(600)
        train(model, choice, report)

    def key_of(choice):
        return f"{choice.mode}/{choice.seed}"

    search = HorizonSearch(open_storage(url, shared=True), name, SHARED, Path(out), title="Toy")
    assert search.work(build_model, careful, interval=0.2, watch=Watch(grace=20.0))
