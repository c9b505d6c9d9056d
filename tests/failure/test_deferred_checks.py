"""Steps whose checks are put off: what fails is found when the next step begins, and leaves nothing behind."""

import copy
import math
import warnings
from dataclasses import dataclass, field

import pytest
import torch
from bad_steps import MOVING, bad_step
from small_net import X, Y, backward, built, same, small_net, train, values
from test_fault_injection import FAULTS, Run
from torch import nn
from torch.nn import functional

from curvlib import Empirical, Sampled, arrays
from curvlib.errors import ConfigurationError, CurvatureError, FailureWarning, NonFiniteError, RefreshError
from curvlib.solvers import EKFAC, KFAC, SPRING, Dense, Diagonal, Woodbury


@dataclass(frozen=True)
class Lowered(Dense):
    """`Dense` of a curvature that lies `by[0]` too low, as rounding may put it."""

    by: list = field(default_factory=lambda: [0.0])

    def factorize(self, estimate, damping):
        return super().factorize(arrays.map_arrays(self._lower, estimate), damping)

    def _lower(self, array):
        square = array.ndim == 2 and array.shape[0] == array.shape[1]
        return arrays.add_diagonal(array, -self.by[0]) if square else array


def everything(optimizer):
    """All tensors and numbers of a state, in an order."""

    def flat(value):
        if isinstance(value, dict):
            return [one for key in sorted(value, key=str) for one in flat(value[key])]
        return [one for item in value for one in flat(item)] if isinstance(value, list | tuple) else [value]

    return flat(optimizer.state_dict())


def assert_alike(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# -- gradients, losses, outputs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh", [1, 2, 100])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_named_one_step_later(refresh, value):
    model = small_net()
    optimizer = built(model, deferred=True, refresh=refresh, transforms=MOVING, fisher=Sampled())
    train(model, optimizer, 2)
    before, state = values(model), copy.deepcopy(everything(optimizer))
    draws = optimizer._generator.get_state()
    bad_step(model, optimizer, value)
    assert same(values(model), before)
    assert optimizer.steps == 3  # nobody has looked yet
    optimizer.zero_grad()
    backward(model)
    with pytest.raises(NonFiniteError, match=r"step 2: the gradient is not finite in 2\.weight; .*unchanged"):
        optimizer.step()
    assert same(values(model), before)
    assert (optimizer.steps, optimizer.health.refused, optimizer.health.steps) == (2, 1, 2)
    optimizer._generator.set_state(draws)
    assert_alike(everything(optimizer), state)
    train(model, optimizer)
    assert optimizer.steps == 3
    assert not same(values(model), before)


@pytest.mark.parametrize("refresh", [1, 3])
def test_skipping_is_what_it_is_when_looked_at_at_once(refresh):
    runs = []
    for deferred in (False, True):
        model = small_net()
        optimizer = built(model, deferred=deferred, refresh=refresh, transforms=MOVING, on_failure="skip")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FailureWarning)
            for number in range(8):
                # With refresh 3, a step between two refreshes, and one that is no refresh when it is made up for.
                (bad_step if number in (2, 5) else train)(model, optimizer)
            state = everything(optimizer)
        assert optimizer.health.skipped == 2
        runs.append((values(model), state, optimizer.steps))
    assert runs[0][2] == runs[1][2] == 6
    assert same(runs[0][0], runs[1][0])
    assert_alike(runs[0][1], runs[1][1])


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_refresh_that_was_lost_is_made_up_for(policy):
    model = small_net()
    optimizer = built(model, deferred=True, refresh=4, on_failure=policy)
    train(model, optimizer, 4)
    bad_step(model, optimizer)  # the second refresh
    if policy == "skip":
        with pytest.warns(FailureWarning, match=r"step 4: .*the step was skipped"):
            train(model, optimizer)  # begins before anybody has looked, so it takes no curvature
        assert optimizer.steps == 5
    else:
        with pytest.raises(NonFiniteError, match="step 4"):
            train(model, optimizer)
        assert optimizer.steps == 4
    train(model, optimizer)
    assert {state.refreshed for state in optimizer.curvature.values()} == {optimizer.steps - 1}


