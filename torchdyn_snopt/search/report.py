"""The report of a comparison: Markdown, CSV, pictures, and the same on the dashboard."""

from __future__ import annotations

import csv
import importlib.util
import os
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.artifacts import FileSystemArtifactStore

from torchdyn_snopt.search.arms import get_arm
from torchdyn_snopt.search.figures import plot_comparison
from torchdyn_snopt.search.results import ArmTable, Comparison, TrialRecord, arm_table

if TYPE_CHECKING:
    from torchdyn_snopt.search.compare import HorizonSearch

REPORT, TABLE = "report.md", "trials.csv"
PICTURE = "comparison.png"
SHOWN = "report shown"  # a study's user attribute: what its page was last written from


def write_report(comparison: Comparison, out: Path) -> list[Path]:
    """Write the report, the table of trials, and the pictures.

    Args:
        comparison: As far as it has come.
        out: Where to.

    Returns:
        The files.
    """
    files = [out / REPORT, out / TABLE]
    pictures = []
    for name, figure in plot_comparison(comparison).items():
        pictures.append(out / f"{name}.png")
        with _replacing(pictures[-1]) as path:
            figure.savefig(path, format="png", dpi=110)
    with _replacing(files[0]) as path:
        Path(path).write_text(markdown(comparison, pictures), encoding="utf-8")
    with _replacing(files[1]) as path:
        _write_csv(Path(path), comparison.rows())
    return [*files, *pictures]


def markdown(comparison: Comparison, pictures: list[Path]) -> str:
    """The report's text.

    Args:
        comparison: As far as it has come.
        pictures: Files beside it.

    Returns:
        Markdown.
    """
    table = arm_table(comparison)
    settings = comparison.settings
    lines = [
        f"# {table.title}",
        "",
        table.markdown(),
        f"{settings.epochs} epochs a run; searches propose t1 in [{settings.low:g}, "
        f"{settings.high:g}] with {settings.trials} trials a seed; where t1 moves, it starts at "
        f"{settings.t1:g} with penalty {settings.penalty:g}/2·t1².",
        "",
    ]
    lines += [f"![{path.stem}]({path.name})\n" for path in pictures if path.name == PICTURE]
    ended = [r for r in comparison.records if r.reason is not None]
    if ended:
        lines += ["## Trials that were not completed", ""]
        lines += [f"- {r.place.title}: {r.state}: {r.reason}" for r in ended]
        lines.append("")
    return "\n".join(lines)


def show_on_dashboard(search: HorizonSearch[Any], comparison: Comparison, out: Path) -> None:
    """Put report and pictures where optuna-dashboard shows them: artifacts and the study's note.

    Args:
        search: Whose studies.
        comparison: What they hold.
        out: Where the report was written.
    """
    table = arm_table(comparison)
    state = zlib.crc32(repr([(r.number, r.state) for r in comparison.records]).encode())
    for size in search.studies:
        study = search.load(size)
        if study.user_attrs.get(SHOWN) == state:
            continue
        picture = _upload_picture(study, search.artifacts, out / PICTURE)
        _save_note(study, table, _best(comparison, size), picture)
        study.set_user_attr(SHOWN, state)
        _name_values(study, search.settings.tradeoff)


def _name_values(study: optuna.Study, cost: str) -> None:
    single = len(study.directions) == 1
    with warnings.catch_warnings():  # Optuna calls the names of values experimental
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(["error + weight·NFE"] if single else ["validation error", cost])


def _best(comparison: Comparison, size: int) -> TrialRecord | None:
    known = [
        r
        for r in comparison.records
        if r.objective is not None and get_arm(r.place.arm).objectives == size
    ]
    return min(known, key=lambda r: r.objective or 0.0, default=None)


def _upload_picture(study: optuna.Study, store: FileSystemArtifactStore, path: Path) -> str | None:
    if not path.exists():
        return None
    uploaded: str = optuna.artifacts.upload_artifact(
        artifact_store=store, study_or_trial=study, file_path=str(path)
    )
    return uploaded


def _save_note(
    study: optuna.Study, table: ArmTable, best: TrialRecord | None, picture: str | None
) -> None:
    """The page's note; without the extra `dashboard` there is no page to write for."""
    if importlib.util.find_spec("optuna_dashboard") is None:
        return
    from optuna_dashboard import save_note
    from optuna_dashboard.artifact import get_artifact_path

    lines = [f"# {table.title}", ""]
    if best is not None:
        lines += [
            f"Best t1: **{best.final('t1'):.3f}** ({best.place.title}, trial {best.number}; "
            f"objective {best.objective:.4f}).",
            "",
        ]
    lines.append(table.markdown())
    if picture is not None:
        lines.append(f"![comparison]({get_artifact_path(study, picture)})")
    save_note(study, "\n".join(lines))


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    head = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, head)
        writer.writeheader()
        writer.writerows(rows)


class _replacing:
    """A file that is put in place only when it is complete."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> str:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle, self._temporary = tempfile.mkstemp(dir=self._path.parent, prefix=".")
        os.close(handle)
        return self._temporary

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            Path(self._temporary).chmod(0o644)
            Path(self._temporary).replace(self._path)
        else:
            Path(self._temporary).unlink()
