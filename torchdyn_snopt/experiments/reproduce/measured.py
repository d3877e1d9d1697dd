"""A reproduction that is measured rather than trained: tables, raw figures, one picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from torchdyn_snopt.experiments.bench.report import BenchReport, BenchTable
from torchdyn_snopt.experiments.storage import replacing, write_text

DPI = 150


@dataclass(frozen=True)
class Measured:
    """What a measurement hands back.

    Attributes:
        report: Tables, a note on how to read them, and every figure.
        figure: The picture.
    """

    report: BenchReport
    figure: Figure

    def write(self, out: Path) -> list[Path]:
        """Write NAME.md, NAME.json and NAME.png.

        Args:
            out: A folder, created if need be.

        Returns:
            The files.
        """
        out.mkdir(parents=True, exist_ok=True)
        text, raw, picture = (out / f"{self.report.kind}.{end}" for end in ("md", "json", "png"))
        write_text(text, "\n\n".join([*map(markdown, self.report.tables), self.report.note]) + "\n")
        self.report.write(raw)
        with replacing(picture) as temporary:
            self.figure.savefig(temporary, dpi=DPI, format="png")
        return [text, raw, picture]


def markdown(table: BenchTable) -> str:
    """A table in Markdown.

    Args:
        table: It.

    Returns:
        Heading and rows.
    """
    lines = ["| " + " | ".join(cells) + " |" for cells in (table.head, *table.body)]
    rule = "|---" + "|---:" * (len(table.head) - 1) + "|"
    return "\n".join([f"## {table.title}", "", lines[0], rule, *lines[1:]])
