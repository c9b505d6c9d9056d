"""Bilinear against per-sample autograd."""

import pytest
import torch
from one_layer import check_layer, numbers, prepared
from torch import nn

import curvlib
from curvlib.errors import CaptureError

SHAPES = [((4, 2), (4, 3)), ((4, 5, 2), (4, 5, 3)), ((4, 2, 1, 2), (4, 2, 1, 3))]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_rows(shapes, bias):
    check_layer(prepared(nn.Bilinear(2, 3, 4, bias=bias)), *(numbers(*shape) for shape in shapes))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parts(frozen):
    check_layer(prepared(nn.Bilinear(2, 3, 4), [frozen]), numbers(4, 5, 2), numbers(4, 5, 3))


def test_inputs_by_name_and_non_contiguous():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = prepared(nn.Bilinear(2, 3, 4))

        def forward(self, x):
            return self.layer(input2=x[..., ::2], input1=x[..., 1:4:2])

    check_layer(Named(), numbers(4, 5))
    check_layer(Named(), numbers(4, 5, 6).transpose(1, 2))


def test_another_sample_axis_is_refused():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Bilinear(2, 2, 4)

        def forward(self, x):
            return self.layer(x.transpose(0, 1), x.transpose(0, 1)).sum(0)

    with pytest.raises(CaptureError, match=r"\(5, 4, 2\).*4 samples; the first axis must be"):
        curvlib.collect(First(), curvlib.Exact(), torch.randn(4, 5, 2))
