"""LayerNorm, RMSNorm, GroupNorm and InstanceNorm against per-sample autograd."""

import pytest
import torch
from one_layer import assert_same, check_layer, numbers, prepared
from torch import nn
from torch.nn import functional

import curvlib
from curvlib.factors import Dense
from curvlib.layers import adapter_for, partition
from curvlib.layers.normalization import group_norm, layer_norm, saved_statistics

SEQUENCE, IMAGE = numbers(3, 2, 4), numbers(3, 4, 2, 3)
LAYERS = {
    "LayerNorm": (lambda: nn.LayerNorm(4), SEQUENCE),
    "LayerNorm without positions": (lambda: nn.LayerNorm(4), numbers(3, 4)),
    "LayerNorm over two axes": (lambda: nn.LayerNorm((2, 4)), SEQUENCE),
    "LayerNorm without bias": (lambda: nn.LayerNorm(4, bias=False, eps=0.1), SEQUENCE),
    "LayerNorm, non-contiguous": (lambda: nn.LayerNorm(2), SEQUENCE.transpose(1, 2)),
    "RMSNorm": (lambda: nn.RMSNorm(4), SEQUENCE),
    "RMSNorm over two axes": (lambda: nn.RMSNorm((2, 4), eps=0.1), SEQUENCE),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), IMAGE),
    "GroupNorm of vectors": (lambda: nn.GroupNorm(2, 4, eps=0.1), numbers(3, 4)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(2, affine=True), SEQUENCE),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True, eps=0.1), IMAGE),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(4, affine=True), IMAGE[..., None]),
    "InstanceNorm2d, channels_last": (
        lambda: nn.InstanceNorm2d(4, affine=True),
        IMAGE.to(memory_format=torch.channels_last),
    ),
    "InstanceNorm, training with running statistics": (
        lambda: nn.InstanceNorm1d(2, affine=True, track_running_stats=True),
        SEQUENCE,
    ),
    "InstanceNorm, running statistics": (
        lambda: nn.InstanceNorm1d(2, affine=True, track_running_stats=True).eval(),
        SEQUENCE,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows(name):
    build, x = LAYERS[name]
    assert adapter_for(type(build())).closed_form
    assert isinstance(check_layer(prepared(build()), x), Dense)


@pytest.mark.parametrize("shape", [(4,), (2, 4)])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_saved_statistics_give_the_same_rows(shape, offset):
    layer, x, g = nn.LayerNorm(shape, eps=0.1).double(), offset + numbers(3, 5, 2, 4), numbers(3, 2, 5, 2, 4)
    statistics = saved_statistics(layer, layer(x))
    with torch.no_grad():
        ours, truth = layer_norm(layer, x, g, statistics).values, layer_norm(layer, x, g).values
    for name, rows in truth.items():
        torch.testing.assert_close(ours[name], rows, rtol=1e-9, atol=1e-9)
    half = layer_norm(layer.float(), x.float(), g.float(), statistics).values["weight"]  # of another dtype: not taken
    assert half.dtype == torch.float32


def test_statistics_of_samples_on_another_axis_are_not_mixed_up():
    """As many positions as samples, so that no shape tells the axes apart."""

    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.norm(x.transpose(0, 1)).transpose(0, 1).mean(1))

    torch.manual_seed(0)
    model, x, y = Swapped().double(), numbers(3, 3, 4) * torch.arange(1, 4)[:, None, None], torch.arange(3) % 2
    rows = curvlib.collect(model, curvlib.Empirical(), x, loss=lambda out: functional.cross_entropy(out, y))["norm"]
    truth = []
    for sample, label in zip(x, y, strict=True):
        loss = functional.cross_entropy(model(sample[None]), label[None])
        truth.append(torch.autograd.grad(loss, model.norm.weight)[0])
    assert_same(rows.dense().values["weight"], torch.stack(truth))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("name", ["LayerNorm", "GroupNorm", "InstanceNorm2d"])
def test_frozen_parts(name, frozen):
    build, x = LAYERS[name]
    exact = check_layer(prepared(build(), [frozen]), x)
    assert list(exact.shapes) == [{"weight": "bias", "bias": "weight"}[frozen]]


def test_group_norm_in_channels_last():
    # Of the adapter alone: torch itself crashes on gradients of a GroupNorm that comes first in this layout.
    layer, g = prepared(nn.GroupNorm(2, 4)), numbers(3, 2, 4, 2, 3)
    plain = group_norm(layer, IMAGE, g).dense().matrix()
    last = group_norm(layer, IMAGE.to(memory_format=torch.channels_last), g).dense().matrix()
    assert_same(last, plain)


def test_positions_before_samples():
    class First(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return self.norm(x.transpose(0, 1)).transpose(0, 1)

    for norm in (nn.LayerNorm(4), nn.RMSNorm(4)):
        check_layer(First(prepared(norm)), SEQUENCE)


def test_layers_without_parameters_are_no_blocks():
    free = (
        nn.LayerNorm(4, elementwise_affine=False),
        nn.RMSNorm(4, elementwise_affine=False),
        nn.GroupNorm(2, 4, affine=False),
        nn.InstanceNorm2d(4),
        nn.BatchNorm2d(4, affine=False),
    )
    assert [block.name for block in partition(nn.Sequential(*free, nn.Linear(4, 4))).blocks] == ["5"]
