"""Any solver against the explicit damped block and the laws that every solver obeys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvlib.arrays import pack, unpack
from curvlib.capture.loans import memory
from curvlib.errors import ConfigurationError, CurvatureError
from curvlib.factors import Dense, Factors, OneHotOuter, OuterProduct, SharedOuter, cat
from curvlib.solvers import Solver
from curvlib.testing.comparison import Comparison, ConformanceError, numbers

__all__ = ["LAWS", "check_solver", "example_factors"]

LAWS = ("truth", "scale", "damping", "state", "failure")
"""Names of what `check_solver` checks."""

Gradient = Mapping[str, Tensor]
_DAMPING = 0.3


def check_solver(
    solver: Solver,
    factors: Mapping[str, Factors] | None = None,
    tolerance: float = 1e-10,
    laws: Sequence[str] = LAWS,
    own_gradient: bool = False,
) -> dict[str, list[str]]:
    """Check a solver on Factors of several kinds, float64.

    An exact solver (``solver.exact``) is compared with the explicit solve of the damped block. Every solver: the answer
    is finite and of the block's shapes; repeating all rows changes nothing; the gradient as Factors and as a vector
    give the same; for damping λ → ∞ it is the gradient over λ; states survive `pack` and `unpack`, and inputs are left
    as they are; NaN is refused with an error.

    Parameters
    ----------
    solver
        What is checked.
    factors
        Name to Factors of torch arrays in float64; by default outer products with and without bias, with one row a
        sample and several, shared outer products with groups, lookups, and dense rows, with fewer and with more rows
        than parameters.
    tolerance
        Largest error allowed, relative to the largest expected entry.
    laws
        Which of `curvlib.testing.LAWS` to check. A sketch draws other rows from a batch twice as large, and leaves out
        "scale"; a method whose λ is something else leaves out "damping".
    own_gradient
        Whether the solver takes no gradient but the mean of the rows that it solves with.

    Returns
    -------
    dict
        ``"checked"`` and ``"refused"``: the names of the Factors that the solver took, and of those that it refused
        with a `ConfigurationError`.

    Raises
    ------
    ConformanceError
        An AssertionError that names the law, the Factors, and by how much it fails.

    Examples
    --------
    >>> import curvlib
    >>> curvlib.testing.check_solver(curvlib.Woodbury())["refused"]
    []
    """
    unknown = [law for law in laws if law not in LAWS]
    if unknown:
        raise ConfigurationError(f"laws {unknown} are unknown; the known ones are {list(LAWS)}")
    outcome: dict[str, list[str]] = {"checked": [], "refused": []}
    for name, rows in (factors or example_factors()).items():
        compare = Comparison(repr(solver), tolerance, f"on {name}")
        try:
            solver.update(None, rows)
        except ConfigurationError:
            outcome["refused"].append(name)
            continue
        except Exception as error:  # whatever a user's solver raises becomes one readable failure
            raise compare.fail("update", f"raises {type(error).__name__}: {error}") from error
        gradient = _mean(rows) if own_gradient else _gradient(rows)
        for law in laws:
            _check(law, solver, rows, gradient, compare)
        outcome["checked"].append(name)
    if not outcome["checked"]:
        raise ConformanceError(f"{solver!r} refuses all Factors given: {outcome['refused']}")
    return outcome


def example_factors() -> dict[str, Factors]:
    """Factors of every common kind, made by hand from arrays."""

    def numbers_of(*shape: int, phase: float = 0.0) -> Tensor:
        pattern = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64)
        return torch.cos(pattern * pattern * 0.31 + phase).reshape(shape)

    def outer(n: int, columns: int = 2, bias: str | None = None) -> Factors:
        return OuterProduct(numbers_of(n, 4), numbers_of(n, columns, 3, phase=1), bias=bias, samples=n)

    def shared(n: int, bias: str | None = None) -> Factors:
        inputs, cotangents = numbers_of(n, 5, 2, 3), numbers_of(n, 1, 5, 2, 2, phase=1)
        return SharedOuter(inputs, cotangents, weight_shape=(4, 3), samples=n, bias=bias)

    return {
        "outer products": outer(3),
        "outer products, one row a sample": outer(3, columns=1, bias="bias"),
        "outer products with bias": outer(3, bias="bias"),
        "outer products, more rows than parameters": outer(20, bias="bias"),
        "shared outer products with groups": shared(4, bias="bias"),
        "shared outer products, more rows than parameters": shared(30),
        "lookups": OneHotOuter(torch.arange(12).reshape(4, 3) % 5, numbers_of(4, 3, 2), vocabulary=5, samples=4),
        "dense rows": Dense(weight=numbers_of(4, 3, 2), bias=numbers_of(4, 3, phase=2)),
    }


def _mean(rows: Factors) -> dict[str, Tensor]:
    """Gradient that the rows themselves stand for."""
    return rows.rmatvec(rows.row_weights(1 / rows.normalizer))


def _gradient(rows: Factors) -> dict[str, Tensor]:
    result = {}
    for number, (name, shape) in enumerate(rows.shapes.items()):
        pattern = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64)
        result[name] = torch.sin(pattern * pattern * 0.43 + number).reshape(shape)
    return result


def _solve(solver: Solver, rows: Factors, gradient: Any, damping: float = _DAMPING) -> dict[str, Tensor]:
    return solver.solve(solver.factorize(solver.update(None, rows), damping), gradient)


def _flat(vector: Mapping[str, Tensor], rows: Factors) -> Tensor:
    return torch.cat([numbers(vector[name]).reshape(-1) for name in rows.shapes])


def _check_truth(solver: Solver, rows: Factors, gradient: Gradient, compare: Comparison) -> None:
    """Law 1, and what its answer is made of."""
    natural = _solve(solver, rows, gradient)
    compare.equal("shapes of the answer", {name: tuple(a.shape) for name, a in natural.items()}, dict(rows.shapes))
    if not bool(torch.isfinite(_flat(natural, rows)).all()):
        raise compare.fail("solve", "gives an answer that is not finite")
    compare.close_vectors(
        "solve for a gradient given as Factors, against the same as a vector,",
        _solve(solver, rows, rows),
        _solve(solver, rows, _mean(rows)),
    )
    if solver.exact:
        J = rows.dense().matrix()
        F = J.T @ J / rows.normalizer + _DAMPING * torch.eye(rows.size, dtype=J.dtype)
        compare.close(
            "solve, against the explicit damped block (law 1),",
            _flat(natural, rows),
            torch.linalg.solve(F, _flat(gradient, rows)),
        )


def _check_scale(solver: Solver, rows: Factors, gradient: Gradient, compare: Comparison) -> None:
    """Law 2: the same batch twice is the same curvature."""
    compare.close_vectors(
        "solve after all rows were repeated (law 2)",
        _solve(solver, cat([rows, rows]), gradient),
        _solve(solver, rows, gradient),
    )


def _check_large_damping(solver: Solver, rows: Factors, gradient: Gradient, compare: Comparison) -> None:
    """Law 4: what damping outweighs is the gradient itself."""
    # Factored damping differs by the root of curvature / λ, exact damping by curvature / λ.
    damping = 1e8 if solver.exact else 1e12
    natural = _solve(solver, rows, gradient, damping)
    relative = Comparison(compare.subject, max(compare.tolerance, 1e-4), compare.situation)
    relative.close_vectors("λ · solve for a large λ (law 4)", {k: damping * v for k, v in natural.items()}, gradient)


def _check_state(solver: Solver, rows: Factors, gradient: Gradient, compare: Comparison) -> None:
    """States are data, and verbs are pure."""
    before = {name: value.clone() for name, value in gradient.items()}
    estimate = solver.update(None, rows)
    inverse = solver.factorize(estimate, _DAMPING)
    expected = solver.solve(inverse, gradient)

    def through_storage(state: Any, what: str) -> Any:
        try:
            return unpack(pack(state))
        except CurvatureError as error:
            raise compare.fail(what, f"does not survive pack and unpack: {error}") from error

    restored = solver.factorize(through_storage(estimate, "estimate"), _DAMPING)
    compare.close_vectors("solve from a restored estimate", solver.solve(restored, gradient), expected)
    restored = through_storage(inverse, "inverse")
    compare.close_vectors("solve from a restored inverse", solver.solve(restored, gradient), expected)
    solver.factorize(solver.update(estimate, rows), 10 * _DAMPING)
    again = solver.solve(solver.factorize(estimate, _DAMPING), gradient)
    compare.close_vectors("solve from an estimate that was used since (verbs are pure)", again, expected)
    compare.close_vectors("the gradient after solve (verbs are pure)", gradient, before)
    if not solver.holds_rows and memory((estimate, inverse)) & memory(rows):
        raise compare.fail(
            "a state", "holds arrays of the rows, which are those of a batch that may be overwritten: let holds_rows "
            "be True, so that rows get memory of their own"
        )  # fmt: skip


def _check_failure(solver: Solver, rows: Factors, gradient: Gradient, compare: Comparison) -> None:
    """Law 7: what is not finite becomes an error, never a direction."""
    bad = rows.scaled(float("nan"))
    if not _refused(lambda: _solve(solver, bad, gradient)):
        raise compare.fail("rows that are NaN (law 7)", "are taken without an error; raise NotPositiveDefiniteError")
    for damping in (0.0, -1.0, float("nan")):
        if not _refused(lambda damping=damping: _solve(solver, rows, gradient, damping)):  # type: ignore[misc]
            raise compare.fail(f"damping {damping}", "is taken without an error; raise ConfigurationError")


_CHECKS: dict[str, Callable[[Solver, Factors, Gradient, Comparison], None]] = {
    "truth": _check_truth,
    "scale": _check_scale,
    "damping": _check_large_damping,
    "state": _check_state,
    "failure": _check_failure,
}


def _check(law: str, solver: Solver, rows: Factors, gradient: Gradient, compare: Comparison) -> None:
    try:
        _CHECKS[law](solver, rows, gradient, compare)
    except CurvatureError as error:
        raise compare.fail(f"law {law!r}", f"cannot be checked: {type(error).__name__}: {error}") from error


def _refused(run: Callable[[], Any]) -> bool:
    try:
        run()
    except CurvatureError:
        return True
    return False
