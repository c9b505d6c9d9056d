"""VGG with batch norm, for small images."""

from __future__ import annotations

from torch import Tensor, nn

from curvlib.cli.networks.parts import classifier, convolution, initialize, scaled

__all__ = ["VGG"]

_STAGES = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
}


class VGG(nn.Module):
    """VGG (Simonyan & Zisserman 2014, arXiv 1409.1556) with batch norm and one linear layer.

    Parameters
    ----------
    depth
        11 or 16; the two hidden linear layers that the number counts are left out, as is usual for CIFAR.
    channels
        Of the images.
    classes
        Number of classes.
    width
        Factor on all numbers of channels.
    """

    def __init__(self, depth: int, channels: int, classes: int, width: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage in _STAGES[depth]:
            for size in stage:
                out = scaled(size, width)
                layers += [convolution(channels, out), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
                channels = out
            # Rounding up changes nothing for sizes that are powers of two, and lets images below 32x32 through.
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.classifier = classifier(channels, classes)
        initialize(self, linear_deviation=0.01)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, shape ``(n, classes)``."""
        logits: Tensor = self.classifier(self.features(images))
        return logits
