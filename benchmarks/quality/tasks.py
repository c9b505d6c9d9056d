"""The four tasks: a model, its batches and loss, what is measured on held-out data, and a target.

Targets and budgets follow trial runs of Adam and were fixed before any run that counts: about where Adam's curve bends,
after some seconds of one core.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import nn
from torch.nn import functional

from benchmarks.quality.networks import CharacterTransformer, ConvNet, PoissonResidual
from curvlib import Bernoulli, Categorical, Gaussian
from curvlib.cli.data import load_dataset
from curvlib.cli.models import MODELS


class Task(ABC):
    """One problem; everything random comes from seeds."""

    name: str
    title: str
    metric: str
    target: float
    """The metric is to be at most this."""
    budget: float
    """CPU seconds of a tuning trial; a final run has twice as many."""
    sizes: tuple[int, ...]
    """Batch sizes that tuning may choose from; the first is the default."""
    dtype = torch.float32
    likelihood: Bernoulli | Categorical | Gaussian

    @abstractmethod
    def network(self) -> nn.Module:
        """New network from torch's global generator."""

    def model(self, seed):
        torch.manual_seed(seed)
        return self.network().to(self.dtype)

    @abstractmethod
    def batch(self, size, generator):
        """Inputs and targets of one step."""

    @abstractmethod
    def loss(self, outputs, targets):
        """What is minimized."""

    @abstractmethod
    def evaluate(self, model):
        """The metric; smaller is better."""

    def warm_up(self):
        """Load the data, so that no run pays for it."""
        self.batch(self.sizes[0], torch.Generator().manual_seed(0))


class Images(Task):
    held_out: int
    sizes = (32, 128)

    @cached_property
    def data(self):
        dataset = load_dataset("fashion-mnist")
        images, labels = torch.tensor(dataset.train_images), torch.tensor(dataset.train_labels).long()
        test, test_labels = torch.tensor(dataset.test_images), torch.tensor(dataset.test_labels).long()
        return images, labels, test[: self.held_out].float() / dataset.peak, test_labels[: self.held_out]

    def batch(self, size, generator):
        images, labels, _, _ = self.data
        chosen = torch.randint(len(images), (size,), generator=generator)
        pixels = images[chosen].float() / 255
        return pixels, self.targets(pixels, labels[chosen])

    def targets(self, pixels, labels):
        return labels


class FashionConvNet(Images):
    name = "convnet"
    title = "Fashion-MNIST, small ConvNet"
    metric = "cross-entropy on 2000 test images"
    target = 0.36
    budget = 6.0
    held_out = 2000
    likelihood = Categorical()

    def network(self):
        return ConvNet()

    def loss(self, outputs, targets):
        return functional.cross_entropy(outputs, targets)

    def evaluate(self, model):
        _, _, images, labels = self.data
        return float(functional.cross_entropy(model(images), labels))


class Autoencoder(Images):
    name = "autoencoder"
    title = "Fashion-MNIST, deep autoencoder"
    metric = "divergence of pixels on 500 test images, nats an image"
    target = 50.0
    budget = 6.0
    held_out = 500
    sizes = (64, 256)
    likelihood = Bernoulli()

    def network(self):
        return MODELS["autoencoder"].build((1, 28, 28), 10, 0.25)

    def targets(self, pixels, labels):
        return pixels.flatten(1)

    def loss(self, outputs, targets):
        return functional.binary_cross_entropy_with_logits(outputs, targets, reduction="sum") / len(targets)

    def evaluate(self, model):
        """The loss above its least value, the entropy of the pixels themselves."""
        _, _, images, _ = self.data
        pixels = images.flatten(1)
        entropy = functional.binary_cross_entropy(pixels, pixels, reduction="sum") / len(pixels)
        return float(self.loss(model(images), pixels) - entropy)


class Characters(Task):
    name = "transformer"
    title = "text of Python's help topics, character transformer"
    metric = "cross-entropy on held-out text, nats a character"
    target = 1.92
    budget = 6.0
    sizes = (8, 32)
    context = 32
    likelihood = Categorical(dim=-1)

    @cached_property
    def data(self):
        from pydoc_data.topics import topics

        text = "".join(topics[name] for name in sorted(topics))
        alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
        codes = torch.tensor([alphabet[character] for character in text])
        part = len(codes) * 9 // 10
        starts = torch.linspace(part, len(codes) - self.context - 1, 128).long()
        return codes[:part], self._windows(codes, starts), len(alphabet)

    def _windows(self, codes, starts):
        windows = codes[starts[:, None] + torch.arange(self.context + 1)]
        return windows[:, :-1], windows[:, 1:]

    def network(self):
        return CharacterTransformer(self.data[2], self.context)

    def batch(self, size, generator):
        codes, _, _ = self.data
        return self._windows(codes, torch.randint(len(codes) - self.context - 1, (size,), generator=generator))

    def loss(self, outputs, targets):
        return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    def evaluate(self, model):
        inputs, targets = self.data[1]
        return float(self.loss(model(inputs), targets))


class Poisson(Task):
    name = "poisson"
    title = "Poisson's equation, physics-informed network"
    metric = "relative error of the solution on a grid"
    target = 1e-2
    budget = 6.0
    sizes = (64, 256)
    dtype = torch.float64
    likelihood = Gaussian()

    def network(self):
        return PoissonResidual()

    def batch(self, size, generator):
        """Points of the square, new ones at every step, and the right side there."""
        points = torch.rand(size, 2, generator=generator, dtype=self.dtype)
        return points, 8 * torch.pi**2 * _solution(points)

    def loss(self, outputs, targets):
        return (outputs + targets).square().mean() / 2

    def evaluate(self, model):
        axis = torch.linspace(0, 1, 41, dtype=self.dtype)
        grid = torch.cartesian_prod(axis, axis)
        truth = _solution(grid)
        return float((model.solution(grid) - truth).norm() / truth.norm())


def _solution(points):
    return torch.sin(2 * torch.pi * points[:, 0]) * torch.sin(2 * torch.pi * points[:, 1])


TASKS = {task.name: task for task in (FashionConvNet(), Autoencoder(), Characters(), Poisson())}
