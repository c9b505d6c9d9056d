"""BackPACK: per-sample gradients and their Gram; the diagonal and the root of the Gauss-Newton matrix.

Known differences, each with its factor below:

- Its per-sample gradients are those of the mean loss, 1/n of curvlib's rows; its Gram is 1/n² of curvlib's.
- Its root of the Gauss-Newton matrix has 1/√n of curvlib's rows, ordered (column, sample) instead of (sample, column).
- Its BatchL2Grad of grouped convolutions is not the squared length of its own BatchGrad (46 to 52 % off autograd's),
  so lengths are compared without groups; BatchGrad, its Gram and the second order are compared with them.
- A transposed convolution with output_padding, and norms but BatchNorm, it refuses.
"""

import pytest
import torch
from torch import nn
from truth import assert_close, network
from twins import CLASSES, assert_same, by_parameter

import curvlib
from curvlib.layers import partition

backpack = pytest.importorskip("backpack", reason="make peers installs backpack-for-pytorch")
extensions = pytest.importorskip("backpack.extensions", reason="make peers installs backpack-for-pytorch")
ReduceTuple = pytest.importorskip("backpack.custom_module.reduce_tuple").ReduceTuple

# Its module hooks meet inputs that need no gradient, and torch says so at every backward.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

SAMPLES = 6


