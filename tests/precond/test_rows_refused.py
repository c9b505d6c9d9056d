"""What a solver has no meaning for is refused when it is composed; what is composed takes steps."""

import re

import pytest
import torch
from torch import nn

import curvlib
from curvlib import solvers
from curvlib.errors import ConfigurationError
from curvlib.solvers import KBFGS, KFAC, KID, KIS, Diagonal, Solver, Switch, Woodbury

OPTIONS = {"Switch": {"solvers": (KID(), KIS()), "until": (1,)}}
PUBLIC = sorted(name for name in solvers.__all__ if issubclass(getattr(solvers, name), Solver) and name != "Solver")
KRONECKER = {"EKFAC", "Eva", "KBFGS", "KFAC", "MKOR", "SINGD", "SKFAC", "SOAP", "Shampoo"}


class Layer(nn.Module):
    """One module, of whose results the first counts."""

    def __init__(self, layer, *frozen, calls=1):
        super().__init__()
        self.layer, self.calls = layer, calls
        for name in frozen:
            layer.get_parameter(name).requires_grad_(False)

    def forward(self, x):
        out = self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        for _ in range(self.calls - 1):
            out = self.layer(torch.tanh(out))
        return (out if isinstance(out, torch.Tensor) else out[0]).flatten(1)


class Tied(nn.Module):
    """Two modules with one weight."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second
        second.weight = first.weight

    def forward(self, x):
        if isinstance(self.second, nn.Embedding | nn.EmbeddingBag):
            return torch.cat([self.first(x).flatten(1), self.second(4 - x).flatten(1)], 1)
        return self.second(torch.tanh(self.first(x))).flatten(1)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x):
        return torch.tanh(x @ self.weight)


FLAT, SEQUENCE, IMAGE, TOKENS = (6, 4), (6, 5, 4), (6, 4, 5), (6, 3)
KINDS = {
    "linear": (lambda: Layer(nn.Linear(4, 4)), FLAT, set()),
    "linear, called twice": (lambda: Layer(nn.Linear(4, 4), calls=2), FLAT, set()),
    "linear, frozen bias": (lambda: Layer(nn.Linear(4, 4), "bias"), FLAT, set()),
    "linear, frozen weight": (lambda: Layer(nn.Linear(4, 4), "weight"), FLAT, {"KBFGS"}),
    "sequence": (lambda: Layer(nn.Linear(4, 4)), SEQUENCE, set()),
    "grouped convolution": (lambda: Layer(nn.Conv1d(4, 4, 3, groups=2)), IMAGE, set()),
    "convolution, frozen weight": (lambda: Layer(nn.Conv1d(4, 4, 3), "weight"), IMAGE, {"KBFGS"}),
    "transposed convolution": (lambda: Layer(nn.ConvTranspose1d(4, 4, 3)), IMAGE, KRONECKER),
    "embedding": (lambda: Layer(nn.Embedding(5, 3)), TOKENS, {"KBFGS"}),
    "bag": (lambda: Layer(nn.EmbeddingBag(5, 3)), TOKENS, {"KBFGS"}),
    "layer norm": (lambda: Layer(nn.LayerNorm(4)), FLAT, KRONECKER),
    "batch norm": (lambda: Layer(nn.BatchNorm1d(4)), FLAT, KRONECKER),
    "LSTM": (lambda: Layer(nn.LSTM(4, 3, batch_first=True)), SEQUENCE, KRONECKER),
    "attention": (lambda: Layer(nn.MultiheadAttention(4, 2, batch_first=True)), SEQUENCE, KRONECKER),
    "bare matrix": (Bare, FLAT, KRONECKER),
    "tied embedding and decoder": (lambda: Tied(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)), TOKENS, KRONECKER),
    "tied embedding and bag": (lambda: Tied(nn.Embedding(5, 3), nn.EmbeddingBag(5, 3)), TOKENS, {"KBFGS"}),
    "tied linear, one bias": (lambda: Tied(nn.Linear(4, 4), nn.Linear(4, 4, bias=False)), FLAT, KRONECKER),
    "tied linear": (lambda: Tied(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)), FLAT, set()),
}


def composed(model, solver, **options):
    options = {"damping": 0.1, "lr": 0.01, "rest": "fallback"} | options
    return curvlib.compose(model, fisher=curvlib.Empirical(), solver=solver, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PUBLIC)
def test_solvers_by_kinds_of_rows(name, kind):
    build, shape, refused = KINDS[kind]
    torch.manual_seed(0)
    model, solver = build(), getattr(solvers, name)(**OPTIONS.get(name, {}))
    x = torch.randint(5, shape) if shape is TOKENS else torch.randn(shape)
    if name in refused:
        (block,) = curvlib.layers.partition(model, bare="fallback").blocks
        with pytest.raises(ConfigurationError, match=rf"'{re.escape(block.name)}' \(.*{name}\).*use Woodbury, "):
            composed(model, solver)
        return
    optimizer = composed(model, solver)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    before = [parameter.clone() for parameter in model.parameters() if parameter.requires_grad]
    for _ in range(2):
        assert torch.isfinite(optimizer.step(closure))
    after = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_a_weight_and_the_bias_of_another_layer_are_no_matrix():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    model[1].weight.requires_grad_(False)
    with pytest.raises(ConfigurationError, match="'network'.*use Woodbury, Dense or Diagonal there"):
        composed(model, KFAC(), blocks="network")


@pytest.mark.parametrize(("frozen", "reason"), [(False, "is a table that is looked up in"), (True, "is frozen")])
def test_the_sentence_names_block_solver_reason_and_what_to_use(frozen, reason):
    model = nn.Sequential(nn.EmbeddingBag(5, 4), nn.Linear(4, 3))
    model[frozen].weight.requires_grad_(not frozen)
    block, kind = ("1", "linear") if frozen else ("0", "embedding_bag")
    message = rf"none in '{block}' \({kind}; KBFGS\): the weight of '{block}' {reason}; use Woodbury, Diagonal or KFAC"
    for solver in (KBFGS(), Switch((KBFGS(), Diagonal()), (1,))):
        with pytest.raises(ConfigurationError, match=message.replace("KBFGS", type(solver).__name__)):
            composed(model, {block: solver, "*": Diagonal()})
    for other in (Woodbury(), Diagonal(), KFAC()):
        composed(model, {block: other, "*": KBFGS() if not frozen else Diagonal()})


def test_a_weight_that_is_frozen_later_is_refused_then():
    model = nn.Linear(4, 3)
    kept = composed(model, KBFGS())
    model.weight.requires_grad_(False)
    with pytest.raises(ConfigurationError, match=r"is frozen; use Woodbury"):
        model(torch.randn(6, 4))
    kept.detach()


def test_an_adapter_of_a_user_says_so_too():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(5, 3))

        def forward(self, x):
            return self.weight[x]

    @curvlib.layers.register(Table, columns=True, lookup=True)
    def table(layer, x, g):
        return curvlib.factors.OneHotOuter(x[:, None], g[:, :, None], 5)

    with pytest.raises(ConfigurationError, match=r"'Table' \(table; KBFGS\)"):
        composed(Table(), KBFGS())
    model = Table()
    optimizer = composed(model, KFAC())
    model(torch.arange(5)).square().mean().backward()
    optimizer.step()
    assert bool((model.weight != 1).all())
