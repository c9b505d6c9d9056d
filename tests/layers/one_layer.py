"""The rows of one layer against autograd, one sample and one output at a time."""

import torch
from torch import nn

import curvlib


class Smooth(nn.Module):
    """A layer and a nonlinear map of its output to three numbers, so that every output has a cotangent of its own."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        features = torch.sin(self.layer(*args, **kwargs)).flatten(1)
        pattern = torch.arange(3 * features.shape[1], dtype=features.dtype)
        return features @ torch.cos(pattern * pattern + 1).reshape(-1, 3)


def prepared(layer, frozen=()):
    """The layer in float64 with reproducible parameters and running statistics, some of them frozen."""
    torch.manual_seed(0)
    layer.double()
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.2)
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    return layer


def numbers(*shape):
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64)


def one_at_a_time(model, samples):
    """Jacobian of every sample's own outputs, shape ``(n, outputs, parameters)``, from calls with one sample each."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradient(output):
        found = torch.autograd.grad(output, parameters, retain_graph=True)
        return torch.cat([g.to_dense().reshape(-1) for g in found])

    return torch.stack([torch.stack([gradient(output) for output in model(*one)[0]]) for one in samples])


def assert_same(given, expected):
    torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-11)


def check_algebra(factors, rows):
    """What solvers ask of Factors, against explicit rows."""
    v, w = numbers(rows.shape[1]), numbers(len(rows))
    shapes = factors.shapes
    parts = v.split([torch.Size(shape).numel() for shape in shapes.values()])
    vector = {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
    assert_same(factors.dense().matrix(), rows)
    assert_same(factors.gram(), rows @ rows.T)
    assert_same(factors.matvec(vector), rows @ v)
    assert_same(torch.cat([part.reshape(-1) for part in factors.rmatvec(w).values()]), rows.T @ w)
    assert_same(torch.cat([part.reshape(-1) for part in factors.diagonal().values()]), rows.square().sum(0))


def check_layer(layer, *args, samples=None):
    """Rows of all outputs, and of two drawn labels, against the per-sample truth; returns the Factors of the former.

    `samples` lists the arguments of calls with one sample each; without it the first axis of every argument is split.
    """
    model = Smooth(layer)
    samples = samples or list(zip(*(arg.split(1) for arg in args), strict=True))
    jacobian = one_at_a_time(model, samples)
    (exact,) = curvlib.collect(model, curvlib.Exact(curvlib.Gaussian()), *args).values()
    for factors in (exact, exact.compact()):
        check_algebra(factors, jacobian.flatten(0, 1))
    fisher = curvlib.Sampled(curvlib.Gaussian(), samples=2)
    cotangents = fisher.cotangents(model(*args).detach(), torch.Generator().manual_seed(3))
    (drawn,) = curvlib.collect(model, fisher, *args, generator=torch.Generator().manual_seed(3)).values()
    check_algebra(drawn, torch.einsum("cno,nop->ncp", cotangents, jacobian).flatten(0, 1))
    return exact
