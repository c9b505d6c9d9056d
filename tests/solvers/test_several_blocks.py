"""Several blocks at once, side by side in threads or in one call, have the states that each would have by itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from curvlib.arrays import Product, altered, evaluated, pack, stacked
from curvlib.errors import NotPositiveDefiniteError
from curvlib.factors import Dense as DenseRows
from curvlib.factors import OuterProduct
from curvlib.solvers import EKFAC, KFAC, SOAP, Dense, Shampoo, Woodbury, pairs

SOLVERS = {
    "KFAC": KFAC(),
    "KFAC, inverse": KFAC(form="inverse"),
    "KFAC, eigen": KFAC(form="eigen"),
    "KFAC, exact damping": KFAC(damping="exact"),
    "EKFAC": EKFAC(),
    "EKFAC, qr": EKFAC(basis="qr", basis_every=2),
    "Shampoo": Shampoo(),
    "SOAP": SOAP(basis_every=2),
}


def rows(seed, d_in, d_out, n=8):
    generator = torch.Generator().manual_seed(seed)
    inputs, cotangents = (torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (d_in, d_out))
    return OuterProduct(inputs, cotangents, weight="weight", bias="bias")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SOLVERS)
def test_states_and_directions_are_those_of_each_block(name, two_threads):
    solver, sizes = SOLVERS[name], [(140, 3), (5, 150), (130, 131)]
    apart, together = [None] * 3, [None] * 3
    for step in range(4):
        given = [rows(10 * step + place, *size) for place, size in enumerate(sizes)]
        apart = [solver.update(one, own) for one, own in zip(apart, given, strict=True)]
        together = solver.update_all(together, given)
        inverses = solver.factorize_all(together, [0.1, 0.2, 0.3])
        for place, own in enumerate(given):
            mine = solver.solve(solver.factorize(apart[place], 0.1 * (place + 1)), own)
            theirs = solver.solve(inverses[place], own)
            for parameter in mine:
                torch.testing.assert_close(theirs[parameter], mine[parameter], rtol=1e-8, atol=1e-10)
    assert [set(pack(one)) for one in together] == [set(pack(one)) for one in apart]


# Blocks of equal sizes, some of which a gradient as rows pays for, beside a block of another size.
EQUAL = [
    rows(place, *size, n=n) for place, (size, n) in enumerate([((6, 5), 9)] * 2 + [((6, 5), 2)] * 2 + [((4, 3), 9)])
]


@pytest.mark.parametrize("name", [*SOLVERS, "KFAC, cholesky"])
@pytest.mark.parametrize("as_rows", [False, True])
@pytest.mark.parametrize("library", [torch.clone, np.asarray], ids=["torch", "numpy"])
def test_directions_of_blocks_of_equal_sizes_are_those_of_each(name, as_rows, library):
    solver = SOLVERS.get(name, KFAC(form="cholesky"))
    given = [replace(own, inputs=library(own.inputs), cotangents=library(own.cotangents)) for own in EQUAL]
    inverses = solver.factorize_all(solver.update_all([None] * len(given), given), [0.1, 0.2, 0.3, 0.1, 0.2])
    gradients = [own if as_rows else own.rmatvec(own.row_weights(1 / own.normalizer)) for own in given]
    together = solver.solve_all(inverses, gradients)
    for inverse, gradient, natural in zip(inverses, gradients, together, strict=True):
        for parameter, value in solver.solve(inverse, gradient).items():
            np.testing.assert_allclose(natural[parameter], value, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["KFAC", "KFAC, eigen", "KFAC, exact damping", "EKFAC"])
def test_inverses_of_blocks_of_equal_sizes_are_not_copied_together_at_every_solve(name, monkeypatch):
    solver = SOLVERS[name]
    inverses = solver.factorize_all(solver.update_all([None] * len(EQUAL), EQUAL), [0.1] * len(EQUAL))
    gradients = [own.rmatvec(own.row_weights(1 / own.normalizer)) for own in EQUAL]
    before = solver.solve_all(inverses, gradients)
    seen = []
    monkeypatch.setattr(pairs, "stacked", lambda arrays: seen.append(stacked(arrays)) or seen[-1])
    solver.solve_all(inverses, gradients)
    own = [array.untyped_storage().data_ptr() for array in inverses[0].stackable().values()]
    assert [whole.untyped_storage().data_ptr() for whole in seen] == own
    # Loaded one by one they are copied, and give the same to the bit.
    loaded = [altered(one, **{name: array.clone() for name, array in one.stackable().items()}) for one in inverses]
    for natural, again in zip(before, solver.solve_all(loaded, gradients), strict=True):
        assert all(torch.equal(natural[name], again[name]) for name in natural)


def explicit(seed, n, *shape):
    generator = torch.Generator().manual_seed(seed)
    weight, bias = (torch.randn(n, *own, generator=generator, dtype=torch.float64) for own in (shape, shape[:1]))
    return DenseRows(weight=weight, bias=bias)


# Rows in factored form, explicit ones of equal and of other sizes, and blocks with fewer parameters than rows.
MIXED = [rows(0, 6, 5), explicit(1, 8, 3, 4), explicit(2, 8, 3, 4), explicit(3, 8, 5, 2), explicit(4, 6, 3, 4)]
MIXED += [explicit(5, 8, 2, 2), explicit(6, 8, 2, 2), explicit(7, 8, 3), explicit(8, 8, 3)]


@pytest.mark.parametrize("solver", [Woodbury(), Woodbury(low_rank=0.9), Dense()], ids=str)
@pytest.mark.parametrize("damping", ["one", "several"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exact_solvers_in_one_call(solver, damping, dtype):
    several = [
        DenseRows({name: array.to(dtype) for name, array in own.values.items()}) if isinstance(own, DenseRows) else own
        for own in MIXED
    ]
    dampings = [0.1 if damping == "one" else 0.1 * (place + 1) for place in range(len(several))]
    estimates = solver.update_all([None] * len(several), several)
    inverses = solver.factorize_all(estimates, dampings)
    gradients = [own.rmatvec(own.row_weights(0.5)) for own in several]
    naturals = solver.solve_all(inverses, gradients)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for own, value, gradient, natural in zip(several, dampings, gradients, naturals, strict=True):
        mine = solver.solve(solver.factorize(solver.update(None, own), value), gradient)
        J, v = own.dense().matrix(), torch.cat([part.reshape(-1) for part in gradient.values()])
        truth = torch.linalg.solve(J.T @ J / len(own) + value * torch.eye(J.shape[1], dtype=J.dtype), v)
        found = torch.cat([natural[name].reshape(-1) for name in gradient])
        for name in gradient:
            torch.testing.assert_close(natural[name], mine[name], rtol=tolerance, atol=tolerance)
        if solver.exact:
            torch.testing.assert_close(found, truth, rtol=tolerance, atol=tolerance)


class OwnSolve(Woodbury):
    def solve(self, inverse, gradient):
        return {name: 2 * value for name, value in super().solve(inverse, gradient).items()}


class Remembering:
    def remember(self, estimate, natural):
        assert all(isinstance(value, torch.Tensor) for value in natural.values())
        return estimate


class OwnMemory(Remembering, Woodbury):
    pass


class OwnMemoryOfKronecker(Remembering, KFAC):
    pass


class OwnMemoryInEigenbasis(Remembering, EKFAC):
    pass


KRONECKER = [KFAC(form=form) for form in ("auto", "inverse", "cholesky", "eigen")] + [KFAC(damping="exact"), EKFAC()]


@pytest.mark.parametrize(
    ("solver", "products"),
    [(Woodbury(), "always"), (Woodbury(low_rank=0.9), "always"), (Dense(), "never"), (OwnSolve(), "never"),
     (OwnMemory(), "never"), (OwnMemoryOfKronecker(), "never"), (OwnMemoryInEigenbasis(), "never"),
     *((solver, "of rows" if solver.form == "cholesky" else "always") for solver in KRONECKER[:-1]),
     (EKFAC(), "always")],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("own", [True, False])
def test_what_is_left_to_later_is_the_same(solver, products, own):
    several = [one.scaled(3.0) for one in (EQUAL[2::2] if isinstance(solver, (KFAC, EKFAC)) else MIXED)]
    inverses = solver.factorize_all(solver.update_all([None] * len(several), several), [0.1] * len(several))
    given = [getattr(inverse, "factors", rows) for inverse, rows in zip(inverses, several, strict=True)]
    gradients = given if own else [one.rmatvec(one.row_weights(0.5)) for one in several]
    lazily = solver.solve_lazily(inverses, gradients)
    expected = products == "always" or (products == "of rows" and own)
    assert any(isinstance(value, Product) for one in lazily for value in one.values()) == expected
    for one, natural in zip(lazily, solver.solve_all(inverses, gradients), strict=True):
        for name, value in evaluated(one).items():
            torch.testing.assert_close(value, natural[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("solver", [Woodbury(), Dense()], ids=str)
def test_one_matrix_that_is_not_positive_definite_refuses_its_stack(solver):
    several = [explicit(seed, 8, 3, 4) for seed in range(3)] + [explicit(seed, 8, 2, 2) for seed in range(3)]
    for bad in (1, 4):
        estimates = solver.update_all([None] * 6, several)
        matrix = getattr(estimates[bad], "kernel", getattr(estimates[bad], "matrix", None))
        matrix -= 100 * torch.eye(len(matrix), dtype=matrix.dtype)
        with pytest.raises(NotPositiveDefiniteError):
            solver.factorize_all(estimates, [0.1] * 6)


class OwnInverse(EKFAC):
    """An inverse of another kind, which knows nothing of being put together with others."""

    def factorize(self, estimate, damping):
        return {"of": super().factorize(estimate, damping)}

    def solve(self, inverse, gradient):
        return super().solve(inverse["of"], gradient)


def test_a_solver_of_ones_own_may_make_inverses_of_another_kind():
    made = OwnInverse().factorize_all(OwnInverse().update_all([None] * len(EQUAL), EQUAL), [0.1] * len(EQUAL))
    expected = EKFAC().factorize_all(EKFAC().update_all([None] * len(EQUAL), EQUAL), [0.1] * len(EQUAL))
    for solve in ("solve_all", "solve_lazily"):
        own, theirs = getattr(OwnInverse(), solve)(made, EQUAL), EKFAC().solve_all(expected, EQUAL)
        for natural, other in zip(own, theirs, strict=True):
            for name, value in other.items():
                torch.testing.assert_close(natural[name], value, rtol=1e-11, atol=1e-12)
