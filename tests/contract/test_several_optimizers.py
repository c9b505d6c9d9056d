"""Several optimizers on one model, one optimizer after the other, and what is left when one goes."""

import gc
import weakref

import pytest
import torch
from parts import X, Y, assert_same, backward, composed, moved, network, train, values
from torch import nn
from torch.nn import functional

from curvlib import Empirical, Exact, Sampled
from curvlib.errors import CaptureError, ConfigurationError

FISHERS = [Exact(), Empirical(), Sampled()]


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("fisher", FISHERS[:2], ids=str)
def test_some_blocks_are_left_to_another_optimizer(fisher):
    model, twin = network(), network()
    optimizer = composed(model, fisher=fisher, only=["2", "4"])
    sgd = torch.optim.SGD(model[0].parameters(), lr=0.1)
    whole = composed(twin, fisher=fisher, groups=[{"blocks": "0", "lr": 0.0}])
    plain = torch.optim.SGD(twin[0].parameters(), lr=0.1)
    assert list(optimizer.curvature) == ["2", "4"]
    for _ in range(3):
        for one, other, whose in ((optimizer, sgd, model), (whole, plain, twin)):
            one.zero_grad()
            other.zero_grad()
            backward(whose)
            one.step()
            other.step()
    assert_same(model, twin)


@pytest.mark.parametrize("fishers", [(Exact(), Empirical()), (Empirical(), Exact()), (Sampled(), Exact())], ids=str)
def test_two_curvatures_on_one_model_do_not_see_each_other(fishers):
    """What one pulls back for its curvature is no backward pass, and no cotangent, to the other."""
    model = network()
    first = composed(model, fisher=fishers[0], only="0", seed=3)
    second = composed(model, fisher=fishers[1], only=["2", "4"])
    alone, other = network(), network()
    alone_first = composed(alone, fisher=fishers[0], only="0", seed=3)
    alone_second = composed(other, fisher=fishers[1], only=["2", "4"])
    for _ in range(3):
        alone.load_state_dict(model.state_dict())
        other.load_state_dict(model.state_dict())
        with torch.enable_grad():
            model(2 * X)  # a pass that no backward follows
        assert not first._capture.waiting
        assert not second._capture.waiting
        for one in (first, second):
            one.zero_grad()
        backward(model)
        first.step()
        second.step()
        train(alone, alone_first)
        train(other, alone_second)
        if fishers[0] != Sampled():  # the pass without a backward has drawn labels
            assert_same(model[0], alone[0])
        assert_same(model[2:], other[2:])


def test_patterns_that_name_nothing_are_refused():
    with pytest.raises(ConfigurationError, match=r"only: nothing matches \['body\.\*'\]; the blocks are"):
        composed(network(), only=["0", "body.*"])


def test_a_generator_and_a_discriminator():
    """What the generator's loss does to the discriminator is thrown away with its gradients."""
    torch.manual_seed(0)
    noise = torch.randn(12, 4).double()

    def train_both(pause):
        torch.manual_seed(1)
        generator, judge = nn.Linear(4, 5).double(), nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        g, d = composed(generator, lr=0.1, fisher=Empirical()), composed(judge, lr=0.1)
        real, fake = torch.zeros(12, dtype=torch.long), torch.ones(12, dtype=torch.long)
        for _ in range(3):
            d.zero_grad()
            outputs = judge(X), judge(generator(noise).detach())
            (functional.cross_entropy(outputs[0], real) + functional.cross_entropy(outputs[1], fake)).backward()
            d.step()
            g.zero_grad()
            if pause:
                with d.paused():
                    functional.cross_entropy(judge(generator(noise)), real).backward()
            else:
                functional.cross_entropy(judge(generator(noise)), real).backward()
            g.step()
        return values(generator), values(judge), d

    generator, judge, optimizer = train_both(pause=False)
    assert optimizer.curvature["0"].estimate is not None
    others = train_both(pause=True)
    assert_same(generator, others[0])
    assert_same(judge, others[1])


# -- one after the other ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", FISHERS, ids=str)
def test_composing_twice_is_two_optimizers_that_do_not_disturb_each_other(fisher):
    model, twin = network(), network()
    first, second = composed(model, fisher=fisher, seed=1), composed(model, fisher=fisher, seed=2)
    other = composed(twin, fisher=fisher, seed=2)
    for _ in range(3):
        first.zero_grad()
        train(model, second)
        train(twin, other)
    assert_same(model, twin)
    one = hooks(twin)
    assert hooks(model) == 2 * one
    first.detach()
    assert hooks(model) == one
    train(model, second)
    train(twin, other)
    assert_same(model, twin)


def test_an_optimizer_that_is_dropped_takes_its_hooks_along():
    model = network()
    optimizer = composed(model, transforms=[])
    train(model, optimizer, 2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    gone = weakref.ref(optimizer)
    del optimizer
    assert hooks(model)
    del scheduler
    gc.collect()
    assert gone() is None
    assert hooks(model) == 0
    # As when the cell of a notebook runs again.
    for _ in range(3):
        optimizer = composed(model)
        train(model, optimizer)
    gc.collect()
    assert hooks(model) == hooks_of_one(network())


def hooks_of_one(model):
    optimizer = composed(model)
    count = hooks(model)
    optimizer.detach()
    return count


def test_a_model_goes_with_its_optimizer():
    model = network()
    optimizer = composed(model)
    train(model, optimizer)
    gone = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert gone() is None


def test_a_context_manager_detaches():
    model = network()
    with composed(model) as optimizer:
        train(model, optimizer, 2)
        assert hooks(model)
    assert hooks(model) == 0
    before = values(model)
    backward(model)
    with pytest.raises(CaptureError, match=r"detached from its model: compose another one, .* state_dict\(\)"):
        optimizer.step()
    assert moved(model, before) == set()
    again = composed(model)
    again.load_state_dict(optimizer.state_dict())
    assert again.steps == 2
    train(model, again)


def test_detaching_twice_and_after_an_error():
    model = network()
    optimizer = composed(model)
    with pytest.raises(RuntimeError), optimizer:
        model(X[:, :2])
    optimizer.detach()
    assert hooks(model) == 0
    assert functional.cross_entropy(model(X), Y) > 0


def test_a_fused_optimizer_leaves_ordinary_gradients_behind():
    model = nn.Sequential(nn.Linear(20, 18), nn.Tanh(), nn.Linear(18, 4)).double()
    x, y = torch.randn(5, 20).double(), torch.arange(5) % 4
    with composed(model, fisher=Empirical(), fused=True) as optimizer:
        train(model, optimizer, 2, x, y)
        optimizer.zero_grad()
        backward(model, x, y)
        assert model[0].weight.grad is None
        with optimizer.paused():
            backward(model, x, y)
        assert model[0].weight.grad is not None
    optimizer.zero_grad()
    backward(model, x, y)
    assert all(p.grad is not None and p.requires_grad for p in model.parameters())
