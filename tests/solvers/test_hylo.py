"""HyLo's KIS and KID against their formulas in explicit matrices, over several updates."""

import math
import random

import numpy as np
import pytest
import torch
from blocks import BUILDS, linear, numbers, reduced, step

from curvlib.errors import ConfigurationError
from curvlib.factors import Dense as DenseRows
from curvlib.factors import OuterProduct, cat
from curvlib.solvers import KID, KIS, Woodbury

DAMPING = 0.2


@pytest.fixture(params=["torch", "numpy"])
def library(request):
    return torch.from_numpy if request.param == "torch" else np.asarray


def rows_of(factors, sharing):
    """J, from the definition: per-sample gradients, or products of mean inputs and summed cotangents."""
    if sharing == "exact" or isinstance(factors, OuterProduct):
        return np.asarray(factors.dense().matrix())
    a, g = reduced(factors)
    rows = np.einsum("ncrgo,ncrgi->ncgoi", g, a).reshape(len(factors), *g.shape[3:], a.shape[4])
    bias = getattr(factors, "bias", None) is not None
    weight = rows[..., :-1] if bias else rows
    parts = [weight, *([rows[..., -1]] if bias else [])]
    return np.concatenate([part.reshape(len(factors), -1) for part in parts], axis=1)


def drawn(J, r, seed):
    """Rows of the r largest perturbed log norms, and the chance of each to be drawn given the next key."""
    source = random.Random(seed)
    keys = np.log((J**2).sum(1)) + [-math.log(-math.log(source.random())) for _ in J]
    order = np.argsort(-keys)
    threshold = keys[order[r]] if r < len(J) else -np.inf
    return order[:r], 1 - np.exp(-(J[order[:r]] ** 2).sum(1) * np.exp(-threshold))


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("sharing", ["exact", "reduce"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("ratio", [0.01, 0.4, 1.0])
def test_sampled_rows_stand_for_all(build, sharing, unbiased, ratio, library):
    solver, estimate = KIS(ratio, sharing, unbiased, seed=3), None
    for update in range(3):
        factors = build(library, update)
        estimate, g, natural = step(solver, estimate, factors, library, DAMPING)
        J, n = rows_of(factors, sharing), factors.normalizer
        r = max(1, round(ratio * len(J)))
        index, chance = drawn(J, r, f"3/{update}")
        weights = 1 / (n * chance) if unbiased else np.full(r, len(J) / (n * r))
        F = np.einsum("i,ip,iq->pq", weights, J[index], J[index])
        np.testing.assert_allclose(natural, np.linalg.solve(F + DAMPING * np.eye(len(g)), g), rtol=1e-9, atol=1e-10)


def test_weighted_rows_have_the_right_curvature_on_average():
    rows = numbers(6, 3) * np.array([3.0, 1.0, 0.3, 1.0, 2.0, 0.1])[:, None]
    factors = DenseRows(weight=rows)
    truth = rows.T @ rows / 6
    error = {}
    for unbiased in (False, True):
        estimate, total = None, 0.0
        for _ in range(4000):
            estimate = KIS(0.5, unbiased=unbiased).update(estimate, factors)
            total = total + estimate.rows.covariance() / 4000
        error[unbiased] = np.linalg.norm(total - truth) / np.linalg.norm(truth)
    assert error[True] < 0.02
    assert error[False] > 0.3


def test_draws_depend_on_the_seed_and_on_the_update_alone(library):
    factors = linear(library, 0)
    first = KIS(0.3).update(None, factors)
    again, other = KIS(0.3).update(None, factors), KIS(0.3, seed=1).update(None, factors)
    second = KIS(0.3).update(first, factors)
    same = [np.array_equal(np.asarray(first.kernel), np.asarray(one.kernel)) for one in (again, other, second)]
    assert same == [True, False, False]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("sharing", ["exact", "reduce"])
@pytest.mark.parametrize("ratio", [0.01, 0.4])
def test_all_rows_are_interpolated_from_the_largest(build, sharing, ratio, library):
    solver, estimate = KID(ratio, sharing), None
    for update in range(3):
        factors = build(library, update)
        estimate, g, natural = step(solver, estimate, factors, library, DAMPING)
        J, n = rows_of(factors, sharing), factors.normalizer
        N, r = len(J), max(1, round(ratio * len(J)))
        J = J[np.argsort(-(J**2).sum(1), kind="stable")]
        K = J @ J.T / n
        Q, R = np.linalg.qr(K)
        P = np.concatenate([np.eye(r), np.linalg.solve(R[:r, :r], R[:r, r:])], axis=1)
        E = Q[:, r:] @ Q[:, r:].T @ K @ Q[:, r:] @ Q[:, r:].T
        M = P @ np.linalg.solve(E + DAMPING * np.eye(N), P.T)
        Z = M - M @ np.linalg.solve(np.linalg.inv(K[:r, :r]) + M, M)
        expected = (g - J[:r].T @ Z @ J[:r] @ g / n) / DAMPING
        np.testing.assert_allclose(natural, expected, rtol=1e-7, atol=1e-8)


def test_interpolation_from_rows_that_span_all_is_exact(library):
    few = linear(library, 0).rows(library(np.arange(4)))
    repeated = cat([few, few.scaled(0.05), few.scaled(0.025)])
    for solver, factors in ((KID(1 / 3), repeated), (KID(1.0), few), (KID(1.0), repeated)):
        _, _, natural = step(solver, None, factors, library, DAMPING)
        _, _, expected = step(Woodbury(), None, factors, library, DAMPING)
        np.testing.assert_allclose(natural, expected, rtol=1e-7, atol=1e-9)
    twice = [step(KID(0.5), None, factors, library, DAMPING)[2] for factors in (few, cat([few, few]))]
    np.testing.assert_allclose(*twice, rtol=1e-7, atol=1e-9)


def test_every_direction_is_one_of_descent():
    for seed in range(20):
        # Two directions that nearly all rows share make the columns kept all but dependent.
        J = numbers(12, 2, seed=seed) @ numbers(2, 20, seed=seed) + 0.05 * numbers(12, 20, seed=seed)
        solver = KID(0.4)
        inverse = solver.factorize(solver.update(None, DenseRows(weight=J)), 0.01)
        columns = [solver.solve(inverse, {"weight": e})["weight"] for e in np.eye(20)]
        operator = np.stack(columns)
        np.testing.assert_allclose(operator, operator.T, atol=1e-8)
        assert np.linalg.eigvalsh(operator)[0] > 0
        assert np.linalg.eigvalsh(operator)[-1] < 1.0001 / 0.01


@pytest.mark.parametrize("solver", [KIS(), KID(), KIS(unbiased=True)], ids=str)
def test_zero_curvature_leaves_the_gradient(solver, library):
    factors = linear(library, 0).scaled(0.0)
    _, gradient, natural = step(solver, None, factors, library, DAMPING)
    np.testing.assert_allclose(natural, gradient / DAMPING)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KIS(0.0), r"\(0, 1\], got 0.0"),
        (lambda: KID(1.5), r"\(0, 1\], got 1.5"),
        (lambda: KIS(sharing="expand"), "'exact', 'reduce'"),
        (lambda: KIS(sharing="reduce").update(None, DenseRows(weight=torch.ones(3, 2))), "no Kronecker form"),
    ],
)
def test_what_makes_no_sense_is_refused(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()
