"""The rows of the table: how each method takes a step. One builder a row, the same hyperparameters for all."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import nn
from torch.nn import functional

import curvlib
from curvlib.solvers import EKFAC, KFAC, Woodbury

LR, MOMENTUM, DAMPING = 1e-4, 0.9, 0.1
NORMS = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class Method:
    """One row.

    Parameters
    ----------
    build
        From a model, inputs and labels to what is called for a step and returns the loss.
    period
        Steps between refreshes.
    package
        What has to be importable; empty for curvlib and torch.
    """

    build: Callable
    period: int = 1
    package: str = ""

    @property
    def installed(self):
        return not self.package or find_spec(self.package) is not None


METHODS: dict[str, Method] = {}
"""Name of the row to method, in the order of the table."""


def row(name, *periods, package="", **options):
    """Register a builder ``(model, x, y, **options)`` as a row; with periods as one each, given as ``period=``."""

    def add(build):
        for period in periods or (None,):
            own = options if period is None else {**options, "period": period}
            METHODS[f"{name}, refresh {period}" if (period or 1) > 1 else name] = Method(
                lambda model, x, y, own=own: build(model, x, y, **own), period or 1, package
            )
        return build

    return add


def ordinary(model, x, y, optimizer, between=None):
    """Step of an ordinary loop; `between` is called between backward and the optimizer's step."""

    def step():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        if between is not None:
            between()
        optimizer.step()
        return loss.detach()

    return step


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)


@row("SGD, momentum")
def sgd(model, x, y):
    return ordinary(model, x, y, momentum(model))


@row("Adam")
def adam(model, x, y):
    return ordinary(model, x, y, torch.optim.Adam(model.parameters(), lr=LR))


def left_out(model, solver):
    """Names of the norm layers, where a solver leaves them to an exact one."""
    return [] if solver.exact else [name for name, module in model.named_modules() if isinstance(module, NORMS)]


def composed(model, x, y, fisher, solver, period, fused=False, backend="torch"):
    """curvlib: estimate and inverse at every refresh; norm layers, which Kronecker methods leave out, exactly."""
    solvers = {**dict.fromkeys(left_out(model, solver), Woodbury()), "*": solver}
    optimizer = curvlib.compose(
        model, fisher=fisher, solver=solvers, damping=DAMPING, refresh=period, lr=LR, fused=fused,
        backend=backend,
        transforms=[curvlib.Momentum(MOMENTUM)],
    )  # fmt: skip
    return ordinary(model, x, y, optimizer)


EMPIRICAL, SAMPLED = curvlib.Empirical(), curvlib.Sampled(curvlib.Categorical())
row("curvlib TENGraD, empirical", 1, 10, fisher=EMPIRICAL, solver=Woodbury(), fused=True)(composed)
row("curvlib TENGraD, sampled", 1, 10, fisher=SAMPLED, solver=Woodbury(), fused=True)(composed)
row("curvlib KFAC", 1, 10, fisher=SAMPLED, solver=KFAC(), fused=True)(composed)
row("curvlib KFAC, empirical", 10, fisher=EMPIRICAL, solver=KFAC(), fused=True)(composed)
row("curvlib EKFAC", 10, fisher=SAMPLED, solver=EKFAC(), fused=True)(composed)
row("curvlib TENGraD, sampled, NumPy", 10, fisher=SAMPLED, solver=Woodbury(), fused=True, backend="numpy")(composed)
row("curvlib KFAC, NumPy", 10, fisher=SAMPLED, solver=KFAC(), fused=True, backend="numpy")(composed)
