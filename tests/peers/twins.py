"""What the cross-checks share: networks, a batch, training side by side, in float64. No peer is imported here."""

from copy import deepcopy

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from truth import assert_close, network

TOLERANCE = 1e-9
CLASSES = 3


class Positions(nn.Module):
    """Mean over the positions of a sequence."""

    def forward(self, x):
        return x.mean(1)


def mlp(bias=True):
    return network(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, CLASSES, bias=bias))


def convolutions():
    return network(
        nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.Tanh(), nn.Conv2d(3, 4, 2, bias=False), nn.Tanh(),
        nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip


def sequence():
    return network(nn.Linear(4, 5), nn.Tanh(), Positions(), nn.Linear(5, CLASSES))


NETS = {"mlp": (mlp, (4,)), "convolutions": (convolutions, (2, 6, 6)), "sequence": (sequence, (3, 4))}


def batch(name, samples=24, seed=0):
    """Inputs for a network of `NETS` and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, *NETS[name][1], generator=generator, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (samples,), generator=generator)


def by_parameter(factors, apply):
    """``apply(block's factors)`` for every block, as one dict from the model's parameter names."""
    return {f"{block}.{name}": value for block, rows in factors.items() for name, value in apply(rows).items()}


def assert_same(given, expected, scale=1.0, tolerance=TOLERANCE):
    """Same names, and ``given`` is ``scale · expected`` parameter by parameter."""
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 0, f"{name} is zero: nothing would be compared"
        assert_close(given[name], scale * value, name, tolerance)


def trained_side_by_side(model, ours, theirs, batches, tolerance=TOLERANCE):
    """Train copies of `model` by optimizers made of them; parameters and every step must stay the same.

    `theirs` returns what is called for a step after backward, and the copy's parameters have their gradients.
    """
    twins = model, deepcopy(model)
    optimizer = ours(twins[0])
    steps = optimizer.step, theirs(twins[1])
    for x, y in batches:
        moves = []
        for twin, step in zip(twins, steps, strict=True):
            twin.zero_grad()
            functional.cross_entropy(twin(x), y).backward()
            before = {name: p.detach().clone() for name, p in twin.named_parameters()}
            step()
            moves.append({name: p.detach() - before[name] for name, p in twin.named_parameters()})
        assert_same(*moves, tolerance=tolerance)


class Float64(TorchFunctionMode):
    """Factorisations that a peer does in float32 whatever the dtype are done in float64 inside this."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda leaf: torch.float64 if leaf is torch.float32 else leaf, (args, kwargs or {}))
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)
