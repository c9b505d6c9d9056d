"""Law 2: k micro-batches and one step are the step of the large batch, for every Fisher and every solver."""

import pytest
import torch
from parts import assert_same, composed, network, values
from torch.nn import functional
from truth import Lowest

import curvlib
from curvlib import Empirical, Exact, Momentum, Sampled, solvers
from curvlib.solvers import Solver

X = torch.randn(3, 12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
Y = torch.arange(12) % 3
OPTIONS = {"Switch": {"solvers": (solvers.KID(), solvers.Woodbury()), "until": (2,)}}
# After one gradient the null space of SOAP's statistics is most of the space: rounding alone chooses a basis in it.
STEPS = {"SOAP": 1}
SOLVERS = sorted(name for name in solvers.__all__ if issubclass(getattr(solvers, name), Solver) and name != "Solver")
FISHERS = {
    "sampled": Sampled(Lowest()),  # the same labels however the batch is split
    "two draws": Sampled(Lowest(), samples=2),
    "exact": Exact(),
    "empirical": Empirical(),
    "summed": Empirical(reduction="sum"),
}
SPLITS = {"even": (4, 4, 4), "uneven": (1, 8, 3)}


def made(name):
    return getattr(solvers, name)(**OPTIONS.get(name, {}))


def trained(fisher, solver, parts, fused=False):
    model = network()
    rate = 0.02 if FISHERS[fisher] != FISHERS["summed"] else 0.02 / 12
    optimizer = composed(
        model,
        fisher=FISHERS[fisher],
        solver=made(solver),
        lr=rate,
        damping=0.3,
        transforms=[Momentum(0.5)],
        fused=fused,
    )

    def closure(x):
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for part in torch.arange(12).split(parts):
            share = 1.0 if fisher == "summed" else 1 / 12
            loss = functional.cross_entropy(model(x[part]), Y[part], reduction="sum") * share
            loss.backward()
            total += loss.detach()
        return total

    for x in X[: STEPS.get(solver, 3)]:
        if optimizer.needs_closure:
            optimizer.step(lambda x=x: closure(x))
        else:
            closure(x)
            optimizer.step()
    return values(model)


def combinations():
    for solver in SOLVERS:
        for fisher in FISHERS:
            one = made(solver)
            if not (one.of_gradient or one.of_fresh_rows) or isinstance(FISHERS[fisher], Empirical):
                yield solver, fisher


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("solver", "fisher"), list(combinations()))
def test_micro_batches_are_the_large_batch(solver, fisher, split):
    whole, parts = trained(fisher, solver, (12,)), trained(fisher, solver, SPLITS[split])
    assert_same(parts, whole, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("solver", ["Woodbury", "KFAC", "EKFAC", "SKFAC"])
@pytest.mark.parametrize("fisher", FISHERS)
def test_so_they_are_with_gradients_as_rows(solver, fisher):
    assert_same(trained(fisher, solver, (1, 8, 3), fused=True), trained(fisher, solver, (12,)), rtol=1e-8, atol=1e-11)


def test_every_solver_is_here_with_every_fisher_that_it_takes():
    pairs = set(combinations())
    assert {solver for solver, _ in pairs} == set(SOLVERS)
    for solver in SOLVERS:
        for name in FISHERS.keys() - {fisher for one, fisher in pairs if one == solver}:
            with pytest.raises(curvlib.errors.ConfigurationError):
                composed(network(), fisher=FISHERS[name], solver=made(solver))
