"""Fisher, solver, damping, refresh and transforms assembled into an ordinary `torch.optim.Optimizer`."""

from curvlib.precond.compose import compose
from curvlib.precond.damping import Constant, Damping
from curvlib.precond.optimizer import NaturalGradient
from curvlib.precond.recipes import TENGraD
from curvlib.precond.refresh import Every, Refresh
from curvlib.precond.transforms import Context, KLClip, Momentum, Transform, WeightDecay

__all__ = [
    "Constant",
    "Context",
    "Damping",
    "Every",
    "KLClip",
    "Momentum",
    "NaturalGradient",
    "Refresh",
    "TENGraD",
    "Transform",
    "WeightDecay",
    "compose",
]
