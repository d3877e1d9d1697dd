"""Which workers still live.

Optuna records heartbeats in relational databases alone, and there only within ``study.optimize``;
a journal file knows none. Here every running trial carries its worker's pulse as a user attribute,
a number that grows by one every few seconds, on every kind of storage. Others take a trial up once
they have watched its pulse stand still for the grace period, each by its own clock: clocks of
different machines need not agree. A worker whose process is known to be gone on this same machine
is given up at once.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

PULSE, WORKER = "pulse", "worker"  # names of user attributes
INTERVAL, GRACE = 5.0, 30.0  # seconds


class Pulse:
    """Beats for a running trial, from a thread of its own, while the block lasts.

    Attributes:
        lost: Whether the trial was taken away: another worker has thought this one dead.
    """

    def __init__(self, storage: BaseStorage, trial_id: int, interval: float = INTERVAL) -> None:
        """A pulse that does not beat yet.

        Args:
            storage: Where the trial is.
            trial_id: Which trial.
            interval: Seconds between beats.
        """
        self._storage, self._trial_id, self._interval = storage, trial_id, interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self.lost = False

    def __enter__(self) -> Pulse:
        self._storage.set_trial_user_attr(self._trial_id, WORKER, this_worker())
        self._storage.set_trial_user_attr(self._trial_id, PULSE, 0)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        beats = 0
        while not self._stop.wait(self._interval):
            beats += 1
            try:
                self._storage.set_trial_user_attr(self._trial_id, PULSE, beats)
            except UpdateFinishedTrialError:
                self.lost = True
                return


class Watch:
    """Watches the pulses of other workers' trials."""

    def __init__(self, grace: float = GRACE, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing seen yet.

        Args:
            grace: Seconds for which a pulse may stand still.
            clock: Seconds from any moment.
        """
        self._grace, self._clock = grace, clock
        self._seen: dict[int, tuple[object, float]] = {}

    def is_dead(self, trial: FrozenTrial) -> bool:
        """Whether the worker of a running trial has died.

        Args:
            trial: As the storage has it now.

        Returns:
            True if its process is gone from this machine, or its pulse has stood still too long.
        """
        worker = trial.user_attrs.get(WORKER)
        if isinstance(worker, str) and _is_gone(worker):
            return True
        pulse, now = (worker, trial.user_attrs.get(PULSE)), self._clock()
        if self._seen.get(trial._trial_id, (None, 0.0))[0] != pulse:
            self._seen[trial._trial_id] = (pulse, now)
        return now - self._seen[trial._trial_id][1] > self._grace


def this_worker() -> str:
    """This process, by machine, boot, namespace of process numbers, and number.

    Returns:
        Fields parted by bars.
    """
    return "|".join([*_place(), str(os.getpid())])


def _place() -> list[str]:
    """What two workers must share for the one to know of the other's process."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    return [
        socket.gethostname(),
        boot.read_text(encoding="ascii").strip() if boot.exists() else "",
        os.readlink(namespace) if namespace.is_symlink() else "",
    ]


def _is_gone(worker: str) -> bool:
    *place, number = worker.split("|")
    if place != _place() or not number.isdecimal():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _is_zombie(int(number))


def _is_zombie(number: int) -> bool:
    """Whether a process has ended and only waits for its parent to take note."""
    stat = Path(f"/proc/{number}/stat")
    try:
        return stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] in {"Z", "X"}
    except OSError:  # no such file on this system, or no longer
        return False
