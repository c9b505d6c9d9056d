"""Solvers on Factors built by hand: the explicit solve is the truth, in every array library."""

import array_api_compat
import numpy as np
import pytest
import torch
from blocks import BUILDS, LIBRARIES, flat, gradient_of, linear, numbers, step

from curvlib.errors import ConfigurationError, NotPositiveDefiniteError
from curvlib.factors import Dense as DenseRows
from curvlib.factors import OuterProduct
from curvlib.solvers import Dense, Woodbury
from curvlib.solvers.dense import DenseInverse
from curvlib.solvers.woodbury import WoodburyInverse

SOLVERS = [Woodbury(), Dense()]


def tall(library, seed):
    return OuterProduct(library(numbers(30, 2, seed=seed)), library(numbers(30, 1, 3, seed=seed)), samples=15)


def explicit(library, seed):
    return DenseRows(weight=library(numbers(5, 3, 4, seed=seed)), gain=library(numbers(5, 2, seed=seed)))


@pytest.fixture(params=LIBRARIES)
def library(request):
    return LIBRARIES[request.param]


def truth(factors, gradient, damping):
    rows = np.asarray(factors.dense().matrix())
    return np.linalg.solve(rows.T @ rows / factors.normalizer + damping * np.eye(factors.size), gradient)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("build", [*BUILDS, tall, explicit])
@pytest.mark.parametrize("damping", [1e-4, 0.1, 1e4])
def test_solve_is_the_explicit_damped_solve(solver, build, damping, library):
    estimate = None
    for seed in range(3):
        factors = build(library, seed)
        estimate, gradient, natural = step(solver, estimate, factors, library, damping)
        expected = truth(factors, gradient, damping)
        assert np.linalg.norm(natural - expected) < 1e-10 * np.linalg.norm(expected)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("build", [*BUILDS, tall, explicit])
def test_factors_stand_for_their_mean_gradient(solver, build, library):
    factors, fresh = build(library, 0), build(library, 0).scaled(0.5)
    inverse = solver.factorize(solver.update(None, factors), 0.1)
    gradient = np.asarray(fresh.dense().matrix()).sum(0) / fresh.normalizer
    np.testing.assert_allclose(
        flat(solver.solve(inverse, fresh)), truth(factors, gradient, 0.1), rtol=1e-10, atol=1e-12
    )


def test_push_through_stays_accurate_where_damping_vanishes():
    factors = linear(torch.from_numpy, 0, columns=1)
    solver = Woodbury()
    inverse = solver.factorize(solver.update(None, factors), 1e-13)
    assert isinstance(inverse, WoodburyInverse)
    rows = factors.dense().matrix()
    limit = torch.linalg.pinv(rows) @ torch.ones(6, dtype=torch.float64)  # F⁺ Jᵀ1/n
    natural = torch.from_numpy(flat(solver.solve(inverse, inverse.factors)))
    torch.testing.assert_close(natural, limit, rtol=1e-8, atol=0)


def test_woodbury_takes_the_smaller_side(library):
    solver = Woodbury()
    assert isinstance(solver.factorize(solver.update(None, linear(library, 0)), 0.1), WoodburyInverse)
    assert isinstance(solver.factorize(solver.update(None, tall(library, 0)), 0.1), DenseInverse)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_bad_arguments_are_refused(solver, library):
    factors = linear(library, 0)
    estimate = solver.update(None, factors)
    for damping in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigurationError, match="positive finite"):
            solver.factorize(estimate, damping)
    inverse = solver.factorize(estimate, 0.1)
    with pytest.raises(ConfigurationError, match=r"'weight': \(4, 5\)"):
        solver.solve(inverse, {"weight": library(numbers(5, 4)), "bias": library(numbers(4))})
    bad = factors.scaled(float("nan"))
    with pytest.raises(NotPositiveDefiniteError):
        solver.factorize(solver.update(None, bad), 0.1)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_states_are_pure(solver, library):
    factors = linear(library, 0)
    gradient = gradient_of(factors, library)
    estimate = solver.update(None, factors)
    first = solver.factorize(estimate, 0.1)
    before = flat(solver.solve(first, gradient))
    solver.factorize(estimate, 10.0)
    solver.update(estimate, factors.scaled(2.0))
    np.testing.assert_array_equal(flat(solver.solve(first, gradient)), before)
    assert array_api_compat.is_array_api_obj(gradient["weight"])
