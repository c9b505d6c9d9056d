"""Every solver obeys the laws; what one breaks by definition is said here, with the reason, and is so."""

import pytest

from curvlib import solvers
from curvlib.solvers import (
    EKFAC,
    FNGD,
    KBFGS,
    KFAC,
    KID,
    KIS,
    MKOR,
    SENG,
    SINGD,
    SKFAC,
    SOAP,
    SPRING,
    Dense,
    Diagonal,
    Eva,
    Identity,
    MinSR,
    Shampoo,
    Solver,
    Switch,
    Woodbury,
)  # fmt: skip
from curvlib.testing import LAWS, ConformanceError, check_solver
from curvlib.testing.solver import example_factors

INSIDE = "λ acts inside the method's own updates; that of factorize changes nothing"
DRAWN = "rows are drawn by their place in the batch, and a batch twice as large draws others"

SOLVERS: list[tuple[Solver, dict[str, str]]] = [
    (Dense(), {}),
    (Diagonal(), {}),
    (Diagonal(decay=0.9, power=0.5), {"damping": "raised to −1/2 a large λ leaves g / √λ"}),
    (EKFAC(), {}),
    (EKFAC(sharing="reduce", basis_every=2), {}),
    (Eva(), {}),
    (FNGD(), {"damping": INSIDE}),
    (Identity(), {"damping": "there is none", "failure": "it looks at no curvature, so none is NaN"}),
    (KBFGS(damping="levenberg-marquardt"), {"damping": "G⁻¹ begins as the identity, so A + √λ I leaves g / √λ"}),
    (KFAC(), {}),
    *((KFAC(damping=damping, form="eigen"), {}) for damping in ("pi", "plain", "exact")),
    (KFAC(sharing="reduce", damping="plain"), {}),
    (KID(), {}),
    (KID(ratio=0.5, sharing="reduce"), {}),
    (KIS(ratio=0.5), {"scale": DRAWN}),
    (KIS(ratio=0.5, sharing="reduce", unbiased=True), {"scale": DRAWN}),
    (MKOR(), {"damping": INSIDE}),
    (MinSR(), {}),
    (SENG(), {}),
    (SENG(columns=4), {}),
    (SINGD(), {"damping": INSIDE}),
    (SINGD(kfac_like=True, inputs="diagonal"), {"damping": INSIDE}),
    (SKFAC(), {}),
    (SOAP(), {}),
    (SPRING(), {}),
    (Shampoo(), {"damping": "with the paper's exponent 1/4 a large λ leaves g / √λ"}),
    (Shampoo(exponent=0.5), {}),
    (Switch((Woodbury(), Diagonal()), (1,)), {}),
    (Woodbury(), {}),
    (Woodbury(low_rank=0.9), {}),
]
OF_GRADIENT = {name for name, rows in example_factors().items() if len(rows) > rows.normalizer}
REFUSED = {KBFGS: {"lookups"}}


@pytest.mark.parametrize(("solver", "breaks"), SOLVERS, ids=lambda value: repr(value) if value else "")
def test_the_laws(solver, breaks):
    kept = [law for law in LAWS if law not in breaks]
    options = {"tolerance": 1e-9, "own_gradient": solver.of_fresh_rows}
    refused = set(REFUSED.get(type(solver), ()))
    refused |= {"dense rows"} if solver.of_kronecker_rows else set()
    refused |= OF_GRADIENT if solver.of_gradient else set()
    assert set(check_solver(solver, laws=kept, **options)["refused"]) == refused
    for law in breaks:
        with pytest.raises(ConformanceError):
            check_solver(solver, laws=[law], **options)


def test_no_solver_is_forgotten():
    public = {getattr(solvers, name) for name in solvers.__all__} - {Solver}
    assert {type(solver) for solver, _ in SOLVERS} == public
