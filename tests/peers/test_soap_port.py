"""SOAP: training runs of pytorch_optimizer's port of the authors' code, and of heavyball's between changes of basis.

Known differences, each corrected below:

- Theirs skip the first step, which has no basis before it: curvlib does with ``skip_first=True``.
- The authors add Adam's ε before the bias correction of v, curvlib after: ε there is ``ε / √(1 − β₂ᵗ)`` here, t the
  number of steps that Adam has taken. heavyball takes ``max(√v, ε)`` after it: ε is made too small to matter.
- Theirs treat tensors of any order and leave vectors to Adam; curvlib has one matrix [W, b] a block, one for each group
  of a convolution. So they are given these matrices as parameters.
- A gradient that leaves several directions of a side empty does not determine the basis: the blocks here are nearly
  square, their gradients of full rank.
- pytorch_optimizer orthogonalises in float32; here in float64, by a `torch` override.
- heavyball adds 1e-8 of the largest eigenvalue to every other before it renews the basis, the authors nothing: with a
  renewal at every step agreement is to 1e-5, without any as good as elsewhere. Every k steps it renews at other steps.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional
from truth import assert_close, network
from twins import TOLERANCE, Float64

import curvlib
from curvlib.precond.damping import Schedule

STEPS = 14
LR, EPS, BETAS = 2**-6, 1e-3, (0.8, 0.7)  # heavyball keeps the learning rate in float32
NEVER = 10**9

NETS = {
    # network, shape of a sample, width of the outputs
    "linear": (lambda: network(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6)), (4,), 6),
    "without bias": (lambda: network(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 6, bias=False)), (4,), 6),
    "sequence": (lambda: network(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Flatten()), (3, 4), 18),
    "convolution": (lambda: network(nn.Conv2d(2, 9, 2), nn.Flatten()), (2, 3, 3), 36),
    "groups": (lambda: network(nn.Conv2d(4, 10, (1, 2), groups=2), nn.Flatten()), (4, 3, 3), 60),
}


def matrices(model, of):
    """[W, b] of every layer and group, from ``of(parameter)``."""
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            matrix = of(layer.weight).flatten(1)
            if layer.bias is not None:
                matrix = torch.cat([matrix, of(layer.bias)[:, None]], dim=1)
            yield from matrix.reshape(getattr(layer, "groups", 1), -1, matrix.shape[1]).clone()


def same_training(net, theirs, damping, basis_every, tolerance=TOLERANCE):
    """Train by curvlib; the peer is given every gradient as matrices, and its parameters must stay the same."""
    build, shape, width = NETS[net]
    model = build()
    optimizer = curvlib.compose(
        model, fisher=curvlib.Empirical(), damping=Schedule(damping), refresh=1, lr=LR,
        solver=curvlib.solvers.SOAP(*BETAS, basis_every=basis_every, skip_first=True),
    )  # fmt: skip
    twins = [nn.Parameter(matrix) for matrix in matrices(model, torch.Tensor.detach)]
    step = theirs(twins)
    generator = torch.Generator().manual_seed(3)
    start = [twin.detach().clone() for twin in twins]
    for number in range(STEPS):
        x, y = (torch.randn(24, *s, generator=generator, dtype=torch.float64) for s in (shape, (width,)))
        optimizer.zero_grad()
        functional.mse_loss(model(x), y).backward()
        for twin, gradient in zip(twins, matrices(model, lambda p: p.grad), strict=True):
            twin.grad = gradient
        optimizer.step()
        step()
        for given, twin, old in zip(matrices(model, torch.Tensor.detach), twins, start, strict=True):
            assert bool((given != old).any()) == (number > 0)
            assert_close(given - old, twin.detach() - old, f"distance after step {number}", tolerance)


@pytest.mark.parametrize("basis_every", [1, 3, NEVER])
@pytest.mark.parametrize("net", NETS)
def test_the_authors_algorithm(net, basis_every):
    peer = pytest.importorskip("pytorch_optimizer", reason="make peers installs pytorch_optimizer")

    def theirs(parameters):
        optimizer = peer.SOAP(
            parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, precondition_frequency=basis_every
        )

        def step():
            with Float64():
                optimizer.step()

        return step

    # At step 0 nothing is corrected, and nothing moves.
    same_training(net, theirs, lambda step: EPS / (1 - BETAS[1] ** max(step, 1)) ** 0.5, basis_every)


@pytest.mark.parametrize(("basis_every", "tolerance"), [(1, 1e-5), (NEVER, TOLERANCE)])
@pytest.mark.parametrize("net", NETS)
def test_heavyball(net, basis_every, tolerance, monkeypatch):
    peer = pytest.importorskip("heavyball", reason="make peers installs heavyball")
    monkeypatch.setattr(peer.utils, "compile_mode", None)

    def theirs(parameters):
        return peer.SOAP(
            parameters, lr=LR, betas=BETAS, shampoo_beta=BETAS[1], eps=1e-30, weight_decay=0.0, merge_dims=False,
            precondition_frequency=basis_every, storage_dtype="float64",
        ).step  # fmt: skip

    same_training(net, theirs, lambda step: 1e-30, basis_every, tolerance)
