"""Laws 1, 3 and 4 through the optimizer: steps in any training loop against the dense truth."""

import pytest
import torch
from corners import batch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from truth import CATEGORICAL, assert_steps_close, exact_step, mean_gradient, network, step_taken

import curvlib

SOLVERS = (curvlib.Woodbury(), curvlib.solvers.Dense())


# -- through the optimizer --------------------------------------------------------------------------------------------


def mlp(seed=0):
    return network(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), seed=seed)


def composed(model, fisher=None, damping=0.3, **options):
    options = {"solver": curvlib.Woodbury(), "lr": 1.0, **options}
    return curvlib.compose(model, fisher=fisher or curvlib.Exact(), damping=damping, **options)


def loss_of(outputs, targets, n):
    return CATEGORICAL.nll(outputs, targets) / n


def one_pass(model, x, y):
    loss_of(model(x), y, len(x)).backward()


def two_passes(model, x, y):
    (loss_of(model(x[:4]), y[:4], len(x)) + loss_of(model(x[4:]), y[4:], len(x))).backward()


def two_backwards(model, x, y):
    first, second = model(x[:4]), model(x[4:])
    loss_of(second, y[4:], len(x)).backward()
    loss_of(first, y[:4], len(x)).backward()


def evaluation_in_between(model, x, y):
    loss = loss_of(model(x), y, len(x))
    with torch.no_grad():
        model.eval()(batch(2, 4))
    model.train()
    loss.backward()


def inference_in_between(model, x, y):
    loss = loss_of(model(x), y, len(x))
    with torch.inference_mode():
        model(batch(2, 4))
    loss.backward()


def passes_without_a_backward(model, x, y):
    model(batch(2, 4))
    loss = loss_of(model(x), y, len(x))
    model(batch(3, 4))
    loss.backward()


def backward_twice(model, x, y):
    loss = loss_of(model(x), y, 2 * len(x))
    loss.backward(retain_graph=True)
    loss.backward()


LOOPS = (
    one_pass,
    two_passes,
    two_backwards,
    evaluation_in_between,
    inference_in_between,
    passes_without_a_backward,
    backward_twice,
)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_a_step_is_the_natural_gradient_of_what_the_backward_went_through(kind, loop):
    model, x = mlp(), batch(9, 4)
    torch.manual_seed(2)
    y = torch.randint(3, (9,))
    expected = exact_step(model, CATEGORICAL, x, y, damping=0.3, empirical=kind == "empirical")
    optimizer = composed(model, curvlib.Exact() if kind == "exact" else curvlib.Empirical())
    loop(model, x, y)
    assert_steps_close(step_taken(model, optimizer), expected)


def test_a_closure_takes_the_same_step():
    model, x, y = mlp(), batch(9, 4), torch.arange(9) % 3
    expected = exact_step(model, CATEGORICAL, x, y, damping=0.3)
    optimizer = composed(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step(lambda: one_pass(model, x, y))
    assert_steps_close({name: before[name] - p.detach() for name, p in model.named_parameters()}, expected)


def test_the_last_batch_of_two_steps_defines_the_second_one():
    model, x = mlp(), batch(9, 4)
    y = torch.arange(9) % 3
    optimizer = composed(model)
    for part in (slice(4), slice(4, 9)):
        expected = exact_step(model_copy(model), CATEGORICAL, x[part], y[part], damping=0.3)
        one_pass(model, x[part], y[part])
        assert_steps_close(step_taken(model, optimizer), expected)
        optimizer.zero_grad()


def model_copy(model):
    """The same network without hooks."""
    copy = mlp()
    copy.load_state_dict(model.state_dict())
    return copy


# -- laws 3 and 4 -----------------------------------------------------------------------------------------------------


@given(st.permutations(range(9)), st.sampled_from(["exact", "empirical"]))
def test_the_order_of_samples_changes_nothing(order, kind):
    x, y, steps = batch(9, 4), torch.arange(9) % 3, []
    for index in (list(range(9)), order):
        model = mlp()
        optimizer = composed(model, curvlib.Exact() if kind == "exact" else curvlib.Empirical())
        one_pass(model, x[index], y[index])
        steps.append(step_taken(model, optimizer))
    assert_steps_close(*steps)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_with_much_damping_the_natural_gradient_is_the_gradient_over_it(solver):
    model, x, y = mlp(), batch(9, 4), torch.arange(9) % 3
    gradient = mean_gradient(model, CATEGORICAL.nll, x, y)
    errors = []
    for damping in (1e4, 1e8):
        model = mlp()
        optimizer = composed(model, solver=solver, damping=damping)
        one_pass(model, x, y)
        step = step_taken(model, optimizer)
        errors.append(max(float((step[k] * damping - gradient[k]).norm() / gradient[k].norm()) for k in gradient))
    assert 1e-9 < errors[0] < 1e-2
    assert errors[1] < 2e-4 * errors[0] + 1e-7  # falls as 1 / λ
