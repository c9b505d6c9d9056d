"""Exceptions anywhere leave model and optimizer as they were, and the loop goes on as if they had not been."""

import gc

import pytest
import torch
from loops import FISHERS, X, Y, built, live_tensors, same, train, values
from torch import nn
from torch.nn import functional


class Fuse(nn.Module):
    """Passes its input on, and fails where it is told to."""

    def __init__(self):
        super().__init__()
        self.forward_error = self.backward_error = None

    def forward(self, x):
        if self.forward_error is not None:
            raise self.forward_error
        if self.backward_error is not None and x.requires_grad:
            x = x * 1

            def fail(gradient):
                raise self.backward_error

            x.register_hook(fail)
        return x


class Fragile(nn.Linear):
    """A block that fails in its own call."""

    error = None

    def forward(self, x):
        if self.error is not None:
            raise self.error
        return super().forward(x)


def fragile_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(inplace=True), Fuse(), Fragile(16, 16), nn.Linear(16, 3))


class ToldError(Exception):
    pass


def forward_fails(model, optimizer, error):
    model[2].forward_error = error
    model(X)


def block_fails(model, optimizer, error):
    model[3].error = error
    model(X)


def loss_fails(model, optimizer, error):
    model(X)
    raise error


def backward_fails(model, optimizer, error):
    model[2].backward_error = error
    functional.cross_entropy(model(X), Y).backward()


def wrong_batch(model, optimizer, error):
    try:
        model(X[:, :5])
    except RuntimeError:
        raise error from None


def closure_fails(model, optimizer, error):
    def closure():
        functional.cross_entropy(model(X), Y).backward()
        raise error

    optimizer.step(closure)


def closure_fails_before_backward(model, optimizer, error):
    def closure():
        model(X)
        raise error

    optimizer.step(closure)


def hook_fails(model, optimizer, error):
    def fail(module, args):
        raise error

    handle = model[3].register_forward_pre_hook(fail)
    try:
        model(X)
    finally:
        handle.remove()


PLACES = [forward_fails, block_fails, loss_fails, backward_fails, wrong_batch, closure_fails,
          closure_fails_before_backward, hook_fails]  # fmt: skip


def heal(model):
    model[2].forward_error = model[2].backward_error = model[3].error = None


@pytest.fixture(autouse=True, scope="module")
def _only_what_is_made_here():
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("error", [ToldError, KeyboardInterrupt])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize(
    ("fisher", "fused"), [("exact", False), ("exact", True), ("empirical", False), ("empirical", True)]
)
def test_the_loop_goes_on(place, error, fisher, fused):
    model, twin = fragile_net(), fragile_net()
    optimizer, other = (built(one, fisher=FISHERS[fisher], fused=fused, refresh=1) for one in (model, twin))
    train(model, optimizer, 2)
    train(twin, other, 2)
    optimizer.zero_grad()
    before, curvature, tensors = values(model), optimizer.curvature, live_tensors()
    for _ in range(2):
        with pytest.raises(error):
            place(model, optimizer, error("told to"))
        heal(model)
        optimizer.zero_grad()
        assert all(p.requires_grad for p in model.parameters())
    assert same(values(model), before)
    assert optimizer.curvature is curvature
    if place is not backward_fails:  # a graph whose backward failed keeps what it had worked out
        assert live_tensors() == tensors
    train(model, optimizer, 2)
    train(twin, other, 2)
    assert same(values(model), values(twin))
    torch.testing.assert_close(model(X), twin(X))


@pytest.mark.parametrize("place", [forward_fails, block_fails], ids=lambda place: place.__name__)
@pytest.mark.parametrize("fisher", FISHERS)
def test_a_first_pass_that_fails_is_checked_when_it_comes_again(place, fisher):
    model = fragile_net()
    optimizer = built(model, fisher=FISHERS[fisher], refresh=1)
    with pytest.raises(ToldError):
        place(model, optimizer, ToldError())
    heal(model)
    train(model, optimizer, 2)
    assert not optimizer._capture._unchecked


def test_a_check_that_fails_keeps_no_graph():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 3)

        def forward(self, x):
            return self.layer(x) + x @ self.layer.weight.T

    model = Twice()
    optimizer = built(model)
    before = live_tensors()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="layer"):
            model(X)
    assert live_tensors() == before
    assert all(p.requires_grad for p in model.parameters())
    optimizer.detach()
    model(X)
