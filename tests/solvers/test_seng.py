"""SENG against its definition in explicit matrices, over several updates."""

import random

import numpy as np
import pytest
import torch

from curvlib.arrays import pack, unpack
from curvlib.errors import ConfigurationError
from curvlib.factors import Dense as DenseRows
from curvlib.factors import OneHotOuter, OuterProduct, SharedOuter
from curvlib.solvers import SENG, Woodbury, seng

DAMPING = 0.2


def numbers(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def linear(library, seed, bias="bias"):
    return OuterProduct(
        library(numbers(6, 5, seed=seed)), library(numbers(6, 2, 4, seed=seed + 50)), bias=bias, samples=6
    )


def no_bias(library, seed):
    return linear(library, seed, bias=None)


def sequence(library, seed):
    a, g = numbers(6, 3, 1, 5, seed=seed), numbers(6, 2, 3, 1, 4, seed=seed + 50)
    return SharedOuter(library(a), library(g), (4, 5), bias="bias", samples=6)


def grouped(library, seed):
    a, g = numbers(6, 3, 2, 5, seed=seed), numbers(6, 1, 3, 2, 4, seed=seed + 50)
    return SharedOuter(library(a), library(g), (8, 5), bias="bias", samples=6)


def embedding(library, seed):
    indices = np.random.default_rng(seed).integers(7, size=(6, 3))
    return OneHotOuter(library(indices), library(numbers(6, 1, 3, 2, seed=seed)), 7)


@pytest.fixture(params=["torch", "numpy"])
def library(request):
    return torch.from_numpy if request.param == "torch" else np.asarray


def flat(vector):
    return np.concatenate([np.asarray(value).reshape(-1) for value in vector.values()])


def run(solver, factors, estimate, library):
    estimate = unpack(pack(solver.update(estimate, factors)))
    gradient = {name: library(numbers(*shape, seed=9)) for name, shape in factors.shapes.items()}
    natural = solver.solve(unpack(pack(solver.factorize(estimate, DAMPING))), gradient)
    assert list(natural) == list(factors.shapes)
    return estimate, flat(gradient), flat(natural)


@pytest.mark.parametrize("build", [linear, no_bias, sequence, grouped, embedding])
@pytest.mark.parametrize("rows_at_a_time", [1, 100])
def test_kernel_and_products_are_sketched_and_the_last_product_is_whole(build, rows_at_a_time, library, monkeypatch):
    monkeypatch.setattr(seng, "_TEMPORARY", rows_at_a_time * build(library, 0).size)
    solver, estimate = SENG(columns=8, seed=3), None
    for update in range(3):
        factors = build(library, update)
        estimate, g, natural = run(solver, factors, estimate, library)
        J, n, P = np.asarray(factors.dense().matrix()), factors.normalizer, factors.size
        S = random.Random(f"3/{update}").sample(range(P), 8)
        kernel = P / 8 * J[:, S] @ J[:, S].T / n
        products = P / 8 * J[:, S] @ g[S]
        middle = np.linalg.solve(kernel + DAMPING * np.eye(len(J)), products)
        np.testing.assert_allclose(natural, (g - J.T @ middle / n) / DAMPING, rtol=1e-9, atol=1e-10)


def test_the_sketch_is_right_on_average():
    factors, total, products = DenseRows(weight=numbers(4, 12)), 0.0, 0.0
    J, g, estimate = factors.dense().matrix(), numbers(12, seed=1), None
    for _ in range(5000):
        estimate = SENG(columns=4).update(estimate, factors)
        total = total + estimate.kernel / 5000
        products = products + estimate.sketch.columns @ g[estimate.sketch.index] / 5000
    np.testing.assert_allclose(total, J @ J.T / 4, atol=0.05 * np.abs(J @ J.T / 4).max())
    np.testing.assert_allclose(products, J @ g, atol=0.05 * np.abs(J @ g).max())


def test_small_blocks_are_exact_and_draws_are_reproducible(library):
    factors = linear(library, 0)
    _, _, natural = run(SENG(), factors, None, library)
    _, _, expected = run(Woodbury(), factors, None, library)
    np.testing.assert_allclose(natural, expected, rtol=1e-10)
    first = SENG(8).update(None, factors)
    others = [SENG(8).update(None, factors), SENG(8, seed=1).update(None, factors), SENG(8).update(first, factors)]
    same = [np.array_equal(np.asarray(first.sketch.index), np.asarray(one.sketch.index)) for one in others]
    assert same == [True, False, False]


@pytest.mark.parametrize("columns", [0, 2.5, True])
def test_bad_hyperparameters_are_refused(columns):
    with pytest.raises(ConfigurationError, match="at least one column"):
        SENG(columns)
