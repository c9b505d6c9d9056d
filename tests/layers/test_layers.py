"""Registry, blocks and the fallback: nothing skipped, nothing covered twice, clear refusals."""

import pytest
import torch
from torch import nn

import curvlib
from curvlib import solvers
from curvlib.errors import CaptureError, ConfigurationError
from curvlib.factors import Dense, OuterProduct
from curvlib.layers import adapter_for, fallback, partition, register, registered


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(1, 2, width))

    def forward(self, x):
        return self.gain * x


@pytest.fixture
def registry(monkeypatch):
    from curvlib.layers import registry as module

    monkeypatch.setattr(module, "_ADAPTERS", dict(module._ADAPTERS))


def collect(model, x, fisher=None):
    return curvlib.collect(model, fisher or curvlib.Exact(), x)


def test_a_custom_layer_registers_in_three_lines(registry):
    model = nn.Sequential(nn.Linear(5, 4), Scale(4), nn.Linear(4, 3)).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    expected = collect(model, x)["1"].dense().matrix()

    @register(Scale)
    def scale(layer, x, g):
        return Dense(gain=g * x)

    assert adapter_for(Scale).function is scale
    assert adapter_for(type("Sub", (Scale,), {})).function is scale
    assert registered()[Scale].closed_form
    torch.testing.assert_close(collect(model, x)["1"].dense().matrix(), expected)


class Softmaxed(Scale):
    """Multiplies with softmax(x), which it need not compute again for its rows."""

    def forward(self, x):
        probabilities = x.softmax(-1)
        self.last = probabilities.detach()
        return self.gain * probabilities


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("fisher", [curvlib.Exact(), curvlib.Sampled(), curvlib.Empirical()])
def test_an_adapter_may_look_something_up_when_a_call_ends(registry, columns, fisher):
    found = []

    @register(Softmaxed, columns=columns, saved=lambda layer, output: (layer.last, output))
    def softmaxed(layer, x, g, saved=None):
        found.append(saved)
        return Dense(gain=(g * (saved[0][:, None] if columns else saved[0])).reshape(-1, 4))

    model = nn.Sequential(nn.Linear(5, 4), Softmaxed(4), nn.Linear(4, 3)).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 3

    def rows():
        loss = (lambda outputs: nn.functional.cross_entropy(outputs, y)) if fisher.needs_backward else None
        generator = torch.Generator().manual_seed(0)
        return curvlib.collect(model, fisher, x, loss=loss, generator=generator)["1"].dense().matrix()

    ours, hidden = rows(), model[0](x)
    assert not any(tensor.requires_grad for saved in found for tensor in saved)
    assert all(torch.equal(output, model[1].gain * last) for last, output in found)
    torch.testing.assert_close(found[0][0], hidden.softmax(-1))
    register(Softmaxed, replace=True)(fallback)
    torch.testing.assert_close(ours, rows())


def test_registering_twice_needs_to_be_meant(registry):
    @register(Scale)
    def one(layer, x, g):
        return Dense(gain=g * x)

    with pytest.raises(ConfigurationError, match=r"Scale has the adapter 'one' already; pass replace=True"):
        register(Scale)(one)
    register(Scale, replace=True)(fallback)
    assert adapter_for(Scale).whole_call
    assert not adapter_for(Scale).closed_form


@pytest.mark.parametrize("what", [(), (int,), (Scale(2),)])
def test_only_module_classes_register(what):
    with pytest.raises(ConfigurationError, match="module|Module|layer class"):
        register(*what)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (lambda layer, x, g: g * x, "returned Tensor; an adapter returns Factors"),
        (lambda layer, x, g: Dense(gain=(g * x)[:-1]), "returned 5 rows where the batch has 6"),
        (lambda layer, x, g: Dense(gain=(g * x)[:, :3]), r"\{'gain': \(3,\)\}.*\{'gain': \(4,\)\}"),
        (lambda layer, x, g: Dense(weight=g * x), r"'weight'.*'gain'"),
        (
            lambda layer, x, g: Dense(gain=(g * x).float()),
            "rows of torch.float32 on cpu; its cotangents are torch.float64",
        ),
        (lambda layer, x, g: Dense(gain=(g * x).to("meta")), "rows of torch.float64 on meta"),
        (lambda layer, x, g: Dense(gain=2 * g * x), "do not add up to its gradient"),
        (lambda layer, x, g: Dense(gain=(g * x).flip(0)), "do not add up to its gradient"),
    ],
)
def test_an_adapter_that_is_wrong_is_found_out_at_the_first_pass(registry, adapter, message):
    register(Scale)(adapter)
    model = nn.Sequential(nn.Linear(5, 4), Scale(4), nn.Linear(4, 3)).double()
    with pytest.raises(CaptureError, match=message) as caught:
        collect(model, torch.randn(6, 5, dtype=torch.float64))
    assert "'1'" in str(caught.value)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_adapter_that_confuses_columns_with_samples_is_found_out(registry):
    def wrong(layer, x, g):
        rows = g * x[:, None]
        return Dense(gain=rows.transpose(0, 1).reshape(-1, rows.shape[-1]))

    register(Scale, columns=True)(wrong)
    with pytest.raises(CaptureError, match="do not add up"):
        collect(nn.Sequential(Scale(3)).double(), torch.randn(6, 3, dtype=torch.float64))


