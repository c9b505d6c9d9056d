"""Wide residual networks."""

from __future__ import annotations

from torch import Tensor, nn

from curvlib.cli.networks.parts import classifier, convolution, initialize, scaled

__all__ = ["WideResNet"]


class _Block(nn.Module):
    """Two pre-activated 3x3 convolutions; the shortcut is a 1x1 convolution where the channels change."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.convolution1 = convolution(channels_in, channels_out, stride=stride)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.convolution2 = convolution(channels_out, channels_out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module | None = None
        if channels_in != channels_out:
            self.shortcut = convolution(channels_in, channels_out, size=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu(self.norm1(x))
        inner = self.convolution2(self.relu(self.norm2(self.convolution1(active))))
        whole: Tensor = inner + (x if self.shortcut is None else self.shortcut(active))
        return whole


class WideResNet(nn.Module):
    """WRN-depth-widening (Zagoruyko & Komodakis 2016, arXiv 1605.07146), without dropout.

    Parameters
    ----------
    depth
        6 k + 4 for k blocks in each of the three groups.
    widening
        Factor on the channels of the groups: 16, 32, 64.
    channels
        Of the images.
    classes
        Number of classes.
    width
        A further factor on all numbers of channels.
    """

    def __init__(self, depth: int, widening: int, channels: int, classes: int, width: float = 1.0) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        size = scaled(16, width)
        layers: list[nn.Module] = [convolution(channels, size)]
        for group, stride in ((16, 1), (32, 2), (64, 2)):
            out = scaled(group * widening, width)
            for number in range(blocks):
                layers.append(_Block(size, out, stride if number == 0 else 1))
                size = out
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(size), nn.ReLU(inplace=True))
        self.classifier = classifier(size, classes)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, shape ``(n, classes)``."""
        logits: Tensor = self.classifier(self.features(images))
        return logits
