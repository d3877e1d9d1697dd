"""The race of the low-rank step against its peers: turns, targets, the table and the picture."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch

from torchdyn_snopt.errors import SolverError
from torchdyn_snopt.experiments.bench import low_rank
from torchdyn_snopt.experiments.tasks import get_task

RACE = dataclasses.replace(low_rank.RACES[1], target=0.6, budget=0.5)


def test_a_race_of_two_ends_with_a_table_and_a_picture(tmp_path):
    peers = (
        dataclasses.replace(RACE.peers[0], batch_size=32),
        dataclasses.replace(RACE.peers[1], settings={"lr": 1e-9}),
    )
    race = dataclasses.replace(RACE, peers=peers)
    measured = low_rank.race(1, lambda _: None, [race])
    quick, stuck = measured.report.raw
    assert quick["seconds"] is not None
    assert quick["curve"][-1][1] <= 0.6
    assert stuck["seconds"] is None
    assert stuck["curve"][-1][0] > race.budget
    (table,) = measured.report.tables
    assert [row[1] for row in table.body] == ["SNOpt low_rank", "Adam"]
    assert table.body[0][5:] == ["1 of 1", "1.00"]
    assert table.body[1][5:] == ["0 of 1", "inf"]
    assert [path.suffix for path in measured.write(tmp_path)] == [".md", ".json", ".png"]


def test_all_peers_of_a_seed_start_alike_and_see_the_same_batches():
    race = low_rank.RACES[0]
    runs = [low_rank.Run(race, replace(peer, batch_size=20), 3) for peer in race.peers]
    states = [run._model.state_dict() for run in runs]
    for state in states[1:]:
        assert all(torch.equal(state[key], states[0][key]) for key in state)
    batches = [next(run._batches).x for run in runs]
    assert all(torch.equal(x, batches[0]) for x in batches)


def test_the_spiral_s_windows_and_model():
    task = get_task("spiral")
    splits = task.load(None)
    assert splits.train.x.shape == (991, 2)
    assert splits.train.y.shape == (991, 9, 2)
    assert torch.equal(splits.train.x[1:], splits.train.y[:-1, 0])
    assert splits.train.x[0].tolist() == pytest.approx([2.0, 0.0])
    # x' = A x³: the first difference quotient.
    slope = (splits.train.y[0, 0] - splits.train.x[0]) / (25.0 / 999)
    assert slope.tolist() == pytest.approx([-0.8, 16.0], abs=2.0)
    model = task.build_model("snopt", 1e-3)
    assert sum(p.numel() for p in model.parameters()) == 252
    assert model(splits.test.x[:7]).shape == (7, 9, 2)
    with torch.no_grad():
        states = model.node(splits.test.x[:2], model.times)
    assert torch.allclose(states[1:].movedim(0, 1), model(splits.test.x[:2]))


def test_every_contender_gets_the_same_number_of_trials_and_its_settings_are_among_them():
    for race in low_rank.RACES:
        for peer in race.peers:
            grid = [candidate.described for candidate in peer.grid()]
            assert len(set(grid)) == 8
            assert peer.described in grid


def test_tuning_chooses_the_least_total_and_stops_what_cannot_win(monkeypatch):
    """Contenders that take as many seconds as their learning rate says, on each of two seeds."""

    class Scripted:
        def __init__(self, race, peer, seed):
            self.peer, self.seed, self.seconds, self.reached = peer, seed, 0.0, None
            self.needed = peer.settings["lr"] * (2.0 if peer.batch_size == 2 else 1.0)
            seeds.append(seed)

        @property
        def finished(self):
            return self.reached is not None or self.seconds > 10.0

        def turn(self):
            self.seconds += 1.0
            if self.seconds >= self.needed:
                self.reached = self.seconds

    seeds = []
    monkeypatch.setattr(low_rank, "Run", Scripted)
    peer = dataclasses.replace(
        RACE.peers[1], settings={"lr": 3.0}, values=({"lr": 3.0}, {"lr": 2.0}), batch_sizes=(2, 1)
    )
    race, trials = low_rank.tune(dataclasses.replace(RACE, peers=(peer,)), 2, lambda _: None)
    assert race.peers[0].described == "lr 2.0, batch 1"
    assert [trial["seconds"] for trial in trials] == [12.0, 6.0, 7.0, 4.0]
    assert [trial["reached"] for trial in trials] == [True, True, False, True]
    assert [trial["chosen"] for trial in trials] == [False, False, False, True]
    assert set(seeds) == {100, 101}


def test_a_contender_whose_field_can_no_longer_be_solved_has_lost(monkeypatch):
    def fails(self):
        raise SolverError("x", phase="forward", t=0.0, dt=0.1, steps=1, norms={})

    run = low_rank.Run(RACE, RACE.peers[1], 0)
    monkeypatch.setattr(low_rank.Run, "_step", fails)
    run.turn()
    assert run.finished
    assert run.reached is None
    assert run.curve == [(0.0, float("inf"))]
