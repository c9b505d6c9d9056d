"""MobileNetV2 for small images, as it was published and as TENGraD's authors use it."""

from __future__ import annotations

from torch import Tensor, nn

from curvlib.cli.networks.parts import classifier, convolution, scaled

__all__ = ["MobileNetV2"]

# Expansion, channels, blocks, stride of the first: strides are those for CIFAR.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class _Block(nn.Module):
    """Inverted residual: 1x1 to more channels, 3x3, 1x1 to fewer, added to the input where nothing is skipped."""

    def __init__(self, channels_in: int, channels_out: int, inner: int, stride: int, *, depthwise: bool) -> None:
        super().__init__()
        groups = inner if depthwise else 1
        self.layers = nn.Sequential(
            convolution(channels_in, inner, size=1),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=groups, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            convolution(inner, channels_out, size=1),
            nn.BatchNorm2d(channels_out),
        )
        self.shortcut: nn.Module | None = None
        if stride == 1:
            project = nn.Sequential(convolution(channels_in, channels_out, size=1), nn.BatchNorm2d(channels_out))
            self.shortcut = nn.Identity() if channels_in == channels_out else project

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.layers(x)
        return inner if self.shortcut is None else inner + self.shortcut(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381) with strides for CIFAR and projected shortcuts.

    Parameters
    ----------
    channels
        Of the images.
    classes
        Number of classes.
    width
        Factor on all numbers of channels.
    dense
        Whether the 3x3 convolutions are dense over half the expansion, which is what TENGraD's authors trained: their
        code had no grouped convolutions. Otherwise they are depthwise, as published.
    """

    def __init__(self, channels: int, classes: int, width: float = 1.0, *, dense: bool = True) -> None:
        super().__init__()
        size = scaled(32, width)
        layers: list[nn.Module] = [convolution(channels, size), nn.BatchNorm2d(size), nn.ReLU(inplace=True)]
        for expansion, stage, blocks, first in _STAGES:
            out = scaled(stage, width)
            for number in range(blocks):
                inner = max(1, expansion * size // 2) if dense else expansion * size
                layers.append(_Block(size, out, inner, first if number == 0 else 1, depthwise=not dense))
                size = out
        last = scaled(1280, width)
        layers += [convolution(size, last, size=1), nn.BatchNorm2d(last), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.classifier = classifier(last, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, shape ``(n, classes)``."""
        logits: Tensor = self.classifier(self.features(images))
        return logits
