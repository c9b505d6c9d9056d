"""Densely connected networks with bottlenecks and compression."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from curvlib.cli.networks.parts import classifier, convolution, initialize, scaled

__all__ = ["DenseNet"]

_EXPANSION = 4


class _Bottleneck(nn.Module):
    """A pre-activated 1x1 and a 3x3 convolution, whose output is put beside the input."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        inner = _EXPANSION * growth
        self.layers = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            convolution(channels, inner, size=1),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            convolution(inner, growth),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.layers(x)), 1)


class DenseNet(nn.Module):
    """DenseNet-BC (Huang et al. 2016, arXiv 1608.06993).

    Parameters
    ----------
    depth
        6 k + 4 for k bottlenecks in each of the three dense blocks; what is left over is ignored, so that the paper's
        19 has two.
    growth
        Channels that a bottleneck adds.
    channels
        Of the images.
    classes
        Number of classes.
    width
        Factor on the growth, and so on all numbers of channels.
    """

    def __init__(self, depth: int, growth: int, channels: int, classes: int, width: float = 1.0) -> None:
        super().__init__()
        growth, bottlenecks = scaled(growth, width), (depth - 4) // 6
        size = 2 * growth
        layers: list[nn.Module] = [convolution(channels, size)]
        for block in range(3):
            if block:
                layers += [nn.BatchNorm2d(size), nn.ReLU(inplace=True), convolution(size, size // 2, size=1)]
                layers.append(nn.AvgPool2d(2))
                size //= 2
            for _ in range(bottlenecks):
                layers.append(_Bottleneck(size, growth))
                size += growth
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(size), nn.ReLU(inplace=True))
        self.classifier = classifier(size, classes)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, shape ``(n, classes)``."""
        logits: Tensor = self.classifier(self.features(images))
        return logits
