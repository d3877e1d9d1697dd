"""What `mnist`, `svhn` and `cifar10` share: the paper's image classifier (Section 4).

Three convolutions extract features (28x28 pixels to 6x6, 32x32 to 7x7), a neural ODE of two 3x3
convolutions with t concatenated transforms them over t in [0, 1], average pooling and a linear
layer classify. Between the convolutions of the field stands tanh: a smooth field takes a solver
fewer steps than the ReLU of the authors. As in their experiments, all pixels are
normalized by the mean and the deviation of MNIST, and batches hold 128 images.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from torchdyn_snopt.experiments.data import Array, load_arrays
from torchdyn_snopt.experiments.tasks.base import (
    Last,
    Samples,
    Sensitivity,
    Splits,
    convolutional_field,
    neural_ode,
)

CLASSES = 10
CHANNELS = 64
PIXEL_MEAN, PIXEL_DEVIATION = 0.1307, 0.3081
BATCH_SIZE = 128


class Standardize(nn.Module):
    """Pixels as numbers of mean 0 and deviation 1, for MNIST.

    The first layer of the model, so that a data set is held as bytes.
    """

    def forward(self, pixels: Tensor) -> Tensor:
        """From uint8 to the default floating-point type.

        Args:
            pixels: ``[batch, channels, height, width]``.

        Returns:
            The same shape.
        """
        scaled = pixels.to(torch.get_default_dtype()).div_(255)
        return scaled.sub_(PIXEL_MEAN).div_(PIXEL_DEVIATION)


def load(name: str, data_dir: Path | None = None) -> Splits:
    """The official splits of an image data set.

    Args:
        name: Of the data set.
        data_dir: The folder with its file.

    Returns:
        Images uint8 ``[samples, channels, height, width]`` and labels ``[samples]``.
    """
    arrays = load_arrays(name, "images", data_dir)
    return Splits(_samples(arrays.x_train, arrays.y_train), _samples(arrays.x_test, arrays.y_test))


def _samples(pixels: Array, labels: Array | None) -> Samples:
    x = torch.as_tensor(pixels)
    x = x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()
    return Samples(x, torch.as_tensor(labels).long())


def classifier(
    colours: int, sensitivity: Sensitivity = "snopt", tolerance: float = 1e-3
) -> nn.Module:
    """Images ``[batch, colours, height, width]`` to logits ``[batch, 10]``.

    Args:
        colours: 1 for grey images, 3 for coloured ones.
        sensitivity: How the gradient of the ODE is computed.
        tolerance: rtol and atol of every solve.

    Returns:
        A new model.
    """
    field = convolutional_field(CHANNELS)
    return nn.Sequential(
        Standardize(),
        nn.Conv2d(colours, CHANNELS, 3),
        nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS, 4, stride=2, padding=1),
        neural_ode(field, sensitivity, tolerance),
        Last(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(CHANNELS, CLASSES),
    )
