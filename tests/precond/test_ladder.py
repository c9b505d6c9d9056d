"""What happens when a factorisation fails."""

import warnings

import pytest
import torch
from loop import X, backward, built, network, steps, unchanged_by, values

from curvlib import Exact, Gaussian, Sampled, Woodbury
from curvlib.errors import FailureWarning, NotPositiveDefiniteError, RefreshError
from curvlib.solvers import Solver


class Fragile(Woodbury):
    """Woodbury that fails to factorise as long as told to."""

    def __init__(self, fails):
        object.__setattr__(self, "fails", fails)

    def factorize(self, estimate, damping):
        if self.fails(estimate, damping):
            raise NotPositiveDefiniteError("told to fail")
        return super().factorize(estimate, damping)


def test_a_factorisation_that_fails_is_retried_in_float64():
    model = network().float()
    solver = Fragile(
        lambda estimate, damping: (
            getattr(estimate, "kernel", None) is not None and estimate.kernel.dtype != torch.float64
        )
    )
    optimizer = built(model, solver=solver, fisher=Sampled())
    backward(model, X.float())
    with pytest.warns(FailureWarning, match="block '[02]': not positive .*it was factorised in float64"):
        optimizer.step()
    assert (optimizer.curvature["0"].retries, optimizer.curvature["0"].failures) == (1, 0)
    assert optimizer.curvature["0"].inverse.factor.dtype == torch.float32


def test_then_with_more_damping():
    model = network()
    optimizer = built(model, solver=Fragile(lambda estimate, damping: damping < 5))
    with pytest.warns(FailureWarning, match="failed in float64; failed with damping 1; with damping 10"):
        steps(model, optimizer, 1)
    assert optimizer.curvature["0"].retries == 1


def test_then_the_last_good_inverse_is_used_and_counted():
    model = network()
    failing = [False]
    optimizer = built(model, solver=Fragile(lambda estimate, damping: failing[0]))
    steps(model, optimizer, 1)
    inverse = optimizer.curvature["0"].inverse
    failing[0] = True
    with pytest.warns(FailureWarning, match=r"step 1: block '[02]': .*the inverse of step 0 is used on") as caught:
        steps(model, optimizer, 3)
    # Once for each block, however often it happens.
    assert [(one.message.block, one.message.step, one.message.action) for one in caught] == [
        ("0", 1, "kept"),
        ("2", 1, "kept"),
    ]
    assert all("told to fail" in one.message.cause for one in caught)
    assert optimizer.health["0"].failures == 3
    assert optimizer.curvature["0"].inverse is inverse
    failing[0] = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(model, optimizer, 1)
    assert optimizer.curvature["0"].refreshed == 4


def test_then_an_error_names_block_step_and_remedy():
    model = network()
    optimizer = built(model, solver=Fragile(lambda estimate, damping: True))
    backward(model)
    unchanged_by(model, optimizer, "step 0: block '0'.*raise the damping", RefreshError)


def test_a_users_solver_needs_three_verbs():
    class Identity(Solver):
        def update(self, estimate, factors):
            return (estimate or 0) + len(factors)

        def factorize(self, estimate, damping):
            return damping

        def solve(self, inverse, gradient):
            return {name: value / inverse for name, value in gradient.items()}

    model = network()
    optimizer = built(model, solver=Identity(), fisher=Exact(Gaussian()))
    backward(model)
    before, gradients = values(model), [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    for p, old, gradient in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.5 * gradient / 0.1)
