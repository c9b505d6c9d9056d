"""The convolutional networks of TENGraD's experiments on CIFAR, for images of any size."""

from curvlib.cli.networks.densenet import DenseNet
from curvlib.cli.networks.mobilenet import MobileNetV2
from curvlib.cli.networks.vgg import VGG
from curvlib.cli.networks.wide_resnet import WideResNet

__all__ = ["VGG", "DenseNet", "MobileNetV2", "WideResNet"]