def test_a_loss_and_outputs_that_are_not_finite():
    model = small_net()
    optimizer = built(model, deferred=True)
    train(model, optimizer)
    before = values(model)

    def closure():
        optimizer.zero_grad()
        return backward(model) * math.inf

    optimizer.step(closure)
    with pytest.raises(NonFiniteError, match="step 1: the loss is inf"):
        optimizer.state_dict()
    optimizer.zero_grad()
    backward(model, x=X * math.nan)
    optimizer.step()
    with pytest.raises(NonFiniteError, match="outputs are not finite"):
        optimizer.state_dict()
    assert same(values(model), before)
    assert (optimizer.steps, optimizer.health.refused) == (1, 2)


def test_what_is_on_another_device_is_looked_at_at_once():
    model = nn.Sequential(nn.Linear(5, 3)).double()
    optimizer = built(model, deferred=True)
    train(model, optimizer)

    def closure():  # stands for a loss on the CPU, where it may be read, of a model on a GPU
        optimizer.zero_grad()
        backward(model)
        return Elsewhere(math.nan)

    with pytest.raises(NonFiniteError, match="step 1: the loss is nan"):
        optimizer.step(closure)


class Elsewhere(torch.Tensor):
    @staticmethod
    def __new__(cls, value):
        return torch.tensor(value).as_subclass(cls)

    @property
    def device(self):
        return torch.device("meta")


def test_the_first_step_is_looked_at_at_once():
    model = small_net()
    optimizer = built(model, deferred=True)
    with pytest.raises(NonFiniteError, match="step 0"):
        bad_step(model, optimizer)


def test_a_gradient_of_other_rows_is_refused_one_step_later():
    model = small_net()
    optimizer = built(model, deferred=True, solver=SPRING(), fisher=Empirical())
    train(model, optimizer)
    before = values(model)
    bad_step(model, optimizer, 3.0)
    with pytest.raises(ConfigurationError, match=r"block '0' or '2': SPRING needs the gradient of the rows"):
        train(model, optimizer)
    assert same(values(model), before)
    assert (optimizer.steps, optimizer.health.refused) == (1, 1)


def test_adamw_moves_nothing_in_a_step_that_fails():
    torch.manual_seed(0)

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3).double()
            self.shift = nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def forward(self, x):
            return self.linear(x) + self.shift

    runs = []
    for spoiled in (False, True):
        torch.manual_seed(0)
        model = Shifted()
        optimizer = built(model, deferred=True, rest="adamw", on_failure="skip", transforms=MOVING)
        train(model, optimizer, 3)
        if spoiled:
            before = values(model)
            optimizer.zero_grad()
            backward(model)
            model.shift.grad[0] = math.nan
            optimizer.step()
            assert same(values(model), before)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FailureWarning)
            train(model, optimizer, 3)
        runs.append((values(model), everything(optimizer)))
    assert same(runs[0][0], runs[1][0])
    assert_alike(runs[0][1], runs[1][1])


# -- factorisations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh", [1, 3])
def test_the_ladder_is_climbed_one_step_later(refresh):
    at_once, later = ((small_net(), Lowered()) for _ in range(2))
    optimizers = [built(model, solver=solver, deferred=deferred, refresh=refresh, transforms=MOVING)
                  for deferred, (model, solver) in zip((False, True), (at_once, later), strict=True)]  # fmt: skip
    for (model, solver), optimizer in zip((at_once, later), optimizers, strict=True):
        train(model, optimizer, 3)
        solver.by[0] = 0.5
    before = values(later[0])
    with pytest.warns(FailureWarning, match=r"step 3: .*factorised failed in float64; with damping 1\b"):
        train(at_once[0], optimizers[0])
    train(later[0], optimizers[1])
    assert same(values(later[0]), before)
    with pytest.warns(FailureWarning, match=r"step 3: .*factorised failed in float64; with damping 1\b"):
        optimizers[1].state_dict()
    assert same(values(later[0]), before)
    for name, state in optimizers[0].curvature.items():
        assert_alike(*([*vars(found).values()] for found in map(plain, (state, optimizers[1].curvature[name]))))
        assert optimizers[1].health[name].retries == 1
    # The next one of this kind is not lost.
    solver = later[1]
    for number in range(refresh):
        moved = values(later[0])
        train(later[0], optimizers[1])
        assert not same(values(later[0]), moved), number
    assert solver.by[0] == 0.5
    assert optimizers[1].health["0"].retries == 2


