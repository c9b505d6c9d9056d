"""Checks that were put off are looked at by whoever needs the state, and not put off where a step needs numbers."""

import copy
import math
import pickle

import pytest
import torch
from bad_steps import MOVING, bad_step, spoil
from small_net import X, backward, built, same, small_net, train, values

from curvlib.errors import ConfigurationError, NonFiniteError
from curvlib.precond import LevenbergMarquardt, OnEvidence, TraceRelative

LOOKS = {
    "state_dict": lambda optimizer: optimizer.state_dict(),
    "health": lambda optimizer: optimizer.health,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "add_param_group": lambda optimizer: optimizer.add_param_group({"params": []}),
}


@pytest.mark.parametrize("look", LOOKS)
def test_whoever_needs_the_state_looks_first(look):
    model = small_net()
    optimizer = built(model, deferred=True)
    train(model, optimizer)
    bad_step(model, optimizer)
    with pytest.raises(NonFiniteError, match="step 1"):
        LOOKS[look](optimizer)
    assert optimizer.steps == 1
    optimizer.state_dict()


def test_freezing_looks_first():
    model = small_net()
    optimizer = built(model, deferred=True)
    train(model, optimizer)
    bad_step(model, optimizer)
    model[0].weight.requires_grad_(False)
    with pytest.raises(NonFiniteError, match="step 1"):
        model(X)
    train(model, optimizer)
    assert optimizer.steps == 2


def test_a_checkpoint_may_be_loaded_over_a_step_that_failed():
    model = small_net()
    optimizer = built(model, deferred=True, transforms=MOVING)
    train(model, optimizer, 2)
    saved, parameters = copy.deepcopy(optimizer.state_dict()), values(model)
    train(model, optimizer, 2)
    after = values(model)
    bad_step(model, optimizer)
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for p, value in zip(model.parameters(), parameters, strict=True):
            p.copy_(value)
    train(model, optimizer, 2)
    assert same(values(model), after)


EAGER = {
    "told so": {"deferred": False},
    "on a CPU, unless told so": {"deferred": None},
    "callbacks": {"callbacks": [lambda optimizer, loss: None]},
    "evidence": {"refresh": OnEvidence(1)},
    "another library": {"backend": "numpy"},
    "the trace, at a refresh": {"damping": TraceRelative(0.1)},
    "a second pass": {"damping": LevenbergMarquardt(0.1)},
}


@pytest.mark.parametrize("name", EAGER)
def test_what_needs_numbers_of_the_step_is_looked_at_at_once(name):
    model = small_net()
    optimizer = built(model, **{"deferred": True, **EAGER[name]})

    def closure(value=None):
        optimizer.zero_grad()
        loss = backward(model)
        if value is not None:
            spoil(model, value)
        return loss

    for _ in range(2):
        optimizer.step(closure)
    with pytest.raises(NonFiniteError, match="step 2"):
        optimizer.step(lambda: closure(math.nan))


def test_the_trace_is_not_needed_between_refreshes():
    model = small_net()
    optimizer = built(model, deferred=True, damping=TraceRelative(0.1), refresh=2)
    train(model, optimizer, 3)
    bad_step(model, optimizer)
    with pytest.raises(NonFiniteError, match="step 3"):
        train(model, optimizer)


def test_it_is_said_what_deferred_may_be():
    with pytest.raises(ConfigurationError, match="deferred"):
        built(small_net(), deferred="yes")
