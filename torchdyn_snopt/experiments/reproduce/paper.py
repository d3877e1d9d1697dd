"""The figures that the paper reports, to stand beside ours."""

from __future__ import annotations

# Table 4: accuracy in percent for images and time series, negative log-likelihood in nats for
# flows; of Adam, SGD and SNOpt.
TABLE4: dict[str, dict[str, float]] = {
    "mnist": {"adam": 98.83, "sgd": 98.68, "snopt": 98.99},
    "svhn": {"adam": 91.92, "sgd": 93.34, "snopt": 95.77},
    "cifar10": {"adam": 77.41, "sgd": 76.42, "snopt": 79.11},
    "spoken-arabic-digits": {"adam": 94.64, "sgd": 97.70, "snopt": 97.41},
    "articulary-word": {"adam": 84.14, "sgd": 85.82, "snopt": 90.23},
    "character-trajectories": {"adam": 93.29, "sgd": 95.93, "snopt": 96.63},
    "circle": {"adam": 0.90, "sgd": 0.94, "snopt": 0.86},
    "gas": {"adam": -6.42, "sgd": -4.58, "snopt": -7.55},
    "miniboone": {"adam": 13.10, "sgd": 13.75, "snopt": 12.50},
}

# Epochs of the authors' scripts; where optimizers differ, those of Adam.
EPOCHS: dict[str, int] = {
    "mnist": 5,
    "svhn": 10,
    "cifar10": 20,
    "spoken-arabic-digits": 10,
    "articulary-word": 600,
    "character-trajectories": 400,
    "gas": 30,
    "miniboone": 20,
}

# Figure 8: time per iteration of SNOpt relative to Adam's.
FIGURE8: dict[str, float] = {
    "mnist": 1.00,
    "svhn": 0.87,
    "cifar10": 1.16,
    "spoken-arabic-digits": 0.99,
    "articulary-word": 1.01,
    "character-trajectories": 1.01,
    "circle": 2.75,
    "gas": 1.93,
    "miniboone": 1.60,
}
FIGURE8_MEMORY = "1.1–1.4"

# Table 6, on SVHN: backward NFE, and the Jacobian and kinetic regularization.
TABLE6: dict[str, tuple[float, float]] = {"adam": (42.1, 323.88), "snopt": (32.6, 199.1)}

FIGURE11 = "2–5"
