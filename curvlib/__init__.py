"""curvlib: a modular curvature engine for PyTorch.

A network's parameters fall into blocks. For every block the engine takes the per-sample Jacobian in its cheapest exact
form (`factors`, `layers`, `fisher`), a solver turns it into a damped inverse curvature (`solvers`), and a composer
assembles Fisher, solver, damping, refresh and transforms into a `torch.optim.Optimizer` (`precond`).
"""

from curvlib import arrays, explanation, factors, fisher, func, layers, precond, solvers, testing
from curvlib.capture import collect
from curvlib.errors import (
    CaptureError,
    ConfigurationError,
    CurvatureError,
    CurvatureWarning,
    DataError,
    NotPositiveDefiniteError,
    UncoveredParameterError,
)
from curvlib.explanation import explain
from curvlib.factors import Factors
from curvlib.fisher import Bernoulli, Categorical, Empirical, Exact, Gaussian, Likelihood, Sampled
from curvlib.precond import (
    Constant,
    Every,
    KLClip,
    Momentum,
    NaturalGradient,
    TENGraD,
    Transform,
    WeightDecay,
    compose,
    recipes,
)
from curvlib.solvers import Solver, Woodbury

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022  # grouped by seam, in the order in which a gradient meets them
    # rooms
    "arrays", "factors", "layers", "fisher", "solvers", "precond", "func", "testing", "explanation",
    # compose an optimizer
    "compose", "NaturalGradient", "TENGraD", "recipes",
    # which curvature
    "Sampled", "Empirical", "Exact", "Likelihood", "Categorical", "Gaussian", "Bernoulli",
    # how it is inverted
    "Solver", "Woodbury",
    # when, how much, and what happens to the step
    "Every", "Constant", "KLClip", "Momentum", "WeightDecay", "Transform",
    # without an optimizer
    "collect", "Factors",
    # what it does and costs
    "explain",
    # errors
    "CurvatureError", "ConfigurationError", "UncoveredParameterError", "CaptureError", "NotPositiveDefiniteError",
    "DataError", "CurvatureWarning",
]  # fmt: skip
