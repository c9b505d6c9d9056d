"""Published methods as configurations: no mathematics here, only choices."""

from __future__ import annotations

from typing import Any

from torch import nn

from curvlib.fisher import Categorical, Likelihood, Sampled
from curvlib.precond.compose import compose
from curvlib.precond.optimizer import NaturalGradient
from curvlib.precond.transforms import KLClip, Momentum, WeightDecay
from curvlib.solvers import Woodbury

__all__ = ["TENGraD"]


def TENGraD(  # noqa: N802  # the method's name
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
    clip = [] if kl_clip is None else [KLClip(kl_clip)]
    return compose(
        model,
        fisher=Sampled(likelihood or Categorical(), samples),
        solver=Woodbury(),
        damping=damping,
        refresh=refresh,
        transforms=[*clip, Momentum(momentum), WeightDecay(weight_decay)],
        lr=lr,
        **options,
    )
