"""Gradients that are thrown away, negated, or given by a closure; the hooks around a step."""

import pytest
import torch
from parts import X, Y, assert_same, backward, composed, moved, network, train, values
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import curvlib
from curvlib import Empirical, Exact, Momentum, Sampled, WeightDecay, Woodbury
from curvlib.errors import ConfigurationError
from curvlib.precond import LevenbergMarquardt
from curvlib.solvers import KBFGS, SENG, SOAP, Eva

FISHERS = [Exact(), Empirical(), Sampled()]


@pytest.mark.parametrize("fisher", FISHERS[:2], ids=str)
@pytest.mark.parametrize(
    "throw_away",
    [
        lambda model, optimizer: optimizer.zero_grad(),
        lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
        lambda model, optimizer: model.zero_grad(),
    ],
    ids=["optimizer.zero_grad()", "set_to_none=False", "model.zero_grad()"],
)
def test_rows_go_with_the_gradient_that_is_thrown_away(fisher, throw_away):
    model, twin = network(), network()
    optimizer, other = composed(model, fisher=fisher), composed(twin, fisher=fisher)
    backward(model, 3 * X + 1, Y.flip(0))
    throw_away(model, optimizer)
    backward(model)
    optimizer.step()
    train(twin, other)
    assert_same(model, twin)


def test_zero_grad_between_forward_and_backward_keeps_the_pass():
    model, twin = network(), network()
    optimizer, other = composed(model), composed(twin)
    train(model, optimizer)
    train(twin, other)
    loss = functional.cross_entropy(model(X), Y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    train(twin, other)
    assert_same(model, twin)


def test_set_to_none():
    model = network()
    optimizer = composed(model)
    train(model, optimizer)
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


# -- maximize ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("fisher", "solver"),
    [
        (Exact(), Woodbury()), (Sampled(), Woodbury()), (Empirical(), Woodbury()), (Empirical(), SOAP()),
        (Empirical(), SENG()), (Empirical(), Eva()),
    ],
    ids=str,
)  # fmt: skip
def test_maximising_is_minimising_the_negative(fisher, solver, fused):
    finals = []
    for sign, maximize in ((1, True), (-1, False)):
        model = network()
        optimizer = composed(
            model, fisher=fisher, solver=solver, maximize=maximize, fused=fused, lr=0.01,
            transforms=[Momentum(0.5), WeightDecay(0.01)],
        )  # fmt: skip
        for _ in range(4):
            optimizer.zero_grad()
            (sign * functional.cross_entropy(model(X), Y)).backward()
            optimizer.step()
        finals.append(values(model))
    assert_same(*finals, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    "options",
    [lambda: {"damping": LevenbergMarquardt(1.0, every=1)}, lambda: {"fisher": Empirical(), "solver": KBFGS()}],
    ids=["LevenbergMarquardt", "KBFGS"],
)
def test_maximising_with_a_second_look_at_the_batch(options):
    finals = []
    for sign, maximize in ((1, True), (-1, False)):
        model = network()
        optimizer = composed(model, maximize=maximize, lr=0.01, **options())

        def closure(sign=sign, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = sign * functional.cross_entropy(model(X), Y)
            loss.backward()
            return loss.detach()

        for _ in range(4):
            optimizer.step(closure)
        finals.append(values(model))
    assert_same(*finals, rtol=1e-10, atol=1e-13)


def test_a_group_may_climb_where_the_others_descend():
    model, twin = network(), network()
    before = values(model)
    train(model, composed(model, groups=[{"blocks": "2", "maximize": True}]))
    train(twin, composed(twin))
    for name, p in model.named_parameters():
        sign = -1 if name.startswith("2") else 1
        torch.testing.assert_close(p - before[name], sign * (twin.get_parameter(name) - before[name]))
    optimizer = composed(
        network(), damping=LevenbergMarquardt(1.0, every=1), groups=[{"blocks": "2", "maximize": True}]
    )
    with pytest.raises(ConfigurationError, match="minimise and groups that maximise"):
        optimizer.step(lambda: backward(optimizer.model))


def test_rest_adamw_climbs_too():
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.zeros(5).double())
            self.body = network()

        def forward(self, x):
            return self.body(x + self.shift)

    model, twin = Bare(), Bare()
    train(model, composed(model, rest="adamw", maximize=True))
    train(twin, composed(twin, rest="adamw"))
    torch.testing.assert_close(model.shift, -twin.shift)


# -- closures and hooks -----------------------------------------------------------------------------------------------


def test_a_closure_gives_the_step_of_a_loop():
    model, twin = network(), network()
    optimizer, other = composed(model, refresh=2), composed(twin, refresh=2)
    for _ in range(3):
        loss = optimizer.step(lambda: (optimizer.zero_grad(), backward(model))[1])
        train(twin, other)
    assert_same(model, twin)
    assert float(loss) > float(backward(twin))


