"""Data sets on disk: one `.npz` file each, in one of three forms.

A folder of data sets holds ``NAME.npz``, readable without pickle:

- images: ``x_train``, ``x_test`` uint8 ``[samples, height, width(, 3)]``, labels from 0 in
  ``y_train``, ``y_test``;
- series: ``x_train``, ``x_test`` float32 ``[samples, length, channels]``, NaN where a series has
  ended or a value is missing, and labels as above;
- points: ``x_train``, ``x_test`` float32 ``[samples, features]``.

The folder is the one that the caller names, else that of the environment variable
``TORCHDYN_SNOPT_DATA``, else ``torchdyn-snopt`` in the user's cache.
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from torchdyn_snopt.errors import InvalidInputError

Kind = Literal["images", "series", "points"]
Array = NDArray[Any]

ENVIRONMENT_VARIABLE = "TORCHDYN_SNOPT_DATA"

_DIMENSIONS: dict[Kind, tuple[int, ...]] = {"images": (3, 4), "series": (3,), "points": (2,)}
_FORMS: dict[Kind, str] = {
    "images": "uint8 [samples, height, width] or [samples, height, width, 3]",
    "series": "float32 [samples, length, channels]",
    "points": "float32 [samples, features]",
}


@dataclass(frozen=True)
class Arrays:
    """A data set as it lies on disk.

    Attributes:
        x_train: What is trained on, in the form of its kind.
        x_test: What is evaluated.
        y_train: Labels ``[samples]``; None for points.
        y_test: Likewise.
    """

    x_train: Array
    x_test: Array
    y_train: Array | None = None
    y_test: Array | None = None


def data_folder(data_dir: Path | None = None) -> Path:
    """The folder of data sets in force.

    Args:
        data_dir: The folder that the caller names, if any.

    Returns:
        It, or the one of the environment, or the one in the user's cache.
    """
    if data_dir is not None:
        return data_dir
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "torchdyn-snopt"


def load_arrays(name: str, kind: Kind, data_dir: Path | None = None) -> Arrays:
    """Read a data set and check its form.

    Args:
        name: The data set; its file is ``NAME.npz``.
        kind: The form that it has to have.
        data_dir: The folder; see `data_folder`.

    Returns:
        Its arrays.

    Raises:
        InvalidInputError: The file is missing, damaged, or of another form.
    """
    path = data_folder(data_dir) / f"{name}.npz"
    if not path.exists():
        raise InvalidInputError(
            f"the data of {name} are not there",
            got=f"no file {path}",
            allowed=f"a folder with {name}.npz",
            do=f"fetch them with: torchdyn-snopt data {name}; or name a folder that has them with "
            f"--data-dir or {ENVIRONMENT_VARIABLE}",
        )
    found = _read(path)
    wanted = ["x_train", "x_test", *(["y_train", "y_test"] if kind != "points" else [])]
    missing = [key for key in wanted if key not in found]
    if missing:
        _refuse(path, kind, f"no {', '.join(missing)}")
    arrays = Arrays(**{key: found[key] for key in wanted})
    _check(path, kind, arrays)
    return arrays


def _read(path: Path) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InvalidInputError(
            "a file of data cannot be read",
            got=f"{path}: {error}",
            allowed="an .npz file without pickled objects",
            do=f"remove it and fetch it anew with: torchdyn-snopt data {path.stem}",
        ) from error


def _check(path: Path, kind: Kind, arrays: Arrays) -> None:
    for part, x, y in (
        ("train", arrays.x_train, arrays.y_train),
        ("test", arrays.x_test, arrays.y_test),
    ):
        sort = "u" if kind == "images" else "f"
        if x.ndim not in _DIMENSIONS[kind] or x.dtype.kind != sort or not len(x):
            _refuse(path, kind, f"x_{part} {x.dtype} {list(x.shape)}")
        if y is not None and (y.shape != (len(x),) or y.dtype.kind not in "iu" or y.min() < 0):
            _refuse(path, kind, f"y_{part} {y.dtype} {list(y.shape)} for {len(x)} samples")
    if arrays.x_train.shape[-1] != arrays.x_test.shape[-1]:
        _refuse(path, kind, "x_train and x_test with different last dimensions")


def _refuse(path: Path, kind: Kind, got: str) -> NoReturn:
    labels = "" if kind == "points" else "; y_train, y_test: labels from 0, one for each sample"
    raise InvalidInputError(
        f"a file of data has not the form of {kind}",
        got=f"{path}: {got}",
        allowed=f"x_train, x_test: {_FORMS[kind]}{labels}",
        do=f"fetch it anew with: torchdyn-snopt data {path.stem}",
    )
