"""How a search shows its course: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from torchdyn_snopt.search import Ending, Observer, SearchSettings
from torchdyn_snopt.search import Progress as Epoch
from torchdyn_snopt.search.plan import Place


def search_display(
    console: Console,
) -> Callable[[SearchSettings], AbstractContextManager[Observer]]:
    """The display that suits a console.

    Args:
        console: Where to show it.

    Returns:
        From the settings of a search to an observer within a block.
    """

    @contextmanager
    def display(settings: SearchSettings) -> Iterator[Observer]:
        if not console.is_terminal:
            yield _Lines(console, settings)
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console) as bars:
            yield _Bars(bars, console, settings)

    return display


def _figures(epoch: Epoch, settings: SearchSettings) -> str:
    objective = epoch.error + settings.nfe_weight * epoch.nfe
    return f"error {100 * epoch.error:.2f} %  NFE {epoch.nfe:g}  t1 {epoch.t1:.3f}  " + (
        f"objective {objective:.4f}"
    )


class _Lines:
    """A line for every trial."""

    def __init__(self, console: Console, settings: SearchSettings) -> None:
        self._console, self._settings = console, settings
        self._head, self._figures = "", ""

    def planned(self, ended: int, total: int) -> None:
        self._head = f"[{ended + 1}/{total}]"

    def began(self, place: Place) -> None:
        self._figures = ""

    def progressed(self, place: Place, progress: Epoch) -> None:
        self._figures = _figures(progress, self._settings)

    def ended(self, place: Place, ending: Ending) -> None:
        self._console.print(_line(self._head, place, ending, self._figures), soft_wrap=True)


class _Bars:
    """A bar for the search and one for the epochs of the trial in hand."""

    def __init__(self, bars: Progress, console: Console, settings: SearchSettings) -> None:
        self._bars, self._console, self._settings = bars, console, settings
        self._all = bars.add_task("trials", total=None, figures="")
        self._one = bars.add_task("", total=settings.epochs, figures="", visible=False)
        self._figures = ""

    def planned(self, ended: int, total: int) -> None:
        self._bars.update(self._all, completed=ended, total=total)

    def began(self, place: Place) -> None:
        self._figures = ""
        self._bars.reset(self._one, description=place.title, visible=True, figures="")

    def progressed(self, place: Place, progress: Epoch) -> None:
        self._figures = _figures(progress, self._settings)
        self._bars.update(self._one, completed=progress.epoch, figures=self._figures)

    def ended(self, place: Place, ending: Ending) -> None:
        self._bars.update(self._one, visible=False)
        self._console.print(_line("", place, ending, self._figures), soft_wrap=True)


def _line(head: str, place: Place, ending: Ending, figures: str) -> str:
    reason = f"  ({ending.reason})" if ending.reason else ""
    return f"{head} {place.title}: {ending.state}  {figures}{reason}".strip()
