"""Training steps as pure functions: the optimizer's own steps, compiled without a break in the graph."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

import curvlib
from curvlib import Empirical, KLClip, Momentum, WeightDecay, Woodbury
from curvlib.errors import ConfigurationError
from curvlib.precond import GradientClip, PureStep
from curvlib.solvers import EKFAC, KFAC, SKFAC

MODELS = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(12, 10), nn.ReLU(inplace=True), nn.Linear(10, 3)), (5, 12)),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(128, 3)),
        (5, 2, 6, 6),
    ),
    "sequences": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Flatten(), nn.Linear(18, 3)), (5, 3, 4)),
}  # fmt: skip
TRANSFORMS = [Momentum(0.9, nesterov=True), WeightDecay(1e-2)]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def problem(name, dtype=torch.float64):
    torch.manual_seed(0)
    build, shape = MODELS[name]
    return build().to(dtype), torch.randn(3, *shape, dtype=dtype), torch.randint(0, 3, (3, shape[0]))


def pure(model, solver=None, transforms=TRANSFORMS):
    return PureStep(
        model, functional.cross_entropy, solver=solver or Woodbury(), damping=0.1, lr=0.1, transforms=transforms
    )


def is_solver(name):
    kind = getattr(curvlib.solvers, name)
    return isinstance(kind, type) and issubclass(kind, curvlib.Solver) and kind is not curvlib.Solver


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "solver", [Woodbury(), KFAC(decay=0.0), EKFAC(decay=0.0), SKFAC()], ids=lambda s: type(s).__name__
)
def test_the_steps_are_those_of_the_optimizer(name, solver):
    if name == "sequences" and not isinstance(solver, Woodbury):
        pytest.skip("LayerNorm has no Kronecker form")
    model, xs, ys = problem(name)
    step = pure(model, solver)
    optimizer = curvlib.compose(
        model, fisher=Empirical(), solver=solver, damping=0.1, lr=0.1, refresh=1, transforms=TRANSFORMS
    )
    state = step.init(xs[0])
    for x, y in zip(xs, ys, strict=True):
        before = {name: value.clone() for name, value in state["parameters"].items()}
        old = state
        state, loss = step(state, (x,), (y,))
        optimizer.zero_grad()
        expected = functional.cross_entropy(model(x), y)
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(loss, expected)
        for name_, value in model.named_parameters():
            torch.testing.assert_close(state["parameters"][name_], value.detach(), rtol=1e-9, atol=1e-11)
            assert torch.equal(old["parameters"][name_], before[name_])


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_step_is_one_graph(name):
    model, xs, ys = problem(name)
    step = pure(model)
    state = step.init(xs[0])
    report = torch._dynamo.explain(step)(state, (xs[0],), (ys[0],))
    assert report.graph_count == 1
    assert report.graph_break_count == 0
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    expected = given = state
    for x, y in zip(xs, ys, strict=True):
        expected, loss = step(expected, (x,), (y,))
        given, same = compiled(given, (x,), (y,))
        torch.testing.assert_close(same, loss)
    for name_, value in expected["parameters"].items():
        torch.testing.assert_close(given["parameters"][name_], value, rtol=1e-9, atol=1e-11)


SOLVERS = [
    pytest.param(name, marks=() if name == "KFAC" else pytest.mark.nightly)
    for name in curvlib.solvers.__all__
    if name not in ("KIS", "Switch") and is_solver(name)
]


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_has_its_place_in_the_graph(solver):
    """But `KIS`, which draws its rows in Python, and `Switch`, which asks for the state of a training."""
    # Compiled one after the other: sizes that have changed once are symbols from then on.
    for name in ("perceptron", "convolutions"):
        model, xs, ys = problem(name)
        step = pure(model, getattr(curvlib.solvers, solver)())
        state = step.init(xs[0])
        given, loss = torch.compile(step, backend="eager", fullgraph=True)(state, (xs[0],), (ys[0],))
        expected, same = step(state, (xs[0],), (ys[0],))
        torch.testing.assert_close(loss, same)
        for key, value in expected["parameters"].items():
            torch.testing.assert_close(given["parameters"][key], value, rtol=1e-9, atol=1e-11)


COLD = """
import torch
from torch.nn import functional
import curvlib

model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8, 3))
solver = curvlib.solvers.{solver}()
step = curvlib.precond.PureStep(model, functional.cross_entropy, solver=solver, damping=0.1, lr=0.1)
x, y = torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
state = step.init(x)
state, loss = torch.compile(step, backend="eager", fullgraph=True)(state, (x,), (y,))
assert loss.isfinite()
"""


@pytest.mark.parametrize("solver", ["Woodbury", "EKFAC"])
def test_a_program_may_begin_with_a_compiled_step(solver):
    """Nothing has been imported or looked up by a step before, which a compiler could not follow."""
    done = subprocess.run([sys.executable, "-c", COLD.format(solver=solver)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("solver", [EKFAC(decay=0.0), KFAC(decay=0.0, form="eigen")], ids=["EKFAC", "KFAC"])
def test_eigenvectors_of_what_is_not_finite_are_not_numbers_in_a_graph(solver):
    model, xs, ys = problem("perceptron")
    step = pure(model, solver)
    state = step.init(xs[0])
    xs[0, 0, 0] = math.inf
    new, loss = torch.compile(step, backend="eager", fullgraph=True)(state, (xs[0],), (ys[0],))
    assert not loss.isfinite()
    assert new["parameters"]["0.weight"].isnan().all()


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.layer(x) * self.scale


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), Twice(), nn.LSTM(3, 3)])
def test_models_without_a_pure_step_are_refused(model):
    with pytest.raises(ConfigurationError, match="compose"):
        pure(model)


@pytest.mark.parametrize("transform", [KLClip(), GradientClip(1.0), WeightDecay(0.1, coupled=True)])
def test_transforms_of_the_gradient_are_refused(transform):
    with pytest.raises(ConfigurationError, match="gradient"):
        pure(nn.Linear(3, 3), transforms=[transform])


def test_the_model_is_left_alone():
    model, xs, ys = problem("perceptron")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = pure(model)
    step(step.init(xs[0]), (xs[0],), (ys[0],))
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
