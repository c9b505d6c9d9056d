"""Kronecker factors of convolutions without unfolding, against Jacobians and unfolded inputs."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from curvlib.factors import cost
from curvlib.layers import ConvolutionFactors
from curvlib.layers.autocorrelation import Kernel, patch_moments, patch_sums, position_moments

CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def numbers(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng([seed, *shape]).standard_normal(shape))


def patches(images, kernel, groups):
    """Every patch by definition: what an output is multiplied by its weight with, (groups, n · positions, d_in)."""
    weight = torch.zeros(groups, images.shape[1] // groups, *kernel.size, dtype=images.dtype)

    def outputs(weight):
        convolved = CONVOLVE[len(kernel.size)](
            images, weight, None, kernel.stride, kernel.padding, kernel.dilation, groups
        )
        return convolved.transpose(0, 1).reshape(groups, -1)

    jacobian = torch.autograd.functional.jacobian(outputs, weight)
    return torch.stack([jacobian[group, :, group].flatten(1) for group in range(groups)])


SHAPES = [  # space, channels, groups, kernel, stride, dilation, padding
    ((7,), 3, 1, (3,), (1,), (1,), (1,)),
    ((9,), 4, 2, (4,), (3,), (2,), (4,)),
    ((6, 5), 3, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((6, 5), 3, 1, (3, 3), (1, 1), (1, 1), (0, 0)),
    ((6, 5), 4, 4, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((7, 8), 2, 1, (3, 3), (2, 2), (1, 1), (1, 1)),
    ((9, 9), 2, 1, (5, 5), (3, 2), (1, 1), (2, 2)),
    ((9, 8), 4, 2, (2, 3), (2, 1), (2, 3), (1, 2)),
    ((6, 5), 3, 1, (1, 1), (1, 1), (1, 1), (0, 0)),
    ((6, 5), 4, 2, (1, 1), (2, 3), (1, 1), (1, 0)),
    ((5, 6), 2, 1, (1, 4), (1, 1), (1, 1), (0, 1)),
    ((6, 5), 2, 1, (4, 1), (1, 2), (1, 1), (3, 0)),
    ((1, 2), 3, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((2, 1), 2, 1, (3, 2), (3, 1), (1, 1), (4, 3)),
    ((3, 4, 3), 2, 1, (3, 2, 3), (1, 1, 1), (1, 1, 1), (1, 0, 1)),
    ((4, 3, 5), 2, 2, (2, 1, 3), (1, 2, 2), (2, 1, 1), (1, 1, 2)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chunked", [False, True])
def test_moments_are_those_of_the_patches(shape, chunked, monkeypatch):
    space, channels, groups, *motion = shape
    images, kernel = numbers(3, channels, *space), Kernel(*motion)
    if chunked:
        monkeypatch.setattr(cost, "_TEMPORARY", 1)
    truth = patches(images, kernel, groups)
    torch.testing.assert_close(patch_moments(images, kernel, groups), truth.mT @ truth, rtol=1e-12, atol=1e-12)
    sums = patch_sums(images, kernel).reshape(3, groups, -1).transpose(0, 1)
    torch.testing.assert_close(sums, truth.reshape(groups, 3, -1, truth.shape[2]).sum(2), rtol=1e-12, atol=1e-12)
    single = patch_moments(images.float(), kernel, groups)
    torch.testing.assert_close(
        single.double(), truth.mT @ truth, rtol=1e-5, atol=1e-5 * truth.square().sum(1).max().item()
    )


small = st.integers(1, 4)


@settings(max_examples=150, deadline=None)
@given(st.tuples(small, small), st.tuples(small, small), st.tuples(small, small), st.tuples(small, small), st.data())
def test_any_kernel_over_any_image(size, stride, dilation, padding, data):
    padding = tuple(one - 1 for one in padding)
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(size, dilation, padding, strict=True)]
    space = [data.draw(st.integers(one, one + 5)) for one in least]
    images = numbers(2, 2, *space)
    unfolded = functional.unfold(images, size, dilation, padding, stride)
    moments = patch_moments(images, Kernel(size, stride, dilation, padding))
    torch.testing.assert_close(moments[0], (unfolded @ unfolded.mT).sum(0), rtol=1e-12, atol=1e-12)


def test_a_border_that_outweighs_everything_cancels_nothing():
    images = numbers(2, 2, 6, 6)
    images[:, :, 0], images[:, :, :, -1] = 1e9, 1e9
    unfolded = functional.unfold(images, 3)
    truth = (unfolded @ unfolded.mT).sum(0)
    torch.testing.assert_close(
        patch_moments(images, Kernel((3, 3), (1, 1), (1, 1), (0, 0)))[0], truth, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("positions", [2, 30])
@pytest.mark.parametrize("groups", [1, 3])
def test_products_of_channels(positions, groups):
    images = numbers(4, 12, positions)
    rows = images.reshape(4, groups, -1, positions)
    truth = torch.einsum("ngop,ngqp->goq", rows, rows)
    torch.testing.assert_close(position_moments(images, groups), truth, rtol=1e-12, atol=1e-12)


def rows_of(shape, bias, weight="weight", columns=2):
    space, channels, groups, kernel, stride, dilation, padding = shape
    blank = torch.zeros(groups * 2, channels // groups, *kernel, dtype=torch.float64)
    images = numbers(3, channels, *space)
    outputs = CONVOLVE[len(kernel)](images, blank, None, stride, padding, dilation, groups)
    cotangents = numbers(3, columns, *outputs.shape[1:], seed=1)
    names = {"weight": weight, "bias": bias, "padding": padding}
    return ConvolutionFactors(images, cotangents, blank.shape, stride, dilation, groups, **names)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("weight", "bias"), [("weight", None), ("weight", "bias"), (None, "bias")])
@pytest.mark.parametrize("lines", [False, True])
def test_kronecker_pairs_are_those_of_the_unfolded_rows(shape, weight, bias, lines, monkeypatch):
    monkeypatch.setattr(cost, "lines_beat_patches", lambda *sizes: lines)
    factors = rows_of(shape, bias, weight)
    for rows in (factors, factors.scaled(0.5)):
        scale = 1 if rows is factors else 0.25
        for sharing in ("expand", "reduce"):
            pair, truth = rows.kronecker(sharing), factors.patches().kronecker_rows(sharing).pair()
            torch.testing.assert_close(pair.inputs, truth.inputs, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(pair.cotangents, scale * truth.cotangents, rtol=1e-12, atol=1e-12)
            assert vars(pair.layout) == vars(truth.layout)


@pytest.mark.parametrize(
    ("sizes", "along", "stride", "lines"),
    [  # measured in float32 on two cores: which was faster, at least by a third
        (cost.Sizes(64, 1, 1024, 1, 144, 16), 3, 1, True),
        (cost.Sizes(64, 1, 64, 1, 576, 64), 3, 1, True),
        (cost.Sizes(64, 1, 1024, 1, 27, 16), 3, 1, True),
        (cost.Sizes(64, 1, 256, 32, 9, 1), 3, 1, True),
        (cost.Sizes(64, 1, 256, 1, 144, 16), 3, 2, True),
        (cost.Sizes(8, 1, 16, 1, 144, 16), 3, 1, False),
        (cost.Sizes(2, 1, 25, 1, 27, 4), 3, 1, False),
        (cost.Sizes(32, 1, 250, 1, 72, 8), 9, 4, False),
    ],
)
def test_the_cheaper_route_is_taken(sizes, along, stride, lines):
    assert cost.lines_beat_patches(sizes, along, stride) is lines
