"""A small network, its batch, and solvers that fail on demand."""

import torch
from torch import nn
from torch.nn import functional

import curvlib
from curvlib import Exact, Woodbury, compose
from curvlib.errors import NotPositiveDefiniteError

X = torch.randn(10, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
Y = torch.arange(10) % 3


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def built(model, **options):
    return compose(model, **{"fisher": Exact(), "solver": Woodbury(), "damping": 0.1, "lr": 0.5, **options})


def backward(model, x=X, y=Y):
    loss = functional.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


def train(model, optimizer, count=1):
    for _ in range(count):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


class Failing(curvlib.solvers.Dense):
    """`Dense` whose factorisation raises what `told[0]` is, if anything."""

    def __init__(self, told):
        object.__setattr__(self, "told", told)

    def factorize(self, estimate, damping):
        if self.told[0] is not None:
            raise self.told[0]
        return super().factorize(estimate, damping)


INDEFINITE = NotPositiveDefiniteError("told to fail")
