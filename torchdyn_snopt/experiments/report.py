"""The table and the pictures of an output folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torchdyn_snopt.experiments.curves import read_runs
from torchdyn_snopt.experiments.figures import draw_figures
from torchdyn_snopt.experiments.storage import replacing, write_text
from torchdyn_snopt.experiments.tables import SummaryTable, summarize


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        table: The summary over all runs of the folder.
        files: Table and picture files.
    """

    table: SummaryTable
    files: list[Path]


def write_report(out: Path) -> Report:
    """Read all runs of a folder and write ``table.md``, ``table.csv`` and the PNGs beside them.

    Args:
        out: The output folder.

    Returns:
        The summary, and what was written.
    """
    runs = [run for run in read_runs(out) if len(run.steps.get("iteration", ()))]
    table = summarize(runs)
    files = [out / "table.md", out / "table.csv"]
    write_text(files[0], table.markdown())
    write_text(files[1], table.csv())
    for name, figure in draw_figures(runs).items():
        files.append(out / f"{name}.png")
        with replacing(files[-1]) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
    return Report(table, files)
