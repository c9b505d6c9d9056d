"""One method a file: a damped inverse curvature from Factors, as pure functions of explicit state."""

from curvlib.solvers.base import Solver
from curvlib.solvers.dense import Dense
from curvlib.solvers.diagonal import Diagonal, Identity
from curvlib.solvers.ekfac import EKFAC
from curvlib.solvers.kfac import KFAC
from curvlib.solvers.skfac import SKFAC
from curvlib.solvers.woodbury import Woodbury

__all__ = ["EKFAC", "KFAC", "SKFAC", "Dense", "Diagonal", "Identity", "Solver", "Woodbury"]
