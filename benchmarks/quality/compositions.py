"""The compositions that docs/quality.md recommends, one for each kind of task. Their spaces come from trials on seed 0.

The grafted ones take directions from curvature and lengths from Adam (`Graft`), so that neither a stale inverse nor a
change of the curvature's scale can spoil a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.quality.search import Choice, Log
from curvlib import Empirical, Exact, Gaussian, Momentum, Woodbury, compose
from curvlib.precond import Graft, LevenbergMarquardt, TraceRelative
from curvlib.solvers import EKFAC, KFAC, Diagonal


@dataclass(frozen=True)
class Composition:
    """How it is built for a task, where it looks for hyperparameters, and where it has no meaning."""

    build: Callable
    space: Callable
    leaves_out: dict = field(default_factory=dict)


def solvers_for(task, solver):
    """The same solver for all layers; 784 pixels make those at an autoencoder's ends too dear: their diagonals do."""
    return {"1": Diagonal(), "14": Diagonal(), "*": solver} if task == "autoencoder" else solver


def grafted(task, model, solver, seed, lr, damping):
    return compose(
        model,
        fisher=Empirical(),
        solver=solvers_for(task, solver),
        damping=TraceRelative(damping),
        refresh=10,
        transforms=[Graft("adam"), Momentum(0.8)],
        lr=lr,
        seed=seed,
    )


def grafted_kfac(task, model, **values):
    return grafted(task, model, KFAC(form="inverse"), **values)


def grafted_ekfac(task, model, **values):
    return grafted(task, model, EKFAC(basis_every=5), **values)


def gauss_newton(task, model, seed, lr, damping, decay):
    return compose(
        model,
        fisher=Exact(Gaussian()),
        solver=Woodbury(),
        blocks="network",
        damping=LevenbergMarquardt(damping, decay=decay, every=1, least=1e-10),
        lr=lr,
        seed=seed,
    )


_GRAFTED = {"lr": Log(2e-3, 1e-2), "damping": Log(0.05, 0.5)}
_MANY_ROWS = "one row for each output of a sample: too many for a kernel of the whole network"

COMPOSITIONS = {
    "grafted KFAC": Composition(grafted_kfac, lambda task: _GRAFTED),
    "grafted EKFAC": Composition(grafted_ekfac, lambda task: _GRAFTED),
    "Gauss–Newton of the network": Composition(
        gauss_newton,
        lambda task: {"lr": Log(0.3, 1.0), "damping": Log(1.0, 100.0), "decay": Choice((0.5, 0.7))},
        {"convnet": _MANY_ROWS, "autoencoder": _MANY_ROWS, "transformer": _MANY_ROWS},
    ),
}