def test_blocks_follow_modules_and_join_where_weights_are_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.second.weight = self.first.weight
            self.again = self.other

        def forward(self, x):
            return self.again(self.second(self.first(x)))

    parts = partition(Tied())
    assert [block.name for block in parts.blocks] == ["first", "other"]
    assert list(parts.blocks[0].parameters) == ["first.weight", "first.bias", "second.bias"]
    assert list(parts.blocks[1].parameters) == ["weight", "bias"]
    assert not parts.rest
    assert [block.name for block in partition(nn.Linear(2, 2)).blocks] == ["Linear"]


def test_three_modules_tied_in_a_chain_are_one_block():
    a, b, c = (nn.Linear(2, 2) for _ in range(3))
    c.weight, b.bias = a.weight, c.bias
    assert len(partition(nn.Sequential(a, b, c)).blocks) == 1


def test_frozen_and_bare_parameters():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(3))
            self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
            self.body = nn.Linear(3, 3)
            self.still = nn.Linear(3, 3).requires_grad_(False)

        def forward(self, x):
            return self.still(self.body(x + self.token))

    parts = partition(Bare())
    assert [block.name for block in parts.blocks] == ["body"]
    assert list(parts.rest) == ["token"]


def test_models_without_anything_to_train_are_refused():
    for model in (nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)):
        with pytest.raises(ConfigurationError, match="no trainable parameters"):
            partition(model)
    with pytest.raises(ConfigurationError, match="run one forward pass first"):
        partition(nn.LazyLinear(3))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.LayerNorm(6), (5, 6)),
        (nn.GroupNorm(2, 4), (5, 4, 3)),
        (nn.PReLU(), (5, 6)),
        (nn.ConvTranspose2d(2, 3, 2, stride=2), (5, 2, 4, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_fallback_covers_any_module_exactly(module, shape, registry):
    register(type(module), replace=True)(fallback)
    model = nn.Sequential(module, nn.Flatten(), nn.LazyLinear(3)).double()
    x = torch.randn(*shape, dtype=torch.float64)
    model(x)
    outputs = [output for sample in x for output in model(sample[None])[0]]
    mine = list(module.parameters())
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(output, mine, retain_graph=True)]) for output in outputs
    ]
    exact = collect(model, x, curvlib.Exact(curvlib.Gaussian()))["0"]
    torch.testing.assert_close(exact.dense().matrix(), torch.stack(rows))
    assert len(collect(model, x, curvlib.Sampled(curvlib.Gaussian()))["0"]) == 5


def test_the_fallback_takes_several_inputs_and_outputs_and_frozen_parts():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Bilinear(3, 3, 4)
            self.mix.bias.requires_grad_(False)

        def forward(self, x, *, y, scale):
            return {"sum": self.mix(x, y) * scale, "unused": self.mix(y, x), "count": 1}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.pair(x, y=x.flip(1), scale=2.0)["sum"])

    with_whole = Model().double()
    x = torch.randn(5, 3, dtype=torch.float64)
    factors = collect(with_whole, x)
    assert list(factors) == ["pair.mix", "head"]
    assert list(factors["pair.mix"].shapes) == ["weight"]
    truth = torch.func.vmap(
        lambda row, g: torch.func.vjp(
            lambda w: torch.func.functional_call(with_whole, {"pair.mix.weight": w}, (row[None],))[0],
            with_whole.pair.mix.weight.detach(),
        )[1](g)[0],
    )
    columns = curvlib.Exact().cotangents(with_whole(x).detach(), None).movedim(0, 1)
    expected = torch.stack([truth(x, columns[:, c]) for c in range(3)], dim=1).flatten(0, 1).flatten(1)
    torch.testing.assert_close(factors["pair.mix"].dense().matrix(), expected)


