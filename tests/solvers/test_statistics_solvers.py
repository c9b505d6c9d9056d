"""What Eva, MKOR, SINGD, Shampoo and SOAP have in common: refusals, purity, and behaviour at the edges."""

import numpy as np
import pytest
import torch
from single_rows import BUILDS, linear, steps

import curvlib
from curvlib.errors import ConfigurationError, NotPositiveDefiniteError
from curvlib.factors import Dense as DenseRows
from curvlib.factors import OuterProduct, cat
from curvlib.solvers import MKOR, SINGD, SOAP, Eva, Shampoo

SOLVERS = [Eva(), MKOR(), SINGD(), SINGD(kfac_like=True, inputs="diagonal"), Shampoo(), SOAP()]
OF_GRADIENT = [solver for solver in SOLVERS if solver.of_gradient]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("build", BUILDS)
def test_torch_and_numpy_agree_and_repeating_the_batch_changes_nothing(solver, build):
    class Twice:
        def __init__(self, solver):
            self.factorize, self.solve = solver.factorize, solver.solve
            self.update = lambda estimate, factors: solver.update(estimate, cat([factors, factors]))

    once, again = steps(solver, build, "numpy", 0.3)[1], steps(Twice(solver), build, "torch", 0.3)[1]
    for (_, one), (_, other) in zip(once, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("solver", OF_GRADIENT, ids=str)
def test_several_rows_a_sample_are_refused(solver):
    columns = OuterProduct(torch.ones(3, 4), torch.ones(3, 2, 5), samples=3)
    with pytest.raises(ConfigurationError, match=r"6 rows for 3 observations: use fisher=Empirical\(\)"):
        solver.update(None, columns)


def test_singd_takes_several_columns():
    assert not SINGD().of_gradient
    columns = OuterProduct(torch.ones(3, 4), torch.ones(3, 2, 5), samples=3)
    one = OuterProduct(torch.ones(3, 4), 2**0.5 * torch.ones(3, 1, 5), samples=3)
    torch.testing.assert_close(SINGD().update(None, columns).cotangents, SINGD().update(None, one).cotangents)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_rows_without_a_kronecker_form_are_refused_with_what_to_use(solver):
    with pytest.raises(ConfigurationError, match="use Woodbury, Dense or Diagonal"):
        solver.update(None, DenseRows(weight=torch.ones(3, 2, 2)))


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_zero_statistics_are_no_division_by_zero(solver):
    factors = linear(torch.from_numpy, 0).factors.scaled(0.0)
    estimate = solver.update(None, factors)
    natural = solver.solve(solver.factorize(solver.update(estimate, factors), 0.25), factors)
    assert all(bool((value == 0).all()) for value in natural.values())


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_what_is_not_finite_and_bad_damping_are_refused(solver):
    factors = linear(torch.from_numpy, 0).factors
    with pytest.raises(NotPositiveDefiniteError, match="finite"):
        solver.factorize(solver.update(None, factors.scaled(float("nan"))), 0.1)
    with pytest.raises(ConfigurationError, match="positive finite"):
        solver.factorize(solver.update(None, factors), 0.0)
    with pytest.raises(ConfigurationError, match="the gradient has parameters"):
        solver.solve(solver.factorize(solver.update(None, factors), 0.1), {"weight": torch.ones(5, 4)})


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_frozen_weight_or_bias_is_a_narrower_matrix(solver, name):
    estimate = None
    for seed in range(3):
        factors = linear(torch.from_numpy, seed).factors.restricted([name])
        estimate = solver.update(estimate, factors)
    natural = solver.solve(solver.factorize(estimate, 0.1), factors)
    assert {key: value.shape for key, value in natural.items()} == factors.shapes
    assert float(curvlib.arrays.dot(natural, factors.rmatvec(factors.row_weights(1.0)))) > 0


@pytest.mark.parametrize("solver", [Eva(), Shampoo(exponent=0.5), SOAP()], ids=str)
def test_the_ones_that_damping_can_outweigh_obey_every_law(solver):
    factors = {build.__name__: build(torch.from_numpy, 0).factors for build in BUILDS}
    assert curvlib.testing.check_solver(solver, factors, tolerance=1e-9)["refused"] == []


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Eva(decay=1.0), r"\[0, 1\), got 1.0"),
        (lambda: MKOR(decay=-0.1), r"\[0, 1\)"),
        (lambda: SINGD(damping=0.0), "positive finite"),
        (lambda: SINGD(rate=0.0), "rate of the update"),
        (lambda: SINGD(momentum=1.0), r"\[0, 1\)"),
        (lambda: SINGD(inputs="toeplitz"), "'dense', 'diagonal'"),
        (lambda: SINGD(cotangents="block"), "'dense', 'diagonal'"),
        (lambda: SINGD(sharing="both"), "'expand', 'reduce'"),
        (lambda: Shampoo(decay=1.0), r"\[0, 1\)"),
        (lambda: Shampoo(exponent=0.0), "exponent"),
        (lambda: SOAP(momentum=1.0), r"\[0, 1\)"),
        (lambda: SOAP(decay=2.0), r"\[0, 1\)"),
        (lambda: SOAP(basis_every=0), "at least 1"),
        (lambda: SOAP(largest=-1), "at least 0"),
    ],
)
def test_bad_hyperparameters_are_refused(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()
