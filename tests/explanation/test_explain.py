"""explain: every parameter is listed, numbers are those of measured tensors, nothing is left changed."""

import json

import pytest
import torch
from rich.console import Console
from torch import nn

import curvlib
from curvlib import explain
from curvlib.errors import ConfigurationError
from curvlib.explanation.counting import CountFlops
from curvlib.layers import register, registry


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.gain * x


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(6))
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.body.weight.requires_grad_(False)

    def forward(self, x):
        return self.head(self.body(x + self.token).tanh())


def convnet():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)
    )


def row(explanation, name):
    return next(one for one in explanation.parameters if one.name == name)


def arrays_of(state, seen):
    """Bytes of all different tensors inside a state, by attributes alone."""
    if isinstance(state, torch.Tensor):
        seen[id(state)] = state.numel() * state.element_size()
    elif isinstance(state, dict):
        for value in state.values():
            arrays_of(value, seen)
    elif hasattr(state, "__dict__"):
        arrays_of(vars(state), seen)
    return seen


@pytest.mark.parametrize("fisher", [curvlib.Sampled(), curvlib.Exact(), curvlib.Empirical()])
def test_bytes_are_those_of_measured_tensors(fisher):
    model, x, y = convnet(), torch.randn(8, 2, 6, 6), torch.randint(3, (8,))
    totals = explain(model, x, fisher=fisher).totals
    loss = nn.functional.cross_entropy if fisher.needs_backward else None
    given = curvlib.collect(model, fisher, x, loss=loss and (lambda out: loss(out, y)))
    assert totals["factor_bytes"] == sum(factors.nbytes for factors in given.values())
    optimizer = curvlib.compose(model, fisher=fisher, solver=curvlib.Woodbury(), damping=0.1, lr=0.1)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    states = optimizer.curvature.values()
    assert totals["inverse_bytes"] == sum(sum(arrays_of(state.inverse, {}).values()) for state in states)
    kept = sum(sum(arrays_of([state.estimate, state.inverse], {}).values()) if False else
               sum(arrays_of({"e": state.estimate, "i": state.inverse}, {}).values()) for state in states)  # fmt: skip
    assert totals["kept_bytes"] == kept
    assert (
        totals["size"] == totals["size_in_blocks"] == totals["size_exact"] == sum(p.numel() for p in model.parameters())
    )


def test_sums_and_shares_add_up_and_are_plain_data():
    explanation = explain(convnet(), torch.randn(8, 2, 6, 6), fisher=curvlib.Exact())
    data = json.loads(json.dumps(explanation.to_dict()))
    for cost in ("factor_bytes", "inverse_bytes", "kept_bytes", "capture_flops", "refresh_flops", "step_flops"):
        assert data["totals"][cost] == sum(one[cost] for one in data["parameters"]) > 0
    assert sum(one["share"]["bytes"] for one in data["parameters"]) == pytest.approx(1)
    assert sum(one["share"]["flops"] for one in data["parameters"]) == pytest.approx(1)
    assert {"name", "block", "adapter", "solver", "exact", "why", "rows"} <= set(data["parameters"][0])
    assert data["parameters"][0]["rows"] == 8 * 3
    assert "n³ / 3" in data["formulas"].values()


def test_operations_of_a_linear_layer_follow_from_its_sizes():
    n, a, o = 16, 40, 30
    model = nn.Sequential(nn.Linear(7, a), nn.Linear(a, o, bias=False))
    second = row(explain(model, torch.randn(n, 7)), "1.weight")
    assert second.capture_flops == 2 * n * a * o  # the cotangent goes on to the first layer
    # Both Grams, the Cholesky factor; their Hadamard product, division and finiteness checks are elementwise passes.
    leading = 2 * n * n * (a + o) + n**3 / 3
    assert leading <= second.refresh_flops <= leading + 10 * n * n
    # J v, the two triangles, Jᵀ w.
    leading = 2 * 2 * n * a * o + 2 * n * n
    assert leading <= second.step_flops <= leading + 10 * (n * a + n * o + a * o)
    assert row(explain(model, torch.randn(n, 7)), "0.weight").capture_flops == 0
    empirical = explain(model, torch.randn(n, 7), fisher=curvlib.Empirical())
    assert row(empirical, "1.weight").capture_flops == 0


@pytest.mark.parametrize(
    ("run", "flops"),
    [
        (lambda a: a @ a, 2 * 2 * 6**3),
        (lambda a: torch.linalg.cholesky(a @ a.mT + 9 * torch.eye(6)), 2 * (2 * 6**3 + 6**3 / 3 + 36) + 36),
        (lambda a: torch.cholesky_solve(a, a), 2 * 2 * 6**3),
        (lambda a: torch.linalg.eigh(a), 2 * 9 * 6**3),
        (lambda a: torch.linalg.inv(a), 2 * 2 * 6**3),
        (lambda a: torch.linalg.solve_triangular(a, a, upper=False), 2 * 6**3),
        (lambda a: a + 1, 72),
        (lambda a: a.sum(0), 72),
        (lambda a: a.mT.reshape(-1), 0),
        (lambda a: nn.functional.conv1d(a, torch.ones(4, 3, 3), groups=2), 2 * 2 * 4 * 4 * 3 * 3),
        (lambda a: nn.functional.conv_transpose1d(a, torch.ones(6, 2, 3)), 2 * 2 * 6 * 6 * 2 * 3),
    ],
)
def test_operations_are_counted_by_the_sizes_of_operands(run, flops):
    matrices = torch.eye(6).repeat(2, 1, 1) * 2
    with CountFlops() as counter:
        run(matrices)
    assert counter.total == flops


