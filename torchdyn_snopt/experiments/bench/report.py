"""What a benchmark hands back: tables to read, and the raw measurements."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchdyn_snopt.experiments.storage import write_text


@dataclass(frozen=True)
class BenchTable:
    """A table of text.

    Attributes:
        title: What was measured.
        head: The titles of the columns.
        body: The rows.
    """

    title: str
    head: list[str]
    body: list[list[str]]


@dataclass(frozen=True)
class BenchReport:
    """The outcome of a benchmark.

    Attributes:
        kind: Its name on the command line.
        tables: What to show.
        note: How to read them.
        environment: Machine and versions.
        raw: Every measurement, as plain values.
    """

    kind: str
    tables: list[BenchTable]
    note: str
    environment: dict[str, Any]
    raw: list[dict[str, Any]]

    def write(self, path: Path) -> None:
        """Write the raw measurements with the environment.

        Args:
            path: A JSON file; its folder is created if need be.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "benchmark": self.kind,
            "note": self.note,
            "environment": self.environment,
            "measurements": self.raw,
        }
        write_text(path, json.dumps(content, indent=2) + "\n")
