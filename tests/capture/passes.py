"""A network, a batch and a capture of it."""

import torch
from torch import nn

import curvlib
from curvlib.capture import Capture
from curvlib.layers import partition

FISHERS = {
    "sampled": curvlib.Sampled(curvlib.Gaussian()),
    "exact": curvlib.Exact(curvlib.Gaussian()),
    "empirical": curvlib.Empirical(),
}


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)).double()


def batch(n=5):
    return torch.randn(n, 4, dtype=torch.float64)


def capture_of(model, fisher, **options):
    return Capture(model, partition(model).blocks, fisher, generator=torch.Generator().manual_seed(0), **options)


def rows(taken):
    return {name: len(factors) for name, factors in taken.items()}
