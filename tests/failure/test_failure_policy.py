"""`on_failure`: what becomes of a step whose curvature cannot be renewed."""

import math
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from small_net import INDEFINITE, Failing, X, Y, backward, built, same, small_net, train, values
from torch.nn import functional

from curvlib.errors import ConfigurationError, FailureWarning, NonFiniteError, RefreshError

POLICIES = ("keep", "gradient", "skip", "raise")


def failing(policy, **options):
    model, told = small_net(), [None]
    return model, built(model, solver=Failing(told), on_failure=policy, **options), told


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("earlier", [False, True], ids=["first refresh", "later refresh"])
def test_what_each_policy_does(policy, earlier):
    model, optimizer, told = failing(policy)
    if earlier:
        train(model, optimizer)
    inverses = {name: state.inverse for name, state in optimizer.curvature.items()}
    told[0] = INDEFINITE
    before, taken = values(model), optimizer.steps
    optimizer.zero_grad()
    backward(model)
    gradients = [p.grad.clone() for p in model.parameters()]
    if policy == "raise" or (policy == "keep" and not earlier):
        with pytest.raises(RefreshError, match=f"step {taken}: block '0': told to fail.*unchanged") as caught:
            optimizer.step()
        assert (caught.value.block, caught.value.step) == ("0", taken)
        assert "told to fail" in str(caught.value.cause)
        assert same(values(model), before)
        assert (optimizer.steps, optimizer.health.refused, optimizer.health["0"].failures) == (taken, 1, 1)
        return
    with pytest.warns(FailureWarning, match="told to fail"):
        optimizer.step()
    if policy == "skip":
        assert same(values(model), before)
        assert (optimizer.steps, optimizer.health.skipped, optimizer.health["0"].failures) == (taken, 1, 1)
    elif earlier:
        assert all(optimizer.curvature[name].inverse is inverse for name, inverse in inverses.items())
        assert optimizer.health["2"].failures == 1
    else:  # along g/λ
        for p, old, gradient in zip(model.parameters(), before, gradients, strict=True):
            torch.testing.assert_close(p.detach(), old - 0.5 * gradient / 0.1)
    told[0] = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 2)
    assert optimizer.health["0"].staleness == 0
    assert optimizer.steps == taken + 2 + (policy != "skip")


def test_a_plain_gradient_lasts_until_the_next_refresh_and_follows_the_damping():
    model, optimizer, told = failing("gradient", refresh=3)
    told[0] = INDEFINITE
    with pytest.warns(FailureWarning):
        train(model, optimizer, 2)
    told[0] = None
    train(model, optimizer)
    assert optimizer.health["0"].staleness is None
    train(model, optimizer)
    assert (optimizer.health["0"].staleness, optimizer.health["0"].failures) == (0, 1)


@pytest.mark.parametrize("closure", [False, True])
def test_skip_also_leaves_out_steps_whose_gradients_are_not_finite(closure):
    model = small_net()
    optimizer = built(model, on_failure="skip", refresh=2)
    train(model, optimizer)
    before, curvature = values(model), optimizer.curvature

    def bad():
        optimizer.zero_grad()
        loss = backward(model)
        model[0].weight.grad[0, 0] = math.nan
        return loss

    loss = None if closure else bad()
    with pytest.warns(FailureWarning, match=r"gradient is not finite in 0.weight.*the step was skipped") as caught:
        returned = optimizer.step(bad if closure else None)
    assert (returned is None) == (loss is not None)
    assert caught[0].message.block == ""
    assert same(values(model), before)
    assert optimizer.curvature is curvature
    bad()
    optimizer.step()  # said once
    assert (optimizer.health.skipped, optimizer.steps) == (2, 1)
    train(model, optimizer, 2)


def test_skip_lets_a_forward_pass_through_whose_outputs_are_not_finite():
    model = small_net()
    optimizer = built(model, on_failure="skip", refresh=1)
    before = values(model)
    functional.cross_entropy(model(X * math.inf), Y).backward()
    with pytest.warns(FailureWarning, match="the step was skipped"):
        optimizer.step()
    assert same(values(model), before)
    train(model, optimizer)
    assert optimizer.health["0"].staleness == 0


def test_skip_does_not_hide_mistakes():
    model = small_net()
    optimizer = built(model, on_failure="skip")
    with pytest.raises(RuntimeError, match="call loss.backward"):
        optimizer.step()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory did not suffice.*2 GiB.*batch"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "memory did not suffice"),
        (MemoryError(), "memory did not suffice"),
        (torch.linalg.LinAlgError("the algorithm failed to converge"), "decomposition failed.*converge.*damping"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_memory_and_decompositions_fail_as_curvature_does(error, message):
    model, optimizer, told = failing("keep")
    told[0] = error
    before = values(model)
    with pytest.raises(RefreshError, match=message):
        train(model, optimizer)
    assert same(values(model), before)
    told[0] = None
    train(model, optimizer)
    told[0] = error
    with pytest.warns(FailureWarning, match="the inverse of step 0 is used on"):
        train(model, optimizer)


def test_an_error_of_the_code_is_no_failure_of_the_curvature():
    model, optimizer, told = failing("keep")
    train(model, optimizer)
    told[0] = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    before = values(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train(model, optimizer)
    assert same(values(model), before)


def test_a_poisoned_average_begins_anew():
    model, optimizer, told = failing("keep")
    train(model, optimizer)
    for name, state in optimizer.curvature.items():
        matrix = torch.full_like(state.estimate.matrix, math.nan)
        optimizer.curvature[name] = replace(state, estimate=replace(state.estimate, matrix=matrix))
    told[0] = INDEFINITE
    with pytest.warns(FailureWarning):
        train(model, optimizer)
    assert all(state.estimate is None and state.inverse is not None for state in optimizer.curvature.values())
    told[0] = None
    train(model, optimizer)
    assert optimizer.health["0"].staleness == 0


def test_a_solution_that_overflows_changes_nothing():
    model = small_net().float()
    optimizer = built(model, damping=1e-30)
    before = values(model)
    optimizer.zero_grad()
    backward(model, X.float())
    for p in model.parameters():
        p.grad.fill_(1e12)
    with pytest.raises((NonFiniteError, RefreshError)):
        optimizer.step()
    assert same(values(model), before)


def test_warnings_and_errors_travel_and_name_everything():
    error = RefreshError("0", 3, INDEFINITE, "Raise the damping")
    warning = FailureWarning("0", 3, "cause", "kept", "an older inverse is used on")
    for one in (error, warning):
        again = pickle.loads(pickle.dumps(one))
        assert (str(again), again.block, again.step) == (str(one), "0", 3)


@pytest.mark.parametrize("policy", [None, "ignore", 1, ["keep"]])
def test_other_policies_are_refused(policy):
    with pytest.raises(ConfigurationError, match="on_failure must be one of 'keep', 'gradient', 'skip', 'raise'"):
        built(small_net(), on_failure=policy)
