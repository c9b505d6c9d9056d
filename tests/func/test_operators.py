"""Blocks, Jacobians and whole models as linear operators, against explicit matrices."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from truth import CATEGORICAL, gauss_newton, matrix, mean_gradient, network, per_sample_jacobians

import curvlib
from curvlib.errors import ConfigurationError
from curvlib.factors import Dense, OuterProduct
from curvlib.func import Curvature, Jacobian, ModelCurvature
from curvlib.solvers import Diagonal

DAMPING = 0.2
LIBRARIES = {"torch": torch.from_numpy, "numpy": np.asarray}


def numbers(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def close(given, expected, tolerance=1e-10):
    np.testing.assert_allclose(np.asarray(given), np.asarray(expected), rtol=tolerance, atol=tolerance)


def rows(library, n):
    arrays = (LIBRARIES[library](array) for array in (numbers(n, 3), numbers(n, 1, 4)))
    return OuterProduct(*arrays, bias="bias", samples=n)


def as_block(flat):
    return {"weight": flat[:12].reshape(4, 3), "bias": flat[12:]}


def flat(vector):
    return np.concatenate([np.asarray(part).reshape(-1) for part in vector.values()])


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("n", [4, 40])
def test_the_curvature_of_a_block(library, n):
    factors, v = rows(library, n), numbers(16, seed=2)
    J = np.asarray(factors.dense().matrix())
    F = J.T @ J / n + DAMPING * np.eye(16)
    operator, own = Curvature(factors, DAMPING), LIBRARIES[library](v)
    assert operator.shape == (16, 16)
    close(operator @ own, F @ v)
    close(operator.solve(own), np.linalg.solve(F, v))
    close(operator.trace(), F.trace())
    close(operator.logdet(), np.linalg.slogdet(F)[1])
    close(flat(operator @ as_block(own)), F @ v)
    sparse = pytest.importorskip("scipy.sparse.linalg")
    close(operator.scipy() @ v, F @ v)
    close(operator.scipy_inverse() @ (F @ v), v)
    solution, failed = sparse.cg(operator.scipy(), v, rtol=1e-12)
    assert not failed
    close(solution, np.linalg.solve(F, v), 1e-8)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("n", [4, 40])
def test_the_jacobian_of_a_block(library, n):
    factors, v, w = rows(library, n), numbers(16, seed=2), numbers(n, seed=3)
    J, operator = np.asarray(factors.dense().matrix()), Jacobian(factors)
    own, weights = LIBRARIES[library](v), LIBRARIES[library](w)
    assert type(operator @ own) is type(own)
    assert (operator.shape, operator.T.shape) == ((n, 16), (16, n))
    assert operator.T.T is operator
    for given in (operator @ own, operator.matvec(as_block(own)), operator.T.rmatvec(own)):
        close(given, J @ v)
    for given in (operator.T @ weights, operator.rmatvec(weights), flat(operator.rmatvec_block(weights))):
        close(given, J.T @ w)
    sparse = pytest.importorskip("scipy.sparse.linalg")
    scipy = operator.scipy()
    assert scipy.dtype == np.float64
    close(scipy @ v, J @ v)
    close(scipy.T @ w, J.T @ w)
    close(operator.T.scipy() @ w, J.T @ w)
    assert sparse.svds(scipy, k=2)[1].max() == pytest.approx(np.linalg.svd(J)[1][0])


class Mixed(nn.Module):
    """Parameters of its own beside layers, a tied pair, a frozen bias; blocks in another order than parameters."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Linear(4, 4)
        self.token = nn.Parameter(torch.zeros(4))
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.scale.weight
        self.head = nn.Linear(4, 3)
        self.head.bias.requires_grad_(False)

    def forward(self, x):
        return self.head(torch.tanh(self.tied(torch.tanh(self.scale(x) + self.token))))


def plain():
    return nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3))


MODELS = {  # how to make one, what to do with bare parameters, its blocks
    "plain": (plain, None, (["1.weight", "1.bias"], ["4.weight", "4.bias"])),
    "root": (lambda: nn.Linear(4, 3), None, (["weight", "bias"],)),
    "mixed": (Mixed, "fallback", (["token"], ["scale.weight", "scale.bias", "tied.bias"], ["head.weight"])),
}


