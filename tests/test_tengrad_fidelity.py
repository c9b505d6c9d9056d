"""The authors' TENGraD update written out from its formulas (arXiv 2106.03947), step for step against the recipe."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.nn import functional
from truth import assert_close, network

import curvlib

STEPS, N, SEED = 25, 8, 7


@dataclass(frozen=True)
class Settings:
    lr: float = 0.05
    damping: float = 0.1
    refresh: int = 10
    momentum: float = 0.9
    weight_decay: float = 3e-3
    kl_clip: float | None = 1e-2

    # Departures from the authors, to show that the comparison would notice them.
    bias_in_block: bool = True
    decay_in_buffer: bool = False
    match_positions: bool = True
    true_labels: bool = False


# -- curvature of one layer, with J never formed ----------------------------------------------------------------------


class Cached:
    """Inputs A (n, K, L), cotangents G (n, M, L) and inverse kernel of the last refresh; a linear layer has L = 1."""

    def __init__(self, A, G, settings):
        self.A, self.G, self.settings, self.n = A, G, settings, len(A)
        AA = torch.einsum("nkl,qkp->nqlp", A, A) + float(settings.bias_in_block)
        GG = torch.einsum("nml,qmp->nqlp", G, G)
        if settings.match_positions:
            kernel = torch.einsum("nqlp->nq", AA * GG)
        else:  # the later "reduce_sum" approximation
            a, g = A.sum(2), G.sum(2)
            kernel = (a @ a.T + 1) * (g @ g.T)
        self.inverse = torch.linalg.inv(kernel / self.n + settings.damping * torch.eye(self.n, dtype=A.dtype))

    def precondition(self, weight, bias):
        """(g - Jᵀ (K + λ)⁻¹ J g / n) / λ for the gradients of weight (M, K) and bias (M,)."""
        outputs = torch.einsum("nkl,mk->nml", self.A, weight)
        if self.settings.bias_in_block:
            outputs = outputs + bias[None, :, None]
        w = self.inverse @ torch.einsum("nml,nml->n", outputs, self.G)
        weighted = torch.einsum("n,nml->nml", w, self.G)
        weight = (weight - torch.einsum("nml,nkl->mk", weighted, self.A) / self.n) / self.settings.damping
        if self.settings.bias_in_block:
            bias = (bias - weighted.sum((0, 2)) / self.n) / self.settings.damping
        return weight, bias


# -- the two networks, written as functions that also return A and s --------------------------------------------------


def dense_forward(p, x):
    s1 = x @ p[0].T + p[1]
    h1 = torch.relu(s1)
    s2 = h1 @ p[2].T + p[3]
    h2 = torch.relu(s2)
    s3 = h2 @ p[4].T + p[5]
    return s3, [(x[..., None], s1), (h1[..., None], s2), (h2[..., None], s3)]


def conv_forward(p, x):
    s1 = functional.conv2d(x, p[0], p[1], padding=1)
    h1 = functional.max_pool2d(torch.relu(s1), 2)
    s2 = functional.conv2d(h1, p[2], p[3], stride=2)
    h2 = torch.relu(s2).flatten(1)
    s3 = h2 @ p[4].T + p[5]
    unfolded = [functional.unfold(x, 3, padding=1), functional.unfold(h1, 2, stride=2), h2[..., None]]
    return s3, list(zip(unfolded, (s1, s2, s3), strict=True))


NETWORKS = {
    "dense": (
        dense_forward,
        lambda: network(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4)),
        (6,),
    ),
    "convolution": (
        conv_forward,
        lambda: network(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(3, 4, 2, stride=2),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(36, 4),
        ),
        (2, 12, 12),
    ),
}


def batches(shape):
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(STEPS, N, *shape, dtype=torch.float64, generator=generator)
    return x, torch.randint(4, (STEPS, N), generator=generator)


SETTINGS = {"dense": Settings(), "convolution": Settings(lr=0.02)}  # the clip acts in some steps, not in others


def reference(name, settings):
    """Parameters after all steps, and ν of every step."""
    forward, build, shape = NETWORKS[name]
    parameters = [p.detach().clone().requires_grad_() for p in build().parameters()]
    buffers = [torch.zeros_like(p) for p in parameters]
    generator = torch.Generator().manual_seed(SEED)
    factors, clips = [], []
    for step, (x, y) in enumerate(zip(*batches(shape), strict=True)):
        outputs, layers = forward(parameters, x)
        if step % settings.refresh == 0:
            labels = torch.multinomial(outputs.detach().softmax(1), 1, generator=generator)[:, 0]
            sampled = functional.cross_entropy(outputs, y if settings.true_labels else labels)
            cotangents = torch.autograd.grad(sampled, [s for _, s in layers], retain_graph=True)
            factors = [
                Cached(A.detach(), N * (g.flatten(2) if g.ndim > 2 else g[..., None]), settings)
                for (A, _), g in zip(layers, cotangents, strict=True)
            ]
        gradients = torch.autograd.grad(functional.cross_entropy(outputs, y), parameters)
        directions = []
        for layer, weight, bias in zip(factors, gradients[::2], gradients[1::2], strict=True):
            natural, natural_bias = layer.precondition(weight.flatten(1), bias)
            directions += [natural.reshape(weight.shape), natural_bias]
        nu = 1.0
        if settings.kl_clip is not None:
            product = sum(float((p * g).sum()) for p, g in zip(directions, gradients, strict=True))
            nu = min(1.0, (settings.kl_clip / (settings.lr**2 * product)) ** 0.5)
        clips.append(nu)
        with torch.no_grad():
            for theta, m, p in zip(parameters, buffers, directions, strict=True):
                decay = settings.weight_decay * theta
                m.mul_(settings.momentum).add_(nu * p + (decay if settings.decay_in_buffer else 0))
                d = m if settings.decay_in_buffer else m + decay
                theta -= settings.lr * d
    return torch.cat([p.detach().flatten() for p in parameters]), clips


def recipe(name, settings):
    _, build, shape = NETWORKS[name]
    model = build()
    optimizer = curvlib.TENGraD(
        model,
        lr=settings.lr,
        damping=settings.damping,
        refresh=settings.refresh,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        kl_clip=settings.kl_clip,
        seed=SEED,
    )
    for x, y in zip(*batches(shape), strict=True):
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", NETWORKS)
def test_25_steps_of_the_recipe_are_the_authors_update(name):
    expected, clips = reference(name, SETTINGS[name])
    assert min(clips) < 0.9, "the KL clip acts in some steps"
    assert clips.count(1.0) > 2, "and not in others"
    assert_close(recipe(name, SETTINGS[name]), expected, tolerance=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_without_the_clip_too(name):
    settings = replace(SETTINGS[name], kl_clip=None, lr=0.01)
    assert_close(recipe(name, settings), reference(name, settings)[0], tolerance=1e-9)


DEPARTURES = {
    "curvature of every step": {"refresh": 1},
    "curvature of the first step for ever": {"refresh": STEPS},
    "no clip": {"kl_clip": None},
    "bias by its raw gradient": {"bias_in_block": False},
    "weight decay inside the momentum": {"decay_in_buffer": True},
    "no momentum": {"momentum": 0.0},
    "empirical Fisher": {"true_labels": True},
    "positions summed apart": {"match_positions": False},
}


@pytest.mark.parametrize("departure", DEPARTURES)
def test_the_comparison_would_notice(departure):
    name = "convolution"  # where every departure can act
    expected, _ = reference(name, SETTINGS[name])
    other, _ = reference(name, replace(SETTINGS[name], **DEPARTURES[departure]))
    assert float((other - expected).norm() / expected.norm()) > 1e-4
