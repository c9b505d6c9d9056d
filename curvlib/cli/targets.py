"""Thresholds whose time to reach a race reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from curvlib.cli.evaluation import Evaluation
from curvlib.errors import ConfigurationError

__all__ = ["Target", "default_targets", "parse_targets", "seconds_to"]

_DEFAULTS = {
    "fashion-mnist": "loss=0.5,loss=0.3,accuracy=0.85,accuracy=0.88",
    "mnist": "loss=0.2,loss=0.05,accuracy=0.95,accuracy=0.98",
    "cifar10": "loss=1.2,loss=0.8,accuracy=0.6,accuracy=0.7",
    "cifar100": "loss=3.0,loss=2.0,accuracy=0.3,accuracy=0.4",
    "digits": "loss=0.1,loss=0.01,accuracy=0.95,accuracy=0.97",
}
# Binary cross-entropy summed over the pixels, whose floor is the images' own entropy and far from 0.
_AUTOENCODER_DEFAULTS = {
    "fashion-mnist": "loss=270,loss=250",
    "mnist": "loss=120,loss=90",
    "digits": "loss=28,loss=25",
}


@dataclass(frozen=True)
class Target:
    """A threshold: a training loss to fall to, or a test accuracy to rise to."""

    quantity: str
    value: float

    def __str__(self) -> str:
        return f"{'loss ≤' if self.quantity == 'loss' else 'accuracy ≥'} {self.value:g}"

    def reached_by(self, point: Evaluation) -> bool:
        """Return whether an evaluation meets the target."""
        if self.quantity == "loss":
            return point.train_loss <= self.value
        return point.test_accuracy >= self.value


def parse_targets(text: str) -> list[Target]:
    """Read a comma-separated list such as ``loss=0.3,accuracy=0.9``."""
    targets = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        quantity, _, number = item.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if quantity not in ("loss", "accuracy") or not math.isfinite(value):
            raise ConfigurationError(f"--targets {item} is not understood: give loss=NUMBER or accuracy=NUMBER")
        if quantity == "accuracy" and value > 1:
            raise ConfigurationError(f"--targets {item} is above 1: an accuracy is a share, such as accuracy=0.9")
        targets.append(Target(quantity, value))
    return targets


def default_targets(dataset: str, reconstructs: bool) -> list[Target]:
    """Return the targets of a data set for a classifier or an autoencoder."""
    return parse_targets((_AUTOENCODER_DEFAULTS if reconstructs else _DEFAULTS).get(dataset, ""))


def seconds_to(target: Target, curve: Sequence[Evaluation]) -> float | None:
    """Return the training seconds of the first evaluation that meets the target, or None."""
    return next((point.seconds for point in curve if target.reached_by(point)), None)
