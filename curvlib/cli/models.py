"""The networks that the command line trains, each adapted to the data's channels, size and classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from curvlib.cli.networks import VGG, DenseNet, MobileNetV2, WideResNet
from curvlib.cli.networks.parts import scaled
from curvlib.errors import ConfigurationError

__all__ = ["MODELS", "ModelSpec"]

Shape = tuple[int, int, int]
Build = Callable[[Shape, int, float], nn.Module]


@dataclass(frozen=True)
class ModelSpec:
    """One network of the table.

    Parameters
    ----------
    build
        From the image's shape ``(channels, height, width)``, the number of classes and a factor on the widths of the
        hidden layers to the network.
    description
        One line for the help and the report.
    minimum_size
        The smallest height and width that survive the pooling.
    reconstructs
        Whether the network reproduces its input instead of naming a class.
    cpu_evaluation_samples
        How many images an evaluation uses on a CPU by default.
    """

    build: Build
    description: str
    minimum_size: int = 1
    reconstructs: bool = False
    cpu_evaluation_samples: int = 10_000

    def __call__(self, shape: Shape, classes: int, width: float = 1.0) -> nn.Module:
        """Build the network, or say that the images are too small for it."""
        if min(shape[1:]) < self.minimum_size:
            raise ConfigurationError(
                f"images of {shape[1]}x{shape[2]} pixels are too small for this model, which needs "
                f"{self.minimum_size}x{self.minimum_size}: choose another --model or --data"
            )
        return self.build(shape, classes, width)


def _convolution(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.ReLU()]


def _perceptron(widths: list[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return layers[:-1]


def _paper_convnet(channels_: int, hidden: int) -> Build:
    def build(shape: Shape, classes: int, width: float) -> nn.Module:
        channels, height, pixels = shape
        size = scaled(channels_, width)
        return nn.Sequential(
            *_convolution(channels, size),
            *_convolution(size, size),
            *_convolution(size, size),
            nn.MaxPool2d(3),
            nn.Flatten(),
            *_perceptron([size * (height // 3) * (pixels // 3), scaled(hidden, width), classes]),
        )

    return build


def _mlp(shape: Shape, classes: int, width: float) -> nn.Module:
    channels, height, columns = shape
    hidden = [scaled(size, width) for size in (1000, 500)]
    return nn.Sequential(nn.Flatten(), *_perceptron([channels * height * columns, *hidden, classes]))


def _autoencoder(shape: Shape, classes: int, width: float) -> nn.Module:
    channels, height, columns = shape
    pixels = channels * height * columns
    # The code keeps its size: it is what makes the task.
    hidden = [scaled(size, width) for size in (1000, 500, 250)]
    return nn.Sequential(
        nn.Flatten(),
        *_perceptron([pixels, *hidden, 30]),
        *_perceptron([30, *hidden[::-1], pixels]),
    )


MODELS: dict[str, ModelSpec] = {
    "small-convnet": ModelSpec(
        _paper_convnet(16, 128),
        "three 3x3 convolutions of 16 channels with ReLU, MaxPool(3), linear layers of 128 and the classes: the "
        "convnet with an eighth of its width",
        minimum_size=3,
        cpu_evaluation_samples=5_000,
    ),
    "convnet": ModelSpec(
        _paper_convnet(128, 500),
        "three 3x3 convolutions of 128 channels with ReLU, MaxPool(3), linear layers of 500 and the classes",
        minimum_size=3,
        cpu_evaluation_samples=1_000,
    ),
    "mlp": ModelSpec(_mlp, "linear layers of 1000, 500 and the classes with ReLU"),
    "autoencoder": ModelSpec(
        _autoencoder,
        "linear layers of 1000-500-250-30-250-500-1000 with ReLU, a linear code of 30, one Bernoulli a pixel",
        reconstructs=True,
    ),
    "vgg16-bn": ModelSpec(
        lambda shape, classes, width: VGG(16, shape[0], classes, width),
        "VGG16 with batch norm and one linear layer",
        cpu_evaluation_samples=1_000,
    ),
    "wrn-28-4": ModelSpec(
        lambda shape, classes, width: WideResNet(28, 4, shape[0], classes, width),
        "wide residual network of depth 28, four times as wide",
        minimum_size=4,
        cpu_evaluation_samples=1_000,
    ),
    "densenet-19-100": ModelSpec(
        lambda shape, classes, width: DenseNet(19, 100, shape[0], classes, width),
        "DenseNet-BC with two bottlenecks in each of three blocks, growth 100, compression 2",
        minimum_size=4,
        cpu_evaluation_samples=1_000,
    ),
    "mobilenetv2-dense": ModelSpec(
        lambda shape, classes, width: MobileNetV2(shape[0], classes, width),
        "MobileNetV2 with dense 3x3 convolutions over half the expansion, as TENGraD's authors train it",
        cpu_evaluation_samples=1_000,
    ),
}
