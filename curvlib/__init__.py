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
    FailureWarning,
    NonFiniteError,
    NotPositiveDefiniteError,
    RefreshError,
    UncoveredParameterError,
)
from curvlib.explanation import explain
from curvlib.factors import Factors, Plan
from curvlib.fisher import Bernoulli, Categorical, Empirical, Exact, Gaussian, Likelihood, Sampled
from curvlib.precond import (
    Callback,
    Constant,
    CSVWriter,
    Every,
    KLClip,
    Momentum,
    NaturalGradient,
    TENGraD,
    TensorBoardWriter,
    Transform,
    WeightDecay,
    compose,
    flat_state,
    nested_state,
    recipes,
)
from curvlib.solvers import Solver, Woodbury

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022  # grouped by seam, in the order in which a gradient meets them
    # rooms
    "arrays", "factors", "layers", "fisher", "solvers", "precond", "func", "testing", "explanation",
    # compose an optimizer
    "compose", "NaturalGradient", "TENGraD", "recipes",
    # what it saves, for formats of tensors alone
    "flat_state", "nested_state",
    # which curvature
    "Sampled", "Empirical", "Exact", "Likelihood", "Categorical", "Gaussian", "Bernoulli",
    # how it is inverted
    "Solver", "Woodbury",
    # when, how much, and what happens to the step
    "Every", "Constant", "KLClip", "Momentum", "WeightDecay", "Transform",
    # by which route, in how much memory
    "Plan",
    # what is told of it
    "Callback", "CSVWriter", "TensorBoardWriter",
    # without an optimizer
    "collect", "Factors",
    # what it does and costs
    "explain",
    # errors
    "CurvatureError", "ConfigurationError", "UncoveredParameterError", "CaptureError", "NotPositiveDefiniteError",
    "DataError", "RefreshError", "NonFiniteError", "CurvatureWarning", "FailureWarning",
]  # fmt: skip
