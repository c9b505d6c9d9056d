"""What curvature will do with every parameter of a model, and what it costs."""

from curvlib.explanation.explain import explain
from curvlib.explanation.table import Explanation, ParameterRow

__all__ = ["Explanation", "ParameterRow", "explain"]
