"""SPRING and MinSR against the paper's formulas in explicit matrices, over several steps."""

import numpy as np
import pytest
import torch
from blocks import BUILDS, flat, linear, numbers, stored
from torch import nn

import curvlib
from curvlib.errors import ConfigurationError
from curvlib.factors import Dense as DenseRows
from curvlib.solvers import SPRING, MinSR, Woodbury

DAMPING, STEPS = 0.2, 4


def tall(library, seed, columns=1):
    return DenseRows(weight=library(numbers(12, 2, 2, seed=seed)))


@pytest.fixture(params=["torch", "numpy"])
def library(request):
    return torch.from_numpy if request.param == "torch" else np.asarray


def mean(factors, scale=1.0):
    return factors.rmatvec(factors.row_weights(scale / factors.normalizer))


@pytest.mark.parametrize("build", [*BUILDS, tall])
@pytest.mark.parametrize("solver", [SPRING(0.9), SPRING(0.5), MinSR()], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.01, 30.0])
def test_steps_are_those_of_the_paper(build, solver, scale, library):
    estimate, previous = None, 0.0
    for seed in range(STEPS):
        factors = build(library, seed, columns=1)
        estimate = stored(solver.update(estimate, factors))
        inverse = stored(solver.factorize(estimate, DAMPING))
        natural = solver.solve(inverse, mean(factors, scale))
        # The paper's normalisation: O = J / √n, r = 1 / √n, λ.
        J, n = np.asarray(factors.dense().matrix()), factors.normalizer
        Obar, r = J / n**0.5, np.full(len(J), scale / n**0.5)
        last = solver.momentum * previous + np.zeros(J.shape[1])
        expected = last + Obar.T @ np.linalg.solve(Obar @ Obar.T + DAMPING * np.eye(len(J)), r - Obar @ last)
        np.testing.assert_allclose(flat(natural), expected, rtol=1e-9, atol=1e-11 * scale)
        # The same as a damped solve that is drawn to the last step.
        F = Obar.T @ Obar + DAMPING * np.eye(J.shape[1])
        proximal = np.linalg.solve(F, J.sum(0) * scale / n + DAMPING * last)
        np.testing.assert_allclose(flat(natural), proximal, rtol=1e-9, atol=1e-11 * scale)
        estimate, previous = solver.remember(estimate, natural), expected


def test_minsr_is_woodbury_and_stays_accurate_where_damping_vanishes(library):
    factors = linear(library, 0, columns=1)
    for damping in (0.1, 1e-13):
        inverse = MinSR().factorize(MinSR().update(None, factors), damping)
        J = np.asarray(factors.dense().matrix())
        expected = (
            np.linalg.pinv(J / 6**0.5) @ np.full(6, 6**-0.5)
            if damping < 1e-9
            else flat(Woodbury().solve(Woodbury().factorize(Woodbury().update(None, factors), damping), factors))
        )
        for gradient in (factors, mean(factors), factors.dense()):
            np.testing.assert_allclose(flat(MinSR().solve(inverse, gradient)), expected, rtol=1e-8)


@pytest.mark.parametrize("solver", [SPRING(), MinSR()], ids=str)
def test_a_gradient_of_other_rows_is_refused(solver, library):
    factors = linear(library, 0, columns=1)
    inverse = solver.factorize(solver.update(None, factors), DAMPING)
    near = {name: value + 1e-4 for name, value in mean(factors).items()}
    solver.solve(inverse, near)
    reverse = {name: -value for name, value in mean(factors).items()}
    for other in (
        mean(linear(library, 1, columns=1)),
        reverse,
        linear(library, 1, columns=1),
        mean(factors.rows(library(np.arange(5)))),
    ):
        with pytest.raises(ConfigurationError, match=r"Empirical\(\) with refresh=1"):
            solver.solve(inverse, other)
    with pytest.raises(ConfigurationError, match="the gradient has parameters"):
        solver.solve(inverse, {"weight": mean(factors)["weight"]})


def test_a_gradient_that_vanishes_in_rounding_is_no_error():
    rows = torch.cat([torch.eye(3), -torch.eye(3)]).double() * (1 / 3)
    factors = DenseRows(weight=rows)
    solver = SPRING()
    inverse = solver.factorize(solver.update(None, factors), DAMPING)
    natural = solver.solve(inverse, {"weight": torch.tensor([1e-17, -1e-17, 0.0], dtype=torch.float64)})
    assert float(natural["weight"].norm()) < 1e-15
    zero = solver.factorize(solver.update(None, factors.scaled(0.0)), DAMPING)
    assert float(solver.solve(zero, {"weight": torch.zeros(3, dtype=torch.float64)})["weight"].norm()) == 0


@pytest.mark.parametrize("values", [(1.0,), (-0.1,), (0.9, 0.0)])
def test_bad_hyperparameters_are_refused(values):
    with pytest.raises(ConfigurationError, match="momentum|tolerance"):
        SPRING(*values)


def compose(model, fisher, refresh=1):
    return curvlib.compose(model, fisher=fisher, solver=SPRING(0.9), damping=0.1, refresh=refresh, lr=0.1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("clip", [False, True])
def test_an_optimizer_hands_it_the_gradient_of_its_rows(reduction, clip):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = compose(model, curvlib.Empirical(reduction))
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert optimizer.curvature["0"].estimate.previous is not None


@pytest.mark.parametrize(
    ("fisher", "refresh", "message"),
    [(curvlib.Sampled(), 1, "needs fisher=Empirical"), (curvlib.Empirical(), 2, "use refresh=1")],
)
def test_an_optimizer_with_other_rows_is_refused_at_construction(fisher, refresh, message):
    with pytest.raises(ConfigurationError, match=message):
        compose(nn.Linear(4, 3), fisher, refresh)
