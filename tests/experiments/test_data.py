from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.experiments import made_up_data
from torchdyn_snopt.errors import InvalidInputError
from torchdyn_snopt.experiments.data import data_folder, load_arrays
from torchdyn_snopt.experiments.tasks import flows, images, series


def test_the_folder_is_the_named_one_then_that_of_the_environment_then_the_cache(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCHDYN_SNOPT_DATA", str(tmp_path / "environment"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_folder(tmp_path / "named") == tmp_path / "named"
    assert data_folder() == tmp_path / "environment"
    monkeypatch.delenv("TORCHDYN_SNOPT_DATA")
    assert data_folder() == tmp_path / "cache" / "torchdyn-snopt"


def test_missing_data_are_answered_with_how_to_get_them(tmp_path):
    with pytest.raises(
        InvalidInputError, match=r"(?s)mnist\.npz.*torchdyn-snopt data mnist.*--data-dir"
    ):
        load_arrays("mnist", "images", tmp_path)


@pytest.mark.parametrize(
    ("kind", "arrays", "got"),
    [
        ("images", {"x_test": np.zeros((2, 4, 4), np.uint8)}, "no x_train, y_train, y_test"),
        (
            "images",
            {"x": np.zeros((2, 4, 4), np.float32), "y": np.zeros(2, int)},
            r"x_train float32 \[2, 4, 4\]",
        ),
        (
            "series",
            {"x": np.zeros((3, 4, 4), np.float32), "y": np.zeros(2, int)},
            r"y_train int64 \[2\] for 3 samples",
        ),
        (
            "series",
            {"x": np.zeros((2, 4, 4), np.float32), "y": np.array([0, -1])},
            r"y_train int64 \[2\]",
        ),
        ("points", {"x": np.zeros((0, 4), np.float32)}, r"x_train float32 \[0, 4\]"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, kind, arrays, got):
    doubled = {f"{k}_{part}": a for k, a in arrays.items() for part in ("train", "test")}
    np.savez(tmp_path / "some.npz", **(arrays if "x_test" in arrays else doubled))
    with pytest.raises(InvalidInputError, match=got):
        load_arrays("some", kind, tmp_path)


def test_parts_that_do_not_match_are_refused(tmp_path):
    np.savez(tmp_path / "some.npz", x_train=np.zeros((2, 3), "f4"), x_test=np.zeros((2, 4), "f4"))
    with pytest.raises(InvalidInputError, match="different last dimensions"):
        load_arrays("some", "points", tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK no archive", b"\x93NUMPY"])
def test_a_damaged_file_is_answered_with_what_to_do(tmp_path, content):
    (tmp_path / "mnist.npz").write_bytes(content)
    with pytest.raises(InvalidInputError, match=r"(?s)cannot be read.*fetch it anew"):
        load_arrays("mnist", "images", tmp_path)


def test_pickled_objects_are_not_loaded(tmp_path):
    np.savez(tmp_path / "some.npz", x_train=np.array([{}]), x_test=np.array([{}]))
    with pytest.raises(InvalidInputError, match="cannot be read"):
        load_arrays("some", "points", tmp_path)


def test_images_stay_bytes_and_the_model_standardizes_them(tmp_path):
    made_up_data.write_images(tmp_path, "cifar10")
    x = images.load("cifar10", tmp_path).train.x
    pixels = np.load(tmp_path / "cifar10.npz")["x_train"]
    assert x.dtype == torch.uint8
    assert np.array_equal(x.numpy()[1, 2], pixels[1, :, :, 2])
    standard = images.Standardize()(x)
    expected = (pixels[1, :, :, 2].astype(np.float64) / 255 - 0.1307) / 0.3081
    assert np.allclose(standard[1, 2].numpy(), expected, atol=1e-6)


def test_observations_hold_time_since_the_last_one_flags_and_values_carried_forward():
    nan = float("nan")
    values = torch.tensor([[[nan, nan], [1.0, 2.0], [nan, nan], [nan, 5.0], [nan, nan]]])
    since, seen, filled = series.observations(values).split([1, 2, 2], dim=-1)
    # At 3 the last observation was at 1; nothing has been observed before 1.
    assert since.flatten().tolist() == [0.0, 0.0, 1.0, 2.0, 1.0]
    assert seen.tolist() == [[[0, 0], [1, 1], [0, 0], [0, 1], [0, 0]]]
    assert filled.tolist() == [[[0, 0], [1, 2], [1, 2], [1, 5], [1, 5]]]


def test_series_are_standardized_by_the_training_part_alone(tmp_path):
    made_up_data.write_series(tmp_path, "japanese-vowels")
    raw = np.load(tmp_path / "japanese-vowels.npz")
    splits = series.load_official("japanese-vowels", tmp_path)
    mean, deviation = (f(raw["x_train"], axis=(0, 1)) for f in (np.nanmean, np.nanstd))
    expected = (raw["x_test"][0, 0] - mean) / (deviation + 1e-5)
    assert np.allclose(splits.test.x[0, 0, 13:].numpy(), expected, atol=1e-6)


def test_pooled_series_are_split_70_to_15_stratified_and_always_alike(tmp_path):
    made_up_data.write_series(tmp_path, "articulary-word", each=100, classes=5)
    splits = series.load_pooled("articulary-word", tmp_path)
    assert (len(splits.train), len(splits.test)) == (140, 30)
    assert torch.bincount(splits.test.y).tolist() == [6] * 5
    assert torch.equal(series.load_pooled("articulary-word", tmp_path).test.x, splits.test.x)
    train = {row.numpy().tobytes() for row in splits.train.x}
    assert not any(row.numpy().tobytes() in train for row in splits.test.x)


def test_parts_of_different_lengths_are_padded_alike(tmp_path):
    made_up_data.write_series(tmp_path, "japanese-vowels", length=6)
    arrays = dict(np.load(tmp_path / "japanese-vowels.npz"))
    arrays["x_train"] = arrays["x_train"][:, :4]
    np.savez(tmp_path / "japanese-vowels.npz", **arrays)
    splits = series.load_official("japanese-vowels", tmp_path)
    assert splits.train.x.shape == splits.test.x.shape == (10, 6, 25)
    assert not splits.train.x[:, 4:, 1:13].any()


def test_points_are_their_own_targets(tmp_path):
    made_up_data.write_points(tmp_path, "gas")
    splits = flows.load("gas", tmp_path)
    assert splits.train.x.shape == (8, 8)
    assert splits.train.y is splits.train.x