def test_batch_statistics_are_served_and_refused_in_the_fallback(registry):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    assert list(collect(model, torch.randn(6, 4))) == ["0", "1", "2"]
    register(nn.BatchNorm1d, replace=True)(fallback)
    with pytest.raises(CaptureError, match="block '0'.*mixes samples outside any module known to do so"):
        collect(model, torch.randn(6, 4))
    with pytest.raises(CaptureError, match="BatchNorm1d has no adapter.*eval mode"):
        curvlib.collect(model, curvlib.Exact(), torch.randn(6, 4), verify=False)
    model.eval()
    assert list(collect(model, torch.randn(6, 4))) == ["0", "1", "2"]


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.body(x.transpose(0, 1)).mean(0))


class Merged(SequenceFirst):
    def forward(self, x):
        return self.head(self.body(x.flatten(0, 1)).tanh().unflatten(0, x.shape[:2]).mean(1))


@pytest.mark.parametrize("positions", [7, 5, 10])  # as many as samples, too, and twice as many
@pytest.mark.parametrize("build", [SequenceFirst, Merged])
def test_positionwise_layers_may_have_their_samples_elsewhere(build, positions):
    model = build().double()
    x = torch.randn(5, positions, 4, dtype=torch.float64)
    taken = collect(model, x)
    for name, factors in taken.items():
        parameters = list(model.get_submodule(name).parameters())
        cotangents = curvlib.Exact().cotangents(model(x).detach(), None).movedim(0, 1)
        for sample in range(5):
            for column in range(3):
                output = (model(x[sample : sample + 1])[0] * cotangents[sample, column]).sum()
                row = torch.cat([g.flatten() for g in torch.autograd.grad(output, parameters)])
                torch.testing.assert_close(factors.dense().matrix()[sample * 3 + column], row)


def test_a_sample_axis_that_cannot_be_told_is_refused():
    convolutions = nn.Sequential(
        nn.Flatten(0, 1), nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Unflatten(0, (-1, 2)), nn.Flatten()
    )
    with pytest.raises(CaptureError, match=r"input has shape \(10, 2, 6\).*5 samples; the first axis must be"):
        collect(convolutions, torch.randn(5, 2, 2, 6))


def test_mixing_samples_outside_a_module_is_refused():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            h = self.body(x)
            return self.head((h - h.mean(0)).tanh())

    with pytest.raises(CaptureError, match="block 'body'.*mixes samples"):
        collect(Centred(), torch.randn(6, 4))


def test_parameters_used_outside_their_module_are_refused():
    class Direct(nn.Module):
        def __init__(self, too):
            super().__init__()
            self.body, self.too = nn.Linear(3, 3), too

        def forward(self, x):
            h = self.body(x) if self.too else x
            return h @ self.body.weight.T

    with pytest.raises(CaptureError, match="'Direct'|'body'.*also used outside"):
        collect(Direct(True), torch.randn(6, 3))
    with pytest.raises(CaptureError, match="body' has a gradient, but its module was not called"):
        collect(nn.Sequential(Direct(False), nn.Linear(3, 3)), torch.randn(6, 3))


def test_half_precision_is_accumulated_in_float32():
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).to(torch.bfloat16)
    factors = collect(model, torch.randn(6, 5, dtype=torch.bfloat16))
    assert all(rows.gram().dtype == torch.float32 for rows in factors.values())


def test_outer_products_stay_factored():
    factors = collect(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), torch.randn(6, 5))
    assert all(isinstance(rows, OuterProduct) for rows in factors.values())


class Mixing(nn.Module):
    """A linear map of its own kind, unknown to the library."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.matrix = nn.Parameter(torch.linspace(-1, 1, d_out * d_in).reshape(d_out, d_in))

    def forward(self, x):
        return x @ self.matrix.T


@pytest.mark.parametrize("name", [name for name in solvers.__all__ if name not in ("Solver", "Switch")])
def test_a_custom_layer_works_with_every_solver_and_appears_in_explain(registry, name):
    @register(Mixing)
    def mixing(layer, x, g):
        return OuterProduct(x, g, weight="matrix")

    torch.manual_seed(0)
    model = nn.Sequential(Mixing(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(12, 5), torch.arange(12) % 3
    solver = getattr(solvers, name)()
    optimizer = curvlib.compose(model, fisher=curvlib.Empirical(), solver=solver, damping=0.5, lr=0.01)
    table = curvlib.explain(optimizer, x).to_dict()["parameters"]
    assert table[0]["name"] == "0.matrix"
    assert "mixing" in table[0]["adapter"]
    assert name in table[0]["solver"]

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[-1] < losses[0]
