"""Published methods as configurations: no mathematics here, only choices.

Each takes the model, the hyperparameters that its authors name, and any further argument of `compose`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from curvlib import solvers
from curvlib.fisher import Categorical, Empirical, Exact, Likelihood, Sampled
from curvlib.hyperparameters import checking
from curvlib.precond.compose import compose
from curvlib.precond.optimizer import NaturalGradient
from curvlib.precond.refresh import Every, Intervals, Refresh
from curvlib.precond.transforms import KLClip, Momentum, Transform, WeightDecay

__all__ = [
    "EKFAC",
    "FNGD",
    "IKFAC",
    "KBFGS",
    "KFAC",
    "MKOR",
    "SENG",
    "SINGD",
    "SKFAC",
    "SOAP",
    "SPRING",
    "Eva",
    "ExactNGD",
    "HyLo",
    "Shampoo",
    "TENGraD",
]

# The functions bear the methods' names, as their authors write them.
# ruff: noqa: N802


@checking()
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


@checking()
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


@checking()
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


@checking()
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
    solver = solvers.EKFAC(decay=decay, basis_every=max(1, refresh // Every(estimate_every).steps))
    return KFAC(model, lr, damping, estimate_every, estimate_every, decay, solver=solver, **options)


@checking()
def SKFAC(
    model: nn.Module, lr: float = 0.03, damping: float = 0.03, refresh: int = 20, **options: Any
) -> NaturalGradient:
    """SKFAC (Tang et al., CVPR 2021): K-FAC of the current batch, its factors inverted in sample space.

    Parameters are those of `KFAC`.
    """
    return KFAC(model, lr, damping, refresh, refresh, solver=solvers.SKFAC(), **options)


@checking()
def HyLo(
    model: nn.Module,
    lr: float = 0.03,
    damping: float = 0.3,
    refresh: int = 100,
    ratio: float = 0.1,
    switch_after: int | None = None,
    kl_clip: float | None = 1e-2,
    **options: Any,
) -> NaturalGradient:
    """HyLo (Mu et al., SC22): a share of the rows for all, interpolated (KID) or sampled by importance (KIS).

    Parameters
    ----------
    model, lr, damping, refresh, kl_clip
        As in `TENGraD`; the authors go without a clip.
    ratio
        Share of the rows that is kept.
    switch_after
        Updates of the curvature with rows interpolated; then they are sampled. None interpolates throughout. The
        authors interpolate for ten epochs, and once more later (`curvlib.solvers.Switch`).
    **options
        As in `TENGraD`: momentum, weight_decay, reduction; further arguments of `compose`.
    """
    solver: solvers.Solver = solvers.KID(ratio=ratio)
    if switch_after is not None:
        solver = solvers.Switch((solver, solvers.KIS(ratio=ratio, unbiased=True)), until=(switch_after,))
    return _empirical(model, solver, lr, damping, refresh, [*_clip(kl_clip)], **options)


@checking()
def SENG(
    model: nn.Module,
    lr: float = 0.03,
    damping: float = 0.3,
    refresh: int = 100,
    columns: int = 65536,
    kl_clip: float | None = 1e-2,
    **options: Any,
) -> NaturalGradient:
    """SENG (Yang et al. 2020, arXiv 2006.05924): sketched empirical natural gradients.

    Parameters are those of `HyLo`; `columns` is how many of a block's parameters are sampled.
    """
    return _empirical(model, solvers.SENG(columns=columns), lr, damping, refresh, [*_clip(kl_clip)], **options)


@checking()
def Eva(
    model: nn.Module,
    lr: float = 0.03,
    damping: float = 0.03,
    kl_clip: float | None = 1e-3,
    **options: Any,
) -> NaturalGradient:
    """Eva (Zhang, Shi, Li, ICLR 2023): Kronecker vectors of batch means, renewed at every step.

    Parameters are those of `HyLo`.
    """
    return _empirical(model, solvers.Eva(), lr, damping, 1, [*_clip(kl_clip)], **options)


@checking()
def MKOR(model: nn.Module, lr: float = 0.1, refresh: int = 10, **options: Any) -> NaturalGradient:
    """MKOR (NeurIPS 2023): rank-one updates of inverse Kronecker factors; each block keeps its gradient's length.

    Parameters are those of `HyLo`; the method has no damping.
    """
    return _empirical(model, solvers.MKOR(), lr, 1.0, refresh, [], **options)


@checking()
def SINGD(
    model: nn.Module, lr: float = 0.01, damping: float = 1e-3, refresh: int = 10, rate: float = 0.05, **options: Any
) -> NaturalGradient:
    """SINGD (Lin et al. 2023, arXiv 2312.05705): inverse-free, multiplicative updates of Kronecker preconditioners.

    Parameters are those of `HyLo`; `rate` is the step of the preconditioner, whose damping acts inside its update.
    """
    solver = solvers.SINGD(damping=damping, rate=rate, normalized=True)
    return _empirical(model, solver, lr, damping, refresh, [], **options)


@checking()
def IKFAC(
    model: nn.Module, lr: float = 0.01, damping: float = 0.01, refresh: int = 10, rate: float = 0.05, **options: Any
) -> NaturalGradient:
    """IKFAC (Lin et al. 2023, arXiv 2312.05705): SINGD without the trace factors, an inverse-free K-FAC.

    Parameters are those of `SINGD`.
    """
    solver = solvers.SINGD(damping=damping, rate=rate, normalized=True, kfac_like=True)
    return _empirical(model, solver, lr, damping, refresh, [], **options)


@checking()
def SPRING(
    model: nn.Module,
    lr: float = 0.1,
    damping: float = 0.1,
    decay: float = 0.9,
    kl_clip: float | None = 1e-2,
    **options: Any,
) -> NaturalGradient:
    """SPRING (arXiv 2401.10190): fresh rows at every step, momentum inside the Woodbury solve.

    Parameters are those of `HyLo`; `decay` is the momentum inside the solve, and `momentum` 0 unless given.
    """
    options = {"momentum": 0.0, **options}
    return _empirical(model, solvers.SPRING(momentum=decay), lr, damping, 1, [*_clip(kl_clip)], **options)


@checking()
def FNGD(
    model: nn.Module,
    lr: float = 0.1,
    damping: float = 0.1,
    first_epoch: int = 400,
    kl_clip: float | None = 1e-2,
    **options: Any,
) -> NaturalGradient:
    """FNGD (Ou et al. 2024, arXiv 2403.03473): weights of samples from inverses in the first epoch, shared ever after.

    Parameters are those of `HyLo`; `first_epoch` is the number of steps in an epoch.
    """
    solver = solvers.FNGD(damping=damping, first_epoch=first_epoch)
    return _empirical(model, solver, lr, damping, 1, [*_clip(kl_clip)], **options)


@checking()
def KBFGS(
    model: nn.Module,
    lr: float = 0.03,
    damping: float = 0.3,
    refresh: int = 1,
    kl_clip: float | None = None,
    **options: Any,
) -> NaturalGradient:
    """K-BFGS (Goldfarb, Ren, Bahamou 2020, arXiv 2006.08877): Kronecker factors of the Hessian, inverted by BFGS.

    Parameters are those of `HyLo`. ``optimizer.step(closure)`` evaluates the batch once more after each refresh.
    """
    return _empirical(model, solvers.KBFGS(), lr, damping, refresh, [*_clip(kl_clip)], **options)


@checking()
def Shampoo(
    model: nn.Module,
    lr: float = 0.01,
    damping: float = 1e-4,
    estimate_every: int = 1,
    refresh: int = 10,
    **options: Any,
) -> NaturalGradient:
    """Shampoo (Gupta, Koren, Singer 2018, arXiv 1802.09568): matrix preconditioners of the gradient's own statistics.

    Parameters are those of `HyLo`; statistics every `estimate_every` steps, roots every `refresh`.
    """
    return _empirical(model, solvers.Shampoo(), lr, damping, Intervals(estimate_every, refresh), [], **options)


@checking()
def SOAP(model: nn.Module, lr: float = 3e-3, damping: float = 1e-8, **options: Any) -> NaturalGradient:
    """SOAP (Vyas et al. 2024, arXiv 2409.11321): Adam in Shampoo's eigenbasis.

    Parameters are those of `HyLo`; the damping is Adam's ε. Momentum is the solver's own: `momentum` is 0 unless given.
    """
    return _empirical(model, solvers.SOAP(), lr, damping, 1, [], **{"momentum": 0.0, **options})


def _empirical(
    model: nn.Module,
    solver: solvers.Solver,
    lr: float,
    damping: float,
    refresh: Refresh | int,
    transforms: list[Transform],
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    reduction: str = "mean",
    likelihood: Likelihood | None = None,
    **options: Any,
) -> NaturalGradient:
    """What the methods that look at the loss's own gradients have in common; they have no use for a likelihood."""
    return compose(
        model,
        fisher=Empirical(reduction),
        solver=solver,
        damping=damping,
        refresh=refresh,
        transforms=[*transforms, Momentum(momentum), WeightDecay(weight_decay)],
        lr=lr,
        **options,
    )


def _clip(bound: float | None) -> list[Transform]:
    return [] if bound is None else [KLClip(bound)]
