"""The functional door: curvature of residual functions under `torch.func`, without a model or an optimizer."""

from curvlib.func.operators import Curvature, jacobian_operator
from curvlib.func.residuals import Linearization, joined, linearize, residual_factors
from curvlib.func.steps import gauss_newton, natural_gradient, spring

__all__ = [
    "Curvature",
    "Linearization",
    "gauss_newton",
    "jacobian_operator",
    "joined",
    "linearize",
    "natural_gradient",
    "residual_factors",
    "spring",
]
