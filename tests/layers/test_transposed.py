"""Transposed convolutions against per-sample autograd, with everything that their constructors allow."""

import pytest
import torch
from one_layer import check_layer, numbers, prepared
from torch import nn

import curvlib
from curvlib.layers import ConvolutionFactors

KINDS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
OPTIONS = {
    "plain": {},
    "stride": {"stride": 2},
    "padding": {"padding": 1},
    "stride, padding, output padding": {"stride": 3, "padding": 1, "output_padding": 2},
    "dilation": {"dilation": 2},
    "dilation, output padding beyond the stride": {"dilation": 3, "stride": 1, "output_padding": 2},
    "groups": {"groups": 2},
    "everything": {"stride": 2, "padding": 1, "output_padding": 1, "dilation": 2, "groups": 2, "bias": False},
}


@pytest.mark.parametrize("dims", KINDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_rows(dims, name):
    size = (3, 2, 2)[dims - 1]
    check_layer(prepared(KINDS[dims](2, 4, 2, **OPTIONS[name])), numbers(2, 2, *[size] * dims))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parts(frozen):
    exact = check_layer(prepared(nn.ConvTranspose2d(2, 3, 2), [frozen]), numbers(2, 2, 2, 3))
    assert len(exact.shapes) == 1


def test_uneven_options_and_layouts():
    layer = nn.ConvTranspose2d(4, 2, (3, 2), stride=(2, 1), padding=(1, 0), output_padding=(1, 0), dilation=(1, 2))
    x = numbers(2, 4, 2, 3)
    for same in (x, x.to(memory_format=torch.channels_last), numbers(2, 3, 2, 4).transpose(1, 3)):
        check_layer(prepared(layer), same)


def test_an_output_size_given_in_the_call():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = prepared(nn.ConvTranspose1d(2, 3, 3, stride=3))

        def forward(self, x):
            return self.layer(x, output_size=[11])

    check_layer(Sized(), numbers(2, 2, 3))


def test_kronecker_factors_are_those_of_the_convolution_with_the_roles_exchanged():
    layer, x = prepared(nn.ConvTranspose1d(2, 3, 2, bias=False)), numbers(4, 2, 3)
    (factors,) = curvlib.collect(layer, curvlib.Sampled(curvlib.Gaussian()), x).values()
    assert isinstance(factors, ConvolutionFactors)
    pair = factors.kronecker()
    # Every pair of an input position and the window of outputs that it reaches.
    inputs = x.transpose(1, 2).reshape(-1, 2)
    windows = factors.images.unfold(2, 2, 1).transpose(1, 2).reshape(-1, 6)
    expected = torch.kron(inputs.T @ inputs, windows.T @ windows / len(windows))
    torch.testing.assert_close(torch.kron(pair.cotangents[0], pair.inputs[0]), expected)
