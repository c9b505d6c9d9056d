"""`optimizer.health`: numbers against explicit matrices, and nothing paid before they are asked for."""

import math
import warnings

import pytest
import torch
from small_net import X, backward, built, small_net, train

import curvlib
from curvlib import Empirical, Exact, KLClip, Momentum, Woodbury
from curvlib.precond import spectrum
from curvlib.solvers import EKFAC, KFAC, MKOR, SKFAC, Dense, Diagonal, MinSR, Switch

LAMBDA = 0.1


def block_matrix(optimizer, name):
    """Curvature of a block as its solver has it, from the solver's inverse alone: F = S⁻¹ − λI column by column."""
    state, solver, block = optimizer.curvature[name], optimizer.solvers[name], optimizer._blocks[0]
    shapes = {key: p.shape for key, p in block.parameters.items()}
    size = sum(p.numel() for p in block.parameters.values())
    columns = []
    for unit in torch.eye(size, dtype=torch.float64):
        parts = dict(zip(shapes, unit.split([math.prod(shape) for shape in shapes.values()]), strict=True))
        natural = solver.solve(state.inverse, {key: part.reshape(shapes[key]) for key, part in parts.items()})
        columns.append(torch.cat([natural[key].reshape(-1) for key in shapes]))
    return torch.linalg.inv(torch.stack(columns, dim=1)) - LAMBDA * torch.eye(size, dtype=torch.float64)


SOLVERS = [
    Woodbury(),
    Dense(),
    KFAC(damping="exact"),
    EKFAC(),
    Diagonal(),
    Switch((Dense(), Woodbury()), (1,)),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_condition_and_effective_dimension_and_kl(solver):
    model = small_net()
    optimizer = built(model, solver=solver, damping=LAMBDA, transforms=[KLClip(1e-3), Momentum(0.5)])
    assert (optimizer.health["0"].condition, optimizer.health.kl) == (None, None)  # and from now on it is watched
    train(model, optimizer)
    before = [p.detach().clone() for p in model[0].parameters()]
    other = [p.detach().clone() for p in model[2].parameters()]
    train(model, optimizer)
    F = block_matrix(optimizer, "0")
    k = torch.linalg.eigvalsh(F).clamp_min(0)
    health = optimizer.health
    assert health["0"].condition == pytest.approx(float((k.max() + LAMBDA) / (k.min() + LAMBDA)), rel=1e-6)
    assert health["0"].effective_dimension == pytest.approx(float((k / (k + LAMBDA)).sum()), rel=1e-8)
    change = torch.cat([(p.detach() - old).reshape(-1) for p, old in zip(model[0].parameters(), before, strict=True)])
    rest = {key: p.detach() - old for (key, p), old in zip(model[2].named_parameters(), other, strict=True)}
    kl = float(change @ F @ change) / 2 + spectrum.quadratic(optimizer.curvature["2"].estimate, rest) / 2
    assert health.kl == pytest.approx(kl, rel=1e-7)


@pytest.mark.parametrize(
    ("solver", "twin"), [(SKFAC(), KFAC(sharing="reduce", decay=0.0)), (MinSR(), Dense())], ids=str
)
def test_solvers_that_keep_rows_agree_with_their_matrices(solver, twin):
    numbers = []
    for one in (solver, twin):
        model = small_net()
        optimizer = built(model, solver=one, fisher=Empirical())
        assert optimizer.health.kl is None
        train(model, optimizer, 2)
        numbers.append([optimizer.health.kl, *optimizer.health["0"].numbers().values()])
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-7)


def test_a_kl_divergence_is_that_of_the_outputs_for_a_small_step():
    model = small_net()
    optimizer = built(model, solver=Dense(), blocks="network", lr=1e-3)
    assert len(optimizer.health) == 1
    before = model(X).detach().log_softmax(1)
    train(model, optimizer)
    after = model(X).detach().log_softmax(1)
    actual = float((before.exp() * (before - after)).sum(1).mean())
    assert optimizer.health.kl == pytest.approx(actual, rel=1e-2)


def test_where_a_solver_has_no_spectrum_there_is_none():
    model = small_net()
    optimizer = built(model, solver=MKOR(), fisher=Empirical())
    assert optimizer.health.kl is None
    train(model, optimizer, 2)
    health = optimizer.health
    assert (health["0"].condition, health["0"].effective_dimension, health.kl) == (None, None, None)
    assert (health["0"].staleness, health["0"].damping) == (0, 0.1)


def test_staleness_counts_steps_and_reads_well():
    model = small_net()
    optimizer = built(model, refresh=3)
    seen = []
    for _ in range(5):
        train(model, optimizer)
        seen.append(optimizer.health["2"].staleness)
    assert seen == [0, 1, 2, 0, 1]
    assert list(optimizer.health) == ["0", "2"]
    assert "5 steps, 0 skipped, 0 refused\n  0: curvature 1 steps old, 0 failures, 0 retries" in repr(optimizer.health)


def test_nothing_is_computed_or_kept_before_it_is_asked_for(monkeypatch):
    def refuse(*args):
        raise AssertionError("computed without being asked for")

    model = small_net()
    optimizer = built(model)
    monkeypatch.setattr(spectrum.torch.linalg, "eigvalsh", refuse)
    train(model, optimizer, 2)
    assert optimizer._moved is None
    health = optimizer.health
    assert health["0"].failures == 0
    train(model, optimizer)
    with pytest.raises(AssertionError, match="without being asked"):
        optimizer.health["0"].condition  # noqa: B018  # the property computes


def test_a_user_s_estimate_may_have_a_spectrum():
    class Mine:
        pass

    spectrum.eigenvalues.register(Mine, lambda estimate: torch.tensor([1.0, 3.0]))
    state = curvlib.precond.curvature.BlockState(estimate=Mine(), damping=1.0, refreshed=0)
    health = curvlib.precond.BlockHealth(state, parameters=2, steps=4, stopped=0)
    assert (health.condition, health.effective_dimension, health.staleness) == (2.0, 1.25, 3)


def test_half_precision_has_a_kl_too():
    model = small_net().bfloat16()
    optimizer = built(model, fisher=Exact())
    assert optimizer.health.kl is None
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backward(model, X.bfloat16())
    optimizer.step()
    assert 0 < optimizer.health.kl < math.inf
