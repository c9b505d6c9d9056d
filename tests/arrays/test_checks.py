"""Checks of factorisations: read at once, or put off and read when asked."""

import numpy as np
import pytest
import torch

from curvlib import arrays
from curvlib.errors import NotPositiveDefiniteError
from curvlib.factors import OuterProduct
from curvlib.solvers import KFAC, Dense, Diagonal, Woodbury

GOOD, BAD = torch.eye(3), -torch.eye(3)


def test_a_factorisation_put_off_leaves_its_verdict_on_the_device():
    with arrays.deferred() as checks:
        factor = arrays.cholesky(GOOD)
        assert bool(checks.good)
        arrays.cholesky(torch.stack([GOOD, BAD]))
        arrays.cholesky(torch.full((3, 3), torch.nan))
    assert torch.equal(factor, GOOD)
    assert (type(checks.good), checks.good.shape, bool(checks.good)) == (torch.Tensor, (), False)
    with pytest.raises(NotPositiveDefiniteError, match=r"shape \(2, 3, 3\)"):
        checks.raise_if_failed()
    checks.raise_if_failed()  # it was read
    assert checks.good is None
    with pytest.raises(NotPositiveDefiniteError):
        arrays.cholesky(BAD)  # outside nothing is put off


def test_the_innermost_one_takes_the_checks():
    with arrays.deferred() as outer:
        with arrays.deferred() as inner:
            arrays.cholesky(BAD)
        arrays.cholesky(GOOD)
    assert (bool(outer.good), bool(inner.good)) == (True, False)


def test_what_is_known_at_once_is_raised_at_once():
    with arrays.deferred() as checks:
        with pytest.raises(NotPositiveDefiniteError):
            arrays.cholesky(-np.eye(3))
        with pytest.raises(NotPositiveDefiniteError):
            arrays.eigh(torch.full((3, 3), torch.nan))
        arrays.cholesky(np.eye(3))
    assert checks.good is None


@pytest.mark.parametrize("solver", [Woodbury(), Dense(), KFAC(), Diagonal()], ids=repr)
def test_solvers_without_a_word_put_off_what_they_would_refuse(solver):
    rows = OuterProduct(torch.randn(4, 3), torch.randn(4, 1, 2), samples=4).scaled(torch.nan)
    with pytest.raises(NotPositiveDefiniteError):
        solver.factorize(solver.update(None, rows), 0.1)
    with arrays.deferred() as checks:
        inverse = solver.factorize(solver.update(None, rows), 0.1)
        solver.solve(inverse, {"weight": torch.ones(2, 3)})
    assert not bool(checks.good)
