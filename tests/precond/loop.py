"""A small network, its batch, and the training loop around it."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from curvlib import (
    Exact,
    Woodbury,
    compose,
)
from curvlib.errors import (
    CaptureError,
)

X = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

Y = torch.arange(12) % 3


def network(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7, **options), nn.ReLU(inplace=True), nn.Linear(7, 3)).double()


def built(model, **options):
    given = {"fisher": Exact(), "solver": Woodbury(), "damping": 0.1, "lr": 0.5, **options}
    return compose(model, **given)


def backward(model, x=X, y=Y):
    loss = functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


def steps(model, optimizer, count):
    for _ in range(count):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# -- refusals that change nothing -------------------------------------------------------------------------------------


def unchanged_by(model, optimizer, message, error=CaptureError):
    before, curvature, taken = values(model), optimizer.curvature, optimizer.steps
    with pytest.raises(error, match=message):
        optimizer.step()
    assert same(values(model), before)
    assert optimizer.curvature is curvature
    assert optimizer.steps == taken
