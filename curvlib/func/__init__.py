"""The functional door: curvature of residual functions under `torch.func`, without a model or an optimizer."""

from curvlib.func.model import ModelCurvature
from curvlib.func.operators import Curvature, Jacobian
from curvlib.func.residuals import Linearization, joined, linearize, residual_factors
from curvlib.func.steps import gauss_newton, natural_gradient, spring

__all__ = [
    "Curvature",
    "Jacobian",
    "Linearization",
    "ModelCurvature",
    "gauss_newton",
    "joined",
    "linearize",
    "natural_gradient",
    "residual_factors",
    "spring",
]
