"""The low-rank option of Woodbury against its definition in explicit matrices, over several updates."""

import numpy as np
import pytest
import torch

from curvlib.arrays import pack, unpack
from curvlib.errors import ConfigurationError
from curvlib.factors import Dense as DenseRows
from curvlib.factors import OuterProduct, SharedOuter
from curvlib.solvers import Woodbury
from curvlib.solvers.dense import Covariance

DAMPING = 0.2


def numbers(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def explicit(library, seed):
    return DenseRows(weight=library(numbers(8, 5, 4, seed=seed)), bias=library(numbers(8, 5, seed=seed)), samples=4)


def sequence(library, seed):
    a, g = numbers(8, 40, 1, 5, seed=seed), numbers(8, 1, 40, 1, 4, seed=seed + 50)
    return SharedOuter(library(a), library(g), (4, 5), bias="bias")


def grouped(library, seed):
    a, g = numbers(8, 40, 2, 3, seed=seed), numbers(8, 1, 40, 2, 2, seed=seed + 50)
    return SharedOuter(library(a), library(g), (4, 3))


def linear(library, seed):
    return OuterProduct(library(numbers(8, 5, seed=seed)), library(numbers(8, 4, seed=seed + 50)), bias="bias")


@pytest.fixture(params=["torch", "numpy"])
def library(request):
    return torch.from_numpy if request.param == "torch" else np.asarray


def flat(vector):
    return np.concatenate([np.asarray(value).reshape(-1) for value in vector.values()])


@pytest.mark.parametrize("build", [explicit, sequence, grouped])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_products_are_truncated_and_the_kernel_is_whole(build, share, library):
    solver, estimate = Woodbury(low_rank=share), None
    for seed in range(3):
        factors = build(library, seed)
        estimate = unpack(pack(solver.update(estimate, factors)))
        inverse = unpack(pack(solver.factorize(estimate, DAMPING)))
        J, n = np.asarray(factors.dense().matrix()), factors.normalizer
        U, S, V = np.linalg.svd(J, full_matrices=False)
        rank = int((np.cumsum(S) <= share * S.sum()).sum())
        assert 0 < rank < len(J)
        L = U[:, :rank] * S[:rank] @ V[:rank]
        middle = np.linalg.inv(J @ J.T / n + DAMPING * np.eye(len(J)))
        vector = {name: library(numbers(*shape, seed=9)) for name, shape in factors.shapes.items()}
        for gradient, g in ((vector, flat(vector)), (factors, J.sum(0) / n), (estimate.factors, L.sum(0) / n)):
            expected = (g - L.T @ middle @ (L @ g) / n) / DAMPING
            np.testing.assert_allclose(flat(solver.solve(inverse, gradient)), expected, rtol=1e-9, atol=1e-10)


def test_factored_and_small_blocks_stay_as_they_are(library):
    solver = Woodbury(low_rank=0.5)
    assert isinstance(solver.update(None, linear(library, 0)).factors, OuterProduct)
    assert isinstance(solver.update(None, DenseRows(weight=library(numbers(9, 3)))), Covariance)


def test_what_is_exact_says_so():
    assert Woodbury().exact
    assert not Woodbury(low_rank=0.9).exact
    for share in (0, 1, 1.5):
        with pytest.raises(ConfigurationError, match=r"strictly in \(0, 1\)"):
            Woodbury(low_rank=share)
