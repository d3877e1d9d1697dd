"""What the classifiers of time series share: the hybrid model of the paper's Figure 6.

Between two observations a neural ODE moves a hidden state, at each one a gated recurrent unit takes
the observation in, and behind the last one a linear layer classifies (Rubanova et al. 2019; Cho et
al. 2014). Observations are one unit of time apart, the field has four linear layers with tanh in
between, and its hidden state is as wide as in the authors' experiments.

What the recurrent unit reads at an observation, in the order of the columns: the time since the
last observation, for each channel whether it was observed, and the channels' values. That makes the
input dimensions of the paper's Table 3, 1 + 2·channels. Values are standardized by the mean and
deviation of each channel over the training series; a missing one keeps the last value observed.
Series that end early are padded: nothing is observed there, and their hidden state at the last
observation is the one that is classified.

torchdyn's HybridNeuralDE does not serve here: it takes all series as equally long, moves the hidden
state after the last observation, and applies its last layer to every state.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from torchdyn_snopt.experiments.data import Array, load_arrays
from torchdyn_snopt.experiments.tasks.base import Samples, Sensitivity, Splits, neural_ode

TRAIN_SHARE, TEST_SHARE_OF_REST = 0.7, 0.5
DEVIATION_FLOOR = 1e-5


# --- data -----------------------------------------------------------------------------------------


def load_pooled(name: str, data_dir: Path | None = None) -> Splits:
    """The split of the paper's experiments: all series pooled, then 70 % to train, 15 % to test.

    The remaining 15 % are the authors' validation set and are not used. The parts are stratified by
    class and always the same.

    Args:
        name: Of the data set.
        data_dir: The folder with its file.

    Returns:
        Series ``[samples, length, 1 + 2·channels]`` and labels ``[samples]``.
    """
    arrays = load_arrays(name, "series", data_dir)
    x = np.concatenate(_equally_long([arrays.x_train, arrays.x_test]))
    y = np.concatenate([cast(Array, arrays.y_train), cast(Array, arrays.y_test)])
    train_x, rest_x, train_y, rest_y = train_test_split(
        x, y, train_size=TRAIN_SHARE, random_state=0, stratify=y
    )
    _, test_x, _, test_y = train_test_split(
        rest_x, rest_y, test_size=TEST_SHARE_OF_REST, random_state=1, stratify=rest_y
    )
    return _splits(train_x, train_y, test_x, test_y)


def load_official(name: str, data_dir: Path | None = None) -> Splits:
    """The split that the data set comes with.

    Args:
        name: Of the data set.
        data_dir: The folder with its file.

    Returns:
        As `load_pooled`.
    """
    arrays = load_arrays(name, "series", data_dir)
    train_x, test_x = _equally_long([arrays.x_train, arrays.x_test])
    return _splits(train_x, cast(Array, arrays.y_train), test_x, cast(Array, arrays.y_test))


def _equally_long(parts: list[Array]) -> list[Array]:
    length = max(part.shape[1] for part in parts)
    return [
        np.pad(part, ((0, 0), (0, length - part.shape[1]), (0, 0)), constant_values=np.nan)
        for part in parts
    ]


def _splits(train_x: Array, train_y: Array, test_x: Array, test_y: Array) -> Splits:
    mean = np.nanmean(train_x, axis=(0, 1))
    deviation = np.nanstd(train_x, axis=(0, 1)) + DEVIATION_FLOOR

    def samples(x: Array, y: Array) -> Samples:
        values = torch.as_tensor((x - mean) / deviation, dtype=torch.float32)
        return Samples(observations(values), torch.as_tensor(y, dtype=torch.int64))

    return Splits(samples(train_x, train_y), samples(test_x, test_y))


def observations(values: Tensor) -> Tensor:
    """Values with gaps as what the recurrent unit reads.

    Args:
        values: ``[samples, length, channels]``, NaN where there is none.

    Returns:
        ``[samples, length, 1 + 2·channels]``: time since the last observation (0 at the first),
        whether each channel was observed (0 or 1), and the values, gaps filled with the last value
        before them (0 before the first).
    """
    seen = ~values.isnan()
    filled = torch.zeros_like(values)
    since = values.new_zeros(values.shape[:2])
    last, gap = torch.zeros_like(values[:, 0]), torch.zeros_like(since[:, 0])
    begun = torch.zeros_like(seen[:, 0, 0])
    for i in range(values.shape[1]):
        last = torch.where(seen[:, i], values[:, i], last)
        filled[:, i] = last
        gap = torch.where(begun, gap + 1.0, gap)
        since[:, i] = gap
        observed = seen[:, i].any(-1)
        gap = torch.where(observed, 0.0, gap)
        begun |= observed
    return torch.cat([since.unsqueeze(-1), seen.to(values), filled], dim=-1)


# --- model ----------------------------------------------------------------------------------------


class GatedUnit(nn.Module):
    """A gated recurrent unit (Cho et al. 2014) of linear layers.

    The same map as torch's GRUCell, which keeps its weights in no layer that a second-order method
    could see.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        """New weights.

        Args:
            inputs: Width of an observation.
            hidden: Width of the hidden state.
        """
        super().__init__()
        self.gates = nn.Linear(inputs + hidden, 2 * hidden)
        self.from_input = nn.Linear(inputs, hidden)
        self.from_state = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Take an observation in.

        Args:
            x: The observation ``[batch, inputs]``.
            h: The hidden state ``[batch, hidden]``.

        Returns:
            The new hidden state.
        """
        reset, update = self.gates(torch.cat([x, h], dim=1)).sigmoid().chunk(2, dim=1)
        candidate = torch.tanh(self.from_input(x) + reset * self.from_state(h))
        return torch.lerp(candidate, h, update)


class SeriesClassifier(nn.Module):
    """ODE between observations, gated unit at each, linear layer behind the last."""

    def __init__(
        self,
        channels: int,
        hidden: int,
        classes: int,
        sensitivity: Sensitivity = "snopt",
        tolerance: float = 1e-3,
    ) -> None:
        """New weights.

        Args:
            channels: Channels of the series.
            hidden: Width of the hidden state.
            classes: How many there are.
            sensitivity: How the gradient of the ODE is computed.
            tolerance: rtol and atol of every solve.
        """
        super().__init__()
        self.channels, self.hidden = channels, hidden
        field = nn.Sequential(
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
        )
        self.node = neural_ode(field, sensitivity, tolerance)
        self.unit = GatedUnit(1 + 2 * channels, hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify.

        Args:
            x: Series as `observations` makes them, ``[batch, length, 1 + 2·channels]``.

        Returns:
            Logits ``[batch, classes]``.
        """
        observed = x[..., 1 : 1 + self.channels].any(dim=-1)  # [batch, length]
        places = torch.arange(x.shape[1], device=x.device)
        last = torch.where(observed, places, 0).amax(dim=1)
        h = x.new_zeros(len(x), self.hidden)
        states = []
        for i in range(int(last.max()) + 1):
            if i:
                h = self.node(h)[-1]
            h = torch.where(observed[:, i : i + 1], self.unit(x[:, i], h), h)
            states.append(h)
        rows = torch.arange(len(x), device=x.device)
        logits: Tensor = self.head(torch.stack(states)[last, rows])
        return logits
