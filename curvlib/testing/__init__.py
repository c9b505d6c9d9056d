"""Conformance kit: checks an adapter, a kind of Factors or a solver, the user's own too, against explicit truth."""

from curvlib.testing.adapter import AdapterReport, check_adapter
from curvlib.testing.comparison import ConformanceError
from curvlib.testing.factors import check_factors
from curvlib.testing.solver import LAWS, check_solver
from curvlib.testing.variants import VARIANTS

__all__ = ["LAWS", "VARIANTS", "AdapterReport", "ConformanceError", "check_adapter", "check_factors", "check_solver"]