def test_the_convolution_gradient_counts_groups_once():
    x, weight = torch.randn(2, 4, 5, requires_grad=True), torch.randn(6, 2, 3, requires_grad=True)
    out = nn.functional.conv1d(x, weight, groups=2)
    with CountFlops() as counter:
        torch.autograd.grad(out, [x, weight], torch.ones_like(out))
    assert counter.total - 2 * (2 * 2 * 3 * weight.numel()) <= 2 * out.numel()


def test_adapters_and_exceptions_are_named(own_registry):
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), Scale(6), nn.Linear(6, 3))
    x = torch.randn(8, 6)
    table = explain(model, x)
    assert row(table, "2.gain").adapter == "torch.func fallback"
    assert row(table, "2.gain").closed_form is False
    assert row(table, "2.gain").exact
    assert "no closed form" in row(table, "2.gain").why
    assert row(table, "2.gain").capture_flops > 0
    assert [row(table, name).exact for name in ("0.weight", "1.weight", "3.weight")] == [False, False, True]
    assert "couples samples" in row(table, "0.weight").why

    @register(Scale)
    def scale(layer, x, g):
        return curvlib.factors.Dense(gain=g * x)

    table = explain(model.eval(), x)
    assert row(table, "2.gain").adapter == "scale"
    assert all(one.exact and not one.why for one in table.parameters)


def test_what_no_block_covers_is_listed_with_the_remedy():
    x = torch.randn(8, 6)
    table = explain(Bare(), x)
    token = row(table, "token")
    assert (token.adapter, token.exact, token.block) == ("uncovered", False, "")
    assert "register an adapter for Bare" in token.why
    assert "rest=" in token.why
    assert row(table, "body.weight").adapter == "frozen"
    assert [one.name for one in table.parameters] == [name for name, _ in Bare().named_parameters()]
    assert row(explain(Bare(), x, rest="sgd"), "token").solver == "sgd"
    assert row(explain(Bare(), x, rest="fallback"), "token").exact
    assert table.totals["size_in_blocks"] == table.totals["size"] - 6 - 36


def test_blocks_that_fail_do_not_hide_the_others(own_registry):
    class Picky(curvlib.Woodbury):
        def update(self, estimate, factors):
            if "bias" not in factors.shapes:
                raise ConfigurationError("needs a bias")
            return super().update(estimate, factors)

    @register(Scale)
    def twice(layer, x, g):
        return curvlib.factors.Dense(gain=2 * g * x)

    class Unused(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(6, 6), Scale(6), nn.Linear(6, 3))
    model.spare = nn.Linear(2, 2)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    x = torch.randn(8, 6)
    table = explain(model, x, solver=Picky())
    assert "not called" in row(table, "spare.weight").why
    assert "do not add up" in row(table, "1.gain").why
    assert "Picky() cannot be used: needs a bias" in row(table, "1.gain").why
    assert [row(table, name).exact for name in ("0.weight", "1.gain", "2.bias")] == [True, False, True]

    @register(Scale, replace=True)
    def few(layer, x, g):
        return curvlib.factors.Dense(gain=(g * x)[1:])

    table = explain(model, x)
    assert "returned 7 rows where the batch has 8" in row(table, "1.gain").why
    sound = explain(nn.Sequential(model[0], nn.Identity(), model[2]), x)
    assert row(table, "2.weight") == row(sound, "2.weight")


def test_an_optimizer_is_explained_with_its_own_parts():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    solver = {"0": curvlib.solvers.Dense(), "*": curvlib.Woodbury()}
    optimizer = curvlib.compose(model, fisher=curvlib.Exact(), solver=solver, damping=0.1, lr=0.1)
    x = torch.randn(8, 6)
    table = explain(optimizer, x)
    assert [row(table, name).solver for name in ("0.weight", "1.weight")] == ["Dense()", "Woodbury()"]
    assert row(table, "1.bias").rows == 24
    assert optimizer._capture.armed
    with pytest.raises(ConfigurationError, match="leave these out"):
        explain(optimizer, x, rest="sgd")
    nn.functional.cross_entropy(model(x), torch.zeros(8, dtype=torch.long)).backward()
    optimizer.step()


def test_the_model_is_as_it_was():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    explain(model, torch.ones(4, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_text_and_rich_show_every_parameter():
    table = explain(Bare(), torch.randn(8, 6))
    text = str(table)
    assert all(one.name in text for one in table.parameters)
    assert "no [1]" in text
    assert "[1] no block covers it" in text
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    assert "head.weight" in console.export_text()
    assert max(map(len, text.splitlines())) <= 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": 3}, "explain takes a torch.nn.Module or a curvlib optimizer, got int"),
        ({"rest": "ignore"}, "rest must be one of"),
        ({"solver": {"nothing": curvlib.Woodbury()}}, r"matches no block; the blocks are \['body', 'head'\]"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        explain(arguments.pop("model", Bare()), torch.randn(8, 6), **arguments)
