"""Data sets of the right form and a few samples, made up."""

from __future__ import annotations

from pathlib import Path

import numpy as np

IMAGES = {"mnist": (28, 28), "svhn": (32, 32, 3), "cifar10": (32, 32, 3)}
SERIES = {
    "spoken-arabic-digits": (93, 13, 10),
    "articulary-word": (144, 9, 25),
    "character-trajectories": (182, 3, 20),
    "japanese-vowels": (29, 12, 9),
}
POINTS = {"gas": 8, "miniboone": 43}
NAMES = (*IMAGES, *SERIES, *POINTS)


def write_images(folder: Path, name: str, train: int = 6, test: int = 4) -> None:
    rng = np.random.default_rng(0)
    parts = {}
    for part, number in (("train", train), ("test", test)):
        parts[f"x_{part}"] = rng.integers(0, 256, (number, *IMAGES[name]), dtype=np.uint8)
        parts[f"y_{part}"] = rng.integers(0, 10, number, dtype=np.uint8)
    np.savez(folder / f"{name}.npz", **parts)


def write_series(
    folder: Path, name: str, each: int = 10, length: int = 5, classes: int = 2
) -> None:
    """Short series, so that a step takes a moment; the second half of them ends early."""
    _, channels, _ = SERIES[name]
    rng = np.random.default_rng(0)
    parts = {}
    for part in ("train", "test"):
        x = rng.standard_normal((each, length, channels)).astype(np.float32)
        x[each // 2 :, length - 2 :] = np.nan
        parts[f"x_{part}"] = x
        parts[f"y_{part}"] = np.arange(each) % classes
    np.savez(folder / f"{name}.npz", **parts)


def write_points(folder: Path, name: str, train: int = 8, test: int = 4) -> None:
    rng = np.random.default_rng(0)
    parts = {
        f"x_{part}": rng.standard_normal((number, POINTS[name])).astype(np.float32)
        for part, number in (("train", train), ("test", test))
    }
    np.savez(folder / f"{name}.npz", **parts)


def write(folder: Path, name: str) -> None:
    """Any data set."""
    if name in IMAGES:
        write_images(folder, name)
    elif name in SERIES:
        write_series(folder, name)
    else:
        write_points(folder, name)
