"""Published methods as configurations: no mathematics here, only choices.

Each takes the model, the hyperparameters that its authors name, and any further argument of `compose`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from curvlib import solvers
from curvlib.fisher import Categorical, Exact, Likelihood, Sampled
from curvlib.precond.compose import compose
from curvlib.precond.optimizer import NaturalGradient
from curvlib.precond.refresh import Intervals
from curvlib.precond.transforms import KLClip, Momentum, Transform, WeightDecay

__all__ = ["EKFAC", "KFAC", "SKFAC", "ExactNGD", "TENGraD"]

# The functions bear the methods' names, as their authors write them.
# ruff: noqa: N802


def TENGraD(
    model: nn.Module,
    lr: float = 0.1,
    damping: float = 0.1,
    refresh: int = 100,
    momentum: float = 0.9,
    weight_decay: float = 3e-3,
    kl_clip: float | None = 1e-2,
    likelihood: Likelihood | None = None,
    samples: int = 1,
    **options: Any,
) -> NaturalGradient:
    """TENGraD (arXiv 2106.03947): exact layer-wise natural gradients from one mini-batch, reused between refreshes.

    Parameters
    ----------
    model
        Network whose output's first axis is the samples.
    lr, damping, refresh, momentum, weight_decay, kl_clip
        As in the authors' experiments; kl_clip None leaves the clip out.
    likelihood
        What the labels are drawn from; `Categorical` by default.
    samples
        Labels drawn for each sample (the authors draw one).
    **options
        Further arguments of `compose`.
    """
    return compose(
        model,
        fisher=Sampled(likelihood or Categorical(), samples),
        solver=solvers.Woodbury(),
        damping=damping,
        refresh=refresh,
        transforms=[*_clip(kl_clip), Momentum(momentum), WeightDecay(weight_decay)],
        lr=lr,
        **options,
    )


def ExactNGD(
    model: nn.Module,
    lr: float = 0.1,
    damping: float = 0.1,
    refresh: int = 10,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    kl_clip: float | None = 1e-2,
    likelihood: Likelihood | None = None,
    **options: Any,
) -> NaturalGradient:
    """Natural gradients of the exact layer-wise Fisher (the generalized Gauss–Newton matrix): no sampled labels.

    Parameters are those of `TENGraD`.
    """
    return compose(
        model,
        fisher=Exact(likelihood or Categorical()),
        solver=solvers.Woodbury(),
        damping=damping,
        refresh=refresh,
        transforms=[*_clip(kl_clip), Momentum(momentum), WeightDecay(weight_decay)],
        lr=lr,
        **options,
    )


def KFAC(
    model: nn.Module,
    lr: float = 0.03,
    damping: float = 0.03,
    estimate_every: int = 20,
    refresh: int = 100,
    decay: float = 0.95,
    momentum: float = 0.9,
    weight_decay: float = 3e-3,
    kl_clip: float | None = 1e-2,
    likelihood: Likelihood | None = None,
    solver: solvers.Solver | None = None,
    **options: Any,
) -> NaturalGradient:
    """K-FAC (Martens & Grosse 2015, arXiv 1503.05671), damped in the eigenbasis, intervals as in TENGraD's baseline.

    Parameters
    ----------
    model, lr, damping, momentum, weight_decay, kl_clip, likelihood
        As in `TENGraD`.
    estimate_every, refresh
        Steps between updates of the averaged factors and between their factorisations.
    decay
        Weight of the past in the averages.
    solver
        Another `KFAC` solver, such as one with reduced positions; or one for each pattern of blocks.
    **options
        Further arguments of `compose`.
    """
    return compose(
        model,
        fisher=Sampled(likelihood or Categorical()),
        solver=solver or solvers.KFAC(decay=decay, damping="exact"),
        damping=damping,
        refresh=Intervals(estimate_every, refresh),
        transforms=[*_clip(kl_clip), Momentum(momentum), WeightDecay(weight_decay)],
        lr=lr,
        **options,
    )


def EKFAC(
    model: nn.Module,
    lr: float = 0.01,
    damping: float = 0.03,
    estimate_every: int = 20,
    refresh: int = 100,
    decay: float = 0.95,
    **options: Any,
) -> NaturalGradient:
    """EKFAC (George et al. 2018, arXiv 1806.03884): second moments every `estimate_every` steps, basis every `refresh`.

    Parameters are those of `KFAC`; ``refresh`` must be a multiple of ``estimate_every``.
    """
    solver = solvers.EKFAC(decay=decay, basis_every=max(1, refresh // estimate_every))
    return KFAC(model, lr, damping, estimate_every, estimate_every, decay, solver=solver, **options)


def SKFAC(
    model: nn.Module, lr: float = 0.03, damping: float = 0.03, refresh: int = 20, **options: Any
) -> NaturalGradient:
    """SKFAC (Tang et al., CVPR 2021): K-FAC of the current batch, its factors inverted in sample space.

    Parameters are those of `KFAC`.
    """
    return KFAC(model, lr, damping, refresh, refresh, solver=solvers.SKFAC(), **options)


def _clip(bound: float | None) -> list[Transform]:
    return [] if bound is None else [KLClip(bound)]
