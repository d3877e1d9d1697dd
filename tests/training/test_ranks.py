"""Two ranks with a part of the batch each do what one process does with the whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.optim.problems import batch, flat, plain
from tests.training import ranks_worker as worker
from torchdyn_snopt import SNOpt
from torchdyn_snopt.optim.ranks import share_out

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]

ROOT = Path(__file__).parents[2]


def torchrun(*arguments: object, ranks: int = 2, **options: Any) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={ranks}", *map(str, arguments)),
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks have saved; all cases in one start, which is what costs time."""
    path = tmp_path_factory.mktemp("ranks") / "result"
    command = torchrun("-m", "tests.training.ranks_worker", path)
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(path.with_name(f"result.{rank}")) for rank in range(2)]


@pytest.mark.parametrize("share", worker.SHARES)
@pytest.mark.parametrize("case", [*worker.SETTINGS, "horizon"])
def test_two_ranks_are_as_good_as_one(ranks: list[dict[str, Any]], case: str, share: str) -> None:
    """To 1e-5 after 20 steps, at every step on the way, and alike on both ranks to the bit."""
    first, second = (results[f"{case} {share}"] for results in ranks)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    reference = worker.train(case, slice(0, worker.SIZE))
    moved = (reference[-1] - reference[0]).abs().max()
    assert moved > 1e-2
    for ours, whole in zip(first, reference, strict=True):
        torch.testing.assert_close(ours, whole, rtol=0.0, atol=1e-5)


def test_a_solve_that_fails_on_one_rank_drops_the_step_of_all(
    ranks: list[dict[str, Any]],
) -> None:
    for results in ranks:
        history = results["skipped"]["history"]
        assert results["skipped"]["skipped"] == 2
        assert torch.equal(history[1], history[3])
        assert not torch.equal(history[3], history[4])
        assert history[-1].isfinite().all()
    assert torch.equal(ranks[0]["skipped"]["history"][-1], ranks[1]["skipped"]["history"][-1])


def test_a_layer_that_one_rank_alone_uses(ranks: list[dict[str, Any]]) -> None:
    one, other = (results["seen by one"] for results in ranks)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


def test_a_failed_factorization_is_every_ranks_error(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert "cannot be factorized" in results["unfactorizable"]
        assert "rank" in results["unfactorizable"]


def test_ranks_with_different_parameters_are_refused(ranks: list[dict[str, Any]]) -> None:
    for rank, results in enumerate(ranks):
        assert "the ranks hold different parameters" in results["unlike"]
        assert f"on rank {rank} of 2" in results["unlike"]


def test_a_group_of_ones_own_trains_alone(ranks: list[dict[str, Any]]) -> None:
    for rank, results in enumerate(ranks):
        torch.manual_seed(rank)
        model = plain()
        optimizer = SNOpt(model, lr=0.01)
        for step in range(2 + rank):
            x, y = batch(step, worker.SIZE)
            optimizer.zero_grad()
            (model(x) - y).square().sum(1).mean().backward()
            optimizer.step()
        assert torch.equal(results["alone"][0], flat(model))


def test_decompositions_are_shared_out_by_their_cost() -> None:
    owners = share_out([9.0, 1.0, 5.0, 4.0, 1.0], 2)
    loads = [sum(c for c, o in zip([9, 1, 5, 4, 1], owners, strict=True) if o == r) for r in (0, 1)]
    assert sorted(loads) == [10, 10]
    assert share_out([1.0], 3) == [0]
    assert share_out([], 2) == []
