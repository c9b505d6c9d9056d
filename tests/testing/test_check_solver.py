"""check_solver passes what is right and names the law that a wrong solver breaks."""

import dataclasses

import pytest
import torch

from curvlib.errors import ConfigurationError
from curvlib.factors import Dense as Rows
from curvlib.solvers import Dense, Solver, Woodbury
from curvlib.testing import ConformanceError, check_solver


@pytest.mark.parametrize("solver", [Woodbury(), Dense()])
def test_the_exact_solvers_pass(solver):
    assert len(check_solver(solver)["checked"]) == 8


@dataclasses.dataclass(frozen=True)
class Double(Dense):
    def solve(self, inverse, gradient):
        return {name: 2 * value for name, value in super().solve(inverse, gradient).items()}


@dataclasses.dataclass(frozen=True)
class DoubleApproximate(Double):
    exact = False


@dataclasses.dataclass(frozen=True)
class SumOfSamples(Dense):
    exact = False

    def update(self, estimate, factors):
        return super().update(None, factors.with_samples(1))


@dataclasses.dataclass(frozen=True)
class Remembers(Dense):
    seen: list = dataclasses.field(default_factory=list)

    def factorize(self, estimate, damping):
        self.seen.append(damping)
        return super().factorize(estimate, sum(self.seen))


@dataclasses.dataclass(frozen=True)
class HidesNaN(Dense):
    def update(self, estimate, factors):
        covariance = super().update(estimate, factors)
        return dataclasses.replace(covariance, matrix=covariance.matrix.nan_to_num())


@dataclasses.dataclass(frozen=True)
class Unsaved(Dense):
    def factorize(self, estimate, damping):
        return {"function": lambda: super(Unsaved, self).factorize(estimate, damping)}

    def solve(self, inverse, gradient):
        return super().solve(inverse["function"](), gradient)


@dataclasses.dataclass(frozen=True)
class HoldsUntold(Woodbury):
    holds_rows = False


class Refuses(Solver):
    def update(self, estimate, factors):
        raise ConfigurationError("not mine")

    factorize = solve = None


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (Double(), r"Double\(\) \(on outer products\): solve, against the explicit damped block \(law 1\)"),
        (DoubleApproximate(), r"λ · solve for a large λ .law 4..*2 times"),
        (SumOfSamples(), r"after all rows were repeated \(law 2\)"),
        (Remembers(), "as Factors, against the same as a vector"),
        (HidesNaN(), r"rows that are NaN \(law 7\) are taken without an error"),
        (Unsaved(), "inverse does not survive pack and unpack"),
        (HoldsUntold(), "a state holds arrays of the rows.*let holds_rows be True"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Solver) else "",
)
def test_a_broken_law_is_named(solver, message):
    with pytest.raises(ConformanceError, match=message):
        check_solver(solver)


def test_laws_may_be_left_out():
    assert check_solver(SumOfSamples(), laws=["truth", "damping", "state"])["refused"] == []
    check_solver(Woodbury(), own_gradient=True)
    with pytest.raises(ConfigurationError, match="laws .'speed'. are unknown; the known ones are .'truth'"):
        check_solver(Woodbury(), laws=["speed"])


def test_refusals_are_reported():
    @dataclasses.dataclass(frozen=True)
    class Few(Dense):
        def update(self, estimate, factors):
            if factors.size > 20:
                raise ConfigurationError("too many")
            return super().update(estimate, factors)

    rows = {"few": Rows(weight=torch.eye(3, dtype=torch.float64)), "many": Rows(weight=torch.ones(2, 30).double())}
    assert check_solver(Few(), rows) == {"checked": ["few"], "refused": ["many"]}
    Refuses.__abstractmethods__ = frozenset()
    with pytest.raises(ConformanceError, match="refuses all Factors given"):
        check_solver(Refuses())
