"""The table of tasks: what can be trained by name."""

from __future__ import annotations

from torchdyn_snopt.errors import InvalidInputError
from torchdyn_snopt.experiments.tasks import (
    articulary_word,
    character_trajectories,
    cifar10,
    circle,
    digits,
    gas,
    japanese_vowels,
    miniboone,
    mnist,
    moons,
    spiral,
    spoken_arabic_digits,
    svhn,
)
from torchdyn_snopt.experiments.tasks.base import ACCURACY, Metric, Samples, Splits, Task

__all__ = ["ACCURACY", "TASKS", "Metric", "Samples", "Splits", "Task", "get_task"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        digits.TASK,
        moons.TASK,
        japanese_vowels.TASK,
        spiral.TASK,
        circle.TASK,
        mnist.TASK,
        svhn.TASK,
        cifar10.TASK,
        spoken_arabic_digits.TASK,
        articulary_word.TASK,
        character_trajectories.TASK,
        gas.TASK,
        miniboone.TASK,
    )
}


def get_task(name: str) -> Task:
    """Look a task up.

    Args:
        name: Its name in `TASKS`.

    Returns:
        The task.

    Raises:
        InvalidInputError: There is none of that name.
    """
    if name not in TASKS:
        raise InvalidInputError(
            "there is no such task",
            got=f"{name!r}",
            allowed=", ".join(TASKS),
            do="choose one of these names",
        )
    return TASKS[name]
