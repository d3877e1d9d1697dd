"""Data sets that do not come with a library: one ``NAME.npz`` each, in a folder of the user's.

The form: ``x_train, y_train, x_test, y_test``, first dimension samples, labels from 0, images as
uint8 ``[samples, height, width]`` or ``[samples, height, width, channels]``; nothing pickled.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np

from torchdyn_snopt.errors import InvalidInputError

VARIABLE = "TORCHDYN_SNOPT_DATA"
PARTS = ("x_train", "y_train", "x_test", "y_test")


def load_arrays(name: str, data_dir: Path | None = None) -> dict[str, np.ndarray]:
    """Read a data set.

    Args:
        name: Of the data set, as of its file.
        data_dir: The folder; the environment variable TORCHDYN_SNOPT_DATA names it if None.

    Returns:
        The four arrays by name.

    Raises:
        InvalidInputError: No folder, no such file, or a file of another form.
    """
    path = _folder(name, data_dir) / f"{name}.npz"
    if not path.is_file():
        raise InvalidInputError(
            f"the data set {name} is not in the data folder",
            got=f"no file {path}",
            allowed=f"an .npz file with {', '.join(PARTS)}",
            do="put it there, or choose another folder with --data-dir",
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {part: file[part] for part in PARTS}
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InvalidInputError(
            f"the data set {name} cannot be read",
            got=f"{path}: {error}",
            allowed=f"an .npz file with {', '.join(PARTS)}, nothing pickled",
            do="write it anew with numpy.savez",
        ) from error
    return arrays


def _folder(name: str, data_dir: Path | None) -> Path:
    named = os.environ.get(VARIABLE)
    if data_dir is None and not named:
        raise InvalidInputError(
            f"the data set {name} has to be read from a folder",
            got="no folder",
            allowed=f"a folder with {name}.npz",
            do=f"name it with --data-dir or with the environment variable {VARIABLE}",
        )
    return data_dir or Path(str(named))
