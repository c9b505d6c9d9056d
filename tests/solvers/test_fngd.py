"""FNGD against its weighted sum in explicit matrices: weights of the first epoch, and what later ones make of them."""

import numpy as np
import pytest
import torch
from blocks import LIBRARIES, numbers
from single_rows import grouped, linear, no_bias, sequence, table
from torch import nn

import curvlib
from curvlib.arrays import pack, unpack
from curvlib.errors import ConfigurationError
from curvlib.factors import Dense as DenseRows
from curvlib.solvers import FNGD

DAMPING, EPOCH, UPDATES = 0.2, 3, 7


def tall(library, seed):
    class Rows:
        factors = DenseRows(weight=library(numbers(12, 2, 2, seed=seed)))

    return Rows


BUILDS = [linear, no_bias, sequence, grouped, table, tall]


def flat(vector):
    return np.concatenate([np.asarray(value).reshape(-1) for value in vector.values()])


def mean(factors, scale=1.0):
    return factors.rmatvec(factors.row_weights(scale / factors.normalizer))


def explicit_weights(J):
    """Weights of the rows in (F + λI)⁻¹ g with F = JᵀJ / n and g the rows' mean."""
    n = len(J)
    F = J.T @ J / n + DAMPING * np.eye(J.shape[1])
    # The natural gradient by Sherman, Morrison and Woodbury as the paper begins: a multiple of g minus a correction.
    weights = (np.ones(n) - np.linalg.solve(J @ J.T + n * DAMPING * np.eye(n), J @ J.T @ np.ones(n))) / DAMPING
    np.testing.assert_allclose(J.T @ weights / n, np.linalg.solve(F, J.mean(0)), rtol=1e-8, atol=1e-10)
    return weights


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("shared", ["mean", "batch"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_later_epochs_share_the_weights_of_the_first(build, shared, scale, library):
    solver, estimate, first = FNGD(DAMPING, EPOCH, shared), None, []
    for seed in range(UPDATES):
        factors = build(LIBRARIES[library], seed).factors
        estimate = unpack(pack(solver.update(estimate, factors)))
        inverse = unpack(pack(solver.factorize(estimate, 9.9)))
        J = np.asarray(factors.dense().matrix())
        if seed < EPOCH:
            first.append(explicit_weights(J))
            weights = first[-1]
        else:
            weights = np.mean(first, axis=0) if shared == "mean" else first[seed % EPOCH]
        for natural, size in [
            (solver.solve(inverse, mean(factors, scale)), scale),
            (solver.solve(inverse, inverse.factors), 1.0),
        ]:
            np.testing.assert_allclose(flat(natural), size * J.T @ weights / len(J), rtol=1e-9, atol=1e-11 * size)


def test_batches_of_other_sizes_use_the_positions_that_they_have():
    estimate, rows, seen = None, [6, 4, 5, 3, 8], []
    solver = FNGD(DAMPING, EPOCH)
    for seed, n in enumerate(rows):
        J = numbers(n, 7, seed=seed)
        factors = DenseRows(weight=torch.from_numpy(J))
        estimate = solver.update(estimate, factors)
        if seed < EPOCH:
            seen.append(explicit_weights(J))
    at = [np.mean([weights[i] for weights in seen if i < len(weights)]) for i in range(6)]
    expected = J.T @ np.array([*at, np.mean(at), np.mean(at)]) / 8
    np.testing.assert_allclose(flat(solver.solve(solver.factorize(estimate, 1.0), factors)), expected, rtol=1e-9)


def test_later_epochs_never_look_at_a_gram(monkeypatch):
    solver, factors = FNGD(DAMPING, 1), linear(torch.from_numpy, 0).factors
    estimate = solver.update(None, factors)
    monkeypatch.setattr(type(factors), "gram", lambda self: pytest.fail("a Gram was computed"))
    estimate = solver.update(estimate, linear(torch.from_numpy, 1).factors)
    solver.solve(solver.factorize(estimate, DAMPING), estimate.factors)


def test_conformance():
    factors = {build.__name__: build(torch.from_numpy, 0).factors for build in BUILDS}
    # Not "damping": λ is the method's own.
    laws = ("truth", "scale", "state", "failure")
    assert curvlib.testing.check_solver(FNGD(), factors, 1e-9, laws, own_gradient=True)["refused"] == []


@pytest.mark.parametrize("first_epoch", [1, 9])
def test_a_gradient_of_other_rows_is_refused(first_epoch):
    solver, estimate = FNGD(DAMPING, first_epoch), None
    for seed in range(2):
        factors = linear(torch.from_numpy, seed).factors
        estimate = solver.update(estimate, factors)
    inverse = solver.factorize(estimate, DAMPING)
    reverse = {name: -value for name, value in mean(factors).items()}
    for other in (mean(linear(torch.from_numpy, 5).factors), reverse):
        with pytest.raises(ConfigurationError, match=r"FNGD.*Empirical\(\) with refresh=1"):
            solver.solve(inverse, other)
    with pytest.raises(ConfigurationError, match="the gradient has parameters"):
        solver.solve(inverse, {"weight": mean(factors)["weight"]})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"damping": 0.0}, "positive finite"),
        ({"first_epoch": 0}, "first epoch"),
        ({"first_epoch": 2.5}, "first epoch"),
        ({"shared": "sample"}, "'mean', 'batch'"),
        ({"tolerance": 0.0}, "tolerance"),
    ],
)
def test_bad_hyperparameters_are_refused(values, message):
    with pytest.raises(ConfigurationError, match=message):
        FNGD(**values)


def compose(model, fisher, refresh=1):
    return curvlib.compose(model, fisher=fisher, solver=FNGD(0.1, 3), damping=0.1, refresh=refresh, lr=0.05)


def test_an_optimizer_takes_woodburys_steps_in_the_first_epoch_and_its_mean_weights_later():
    torch.manual_seed(0)
    model, plain = (nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double() for _ in range(2))
    optimizer, weights = compose(model, curvlib.Empirical()), []
    for number in range(5):
        x, y = torch.randn(16, 4, dtype=torch.float64), torch.randint(3, (16,))
        before = [p.detach().clone() for p in model.parameters()]
        plain.load_state_dict(model.state_dict())
        losses = nn.functional.cross_entropy(plain(x), y, reduction="none")
        rows = [torch.autograd.grad(loss, list(plain[2].parameters()), retain_graph=True) for loss in losses]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        J = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows]).numpy()
        if number < 3:
            weights.append(np.linalg.solve(J @ J.T / 16 + 0.1 * np.eye(16), np.ones(16)))
        expected = J.T @ (weights[-1] if number < 3 else np.mean(weights, axis=0)) / 16
        moved = [(b - p.detach()) / 0.05 for b, p in zip(before, model.parameters(), strict=True)][2:]
        np.testing.assert_allclose(flat(dict(enumerate(moved))), expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    ("fisher", "refresh", "message"),
    [(curvlib.Sampled(), 1, "needs fisher=Empirical"), (curvlib.Empirical(), 2, "use refresh=1")],
)
def test_an_optimizer_with_other_rows_is_refused_at_construction(fisher, refresh, message):
    with pytest.raises(ConfigurationError, match=message):
        compose(nn.Linear(4, 3), fisher, refresh)