def explicit(model, blocks, x, damping):
    """F + λI over all trainable parameters in the order of `parameters()`, blocks from autograd sample by sample."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    sizes = {name: model.get_parameter(name).numel() for name in names}
    place = dict(
        zip(names, np.split(np.arange(sum(sizes.values())), np.cumsum(list(sizes.values()))[:-1]), strict=True)
    )
    jacobian = per_sample_jacobians(model, x)
    hessians = torch.stack([CATEGORICAL.hessian(f) for f in model(x).detach()])
    F = damping * np.eye(sum(sizes.values()))
    for block in blocks:
        index = np.concatenate([place[name] for name in block])
        F[np.ix_(index, index)] += gauss_newton(matrix(jacobian, block, 2), hessians, len(x)).numpy()
    assert sorted(name for block in blocks for name in block) == sorted(names)
    return F


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("samples", [2, 40])
def test_the_curvature_of_a_model(name, samples):
    build, rest, blocks = MODELS[name]
    model, x = network(build()), torch.from_numpy(numbers(samples, 4))
    F = explicit(model, blocks, x, DAMPING)
    operator = ModelCurvature(model, curvlib.collect(model, curvlib.Exact(), x, rest=rest), DAMPING)
    gradient = mean_gradient(model, CATEGORICAL.nll, x, torch.arange(samples) % 3)
    trainable = [p for p in model.parameters() if p.requires_grad]
    v = parameters_to_vector(gradient.values())
    assert operator.shape == F.shape
    assert operator.shapes == {key: tuple(p.shape) for key, p in model.named_parameters() if p.requires_grad}
    close(operator @ v, F @ v.numpy())
    close(operator.solve(v), np.linalg.solve(F, v.numpy()), 1e-9)
    close(operator.trace(), F.trace())
    close(operator.logdet(), np.linalg.slogdet(F)[1])
    named = operator.solve(gradient)
    assert list(named) == list(gradient)
    close(parameters_to_vector(named.values()), operator.solve(v))
    pytest.importorskip("scipy")
    close(operator.scipy() @ v.numpy(), F @ v.numpy())
    close(operator.scipy_inverse() @ v.numpy(), np.linalg.solve(F, v.numpy()), 1e-9)
    # A flat answer is a step of the model's own parameters.
    before = parameters_to_vector(trainable).detach()
    vector_to_parameters(before - operator.solve(v), trainable)
    close(trainable[0].detach(), before[: trainable[0].numel()].view_as(trainable[0]) - next(iter(named.values())))


def test_any_solver_inverts_the_blocks():
    model, x = network(plain()), torch.from_numpy(numbers(5, 4))
    F = explicit(model, MODELS["plain"][2], x, DAMPING)
    operator = ModelCurvature(model, curvlib.collect(model, curvlib.Exact(), x), DAMPING, Diagonal())
    v = torch.from_numpy(numbers(len(F)))
    close(operator.solve(v), v.numpy() / np.diag(F))


def model_curvature(change=lambda blocks: blocks, model=None, damping=0.1, **options):
    made = network(Mixed())
    blocks = curvlib.collect(made, curvlib.Exact(), torch.from_numpy(numbers(3, 4)), rest="fallback")
    return ModelCurvature(model or made, change(blocks), damping, **options)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Curvature(Dense(weight=torch.ones(2, 3)), -1.0), "≥ 0"),
        (lambda: Curvature(Dense(weight=torch.ones(2, 3))).solve(torch.ones(3)), "positive finite"),
        (lambda: Curvature(Dense(weight=torch.ones(2, 3))) @ torch.ones(4), r"shape \(3,\), got \(4,\)"),
        (lambda: Jacobian(Dense(weight=torch.ones(2, 3))) @ torch.ones(2), r"block has shape \(3,\), got \(2,\)"),
        (lambda: Jacobian(Dense(weight=torch.ones(2, 3))).T @ torch.ones(3), r"rows has shape \(2,\), got \(3,\)"),
        (lambda: Jacobian(Dense(weight=torch.ones(2, 3))) @ {"bias": torch.ones(3)}, "'bias'"),
        (lambda: model_curvature(model=nn.Linear(4, 3)), r"'Mixed.\(own\)' .* is none of the model's"),
        (lambda: model_curvature(lambda b: {k: v for k, v in b.items() if k != "head"}), r"\['head.weight'\]"),
        (lambda: model_curvature(damping=-1.0), "≥ 0"),
        (lambda: model_curvature(damping=0.0).logdet(), "positive finite"),
        (lambda: model_curvature() @ torch.ones(4), r"shape \(40,\), got \(4,\)"),
        (lambda: model_curvature() @ {"token": torch.ones(4)}, "the gradient has parameters"),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()
