"""What taking curvature costs: one pass with its rows, and the Grams of these rows."""

from abc import ABC, abstractmethod

import torch
from torch import nn

import curvlib

from . import blocks


class Positions(nn.Module):
    """Mean over the positions of a sequence."""

    def forward(self, x):
        return x.mean(1)


def network(layer, width):
    """A small network with two layers of a kind, and a batch's shape but for its size."""
    if layer == "linear":
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 10))
    if layer == "sequence":
        layers = (nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        return nn.Sequential(*layers, Positions(), nn.Linear(width, 10))
    if layer == "normalization":
        return nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.LayerNorm(width), Positions(), nn.Linear(width, 10))
    if layer == "embedding":
        return nn.Sequential(nn.Embedding(1000, width), Positions(), nn.Linear(width, 10))
    convolutions = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def batch_for(layer, width, batch, positions):
    if layer == "linear":
        return torch.randn(batch, width)
    if layer == "convolution":
        side = round(positions**0.5)
        return torch.randn(batch, width, side, side)
    if layer == "embedding":
        return torch.randint(0, 1000, (batch, positions))
    return torch.randn(batch, positions, width)


FISHERS = {
    "sampled": lambda: curvlib.Sampled(curvlib.Categorical()),
    "exact": lambda: curvlib.Exact(curvlib.Categorical()),
    "empirical": lambda: curvlib.Empirical(),
}
SHAPES = {
    # layer: width, positions
    "linear": (512, 1),
    "sequence": (128, 64),
    "convolution": (32, 256),
    "normalization": (256, 64),
    "embedding": (128, 64),
}


class Capture:
    """Factors of a whole network, checked beforehand; against forward and backward alone."""

    params = (list(SHAPES), list(FISHERS), [64], ["cpu", "cuda"])
    param_names = ("layer", "fisher", "batch", "device")
    timeout = 120

    def setup(self, layer, fisher, batch, device):
        blocks.device_of(f"torch {device}")
        blocks.pin()
        width, positions = SHAPES[layer]
        self.place, self.fisher = f"torch {device}", FISHERS[fisher]()
        self.model = network(layer, width).to(device)
        self.x = batch_for(layer, width, batch, positions).to(device)
        self.y = torch.randint(0, 10, (batch,), device=device)
        self.time_collect()
        self.time_gradient()

    def loss(self, outputs):
        return nn.functional.cross_entropy(outputs, self.y)

    def time_collect(self, *_):
        curvlib.collect(self.model, self.fisher, self.x, loss=self.loss, verify=False)
        blocks.synchronize(self.place)

    def time_gradient(self, *_):
        torch.autograd.grad(self.loss(self.model(self.x)), list(self.model.parameters()))
        blocks.synchronize(self.place)


class Products(ABC):
    """J Jᵀ, and the products with J that a solve needs."""

    timeout = 120

    @abstractmethod
    def setup(self, *_):
        """Abstract, or asv would take this class for a benchmark."""

    def prepare(self, layer, width, batch, positions, dtype, place):
        self.place = place
        blocks.device_of(self.place)
        blocks.pin()
        self.rows = blocks.block(layer, width, batch, positions, dtype, self.place)
        self.vector = self.rows.rmatvec(self.rows.row_weights(1.0))
        self.time_gram()
        self.time_products()

    def time_gram(self, *_):
        self.rows.gram()
        blocks.synchronize(self.place)

    def time_products(self, *_):
        self.rows.rmatvec(self.rows.matvec(self.vector))
        blocks.synchronize(self.place)


class Linear(Products):
    """A layer without sharing, width × width."""

    params = ([64, 512], [32, 128, 512], ["float32", "float64"], list(blocks.PLACES))
    param_names = ("width", "batch", "dtype", "place")

    def setup(self, width, batch, dtype, place):
        self.prepare("linear", width, batch, 1, dtype, place)


class Shared(Products):
    """Layers that use a weight at several positions; which route is taken depends on the sizes."""

    params = (
        ["sequence", "convolution"],
        [16, 64],
        [32, 128],
        [16, 64, 256],
        ["float32", "float64"],
        list(blocks.PLACES),
    )
    param_names = ("layer", "width", "batch", "positions", "dtype", "place")

    def setup(self, layer, width, batch, positions, dtype, place):
        if layer == "sequence" and positions == 256:
            raise NotImplementedError("sequences are shorter")
        if (dtype == "float64" or place.startswith("numpy")) and (width, batch, positions) != (64, 32, 16):
            raise NotImplementedError("one size is enough for these")
        self.prepare(layer, width, batch, positions, dtype, place)
