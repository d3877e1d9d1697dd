"""Tables 1 and 2 and the distances of the factors: what they measure, on the smallest cases."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from torchdyn_snopt import MSELoss, SNOptSensitivity
from torchdyn_snopt.experiments.reproduce import factors, table1, table2
from torchdyn_snopt.experiments.tasks.base import Last, neural_ode


def silent(_: str) -> None:
    pass


def test_table_1_ranks_recursion_behind_theorem_1(monkeypatch, tmp_path):
    monkeypatch.setattr(table1, "FIELDS", (table1.FIELDS[2],))
    monkeypatch.setattr(table1, "SOLVERS", ("rk4", "dopri5"))
    monkeypatch.setattr(table1, "SAMPLES", 1)
    monkeypatch.setattr(table1, "WIDTH", 1)
    measured = table1.run_table1(silent, seeds=1)
    rows = {row["solver"]: row for row in measured.report.raw}
    assert rows["dopri5"]["first"] < 0.05
    assert rows["dopri5"]["theorem1"] < 0.05
    assert rows["dopri5"]["recursive"] > 100 * rows["dopri5"]["theorem1"]
    files = measured.write(tmp_path)
    assert [path.name for path in files] == ["table1.md", "table1.json", "table1.png"]
    assert "| contracting | dopri5 |" in files[0].read_text()
    assert len(json.loads(files[1].read_text())["measurements"]) == 2


def test_table_2_measures_memory_and_fits_exponents():
    sizes = tuple(table2.Size(length=2, width=width, depth=1) for width in (16, 64))
    sweep = table2.Sweep("n", sizes, tuple(table2.METHODS))
    measured = table2.run_table2(silent, [sweep], rounds=1)
    peaks = {(r["method"], r["n"]): r["bytes"] for r in measured.report.raw}
    small, large = (size.n for size in sizes)
    assert (small, large) == (148, 580)
    # Theorem 1 holds at least Quu, n² numbers of 8 bytes; Proposition 2 at least p.
    assert peaks["Theorem 1", large] > 8 * large**2
    assert 8 * large < peaks["Proposition 2", large] < peaks["Theorem 1", large] / 10
    assert peaks["SNOpt", large] > peaks["first-order adjoint", large]
    memory = {row[0]: row for row in measured.report.tables[0].body}
    assert float(memory["Theorem 1"][3]) > 1.5
    assert float(memory["first-order adjoint"][3]) < 1.2
    assert memory["SNOpt"][2] == "–"


def test_snopts_memory_does_not_grow_with_the_depth_once_rows_are_gathered():
    sizes = [table2.Size(4096, depth=depth) for depth in (8, 32, 64)]
    few, more, most = (table2.measure(size, 0, ("SNOpt",))[0]["bytes"] for size in sizes)
    assert few < 24e6
    assert max(more, most) <= 1.01 * few


def test_peak_bytes_counts_what_lives_at_one_time():
    def work() -> None:
        for _ in range(5):
            torch.ones(1000, 1000).sum()

    assert 4_000_000 <= table2.peak_bytes(work) < 8_000_000


@pytest.mark.usefixtures("float64")
def test_the_exact_blocks_are_those_of_the_dense_matrix():
    """A quadratic loss of a model without an ODE: G = (2/D) kron(I, mean z zᵀ), and exact."""
    layer = nn.Linear(3, 2)
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    z = torch.cat([x, torch.ones(5, 1)], 1)
    blocks = factors.exact_blocks(nn.Sequential(layer), lambda: MSELoss()(layer(x), y))
    expected = torch.kron(torch.eye(2), z.mT @ z / 5)
    torch.testing.assert_close(blocks["0"], expected)


@pytest.mark.usefixtures("float64")
def test_distances_are_zero_where_the_factorization_is_exact_and_not_elsewhere():
    exact, other = nn.Linear(3, 2), nn.Linear(2, 2)
    node = neural_ode(nn.Sequential(other, nn.Tanh()), SNOptSensitivity(adjoint="checkpoint"), 1e-6)
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    network = nn.Sequential(exact)
    (row,) = factors.distances(network, lambda: MSELoss()(network(x), y))
    assert row["ggn"] < 1e-12
    assert row["mc"] < 1e-12 or row["mc"] > 1e-3  # one draw a sample
    assert row["empirical"] > 1e-2
    network = nn.Sequential(exact, node, Last())
    rows = factors.distances(network, lambda: MSELoss()(network(x), y))
    assert [row["layer"] for row in rows] == ["0", "field 0"]
    assert all(1e-3 < row["ggn"] < 1.0 for row in rows)
