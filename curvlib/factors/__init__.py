"""The per-sample Jacobian of one block in its cheapest exact form, and the algebra on it."""

from curvlib.factors.base import Factors, Sharing
from curvlib.factors.combine import Sum, cat
from curvlib.factors.dense import Dense
from curvlib.factors.kronecker import KroneckerLayout, KroneckerPair, KroneckerRows
from curvlib.factors.lowrank import LowRank
from curvlib.factors.onehot import OneHotOuter
from curvlib.factors.outer import OuterProduct
from curvlib.factors.plan import Plan, Route
from curvlib.factors.scaled import Scaled
from curvlib.factors.shared import SharedOuter

__all__ = [
    "Dense",
    "Factors",
    "KroneckerLayout",
    "KroneckerPair",
    "KroneckerRows",
    "LowRank",
    "OneHotOuter",
    "OuterProduct",
    "Plan",
    "Route",
    "Scaled",
    "SharedOuter",
    "Sharing",
    "Sum",
    "cat",
]
