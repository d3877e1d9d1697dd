"""The task `mnist`, on a data set of the right form and of wrong ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchdyn_snopt.errors import InvalidInputError
from torchdyn_snopt.experiments.tasks import get_task


def write(folder, **changes):
    generator = np.random.default_rng(0)
    arrays = {
        "x_train": generator.integers(0, 256, (6, 28, 28), dtype=np.uint8),
        "y_train": np.arange(6),
        "x_test": generator.integers(0, 256, (3, 28, 28), dtype=np.uint8),
        "y_test": np.arange(3),
    }
    arrays = {name: value for name, value in {**arrays, **changes}.items() if value is not None}
    np.savez(folder / "mnist.npz", **arrays)


@pytest.mark.parametrize("by_variable", [False, True])
def test_images_are_read_and_classified(tmp_path, monkeypatch, by_variable):
    write(tmp_path)
    if by_variable:
        monkeypatch.setenv("TORCHDYN_SNOPT_DATA", str(tmp_path))
    task = get_task("mnist")
    splits = task.load(None if by_variable else tmp_path)
    assert splits.train.x.shape == (6, 1, 28, 28)
    assert splits.test.y.tolist() == [0, 1, 2]
    logits = task.build_model("snopt", task.tolerance)(splits.train.x)
    assert logits.shape == (6, 10)
    task.loss(logits, splits.train.y).backward()


@pytest.mark.parametrize("missing", ["folder", "file", "array", "form", "damage"])
def test_what_is_missing_is_named(tmp_path, monkeypatch, missing):
    monkeypatch.delenv("TORCHDYN_SNOPT_DATA", raising=False)
    if missing == "array":
        write(tmp_path, y_test=None)
    if missing == "form":
        write(tmp_path, x_train=torch.rand(6, 28, 28).numpy())
    if missing == "damage":
        (tmp_path / "mnist.npz").write_bytes(b"not an archive")
    with pytest.raises(InvalidInputError, match="mnist"):
        get_task("mnist").load(None if missing == "folder" else tmp_path)
