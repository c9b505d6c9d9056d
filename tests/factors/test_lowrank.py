"""Truncated rows against the singular value decomposition of J."""

import numpy as np
import pytest
import torch

from curvlib.errors import ConfigurationError, NotPositiveDefiniteError
from curvlib.factors import Dense, LowRank, cat
from curvlib.factors.lowrank import truncated


@pytest.fixture(params=["torch", "numpy"])
def factors(request):
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((6, 4, 3)), rng.standard_normal((6, 4))
    library = torch.from_numpy if request.param == "torch" else np.asarray
    return Dense(weight=library(weight), bias=library(bias), samples=3)


def matrix(factors):
    return np.asarray(factors.dense().matrix())


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.999])
def test_the_leading_singular_directions_are_kept(factors, share):
    U, S, V = np.linalg.svd(matrix(factors), full_matrices=False)
    rank = max(1, int((np.cumsum(S) <= share * S.sum()).sum()))
    kept = truncated(factors, share)
    assert kept.left.shape == (6, rank)
    np.testing.assert_allclose(matrix(kept), U[:, :rank] * S[:rank] @ V[:rank], atol=1e-12)
    assert kept.normalizer == 3
    assert kept.nbytes == 8 * rank * (6 + 16)


def test_no_rank_is_lost_to_rows_that_repeat(factors):
    twice = cat([factors, factors])
    one, two = truncated(factors, 0.7), truncated(twice, 0.7)
    assert one.left.shape[1] == two.left.shape[1]
    np.testing.assert_allclose(matrix(two), np.concatenate([matrix(one)] * 2), atol=1e-7)
    np.testing.assert_allclose(matrix(truncated(factors.scaled(0.0), 0.9)), 0)


def test_structure_is_kept_by_the_algebra(factors):
    kept = truncated(factors, 0.7)
    for result in (kept.add(kept), cat([kept, kept]), kept.scaled(2.0), kept.rows(kept.left.argsort(axis=0)[:, 0])):
        assert isinstance(result, LowRank)


def test_what_makes_no_sense_is_refused(factors):
    for share in (0.0, 1.0, 1.5):
        with pytest.raises(ConfigurationError, match=r"\(0, 1\)"):
            truncated(factors, share)
    with pytest.raises(NotPositiveDefiniteError, match="not finite"):
        truncated(factors.scaled(float("nan")), 0.9)
