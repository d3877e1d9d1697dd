"""Autocast around a field: what was in force when the solve began holds in its backward pass too.

Frameworks leave their autocast region before the backward pass, in which the field is evaluated
again. The state itself stays in at least float32 under autocast: its error is what the step size is
chosen by. Casts of weights are not cached, since a cache filled without gradients (in the forward
solve) would cut the graph of the backward one.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_DEVICES = ("cpu", "cuda")
_LOW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Precision:
    """Autocast as it was at one moment.

    Attributes:
        dtypes: the dtype for each kind of device for which it was on.
    """

    dtypes: tuple[tuple[str, torch.dtype], ...] = ()

    @classmethod
    def current(cls) -> Precision:
        """What is in force now.

        Returns:
            It.
        """
        found = [(d, torch.get_autocast_dtype(d)) for d in _DEVICES if torch.is_autocast_enabled(d)]
        return cls(tuple(found))

    @property
    def is_plain(self) -> bool:
        """Whether neither then nor now anything is cast."""
        return not self.dtypes and not any(map(torch.is_autocast_enabled, _DEVICES))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Bring it back for the duration of the block.

        Yields:
            Nothing.
        """
        wanted = dict(self.dtypes)
        with ExitStack() as stack:
            for device in _DEVICES:
                if device in wanted:
                    cast = torch.autocast(device, wanted[device], cache_enabled=False)
                    stack.enter_context(cast)
                elif torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield

    def state(self, x: Tensor) -> Tensor:
        """The first state in the dtype that the solve runs in.

        Args:
            x: it.

        Returns:
            In float32 where autocast has narrowed it.
        """
        return x.float() if self.dtypes and x.dtype in _LOW else x
