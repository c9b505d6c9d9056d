"""Networks and loops whose life is watched."""

import gc
import os

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvlib import Empirical, Exact, Momentum, Sampled, Woodbury, compose

FISHERS = {"sampled": Sampled(), "exact": Exact(), "empirical": Empirical()}
N, WIDTH = 16, 64
X = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(1))
Y = torch.arange(N) % 3


def wide_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, 3))


def built(model, **options):
    given = {
        "fisher": Sampled(), "solver": Woodbury(), "damping": 0.3, "lr": 0.01, "refresh": 2,
        "transforms": [Momentum(0.5)], **options,
    }  # fmt: skip
    return compose(model, **given)


def train(model, optimizer, count=1, x=X, y=Y):
    for _ in range(count):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def live_tensors():
    while gc.collect():  # what one collection frees may have been what held something else
        pass
    return sum(issubclass(type(one), Tensor) for one in gc.get_objects())


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
