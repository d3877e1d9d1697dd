"""Where a study lives: a URL, what it permits, and its opening."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import optuna
from optuna.storages import BaseStorage
from optuna.storages.journal import JournalFileBackend, JournalStorage
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from torchdyn_snopt.errors import InvalidInputError, UnsupportedError

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

JOURNAL = "journal:"
FORMS = "sqlite:///FILE, journal:FILE, postgresql://USER:PASSWORD@HOST/DATABASE, mysql://..."
# Workers that start together all create the tables; those that come second try again.
OPENING_ATTEMPTS, OPENING_PAUSE = 5, 1.0


@dataclass(frozen=True)
class StudyStorage:
    """An open storage.

    Attributes:
        url: Where it is, without a password.
        storage: Optuna's object.
    """

    url: str
    storage: BaseStorage


def default_url(folder: Path, *, workers: int) -> str:
    """The storage of a search that names none.

    Args:
        folder: The output folder.
        workers: How many processes will write.

    Returns:
        An SQLite file for one process, a journal file for several.
    """
    if workers > 1 or (folder / "study.journal").exists():
        return f"{JOURNAL}{folder / 'study.journal'}"
    return f"sqlite:///{folder / 'study.db'}"


def open_storage(url: str, *, shared: bool = False) -> StudyStorage:
    """Open a storage, creating files and tables where they are missing.

    Args:
        url: An Optuna storage URL, or ``journal:`` and the path of a journal file.
        shared: Whether several processes are going to write to it at the same time.

    Returns:
        The storage.

    Raises:
        InvalidInputError: The URL cannot be read, or nothing can be opened there.
    """
    if url.startswith(JOURNAL):
        path = Path(url.removeprefix(JOURNAL))
        path.parent.mkdir(parents=True, exist_ok=True)
        lock: Any = _ReleasedOnDeath(path)  # the base class of Optuna's own locks is not public
        backend = JournalFileBackend(str(path), lock_obj=lock)
        return StudyStorage(url, JournalStorage(backend))
    parsed = _parse(url)
    if parsed.get_backend_name() == "sqlite":
        _check_sqlite(parsed, shared)
    full = parsed.render_as_string(hide_password=False)
    shown = parsed.render_as_string(hide_password=True)
    try:
        return StudyStorage(shown, _patiently(lambda: optuna.storages.get_storage(full)))
    except (SQLAlchemyError, ImportError) as error:
        raise InvalidInputError(
            "the storage cannot be opened",
            got=f"{shown}: {str(error).splitlines()[0]}",
            allowed=FORMS,
            do="check that the server runs, that the database exists, and that its driver is "
            "installed (for PostgreSQL: pip install 'psycopg[binary]')",
        ) from error


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise InvalidInputError(
            "the storage is no URL",
            got=f"{url!r}",
            allowed=FORMS,
            do="write it in one of these forms",
        ) from error
    # SQLAlchemy's default driver for PostgreSQL is psycopg2, whose successor this package names.
    if parsed.drivername in {"postgresql", "postgres"}:
        return parsed.set(drivername="postgresql+psycopg")
    return parsed


def _check_sqlite(url: URL, shared: bool) -> None:
    if shared:
        raise UnsupportedError(
            "an SQLite file serves one process only",
            got=url.render_as_string(),
            allowed="journal:FILE for several workers on one machine, postgresql://... for many",
            do="pass --storage journal:FILE: SQLite locks the whole file for every write, so that "
            "workers that report at the same time fail with 'database is locked'",
        )
    if url.database and url.database != ":memory:":
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)


def _patiently(open_it: Callable[[], BaseStorage]) -> BaseStorage:
    for attempt in range(OPENING_ATTEMPTS):
        try:
            return open_it()
        except SQLAlchemyError:
            if attempt == OPENING_ATTEMPTS - 1:
                raise
            time.sleep(OPENING_PAUSE)
    raise AssertionError("unreachable")


class _ReleasedOnDeath:
    """The journal's lock, held by the operating system: a process that is killed releases it.

    Optuna's own locks are files that stay when their process is killed, and are broken by force
    after 30 seconds.
    """

    def __init__(self, path: Path) -> None:
        self._lock = filelock.FileLock(f"{os.fspath(path)}.flock", thread_local=False)

    def acquire(self) -> bool:
        self._lock.acquire()
        return True

    def release(self) -> None:
        self._lock.release()
