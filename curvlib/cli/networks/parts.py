"""What the networks have in common: widths, the head, the initial weights."""

from __future__ import annotations

from torch import nn

__all__ = ["classifier", "convolution", "initialize", "scaled"]


def scaled(channels: int, width: float) -> int:
    """Return a number of channels times a width factor, at least 1."""
    return max(1, round(channels * width))


def convolution(channels_in: int, channels_out: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """Return a padded convolution without a bias, which the batch norm after it would undo."""
    return nn.Conv2d(channels_in, channels_out, size, stride=stride, padding=size // 2, bias=False)


def classifier(channels: int, classes: int) -> nn.Sequential:
    """Return the mean over all positions and a linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def initialize(network: nn.Module, linear_deviation: float | None = None) -> None:
    """Draw weights of convolutions from normal distributions of variance 2 / fan-out; zero the biases of linear layers.

    Parameters
    ----------
    network
        Whose modules are initialised in place.
    linear_deviation
        Standard deviation of the weights of linear layers; None leaves them as torch draws them.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
            if linear_deviation is not None:
                nn.init.normal_(module.weight, 0, linear_deviation)
