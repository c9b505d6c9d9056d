"""The networks of the experiments: sizes against published and counted ones, shapes, exact rows."""

import pytest
import torch
from torch import nn

import curvlib
from curvlib.cli.models import MODELS
from curvlib.cli.networks import VGG, DenseNet, MobileNetV2, WideResNet


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


# Millions of parameters from the tables of arXiv 1605.07146 (WRN) and 1608.06993 (DenseNet-BC), for CIFAR-10.
PUBLISHED = [
    (lambda: WideResNet(40, 4, 3, 10), 8.9),
    (lambda: WideResNet(16, 8, 3, 10), 11.0),
    (lambda: WideResNet(28, 10, 3, 10), 36.5),
    (lambda: DenseNet(100, 12, 3, 10), 0.8),
    (lambda: DenseNet(250, 24, 3, 10), 15.3),
    (lambda: DenseNet(190, 40, 3, 10), 25.6),
]


@pytest.mark.parametrize(("build", "millions"), PUBLISHED)
def test_sizes_are_the_published_ones(build, millions):
    with torch.device("meta"):
        assert round(parameters(build()) / 1e6, 1) == millions


# Counted on the networks that the paper's authors published (github.com/saeedsoori/k-fac, models/cifar).
AUTHORS = {
    "vgg16-bn": (14_724_042, 14_770_212),
    "wrn-28-4": (5_849_050, 5_872_180),
    "densenet-19-100": (2_939_610, 2_975_700),
    "mobilenetv2-dense": (11_512_954, 11_628_244),
}


@pytest.mark.parametrize("name", AUTHORS)
def test_sizes_are_the_authors(name):
    with torch.device("meta"):
        assert tuple(parameters(MODELS[name]((3, 32, 32), classes)) for classes in (10, 100)) == AUTHORS[name]


def test_mobilenet_as_published_is_depthwise():
    with torch.device("meta"):
        published, dense = MobileNetV2(3, 10, dense=False), MobileNetV2(3, 10)
    # The size that CIFAR versions with projected shortcuts have.
    assert parameters(published) == 2_296_922
    assert sum(layer.groups > 1 for layer in published.modules() if isinstance(layer, nn.Conv2d)) == 17
    assert all(layer.groups == 1 for layer in dense.modules() if isinstance(layer, nn.Conv2d))


@pytest.mark.parametrize("name", AUTHORS)
def test_positions_shrink_as_the_authors_have_it(name):
    model = MODELS[name]((3, 32, 32), 10, 0.1)
    sizes = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-1]))
    model(torch.zeros(2, 3, 32, 32))
    last = {"vgg16-bn": 2, "wrn-28-4": 8, "densenet-19-100": 8, "mobilenetv2-dense": 4}[name]
    assert (sizes[0], min(sizes)) == (32, last)


@pytest.mark.parametrize("name", MODELS)
def test_width_is_of_hidden_layers(name):
    whole, half = (MODELS[name]((3, 32, 32), 10, width) for width in (0.25, 0.125))
    assert parameters(half) < 0.6 * parameters(whole)
    outputs = half(torch.zeros(2, 3, 32, 32))
    assert outputs.shape == (2, 3 * 32 * 32 if MODELS[name].reconstructs else 10)


def test_convolutions_start_at_variance_two_over_fan_out():
    torch.manual_seed(0)
    model = VGG(11, 3, 10)
    last = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)][-1]
    assert last.weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
    assert model.classifier[-1].weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not model.classifier[-1].bias.any()


@pytest.mark.parametrize("name", AUTHORS)
def test_every_layer_has_rows_that_are_exact(name):
    torch.manual_seed(0)
    model = MODELS[name]((3, 32, 32), 10, 0.06)
    # `collect` raises an error where rows and autograd's gradient differ.
    factors = curvlib.collect(model, curvlib.Sampled(curvlib.Categorical()), torch.randn(4, 3, 32, 32))
    covered = sum(own.size for own in factors.values())
    assert covered == parameters(model)