def test_hooks_around_a_step_see_it_and_may_change_its_arguments():
    model = network()
    optimizer = composed(model)
    seen = []

    def before(one, args, kwargs):
        seen.append(("before", one.steps))
        return (one, lambda: backward(model)), kwargs

    handle = optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(lambda one, args, kwargs: seen.append(("after", one.steps)))
    assert float(optimizer.step()) > 0
    assert seen == [("before", 0), ("after", 1)]
    handle.remove()
    train(model, optimizer)
    assert seen[2:] == [("after", 2)]


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_a_hook_of_all_optimizers_sees_every_step(kind):
    model = network()
    optimizer = composed(model)
    seen = []
    register = {"pre": register_optimizer_step_pre_hook, "post": register_optimizer_step_post_hook}[kind]
    train(model, optimizer)
    handle = register(lambda one, args, kwargs: seen.append((one, one.steps)))
    try:
        train(model, optimizer)
    finally:
        handle.remove()
    train(model, optimizer)
    assert seen == [(optimizer, 1 if kind == "pre" else 2)]


def test_a_profiler_finds_steps_and_cleared_gradients_by_their_names():
    model = network()
    optimizer = composed(model)
    train(model, optimizer)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        train(model, optimizer)
    names = {event.name for event in profiler.events()}
    assert {f"Optimizer.{method}#NaturalGradient.{method}" for method in ("step", "zero_grad")} <= names


def test_cleared_gradients_are_gone_or_zero_as_torch_has_it():
    model, twin = network(), network()
    optimizer = composed(model)
    for set_to_none in (True, False):
        backward(model)
        backward(twin)
        optimizer.zero_grad(set_to_none)
        torch.optim.SGD(twin.parameters()).zero_grad(set_to_none)
        for p, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (other.grad is None) == set_to_none
            assert set_to_none or torch.equal(p.grad, other.grad)


def test_state_hooks_see_the_whole_state():
    model = network()
    optimizer = composed(model)
    train(model, optimizer, 2)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda one: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda one, state: {**state, "note": sorted(state)})
    state = optimizer.state_dict()
    assert state["note"] == ["curvature", "param_groups", "state"]
    twin = network()
    twin.load_state_dict(model.state_dict())
    other = composed(twin)
    other.register_load_state_dict_pre_hook(lambda one, given: calls.append(sorted(given)))
    other.register_load_state_dict_post_hook(lambda one: calls.append(one.steps))
    other.load_state_dict(state)
    assert calls == ["save", ["curvature", "note", "param_groups", "state"], 2]
    # A hook may mend what is loaded.
    mending = composed(network())
    mending.register_load_state_dict_pre_hook(lambda one, given: {**given, **state})
    mending.load_state_dict({"old": 1})
    assert mending.steps == 2


# -- gradients as rows ------------------------------------------------------------------------------------------------


def wide():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(20, 18), torch.nn.Tanh(), torch.nn.Linear(18, 4)).double()


@pytest.mark.parametrize("how", ["clipped", "unscaled", "replaced"])
def test_gradients_that_change_are_refused_where_they_are_rows(how):
    model = wide()
    x, y = torch.randn(5, 20).double(), torch.arange(5) % 4
    optimizer = curvlib.compose(model, fisher=Sampled(), solver=Woodbury(), damping=0.1, lr=0.1, fused=True)
    before = values(model)
    scaler = torch.amp.GradScaler("cpu", enabled=how == "unscaled")
    scaler.scale(functional.cross_entropy(model(x), y)).backward()
    if how == "clipped":
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    if how == "replaced":
        model[0].weight.grad = 2 * model[0].weight.grad
    with pytest.raises(ConfigurationError, match=r"(clip_grad_norm_|GradScaler).* leave out fused=True"):
        scaler.step(optimizer)
    assert moved(model, before) == set()
    # Untouched ones go on, also where zeros stay in place.
    for set_to_none in (True, False, False):
        optimizer.zero_grad(set_to_none)
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert moved(model, before) == set(before)
    optimizer.detach()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_zero_grad_throws_rows_away_too():
    finals = []
    for fused in (False, True):
        model = wide()
        x, y = torch.randn(5, 20, generator=torch.Generator().manual_seed(0)).double(), torch.arange(5) % 4
        optimizer = curvlib.compose(model, fisher=Empirical(), solver=Woodbury(), damping=0.1, lr=0.1, fused=fused)
        for _ in range(3):
            functional.cross_entropy(model(2 * x), y).backward()
            train(model, optimizer, 1, x, y)
        finals.append(values(model))
    assert_same(*finals, rtol=1e-9, atol=1e-11)


def test_the_first_batch_of_one_sample_counts_once():
    """A pass of several samples after one of a single sample is checked again, and has explicit gradients."""
    finals = []
    for fused in (False, True):
        model = wide()
        x, y = torch.randn(5, 20, generator=torch.Generator().manual_seed(0)).double(), torch.arange(5) % 4
        optimizer = curvlib.compose(model, fisher=Empirical(), solver=Woodbury(), damping=0.1, lr=0.1, fused=fused)
        for size in (1, 1, 5, 5):
            train(model, optimizer, 1, x[:size], y[:size])
        finals.append(values(model))
    assert_same(*finals, rtol=1e-9, atol=1e-11)
