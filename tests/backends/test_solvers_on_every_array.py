"""Law 5: same code, same answer. Solver × library × dtype × kind of Factors, against NumPy in float64."""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from libraries import EVERY, MAKE, READ

from curvlib import solvers as s
from curvlib.arrays import map_arrays
from curvlib.errors import ConfigurationError
from curvlib.factors import Dense, LowRank, OneHotOuter, OuterProduct, Scaled, SharedOuter, Sum
from curvlib.solvers.base import Evaluation

# More samples than widths, so that every eigenbasis is determined.
N, DAMPING = 24, 0.9
TOLERANCE = {"float64": 1e-10, "float32": 1e-4}


def numbers(seed, *shape):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def outer(seed, columns=1, **names):
    return OuterProduct(numbers(seed, N, 5), numbers(seed + 50, N, columns, 4), samples=N, **names)


def shared(seed, columns=1, groups=1, positions=3, **names):
    a, g = numbers(seed, N, positions, groups, 4), numbers(seed + 50, N, columns, positions, groups, 3)
    return SharedOuter(a, g, weight_shape=(3 * groups, 2, 2), samples=N, **names)


def lookups(seed, columns=1):
    indices = np.random.default_rng(seed).integers(5, size=(N, 3))
    return OneHotOuter(indices, numbers(seed, N, columns, 3, 4), vocabulary=5, samples=N)


def dense(seed):
    return Dense(weight=numbers(seed, N, 3, 4), bias=numbers(seed, N, 3))


KINDS = {
    "outer": outer,
    "outer, several columns": lambda seed: outer(seed, 2, bias="bias"),
    "outer, few rows": lambda seed: OuterProduct(numbers(seed, 6, 9), numbers(seed + 50, 6, 1, 7), bias="bias"),
    "shared": lambda seed: shared(seed, 2, bias="bias"),
    "shared, groups": lambda seed: shared(seed, groups=2),
    "shared, many positions": lambda seed: shared(seed, positions=40).scaled(0.2),
    "one-hot": lookups,
    "one-hot, several columns": lambda seed: lookups(seed, 2),
    "dense": dense,
    "low rank": lambda seed: LowRank(numbers(seed, N, 4), Dense(weight=numbers(seed, 4, 3, 4))),
    "scaled": lambda seed: Scaled(shared(seed), 0.7, samples=N),
    "sum": lambda seed: Sum((outer(seed, weight="w", bias="b"), outer(seed + 7, weight="w"))),
}
SOLVERS = [
    s.Dense(), s.Diagonal(decay=0.9), s.EKFAC(), s.EKFAC(sharing="reduce", basis_every=2), s.Eva(),
    s.FNGD(first_epoch=2), s.Identity(), s.KBFGS(), s.KFAC(), s.KFAC(sharing="reduce"),
    *(s.KFAC(damping=damping, form="eigen") for damping in ("pi", "plain", "exact")), s.KID(ratio=0.5),
    s.KIS(ratio=0.5), s.MKOR(), s.MinSR(), s.SENG(), s.SENG(columns=4), s.SINGD(), s.SKFAC(), s.SOAP(), s.SPRING(),
    s.Shampoo(), s.Switch((s.Woodbury(), s.Diagonal()), (1,)), s.Woodbury(), s.Woodbury(low_rank=0.9),
]  # fmt: skip


def natural(solver, kind, make):
    """Natural gradient after three updates, all the verbs used; None where the solver refuses the kind."""
    batches = [map_arrays(make, KINDS[kind](seed)) for seed in range(4)]
    shapes = batches[0].shapes
    parameters = [{name: make(numbers(seed, *shape)) for name, shape in shapes.items()} for seed in (70, 71)]
    estimate = None
    for factors, following in pairwise(batches):
        gradient = {name: make(numbers(90, *shape)) for name, shape in shapes.items()}
        if solver.of_fresh_rows:
            gradient = factors.rmatvec(factors.row_weights(1 / factors.normalizer))
        try:
            estimate = solver.update(estimate, factors)
        except ConfigurationError:
            return None
        inverse = solver.factorize(estimate, DAMPING)
        direction = solver.solve(inverse, gradient)
        estimate = solver.remember(estimate, direction)
        if solver.of_second_pass:
            before, after = Evaluation(parameters[0], factors), Evaluation(parameters[1], following)
            estimate = solver.follow(estimate, inverse, before, after)
    return direction


@cache
def truth(solver, kind):
    return natural(solver, kind, np.asarray)


def casting(make, dtype):
    return lambda values: make(values.astype(dtype) if values.dtype.kind == "f" else values)


# SOAP's second moments stay in the eigenbasis of the first gradient, and six rows leave many a basis of the rest.
CASES = [(solver, kind) for solver in SOLVERS for kind in KINDS if (type(solver), kind) != (s.SOAP, "outer, few rows")]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("library", EVERY)
@pytest.mark.parametrize(("solver", "kind"), CASES, ids=str)
def test_the_answer_is_that_of_numpy_in_float64(solver, kind, library, dtype):
    expected = truth(solver, kind)
    answer = natural(solver, kind, casting(MAKE[library], dtype))
    if expected is None:
        assert answer is None
        return
    assert list(answer) == list(expected)
    scale = max(np.abs(value).max() for value in expected.values())
    for name, value in expected.items():
        values = READ[library](answer[name])
        assert values.dtype == dtype
        np.testing.assert_allclose(values, value, rtol=0, atol=TOLERANCE[dtype] * scale)


def test_no_solver_is_forgotten():
    assert {type(solver) for solver in SOLVERS} == {getattr(s, name) for name in s.__all__} - {s.Solver}
