"""Products of several blocks at once are those of each block, whichever of them share a call."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kinds import KINDS, close, matrix, numbers

from curvlib.arrays import evaluated, torch_kernels
from curvlib.factors import Dense, Scaled
from curvlib.factors.together import covariances, grams
from curvlib.factors.together import rmatvecs as rmatvecs_lazily

LIBRARIES = ("torch", "numpy")


def explicit(library, rows, *shape, seed=0, scale=None):
    factors = Dense(weight=numbers(library, rows, *shape, seed=seed), bias=numbers(library, rows, shape[0], seed=seed))
    return factors if scale is None else Scaled(factors, scale)


def blocks(library):
    """Blocks of every kind, some of equal shapes, two too large to be copied together."""
    equal = [explicit(library, 6, 3, 2, seed=seed, scale=scale) for seed, scale in enumerate((None, 2.0, -0.5))]
    large = [explicit(library, 40, 30, 40, seed=seed) for seed in (3, 4)]
    kinds = [make(library, 1) for name, make in KINDS.items() if "convolution" not in name or library == "torch"]
    return [*equal, *kinds, *large, explicit(library, 6, 3, 2, seed=5)]


def rmatvecs(*arguments):
    return [evaluated(one) for one in rmatvecs_lazily(*arguments)]


@pytest.mark.parametrize("library", LIBRARIES)
def test_grams_are_those_of_the_dense_rows(library):
    several = blocks(library)
    for factors, gram in zip(several, grams(several), strict=True):
        close(gram, matrix(factors) @ matrix(factors).T)
        assert type(gram) is type(factors.like)


@pytest.mark.parametrize("library", LIBRARIES)
def test_covariances_are_those_of_the_dense_rows(library):
    several = blocks(library)
    for factors, covariance in zip(several, covariances(several), strict=True):
        close(covariance, matrix(factors).T @ matrix(factors))


@pytest.mark.parametrize("library", LIBRARIES)
def test_sums_of_weighted_rows_are_those_of_the_dense_rows(library):
    several = blocks(library)
    weights = [numbers(library, len(factors), seed=place) for place, factors in enumerate(several)]
    for factors, one, total in zip(several, weights, rmatvecs(several, weights), strict=True):
        assert {name: tuple(array.shape) for name, array in total.items()} == factors.shapes
        expected = factors.dense().rmatvec(one)
        for name, array in total.items():
            close(array, expected[name])
    for expected, total in zip(
        rmatvecs(several, weights), rmatvecs(several, weights, [-0.5] * len(several)), strict=True
    ):
        for name, array in total.items():
            close(array, -0.5 * expected[name])


@pytest.mark.parametrize("together", [True, False])
def test_rows_that_lie_side_by_side(monkeypatch, together):
    monkeypatch.setattr(torch_kernels, "SIDE_BY_SIDE", range(1, 1 << 30) if together else range(1))
    whole = numbers("torch", 4, 6, 10, 16)
    small = [Dense(weight=rows) for rows in whole]
    large = [Dense(weight=rows) for rows in numbers("torch", 4, 20, 50, 40)]
    several = [Scaled(small[1], 3.0), small[0], large[3], small[2], large[0], large[1], small[3], large[2]]
    for factors, gram in zip(several, grams(several), strict=True):
        close(gram, matrix(factors) @ matrix(factors).T)
    own = [numbers("torch", len(factors), seed=place) for place, factors in enumerate(several)]
    for factors, one, total in zip(several, own, rmatvecs(several, own), strict=True):
        close(total["weight"].reshape(-1), matrix(factors).T @ one.numpy())


@pytest.mark.parametrize("made", [grams, covariances])
def test_results_may_be_changed_and_change_nothing_else(made):
    several = [explicit("torch", 4, 3, 2, seed=seed) for seed in range(3)]
    alone = Dense(weight=numbers("torch", 4, 5))
    before = [factors.dense().matrix().clone() for factors in several]
    first, *others = made([*several, alone])
    kept = [other.clone() for other in others]
    first *= 0
    assert all((one == other).all() for one, other in zip(others, kept, strict=True))
    assert all((factors.dense().matrix() == rows).all() for factors, rows in zip(several, before, strict=True))


def test_nothing_makes_nothing():
    assert grams([]) == covariances([]) == rmatvecs([], []) == []


@given(
    shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=6),
    scale=st.sampled_from([None, 3.0]),
)
def test_any_mixture_of_shapes(shapes, scale):
    several = [explicit("numpy", *shape, seed=place, scale=scale) for place, shape in enumerate(shapes)]
    for factors, gram, covariance in zip(several, grams(several), covariances(several), strict=True):
        rows = matrix(factors)
        np.testing.assert_allclose(gram, rows @ rows.T, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(covariance, rows.T @ rows, rtol=1e-11, atol=1e-12)
