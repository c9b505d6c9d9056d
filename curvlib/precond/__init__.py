"""Fisher, solver, damping, refresh and transforms assembled into an ordinary `torch.optim.Optimizer`."""

from curvlib.precond.compose import compose
from curvlib.precond.damping import Constant, Damping, LevenbergMarquardt, PerBlock, Schedule, TraceRelative
from curvlib.precond.optimizer import NaturalGradient
from curvlib.precond.recipes import TENGraD
from curvlib.precond.refresh import Every, Intervals, OnEvidence, Refresh, When
from curvlib.precond.transforms import (
    Context,
    GradientClip,
    Graft,
    KLClip,
    Momentum,
    NormConstraint,
    Transform,
    TrustRatio,
    WeightDecay,
)

__all__ = [
    "Constant",
    "Context",
    "Damping",
    "Every",
    "GradientClip",
    "Graft",
    "Intervals",
    "KLClip",
    "LevenbergMarquardt",
    "Momentum",
    "NaturalGradient",
    "NormConstraint",
    "OnEvidence",
    "PerBlock",
    "Refresh",
    "Schedule",
    "TENGraD",
    "TraceRelative",
    "Transform",
    "TrustRatio",
    "WeightDecay",
    "When",
    "compose",
]
