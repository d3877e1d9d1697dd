"""The log of a run: one JSON object a line, complete after every line.

Each record has a ``kind``: ``header`` (once, first: configuration and environment), ``step`` (one
training iteration), ``epoch`` (an evaluation), ``end`` (how the run ended, and why).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torchdyn_snopt.errors import InvalidInputError

Record = dict[str, Any]


class RunLog:
    """Appends records to a file; a context manager that closes it."""

    def __init__(self, path: Path, *, keep_bytes: int = 0) -> None:
        """Open the log, dropping what lies beyond a known length.

        Args:
            path: The file; created if it is not there.
            keep_bytes: How much of an existing file to keep, a value that `size` had.

        Raises:
            InvalidInputError: The file is shorter than that.
        """
        self.path = path
        present = path.stat().st_size if path.exists() else 0
        if present < keep_bytes:
            raise InvalidInputError(
                "the log does not belong to the checkpoint beside it",
                got=f"{path} of {present} bytes",
                allowed=f"at least {keep_bytes} bytes, as when the checkpoint was written",
                do="put the log back, or start the run anew in another folder",
            )
        self._file = path.open("ab")
        self._file.truncate(keep_bytes)

    @property
    def size(self) -> int:
        """Length of the file in bytes; everything written so far is in it."""
        return self._file.tell()

    def write(self, kind: str, **fields: Any) -> Record:
        """Append one record and hand it to the operating system.

        Args:
            kind: Its kind.
            **fields: Its other fields; numbers that are not finite are written as null.

        Returns:
            The record.
        """
        record: Record = {"kind": kind, **fields}
        line = json.dumps(_finite(record), allow_nan=False, ensure_ascii=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        return record

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


class SilentLog(RunLog):
    """The log of a process that leaves writing to another one."""

    def __init__(self) -> None:
        """No file."""

    @property
    def size(self) -> int:
        """Nothing is written."""
        return 0

    def write(self, kind: str, **fields: Any) -> Record:
        """Make the record.

        Args:
            kind: Its kind.
            **fields: Its other fields.

        Returns:
            It.
        """
        return {"kind": kind, **fields}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """There is nothing to close."""


def read_log(path: Path) -> Iterator[Record]:
    """The records of a log; a last line that was cut off in writing is left out.

    Any other line that is not a JSON object with a kind is an `InvalidInputError`.

    Args:
        path: The file.

    Yields:
        One record after the other.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            yield _parse(line, path, number)


def _parse(line: bytes, path: Path, number: int) -> Record:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or "kind" not in record:
        raise InvalidInputError(
            "a line of a log cannot be read",
            got=f"{path}, line {number}: {line[:80]!r}",
            allowed="one JSON object with a 'kind' on every line",
            do="remove the damaged line or the folder of that run",
        )
    return record


def _finite(value: Any) -> Any:
    """The value with null in place of NaN and infinities, which JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
