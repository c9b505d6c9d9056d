"""Embedding and EmbeddingBag: rows of lookups, never densified, and what has no exact rows refused."""

import pytest
import torch
from one_layer import check_layer, numbers, prepared
from torch import nn

import curvlib
from curvlib.errors import CaptureError
from curvlib.factors import OneHotOuter

V, D = 6, 2
TOKENS = torch.tensor([[0, 3, 3, 1], [2, 0, 5, 5], [4, 4, 4, 4]])
FLAT, OFFSETS = torch.tensor([1, 3, 3, 0, 2, 5, 0, 4]), torch.tensor([0, 3, 3])
BAGS = [FLAT[:3], FLAT[3:3], FLAT[3:]]


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[:, 0], TOKENS.reshape(3, 2, 2), TOKENS.int(), TOKENS.T[:3].T])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"padding_idx": -1}, {"sparse": True}])
def test_embedding(tokens, options):
    exact = check_layer(prepared(nn.Embedding(V, D, **options)), tokens)
    assert isinstance(exact, OneHotOuter)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 3])
def test_bags_of_equal_length(mode, padding):
    check_layer(prepared(nn.EmbeddingBag(V, D, mode=mode, padding_idx=padding)), TOKENS)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("last", [False, True])
def test_bags_of_any_length(mode, padding, last):
    layer = prepared(nn.EmbeddingBag(V, D, mode=mode, padding_idx=padding, include_last_offset=last))
    alone = torch.tensor([0])
    offsets = torch.cat([OFFSETS, torch.tensor([len(FLAT)])]) if last else OFFSETS
    samples = [(bag, torch.tensor([0, len(bag)]) if last else alone) for bag in BAGS]
    check_layer(layer, FLAT, offsets, samples=samples)


@pytest.mark.parametrize("shape", ["equal", "offsets"])
def test_bags_with_weights(shape):
    layer = prepared(nn.EmbeddingBag(V, D, mode="sum"))
    if shape == "equal":
        check_layer(layer, TOKENS, None, numbers(3, 4), samples=[(t[None], None, w[None]) for t, w in
                                                                 zip(TOKENS, numbers(3, 4), strict=True)])  # fmt: skip
    else:
        weights = numbers(8)
        parts = zip(BAGS, [weights[:3], weights[3:3], weights[3:]], strict=True)
        check_layer(layer, FLAT, OFFSETS, weights, samples=[(bag, torch.tensor([0]), w) for bag, w in parts])


def test_all_bags_empty():
    layer = prepared(nn.EmbeddingBag(V, D, mode="sum"))
    empty = torch.tensor([], dtype=torch.long)
    model = nn.Sequential(layer, nn.Linear(D, 2)).double()

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, offsets):
            return model[1](layer(input=x, offsets=offsets))

    factors = curvlib.collect(Call(), curvlib.Exact(), empty, torch.zeros(3, dtype=torch.long))["inner.0"]
    assert float(factors.gram().abs().max()) == 0


def test_several_bags_a_sample():
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag = nn.EmbeddingBag(V, D, mode="sum")

        def forward(self, x):
            return self.bag(x.flatten(0, 1)).unflatten(0, (len(x), 2))

    check_layer(prepared_inside(Pairs(), "bag"), TOKENS.reshape(3, 2, 2))

    class Uneven(Pairs):
        def forward(self, x):
            return self.bag(x.flatten(0, 1))[: len(x)]

    uneven = torch.cat([TOKENS, TOKENS[:1]])[:, None].expand(4, 1, 4)
    with pytest.raises(CaptureError, match="4 bags do not divide into 3 samples"):
        curvlib.collect(Cut(prepared_inside(Uneven(), "bag")), curvlib.Exact(), uneven)


class Cut(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[:3]


def prepared_inside(model, name):
    prepared(getattr(model, name))
    return model


def test_tokens_first_and_merged():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(V, D)

        def forward(self, x):
            return self.table(x.T).transpose(0, 1)

    class Merged(First):
        def forward(self, x):
            return self.table(x.flatten()).unflatten(0, x.shape)

    for build in (First, Merged):
        check_layer(prepared_inside(build(), "table"), TOKENS)


def test_a_tied_decoder_is_one_block_without_explicit_rows(monkeypatch):
    class Language(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.table, self.decoder = nn.Embedding(V, D), nn.Linear(D, V, bias=bias)
            self.decoder.weight = self.table.weight

        def forward(self, x):
            return self.decoder(torch.sin(self.table(x)).cumsum(1))

    for bias in (True, False):
        model = Language(bias).double()
        check_layer(model, TOKENS)
        with monkeypatch.context() as patch:
            patch.setattr(OneHotOuter, "dense", None)
            (factors,) = curvlib.collect(model, curvlib.Exact(curvlib.Gaussian()), TOKENS).values()
            factors.gram()


def test_training_an_embedding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.Linear(32, 5)).double()
    x, y = torch.randint(50, (40, 4)), torch.randint(5, (40,))
    optimizer = curvlib.TENGraD(model, lr=0.5, damping=0.1, refresh=2)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 1.0}, "max_norm=1.0 changes its weight in place"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq=True has a gradient that is not"),
    ],
)
def test_what_has_no_exact_rows_is_refused(kind, options, message):
    model = nn.Sequential(kind(V, D, **options), nn.Flatten(), nn.LazyLinear(2))
    model(TOKENS)
    with pytest.raises(CaptureError, match=f"{kind.__name__} with {message}"):
        curvlib.collect(model, curvlib.Exact(), TOKENS)
