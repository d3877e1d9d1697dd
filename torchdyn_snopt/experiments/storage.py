"""Files of a run that must never be half-written, and the lock on an output folder."""

from __future__ import annotations

import os
import pickle
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import filelock
import numpy as np
import torch

from torchdyn_snopt.errors import InvalidInputError

LOCK_NAME = ".lock"
HOLDER_NAME = ".lock-holder"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name, and put it in place only when it is complete.

    Args:
        path: The file to create or replace.

    Yields:
        The temporary path in the same folder; it is removed if the block fails.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _flush_to_disk(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one go.

    Args:
        path: The file.
        text: Its new content.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Replace a checkpoint in one go.

    Args:
        path: The file.
        content: State dictionaries, tensors and plain values.
    """
    with replacing(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint without executing anything in it.

    Args:
        path: The file.
        device: Where its tensors go.

    Returns:
        The content.

    Raises:
        InvalidInputError: The file is no checkpoint, is damaged, or holds more than plain data.
    """
    try:
        return cast(dict[str, Any], torch.load(path, map_location=device, weights_only=True))
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise InvalidInputError(
            "a checkpoint cannot be read",
            got=f"{path}: {str(error).splitlines()[0]}",
            allowed="a file written by the same command",
            do="remove that run's folder and start it anew",
        ) from error


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every random generator that training may draw from.

    Args:
        device: The device that is trained on.

    Returns:
        Plain values and tensors.
    """
    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))  # noqa: NPY002
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put the generators back to where `random_state` found them.

    Args:
        state: What `random_state` returned.
        device: The device that is trained on.
    """
    torch.set_rng_state(state["torch"].cpu())
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone; it is created if it is not there.

    The operating system releases the lock when its process ends, however it ends, so a lock never
    outlives its holder.

    Args:
        folder: The folder.

    Yields:
        Nothing; the folder is held during the block.

    Raises:
        InvalidInputError: Another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / HOLDER_NAME
    lock = filelock.FileLock(folder / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise InvalidInputError(
            "another run is writing into this folder",
            got=f"{folder}, held by process {_read_holder(holder)}",
            allowed="one run for each folder at a time",
            do="wait for it, stop it, or choose another folder with --out",
        ) from error
    try:
        write_text(holder, str(os.getpid()))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _read_holder(holder: Path) -> str:
    try:
        return holder.read_text(encoding="utf-8")
    except FileNotFoundError:  # it holds the lock and is about to say who it is
        return "unknown"


def _flush_to_disk(path: Path) -> None:
    """Make sure that a crash right after the rename cannot leave an empty file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
