"""Switch against its solvers run one after the other by hand."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from blocks import BUILDS, LIBRARIES, flat, gradient_of, linear, step, stored
from torch import nn

import curvlib
from curvlib.errors import ConfigurationError
from curvlib.solvers import KBFGS, KFAC, KID, KIS, SPRING, Diagonal, Eva, MinSR, Switch, Woodbury

DAMPING, UPDATES = 0.2, 6


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    ("solvers", "until"),
    [
        ((KID(0.4), KIS(0.4, unbiased=True)), (3,)),
        ((KID(0.4), KIS(0.4), KID(0.4), Woodbury()), (2, 3, 5)),
        ((KFAC(), Diagonal(0.9)), (2,)),
    ],
)
def test_each_solver_serves_its_updates(solvers, until, build, library):
    make, switched, own = LIBRARIES[library], None, None
    for update in range(UPDATES):
        place = sum(update >= count for count in until)
        own = None if update in until else own
        factors = build(make, update)
        switched, _, natural = step(Switch(solvers, until), switched, factors, make, DAMPING)
        own, _, expected = step(solvers[place], own, factors, make, DAMPING)
        np.testing.assert_array_equal(natural, expected)
        assert (switched.place, switched.count) == (place, update + 1)


def test_an_inverse_of_the_solver_before_serves_on():
    solver, factors = Switch([Woodbury(), Diagonal()], [1]), linear(torch.from_numpy, 0)
    gradient = gradient_of(factors, torch.from_numpy)
    first = solver.update(None, factors)
    inverse = stored(solver.factorize(first, DAMPING))
    second = solver.update(first, factors)
    assert (first.place, second.place, inverse.place) == (0, 1, 0)
    expected = Woodbury().solve(Woodbury().factorize(Woodbury().update(None, factors), DAMPING), gradient)
    np.testing.assert_array_equal(flat(solver.solve(inverse, gradient)), flat(expected))


def test_memory_is_the_solvers_own():
    factors, solver = linear(torch.from_numpy, 0, columns=1), Switch((SPRING(0.9), MinSR()), (2,))
    gradient, estimate = factors.rmatvec(factors.row_weights(1 / factors.normalizer)), None
    previous = []
    for _ in range(3):
        estimate = solver.update(estimate, factors)
        natural = solver.solve(solver.factorize(estimate, DAMPING), gradient)
        previous.append(estimate.estimate.previous is not None)
        estimate = stored(solver.remember(estimate, natural))
    assert previous == [False, True, False]


def test_it_needs_what_its_solvers_need():
    assert Switch((Woodbury(), MinSR()), (1,)).exact
    assert not Switch((Woodbury(), KIS()), (1,)).exact
    needs = [(Eva(), "of_gradient"), (MinSR(), "of_fresh_rows"), (KFAC(), "of_kronecker_rows")]
    for first, attribute in (*needs, (KBFGS(), "of_second_pass"), (KBFGS(), "of_preactivations")):
        assert getattr(Switch((Woodbury(), first), (1,)), attribute)
        assert not getattr(Switch((Woodbury(), Diagonal()), (1,)), attribute)
    options = {"solver": Switch((Woodbury(), Eva()), (1,)), "damping": 0.1, "lr": 0.1}
    with pytest.raises(ConfigurationError, match="Switch .*needs fisher=Empirical"):
        curvlib.compose(nn.Linear(4, 3), fisher=curvlib.Sampled(), **options)


def test_the_recipe_switches_by_its_updates_and_resumes():
    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        return model, curvlib.precond.recipes.HyLo(model, lr=0.05, refresh=2, ratio=0.5, switch_after=2)

    def advance(model, optimizer, steps):
        places = []
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            places.append(optimizer.curvature["0"].inverse.place)
        return places

    x, y = torch.randn(16, 4), torch.arange(16) % 3
    model, optimizer = made()
    assert advance(model, optimizer, 3) == [0, 0, 0]
    again, other = made()
    again.load_state_dict(model.state_dict())
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    assert advance(model, optimizer, 4) == advance(again, other, 4) == [0, 1, 1, 1]
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("solvers", "until", "message"),
    [
        ((KID(),), (), "two or more solvers"),
        ((KID(), KIS()), (), "2 solvers and until=()"),
        ((KID(), KIS()), (1, 2), "each but the last"),
        ((KID(), "KIS"), (1,), "between solvers such as .* got 'KIS'"),
        ((KID(), KIS()), (0,), "at least 1"),
        ((KID(), KIS()), (2.5,), "rising numbers of updates"),
        ((KID(), KIS()), (True,), "rising numbers of updates"),
        ((KID(), KIS(), KID()), (3, 3), r"rising numbers of updates, at least 1, got \(3, 3\)"),
    ],
)
def test_nonsense_is_refused(solvers, until, message):
    with pytest.raises(ConfigurationError, match=message):
        Switch(solvers, until)
