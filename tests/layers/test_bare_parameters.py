"""Parameters beside layers, padding, modules used more than once: covered exactly, or named in an error."""

import pytest
import torch
from per_sample import assert_exact, numbers, randomized
from torch import nn
from torch.nn.utils import parametrize

import curvlib
from curvlib.errors import CaptureError, ConfigurationError, UncoveredParameterError
from curvlib.layers import partition

N, WIDTH = 4, 4


class Scaled(nn.Module):
    """A residual branch with a layer scale, as in ConvNeXt."""

    def __init__(self):
        super().__init__()
        self.spread = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gamma = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        h = self.mix(self.norm(self.spread(x).permute(0, 2, 3, 1))).tanh()
        return x + (self.gamma * h).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(2, WIDTH, 2, stride=2), nn.Sequential(Scaled(), Scaled())
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(2, WIDTH, 2, stride=2)
        self.token, self.places = nn.Parameter(torch.zeros(1, 1, WIDTH)), nn.Parameter(torch.zeros(1, 5, WIDTH))
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(x), -1, -1), h], 1) + self.places
        return self.head(self.layer(h)[:, 0])


class Listed(nn.Module):
    """Parameters in a list and a dictionary, and one that a parametrization makes."""

    def __init__(self):
        super().__init__()
        self.shifts = nn.ParameterList([torch.ones(WIDTH), torch.ones(1)])
        self.gains = nn.ParameterDict({"low": torch.ones(WIDTH), "high": torch.ones(2)})
        self.bent = nn.Parameter(torch.ones(WIDTH))
        parametrize.register_parametrization(self, "bent", nn.Softplus())
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x):
        h = (self.body(x * self.gains["low"] + self.shifts[0]) * self.bent).tanh()
        return self.head(h) * self.gains["high"] + self.shifts[1]


