"""A small network, its batch, and the training loop around it."""

import torch
from torch import nn
from torch.nn import functional

import curvlib

X = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 3


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def composed(model, **options):
    given = {"fisher": curvlib.Exact(), "solver": curvlib.Woodbury(), "damping": 0.1, "lr": 0.5, **options}
    return curvlib.compose(model, **given)


def backward(model, x=X, y=Y, share=1.0):
    loss = functional.cross_entropy(model(x.to(next(model.parameters()).dtype)), y) * share
    loss.backward()
    return loss.detach()


def train(model, optimizer, steps=1, x=X, y=Y):
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model, x, y)
        optimizer.step()


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model, before):
    """Names of the parameters that are no longer as they were."""
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def assert_same(left, right, **tolerance):
    left, right = (values(one) if isinstance(one, nn.Module) else one for one in (left, right))
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], msg=name, **(tolerance or {"rtol": 0.0, "atol": 0.0}))
