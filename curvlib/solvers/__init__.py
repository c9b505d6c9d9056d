"""One method a file: a damped inverse curvature from Factors, as pure functions of explicit state."""

from curvlib.solvers.base import Solver
from curvlib.solvers.dense import Dense
from curvlib.solvers.woodbury import Woodbury

__all__ = ["Dense", "Solver", "Woodbury"]