MODELS = {
    "vit": (ViT, (N, 2, 4, 4), {"ViT.(own)": ["token", "places"]}),
    "convnext": (
        ConvNeXt,
        (N, 2, 4, 4),
        {"blocks.0.(own)": ["gamma"], "blocks.1.(own)": ["gamma"]},
    ),
    "lists": (
        Listed,
        (N, WIDTH),
        {
            "ParametrizedListed.(own)": [
                "gains.high",
                "gains.low",
                "parametrizations.bent.original",
                "shifts.0",
                "shifts.1",
            ]
        },
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_bare_parameters_are_covered_by_the_module_that_holds_them(name, training):
    build, shape, own = MODELS[name]
    model = randomized(build()).train(training)
    taken = assert_exact(model, numbers(*shape), rest="fallback")
    found = {block: rows for block, rows in taken.items() if block.endswith("(own)")}
    assert {block: sorted(rows.shapes) for block, rows in found.items()} == {k: sorted(v) for k, v in own.items()}
    assert not partition(model, bare="fallback").rest
    for block in partition(model, bare="fallback").blocks:
        if block.name in own:
            assert not block.uses[0].adapter.closed_form


def test_without_a_word_about_them_bare_parameters_are_an_error():
    model, x = randomized(ViT()), numbers(N, 2, 4, 4)
    with pytest.raises(UncoveredParameterError, match="'token', 'places'.*rest='fallback'.*rest='freeze'"):
        curvlib.collect(model, curvlib.Exact(), x)
    assert "ViT.(own)" not in curvlib.collect(model, curvlib.Exact(), x, rest="freeze")
    assert list(partition(model).rest) == ["token", "places"]
    with pytest.raises(ConfigurationError, match="rest must be 'fallback' or 'freeze', got 'sgd'"):
        curvlib.collect(model, curvlib.Exact(), x, rest="sgd")
    with pytest.raises(ConfigurationError, match="bare must be None or 'fallback', got 'yes'"):
        partition(model, bare="yes")


@pytest.mark.parametrize(
    "fisher",
    [curvlib.Sampled(curvlib.Categorical()), curvlib.Exact(curvlib.Categorical()), curvlib.Empirical()],
    ids=["sampled", "exact", "empirical"],
)
def test_an_optimizer_trains_bare_parameters_by_the_fallback(fisher):
    model = randomized(ViT()).float()
    optimizer = curvlib.compose(model, fisher=fisher, solver=curvlib.Woodbury(), damping=0.1, lr=0.3, rest="fallback")
    assert "ViT.(own)" in optimizer.curvature
    x, y = numbers(8, 2, 4, 4).float(), torch.arange(8) % 2
    before, losses = model.token.detach().clone(), []
    for _ in range(6):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert not torch.equal(model.token, before)


def test_a_bare_parameter_that_an_inner_module_holds_too_is_one_block():
    class Inner(nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.shift, self.body = shift, nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.body(x + self.shift).tanh()

    class Outer(nn.Module):
        def __init__(self, both):
            super().__init__()
            shift = nn.Parameter(torch.ones(WIDTH))
            self.first, self.second, self.head = Inner(shift), Inner(shift), nn.Linear(WIDTH, 2)
            if both:
                self.shift = shift
            self.both = both

        def forward(self, x):
            h = self.second(self.first(x))
            return self.head(h * self.shift if self.both else h)

    for both, name in ((True, "Outer.(own)"), (False, "first.(own)")):
        taken = assert_exact(randomized(Outer(both)), numbers(N, WIDTH), rest="fallback")
        assert [block for block in taken if block.endswith("(own)")] == [name]


def test_low_rank_updates_beside_a_frozen_layer_are_one_block():
    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
            self.a, self.b = nn.Parameter(torch.ones(2, WIDTH)), nn.Parameter(torch.ones(WIDTH, 2))

        def forward(self, x):
            return self.base(x) + x @ self.a.T @ self.b.T

    taken = assert_exact(randomized(nn.Sequential(LowRank(), nn.Tanh(), nn.Linear(WIDTH, 2))), numbers(N, WIDTH))
    assert {name: list(rows.shapes) for name, rows in taken.items()} == {"0": ["a", "b"], "2": ["weight", "bias"]}


def test_batch_statistics_around_bare_parameters_are_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.norm, self.head = (
                nn.Parameter(torch.ones(WIDTH)),
                nn.BatchNorm1d(WIDTH),
                nn.Linear(WIDTH, 2),
            )

        def forward(self, x):
            return self.head(self.norm(x * self.gain))

    model = randomized(Model())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CaptureError, match="Model.*eval mode"):
        curvlib.collect(model, curvlib.Exact(), numbers(N, WIDTH), rest="fallback", verify=False)
    assert model.norm.num_batches_tracked == before["norm.num_batches_tracked"] + 1  # by the forward pass alone
    assert_exact(model.eval(), numbers(N, WIDTH), rest="fallback")


# -- padding, and modules used more than once -------------------------------------------------------------------------


class Ragged(nn.Module):
    """Padded sequences whose padding no output depends on."""

    def __init__(self, lengths):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(3, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)
        self.lengths = lengths

    def forward(self, x, lengths=None):
        valid = torch.arange(x.shape[1]) < (self.lengths if lengths is None else lengths)[:, None]
        h = self.norm(self.body(x)).tanh()
        return self.head((h * valid[..., None]).sum(1) / valid.sum(1, keepdim=True))


def test_padding_contributes_nothing():
    lengths = torch.tensor([5, 2, 1, 3])
    x = numbers(N, 5, 3)

    def alone(sample):
        return x[sample : sample + 1, : lengths[sample]], lengths[sample : sample + 1]

    assert_exact(randomized(Ragged(lengths)), x, alone=alone)


def test_a_module_that_two_parents_share_and_call_several_times():
    class Parent(nn.Module):
        def __init__(self, child):
            super().__init__()
            self.child, self.own = child, nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.own(self.child(self.child(x).tanh())).tanh()

    child = nn.Linear(WIDTH, WIDTH)
    model = randomized(nn.Sequential(Parent(child), Parent(child), nn.Linear(WIDTH, 2)))
    assert [*assert_exact(model, numbers(N, WIDTH))] == ["0.child", "0.own", "1.own", "2"]
    assert_exact(model, numbers(N, 3, WIDTH).mean(1))


def test_layers_called_on_sequences_and_on_vectors():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

        def forward(self, x):
            return self.head(self.body(self.body(x).tanh().mean(1)))

    assert_exact(randomized(Model()), numbers(N, 3, WIDTH))
