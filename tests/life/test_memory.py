"""Memory: no graph, tensor or hook outlives its step, and everything goes with the model."""

import gc
import sys
import weakref

import pytest
import torch
from loops import FISHERS, X, Y, built, live_tensors, resident_bytes, train, wide_net
from torch import nn
from torch.nn import functional


@pytest.fixture(autouse=True, scope="module")
def _only_what_is_made_here():
    """Objects from before are looked at neither by collections nor by counts."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("fisher", "fused"), [("sampled", False), ("exact", True), ("empirical", True)])
def test_five_hundred_steps_keep_nothing(fisher, fused):
    model = wide_net()
    optimizer = built(model, fisher=FISHERS[fisher], fused=fused, refresh=1 if fisher == "empirical" else 2)

    def taken():
        optimizer.zero_grad()
        return live_tensors(), [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    train(model, optimizer, 100)
    first, size = taken(), resident_bytes()
    train(model, optimizer, 400)
    assert taken() == first
    # One activation kept a step would be 4 KiB · 400, one of its graphs several times that.
    assert resident_bytes() - size < 1.2 * 2**20
    assert not optimizer._capture._used


def test_passes_that_no_backward_follows_do_not_pile_up():
    model = wide_net()
    optimizer = built(model, refresh=1)
    train(model, optimizer, 2)
    optimizer.zero_grad()
    before = live_tensors()
    for _ in range(50):
        model(X)
    assert live_tensors() == before
    assert not optimizer._capture._used
    held = [model(X) for _ in range(3)]
    assert live_tensors() > before
    held.clear()
    assert live_tensors() == before
    train(model, optimizer)
    assert optimizer.curvature["0"].estimate.kernel.shape == (len(X), len(X))


def test_backwards_that_no_step_follows_are_forgotten_with_their_gradients():
    model = wide_net()
    optimizer = built(model, refresh=1)
    train(model, optimizer, 2)
    optimizer.zero_grad()
    before = live_tensors()
    for _ in range(5):
        functional.cross_entropy(model(X), Y).backward()
        optimizer.zero_grad()
    assert live_tensors() == before
    train(model, optimizer)
    assert optimizer.curvature["0"].estimate.kernel.shape == (len(X), len(X))


class Again(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.gain = nn.Parameter(torch.ones(64))

    def forward(self, x):
        return self.layer(self.layer(x) * self.gain)


@pytest.mark.parametrize("fused", [False, True], ids=["explicit", "fused"])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("when", ["fresh", "after a forward", "after a backward", "after steps"])
def test_a_deleted_model_takes_everything_with_it(fisher, fused, when):
    before = live_tensors()
    model = nn.Sequential(*wide_net()[:2], Again(), nn.Linear(64, 3))
    optimizer = built(model, fisher=FISHERS[fisher], fused=fused, rest="fallback")
    if when != "fresh":
        outputs = model(X)
        if when != "after a forward":
            functional.cross_entropy(outputs, Y).backward()
        del outputs
    if when == "after steps":
        train(model, optimizer, 3)
    watched = [weakref.ref(model), weakref.ref(optimizer), weakref.ref(optimizer._capture)]
    del model, optimizer
    gc.collect()
    assert [one() for one in watched] == [None] * 3
    assert live_tensors() == before


def test_a_watched_optimizer_keeps_one_move():
    model = wide_net()
    optimizer = built(model)
    assert optimizer.health.kl is None
    train(model, optimizer, 2)
    before = live_tensors()
    train(model, optimizer, 20)
    assert live_tensors() == before