def plain(state):
    """A block's state with its records as lists of arrays."""
    found = []
    arrays.map_arrays(lambda array: found.append(array) or array, state)

    class Flat:
        pass

    flat = Flat()
    flat.__dict__ = {str(number): array for number, array in enumerate(found)}
    flat.damping, flat.steps = state.damping, (state.refreshed, state.factorized, state.failures, state.retries)
    return flat


@pytest.mark.parametrize("policy", ["keep", "gradient", "skip", "raise"])
def test_what_no_rung_can_factorise(policy):
    model, solver = small_net(), Lowered()
    optimizer = built(model, solver=solver, deferred=True, on_failure=policy, transforms=MOVING)
    train(model, optimizer, 2)
    state = copy.deepcopy(everything(optimizer))
    before, inverses = values(model), {name: state.inverse for name, state in optimizer.curvature.items()}
    solver.by[0] = 1e6
    train(model, optimizer)
    assert same(values(model), before)
    if policy == "raise":
        with pytest.raises(RefreshError, match="step 2: block '0'.*unchanged") as caught:
            optimizer.state_dict()
        assert (caught.value.step, optimizer.steps) == (2, 2)
        assert_alike(everything(optimizer), state)
    else:
        with pytest.warns(FailureWarning, match="step 2"):
            optimizer.state_dict()
        assert optimizer.steps == 2 + (policy != "skip")
        assert optimizer.health["0"].failures == 1
        assert all(optimizer.curvature[name].inverse is inverse for name, inverse in inverses.items())
    assert same(values(model), before)
    solver.by[0] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 2)
    assert optimizer.health["0"].staleness == 0


def test_what_fails_at_once_is_blamed_on_the_gradient_that_caused_it():
    model = small_net()
    optimizer = built(model, solver=EKFAC(), fisher=Empirical(), deferred=True, on_failure="raise")
    train(model, optimizer)
    optimizer.zero_grad()
    (functional.cross_entropy(model(X), Y) * math.nan).backward()
    with pytest.raises(NonFiniteError, match="gradient is not finite"):  # not that it has no eigenvectors
        optimizer.step()
    assert optimizer.steps == 1


def outcome(solver, fault, policy, deferred):
    """What is raised, warned of and counted for a step with a fault, looked at at once or after it, and its move."""
    run, raised = Run(solver, on_failure=policy, deferred=deferred), None
    for _ in range(2):
        run.step()
    before = values(run.model)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        FAULTS[fault](run, patch)
        try:
            run.step()
            run.optimizer.state_dict()
        except CurvatureError as error:
            raised = type(error), str(error)
    health = run.optimizer.health
    counted = [health.steps, health.skipped, health.refused]
    counted += [(block.failures, block.retries, block.staleness, block.damping) for block in health.values()]
    # Which cause is named may differ: outputs that are not finite make gradients so, too.
    said = [one.message.args[:2] + one.message.args[3:] for one in warned if one.category is FailureWarning]
    assert run.finite()
    return (raised, said, counted), before, values(run.model)


@pytest.mark.parametrize("policy", ["keep", "skip"])
@pytest.mark.parametrize("solver", [Woodbury(), KFAC(), EKFAC(), Diagonal(), SPRING()], ids=repr)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_comes_to_what_it_does_at_once(fault, solver, policy):
    expected, _, moved = outcome(solver, fault, policy, deferred=False)
    found, before, after = outcome(solver, fault, policy, deferred=True)
    assert found == expected
    assert same(after, moved) or same(after, before)  # the move is lost where a factorisation was made good
