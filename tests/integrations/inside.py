"""What all frameworks train here: a classifier on points in the plane, and how well it does."""

import torch
from torch import nn
from torch.nn import functional

import curvlib

CLASSES = 3
X = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0.5).long()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, CLASSES))


def composed(model, **options):
    given = {
        "fisher": curvlib.Sampled(),
        "solver": curvlib.Woodbury(),
        "damping": 0.1,
        "lr": 0.2,
        "refresh": 3,
        **options,
    }
    return curvlib.compose(model, **given)


def batches(size=32):
    return [(X[part], Y[part]) for part in torch.arange(len(X)).split(size)]


def plain_loop(model, optimizer, epochs=1, scheduler=None, accumulate=1, clip=None):
    """The same training without any framework."""
    for _ in range(epochs):
        for number, (x, y) in enumerate(batches(), 1):
            (functional.cross_entropy(model(x), y) / accumulate).backward()
            if number % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                optimizer.zero_grad()


def assert_same(left, right, **tolerance):
    for (name, p), q in zip(left.named_parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), msg=name, **(tolerance or {"rtol": 1e-5, "atol": 1e-6}))