@pytest.fixture(autouse=True)
def _default_float64():
    """Its gradients of an embedding have the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def then_linear(*layers, width):
    return lambda: network(*layers_of(layers), nn.Tanh(), nn.Flatten(), nn.Linear(width, CLASSES))


def layers_of(makers):
    return [maker() for maker in makers]


NETS = {
    # name: network, shape of a sample
    "Linear": (then_linear(lambda: nn.Linear(4, 5), width=5), (4,)),
    "Linear without bias": (then_linear(lambda: nn.Linear(4, 5, bias=False), width=5), (4,)),
    "Linear on a sequence": (then_linear(lambda: nn.Linear(4, 5), width=15), (3, 4)),
    "Conv1d": (then_linear(lambda: nn.Conv1d(2, 3, 3, stride=2, dilation=2, padding=1), width=6), (2, 6)),
    "Conv2d": (then_linear(lambda: nn.Conv2d(2, 3, 3, padding=1), width=48), (2, 4, 4)),
    "Conv2d without bias": (then_linear(lambda: nn.Conv2d(2, 3, (2, 3), bias=False), width=18), (2, 4, 4)),
    "Conv2d, groups": (then_linear(lambda: nn.Conv2d(4, 6, 3, groups=2), width=24), (4, 4, 4)),
    "Conv2d, depthwise": (then_linear(lambda: nn.Conv2d(3, 6, 3, groups=3), width=24), (3, 4, 4)),
    "Conv2d, stride": (then_linear(lambda: nn.Conv2d(2, 3, 3, stride=(2, 1), padding=1), width=24), (2, 4, 4)),
    "Conv2d, dilation": (then_linear(lambda: nn.Conv2d(2, 3, 2, dilation=(1, 2)), width=18), (2, 4, 4)),
    "Conv2d, all": (
        then_linear(lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2, dilation=2, padding=(2, 1)), width=54),
        (4, 5, 7),
    ),
    "Conv3d": (then_linear(lambda: nn.Conv3d(2, 4, 2, groups=2, stride=2), width=16), (2, 4, 2, 4)),
    "ConvTranspose1d": (then_linear(lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), width=21), (2, 3)),
    "ConvTranspose2d": (
        then_linear(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), width=294),
        (4, 3, 3),
    ),
}  # fmt: skip

GROUPED = {"Conv2d, groups", "Conv2d, depthwise", "Conv2d, all", "Conv3d", "ConvTranspose2d"}
FIRST_ORDER = {
    "Embedding": (then_linear(lambda: nn.Embedding(7, 4), width=12), (3,)),
    "LSTM": (then_linear(lambda: nn.LSTM(4, 5, batch_first=True), ReduceTuple, width=15), (3, 4)),
    "RNN": (then_linear(lambda: nn.RNN(4, 5, batch_first=True), ReduceTuple, width=15), (3, 4)),
    "BatchNorm2d": (then_linear(lambda: nn.BatchNorm2d(2), width=8), (2, 2, 2)),
}


def setting(name):
    build, shape = (NETS | FIRST_ORDER)[name]
    model = build().eval()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(SAMPLES, *shape, generator=generator, dtype=torch.float64)
    if name == "Embedding":
        x = torch.randint(0, 7, (SAMPLES, *shape), generator=generator)
    return model, x, torch.randint(0, CLASSES, (SAMPLES,), generator=generator)


def theirs(model, x, y, extension, saved):
    """What `extension` saves at every parameter of `model`, by name."""
    extended, loss = backpack.extend(model), backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(extension):
        loss(extended(x), y).backward()
    return {name: getattr(p, saved) for name, p in model.named_parameters()}


def ours(model, x, fisher, y=None):
    return curvlib.collect(model, fisher, x, loss=lambda outputs: nn.functional.cross_entropy(outputs, y))


def grams(factors, rows):
    """For every block its Gram and that of explicit rows, given by parameter name."""
    for block, own in factors.items():
        J = torch.cat([rows[f"{block}.{name}"].flatten(1) for name in own.shapes], dim=1)
        yield block, own.gram(), J @ J.T


@pytest.mark.parametrize("name", NETS | FIRST_ORDER)
def test_rows_and_gram_are_those_of_batch_grad(name):
    model, x, y = setting(name)
    factors = ours(model, x, curvlib.Empirical(), y)
    rows = {key: SAMPLES * row for key, row in theirs(model, x, y, extensions.BatchGrad(), "grad_batch").items()}
    assert_same(by_parameter(factors, lambda own: own.dense().values), rows)
    for block, own, gram in grams(factors, rows):
        assert_close(own, gram, f"Gram of {block}")


@pytest.mark.parametrize("name", NETS | FIRST_ORDER)
def test_squares_of_rows(name):
    model, x, y = setting(name)
    factors = ours(model, x, curvlib.Empirical(), y)
    squares = theirs(model, x, y, extensions.SumGradSquared(), "sum_grad_squared")
    assert_same(by_parameter(factors, lambda own: own.diagonal()), squares, SAMPLES**2)


@pytest.mark.parametrize("name", [name for name in NETS | FIRST_ORDER if name not in GROUPED])
def test_lengths_of_rows(name):
    model, x, y = setting(name)
    factors = ours(model, x, curvlib.Empirical(), y)
    lengths = theirs(model, x, y, extensions.BatchL2Grad(), "batch_l2")
    for block, own in factors.items():
        total = sum(lengths[f"{block}.{parameter}"] for parameter in own.shapes)
        assert_close(own.gram().diagonal(), SAMPLES**2 * total, f"squared lengths in {block}")


@pytest.mark.parametrize("name", NETS)
def test_the_diagonal_of_the_gauss_newton_matrix(name):
    model, x, y = setting(name)
    factors = ours(model, x, curvlib.Exact())
    expected = theirs(model, x, y, extensions.DiagGGNExact(), "diag_ggn_exact")
    given = by_parameter(
        factors, lambda own: {parameter: square / own.normalizer for parameter, square in own.diagonal().items()}
    )
    assert_same(given, expected)


@pytest.mark.parametrize("name", NETS)
def test_the_root_of_the_gauss_newton_matrix(name):
    model, x, y = setting(name)
    factors = ours(model, x, curvlib.Exact())
    roots = theirs(model, x, y, extensions.SqrtGGNExact(), "sqrt_ggn_exact")
    rows = {key: SAMPLES**0.5 * root.transpose(0, 1).flatten(0, 1) for key, root in roots.items()}
    assert_same(by_parameter(factors, lambda own: own.dense().values), rows)
    for block, own, gram in grams(factors, rows):
        assert_close(own, gram, f"Gram of {block}")


def test_kflr_is_kfac_with_the_exact_fisher():
    """For layers without weight sharing; weight and bias apart, as BackPACK has them. Order there: G, then A."""
    model, x, y = setting("Linear")
    expected = theirs(model, x, y, extensions.KFLR(), "kflr")
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("weight"))
    for block, own in ours(model, x, curvlib.Exact()).items():
        G, A = expected[f"{block}.weight"]
        pair = own.kronecker()
        assert_close(pair.inputs[0], A, f"A of {block}")
        assert_close(pair.cotangents[0] / own.normalizer, G, f"G of {block}")
        assert_close(expected[f"{block}.bias"][0], G, f"G of the bias of {block}")


@pytest.mark.parametrize("name", NETS | FIRST_ORDER)
def test_no_layer_is_left_to_the_fallback(name):
    """Rows by `torch.func` would compare BackPACK with autograd, not with curvlib's formulas."""
    assert all(use.adapter.closed_form for block in partition(setting(name)[0]).blocks for use in block.uses)
