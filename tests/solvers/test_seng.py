"""SENG against its definition in explicit matrices, over several updates."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from blocks import (
    BUILDS,
    SAMPLES,
    embedding,
    gradient_of,
    grouped,
    linear,
    matrices,
    no_bias,
    numbers,
    positions,
    sequence,
    step,
    stored,
)  # fmt: skip

import curvlib
from curvlib.errors import ConfigurationError, NotPositiveDefiniteError
from curvlib.factors import Dense as DenseRows
from curvlib.factors import SharedOuter
from curvlib.solvers import SENG, Woodbury, seng
from curvlib.solvers.seng import SidesSketch

DAMPING = 0.2


@pytest.fixture(params=["torch", "numpy"])
def library(request):
    return torch.from_numpy if request.param == "torch" else np.asarray


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("rows_at_a_time", [1, 100])
def test_kernel_and_products_are_sketched_and_the_last_product_is_whole(build, rows_at_a_time, library, monkeypatch):
    monkeypatch.setattr(seng, "_TEMPORARY", rows_at_a_time * build(library, 0).size)
    solver, estimate = SENG(columns=8, seed=3), None
    for update in range(3):
        factors = build(library, update)
        estimate, g, natural = step(solver, estimate, factors, library, DAMPING)
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
    _, _, natural = step(SENG(), None, factors, library, DAMPING)
    _, _, expected = step(Woodbury(), None, factors, library, DAMPING)
    np.testing.assert_allclose(natural, expected, rtol=1e-10)
    first = SENG(8).update(None, factors)
    others = [SENG(8).update(None, factors), SENG(8, seed=1).update(None, factors), SENG(8).update(first, factors)]
    same = [np.array_equal(np.asarray(first.sketch.index), np.asarray(one.sketch.index)) for one in others]
    assert same == [True, False, False]


@pytest.mark.parametrize("value", [0, 2.5, True])
def test_bad_hyperparameters_are_refused(value):
    with pytest.raises(ConfigurationError, match="at least one column"):
        SENG(value)
    for name in ("implicit", "rank"):
        with pytest.raises(ConfigurationError, match=f"{name} must be an integer of at least 1"):
            SENG(**{name: value})


def many_positions(library, seed):
    a, g = numbers(SAMPLES, 7, 1, 5, seed=seed), numbers(SAMPLES, 2, 7, 1, 3, seed=seed + 50)
    return SharedOuter(library(a), library(g), (3, 5), bias="bias", samples=SAMPLES)


def truncated_rows(factors, rank):
    """Matrices G V Vᵀ X of every row and group, shape (rows, groups, d_out, d), one singular decomposition each."""
    a, g = positions(factors)
    n, columns, _, groups, d_out = g.shape
    result = np.zeros((n, columns, groups, d_out, a.shape[4]))
    for sample, column, group in np.ndindex(n, columns, groups):
        U, S, V = np.linalg.svd(g[sample, column, :, group].T, full_matrices=False)
        result[sample, column, group] = (U[:, :rank] * S[:rank]) @ V[:rank] @ a[sample, 0, :, group]
    return result.reshape(n * columns, groups, d_out, a.shape[4])


@pytest.mark.parametrize("build", [linear, no_bias, sequence, grouped, many_positions])
@pytest.mark.parametrize("columns", [9, 16])
@pytest.mark.parametrize("rank", [1, 2, 16])
def test_sides_of_large_blocks_are_truncated_and_sampled_apart(build, columns, rank, library):
    solver, estimate = SENG(columns, seed=3, implicit=1, rank=rank), None
    for update in range(3):
        factors = build(library, update)
        estimate = stored(solver.update(estimate, factors))
        assert isinstance(estimate.sketch, SidesSketch)
        gradient = gradient_of(factors, library)
        natural = matrices(factors, solver.solve(stored(solver.factorize(estimate, DAMPING)), gradient))
        rows, G, n = truncated_rows(factors, rank), matrices(factors, gradient), factors.normalizer
        if rank == 16 or build in (linear, no_bias):
            exact = [matrices(factors, {k: v[i] for k, v in factors.dense().values.items()}) for i in range(len(rows))]
            np.testing.assert_allclose(rows, exact, atol=1e-12)
        source, side = random.Random(f"3/{update}"), int(columns**0.5)
        outputs, inputs = (source.sample(range(size), min(side, size)) for size in rows.shape[2:])
        P = rows.shape[2] * rows.shape[3] / (len(outputs) * len(inputs))
        sampled = rows[:, :, outputs][..., inputs].reshape(len(rows), -1)
        products = P * sampled @ G[:, outputs][..., inputs].reshape(-1)
        middle = np.linalg.solve(P * sampled @ sampled.T / n + DAMPING * np.eye(len(rows)), products)
        expected = (G - np.einsum("r,rgoi->goi", middle, rows) / n) / DAMPING
        np.testing.assert_allclose(natural, expected, rtol=1e-9, atol=1e-10)


def test_what_has_no_sides_stays_explicit(library):
    for factors in (embedding(library, 0), DenseRows(weight=library(numbers(4, 3, 4)))):
        one, other = (SENG(4, implicit=size).update(None, factors) for size in (1, 10**6))
        np.testing.assert_array_equal(np.asarray(one.kernel), np.asarray(other.kernel))
    whole = SENG(10**4, implicit=1).update(None, linear(library, 0))
    assert whole.sketch is None


def test_convolutions_have_sides_too():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3, groups=2), torch.nn.Flatten(), torch.nn.Linear(16, 3)).double()
    x = torch.from_numpy(numbers(5, 2, 4, 4))
    rows = curvlib.collect(model, curvlib.Exact(), x)["0"]
    estimate = SENG(4, implicit=1, rank=16).update(None, rows)
    torch.testing.assert_close(estimate.factors.dense().matrix(), rows.dense().matrix())
    torch.testing.assert_close(SENG(10**4).update(None, rows).kernel, rows.gram() / 5)


def test_sides_that_are_not_finite_are_refused_where_the_ladder_stands(library):
    solver, factors = SENG(4, implicit=1, rank=1), sequence(library, 0)
    bad = dataclasses.replace(factors, cotangents=factors.cotangents * 1.0)
    bad.cotangents[2, 0, 2] = float("nan")
    estimate = solver.update(None, bad)
    with pytest.raises(NotPositiveDefiniteError):
        solver.factorize(estimate, DAMPING)
