"""One method a file: a damped inverse curvature from Factors, as pure functions of explicit state."""

from curvlib.solvers.base import Solver
from curvlib.solvers.dense import Dense
from curvlib.solvers.diagonal import Diagonal, Identity
from curvlib.solvers.ekfac import EKFAC
from curvlib.solvers.eva import Eva
from curvlib.solvers.fngd import FNGD
from curvlib.solvers.hylo import KID, KIS
from curvlib.solvers.kbfgs import KBFGS
from curvlib.solvers.kfac import KFAC
from curvlib.solvers.mkor import MKOR
from curvlib.solvers.seng import SENG
from curvlib.solvers.shampoo import Shampoo
from curvlib.solvers.singd import SINGD
from curvlib.solvers.skfac import SKFAC
from curvlib.solvers.soap import SOAP
from curvlib.solvers.spring import SPRING, MinSR
from curvlib.solvers.switch import Switch
from curvlib.solvers.woodbury import Woodbury

__all__ = [
    "EKFAC",
    "FNGD",
    "KBFGS",
    "KFAC",
    "KID",
    "KIS",
    "MKOR",
    "SENG",
    "SINGD",
    "SKFAC",
    "SOAP",
    "SPRING",
    "Dense",
    "Diagonal",
    "Eva",
    "Identity",
    "MinSR",
    "Shampoo",
    "Solver",
    "Switch",
    "Woodbury",
]
