"""Copies and pickles of optimizers and models: whole, independent, without a trace of each other."""

import copy
import io
import pickle

import pytest
import torch
from parts import X, assert_same, backward, composed, moved, network, train, values

from curvlib import Empirical, KLClip, Momentum, Sampled, Woodbury
from curvlib.precond import LevenbergMarquardt
from curvlib.solvers import KFAC

OPTIONS = {
    "sampled": {"fisher": Sampled(), "refresh": 3, "transforms": [KLClip(), Momentum(0.9)]},
    "groups": {"groups": [{"blocks": "2", "lr": 0.1, "solver": KFAC()}], "maximize": True},
    "fused": {"fisher": Empirical(), "fused": True, "solver": Woodbury()},
    "only": {"only": ["2", "4"], "backend": "numpy", "factorize_in": "float64"},
}


def unpickled(pair):
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("way", [copy.deepcopy, unpickled])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_copy_goes_on_as_the_original_does(name, way):
    model = network()
    optimizer = composed(model, **OPTIONS[name])
    train(model, optimizer, 4)
    twin, other = way((model, optimizer))
    assert other.model is twin
    assert type(other) is type(optimizer)
    before = values(twin)
    train(model, optimizer, 3)
    assert moved(twin, before) == set()
    train(twin, other, 3)
    assert_same(model, twin)


def test_a_copied_optimizer_brings_its_model():
    model = network()
    optimizer = composed(model, damping=LevenbergMarquardt(2.0))
    optimizer.step(lambda: backward(model))
    other = copy.deepcopy(optimizer)
    assert other.model is not model
    assert other.damping is not optimizer.damping
    assert_same(other.model, model)
    other.step(lambda: backward(other.model))
    assert optimizer.steps == 1


def test_a_detached_optimizer_stays_detached():
    optimizer = composed(network())
    optimizer.detach()
    assert unpickled(optimizer)._capture.detached


def test_an_optimizer_of_functions_that_cannot_be_pickled_says_so():
    optimizer = composed(network(), output=lambda result: result)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(optimizer)
    copy.deepcopy(optimizer)


@pytest.mark.parametrize("options", [{"fisher": Sampled()}, {"fisher": Empirical(), "fused": True}], ids=str)
@pytest.mark.parametrize("way", ["deepcopy", "torch.save"])
def test_a_copied_model_has_no_optimizer(way, options):
    model = network()
    optimizer = composed(model, **options)
    train(model, optimizer, 2)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    backward(twin)
    assert not optimizer._capture.waiting
    assert all(p.grad is not None for p in twin.parameters())
    # What came along has removed itself.
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in twin.modules())
    assert torch.equal(twin(X), model(X))
    train(model, optimizer)
