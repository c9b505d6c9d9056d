"""Fisher, solver, damping, refresh and transforms assembled into an ordinary `torch.optim.Optimizer`."""

from curvlib.precond.callbacks import Callback, CSVWriter, TensorBoardWriter
from curvlib.precond.compose import compose
from curvlib.precond.damping import Constant, Damping, LevenbergMarquardt, PerBlock, Schedule, TraceRelative
from curvlib.precond.failure import Failures
from curvlib.precond.flat import flat_state, nested_state
from curvlib.precond.health import BlockHealth, Health
from curvlib.precond.optimizer import NaturalGradient
from curvlib.precond.pure import PureStep
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
    "BlockHealth",
    "CSVWriter",
    "Callback",
    "Constant",
    "Context",
    "Damping",
    "Every",
    "Failures",
    "GradientClip",
    "Graft",
    "Health",
    "Intervals",
    "KLClip",
    "LevenbergMarquardt",
    "Momentum",
    "NaturalGradient",
    "NormConstraint",
    "OnEvidence",
    "PerBlock",
    "PureStep",
    "Refresh",
    "Schedule",
    "TENGraD",
    "TensorBoardWriter",
    "TraceRelative",
    "Transform",
    "TrustRatio",
    "WeightDecay",
    "When",
    "compose",
    "flat_state",
    "nested_state",
]
