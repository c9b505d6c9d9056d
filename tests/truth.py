"""Dense truth for natural gradients, built from `torch.func` and explicit matrices alone.

Nothing here uses curvlib's factors, layers, capture or solvers; curvlib appears only as the likelihood object that a
family stands for.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

import curvlib

TOLERANCE = 1e-10


# -- likelihoods ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Family:
    """A likelihood written out: what one sample costs, its Hessian, and some valid targets."""

    likelihood: curvlib.Likelihood
    nll: Callable[[Tensor, Tensor], Tensor]  # outputs and targets of any number of samples, summed
    hessian: Callable[[Tensor], Tensor]  # outputs (d,) of one sample -> (d, d)
    targets: Callable[[Tensor], Tensor]  # outputs -> arbitrary targets, from torch's global generator

    def __repr__(self):
        return str(self.likelihood)


def _softmax_hessian(f):
    p = f.softmax(0)
    return torch.diag(p) - torch.outer(p, p)


def _logit_hessian(f):
    p = f.sigmoid()
    return torch.diag(p * (1 - p))


CATEGORICAL = Family(
    curvlib.Categorical(),
    nll=lambda f, y: functional.cross_entropy(f, y, reduction="sum"),
    hessian=_softmax_hessian,
    targets=lambda f: torch.randint(f.shape[1], (f.shape[0], *f.shape[2:])),
)
GAUSSIAN = Family(
    curvlib.Gaussian(variance=0.25),
    nll=lambda f, y: (f - y).square().sum() / (2 * 0.25),
    hessian=lambda f: torch.eye(len(f), dtype=f.dtype) / 0.25,
    targets=lambda f: torch.randn_like(f),
)
BERNOULLI = Family(
    curvlib.Bernoulli(),
    nll=lambda f, y: -(y * functional.logsigmoid(f) + (1 - y) * functional.logsigmoid(-f)).sum(),
    hessian=_logit_hessian,
    targets=lambda f: torch.randint(2, f.shape).to(f),
)
FAMILIES = (CATEGORICAL, GAUSSIAN, BERNOULLI)


class Preset(curvlib.Likelihood):
    """A likelihood whose labels are given beforehand, so that the truth can use the same ones."""

    def __init__(self, base, labels):
        self.base, self.labels = base, list(labels)

    def observations(self, outputs):
        return self.base.observations(outputs)

    def loss(self, outputs, targets):
        return self.base.loss(outputs, targets)

    def sample(self, outputs, generator):
        return self.labels.pop(0)

    def residual(self, outputs, targets):
        return self.base.residual(outputs, targets)

    def hessian_root(self, outputs):
        return self.base.hessian_root(outputs)


class Lowest(curvlib.Categorical):
    """Labels that are a function of each sample's outputs, so that they follow the sample wherever it goes."""

    def sample(self, outputs, generator):
        return outputs.argmin(self.dim)


# -- per-sample derivatives -------------------------------------------------------------------------------------------


def trainable(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def call(model, parameters, x):
    # On a copy: functional_call does not put the parameters of a module that sits in two places back.
    return functional_call(deepcopy(model), parameters, (x,))


def per_sample_gradients(model, nll, x, targets):
    """Parameter name to the gradient of every sample's own loss, shape ``(n, *parameter)``."""

    def loss(parameters, xi, yi):
        return nll(call(model, parameters, xi[None]), yi[None])

    return vmap(grad(loss), in_dims=(None, 0, 0))(trainable(model), x, targets)


def per_sample_jacobians(model, x):
    """Parameter name to the Jacobian of every sample's own outputs, shape ``(n, outputs, *parameter)``."""

    def output(parameters, xi, place):
        return call(model, parameters, xi[None]).reshape(-1)[place]

    places = range(model(x[:1]).numel())
    one_output = [vmap(grad(partial(output, place=place)), in_dims=(None, 0))(trainable(model), x) for place in places]
    return {name: torch.stack([rows[name] for rows in one_output], dim=1) for name in one_output[0]}


def mean_gradient(model, nll, x, targets):
    """Parameter name to the gradient of the mean loss, by plain autograd."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = nll(model(x), targets) / len(x)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


# -- explicit matrices ------------------------------------------------------------------------------------------------


def matrix(arrays, names, axes=1):
    """The named arrays side by side, everything after the first `axes` axes flattened into one."""
    return torch.cat([arrays[name].flatten(axes) if arrays[name].ndim > axes else arrays[name][..., None]
                      for name in names], dim=-1)  # fmt: skip


def vector(arrays, names):
    return torch.cat([arrays[name].reshape(-1) for name in names])


def gauss_newton(jacobian, hessians, observations):
    """Σ_i J_iᵀ H_i J_i / observations, for J of shape ``(n, outputs, P)`` and H of shape ``(n, outputs, outputs)``."""
    return torch.einsum("nop,noq,nqr->pr", jacobian, hessians, jacobian) / observations


def natural(curvature, damping, gradient):
    return torch.linalg.solve(curvature + damping * torch.eye(len(curvature), dtype=curvature.dtype), gradient)


def column_names(model, block, shapes):
    """Qualified names of a block's parameters, in the order of its columns."""
    known = dict(model.named_parameters())
    return [f"{block}.{name}" if f"{block}.{name}" in known else name for name in shapes]


def exact_step(model, family, x, targets, damping, empirical=False):
    """Parameter name to the natural gradient of the mean loss, one block a module, by explicit matrices."""
    gradient = mean_gradient(model, family.nll, x, targets)
    if empirical:
        rows = per_sample_gradients(model, family.nll, x, targets)
    else:
        jacobian = per_sample_jacobians(model, x)
        hessians = torch.stack([family.hessian(f.reshape(-1)) for f in model(x).detach()])
    modules = dict.fromkeys(name.rpartition(".")[0] for name in gradient)
    step = {}
    for module in modules:
        names = [name for name in gradient if name.rpartition(".")[0] == module]
        if empirical:
            J = matrix(rows, names)
            F = J.T @ J / len(x)
        else:
            F = gauss_newton(matrix(jacobian, names, 2), hessians, len(x))
        flat = natural(F, damping, vector(gradient, names)).split([gradient[name].numel() for name in names])
        step |= {name: part.reshape(gradient[name].shape) for name, part in zip(names, flat, strict=True)}
    return step


# -- the networks' training step --------------------------------------------------------------------------------------


def step_taken(model, optimizer):
    """Parameter name to what one `optimizer.step()` subtracts: with lr 1 and no transforms the natural gradient."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


def assert_close(given, expected, what="", tolerance=TOLERANCE):
    """Relative in norm."""
    assert given.shape == expected.shape, f"{what}: shape {tuple(given.shape)}, expected {tuple(expected.shape)}"
    assert given.dtype == expected.dtype == torch.float64, f"{what}: {given.dtype}, {expected.dtype}"
    error, scale = float((given - expected).norm()), float(expected.norm())
    assert error <= tolerance * scale + 1e-13, f"{what}: relative error {error / max(scale, 1e-300):.2e}"


def assert_steps_close(given, expected, tolerance=TOLERANCE):
    assert list(given) == list(expected)
    for name in expected:
        assert float(expected[name].norm()) > 0
        assert_close(given[name], expected[name], name, tolerance)


def network(*layers, seed=0):
    """A float64 network with reproducible random parameters, biases included."""
    torch.manual_seed(seed)
    model = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
    model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) / max(1, p[0].numel() if p.ndim > 1 else 2) ** 0.5)
    return model
