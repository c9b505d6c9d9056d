"""Any kind of Factors against its own explicit rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvlib.arrays import Array, device, evaluated, namespace, pack, unpack
from curvlib.errors import CurvatureError
from curvlib.factors import Factors, cat
from curvlib.testing.comparison import Comparison, ConformanceError, numbers

__all__ = ["check_factors", "check_kronecker"]


def check_factors(factors: Factors, tolerance: float = 1e-9) -> None:
    """Check every operation of `factors` against the explicit rows that its own `dense()` gives.

    Parameters
    ----------
    factors
        An object of any kind, with at least two rows, of torch, NumPy or CuPy arrays.
    tolerance
        Largest error allowed, relative to the largest expected entry; the default is for float64.

    Raises
    ------
    ConformanceError
        Naming the operation, by how much it is off, and where.

    Examples
    --------
    >>> import torch, curvlib
    >>> rows = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    >>> curvlib.testing.check_factors(curvlib.factors.Dense(weight=rows))
    """
    compare = Comparison(f"{type(factors).__name__} factors", tolerance)
    _guarded(compare, "dense()", lambda: factors.dense())
    rows = _matrix(factors)
    _check_shape(factors, rows, compare)
    checks = {"products": _check_products, "new factors": _check_new_factors, "state": _check_state}
    for check in checks.values():
        check(factors, rows, compare)
    check_kronecker(factors, compare)


def _guarded(compare: Comparison, what: str, run: Any) -> Any:
    try:
        return run()
    except ConformanceError:
        raise
    except Exception as error:  # whatever a user's kind raises becomes one readable failure
        raise compare.fail(what, f"raises {type(error).__name__}: {error}") from error


def _matrix(factors: Factors) -> Tensor:
    return numbers(factors.dense().matrix())


def _flat(factors: Factors, vector: Any) -> Tensor:
    return torch.cat([numbers(vector[name]).reshape(-1) for name in factors.shapes])


def _wave(count: int, phase: float) -> Tensor:
    # Fixed numbers without structure; random ones would disturb the user's generators.
    pattern = torch.arange(1, count + 1, dtype=torch.float64)
    return torch.cos(pattern * pattern * 0.7 + phase)


def _like(factors: Factors, values: Tensor) -> Array:
    """Return the values in the factors' library, dtype and device."""
    weights = factors.row_weights(1.0)
    xp = namespace(weights)
    return xp.asarray(values.tolist(), dtype=weights.dtype, device=device(weights)).reshape(tuple(values.shape))


def _check_shape(factors: Factors, rows: Tensor, compare: Comparison) -> None:
    dense = factors.dense()
    compare.equal("len()", len(factors), len(dense))
    compare.equal("shapes", factors.shapes, dense.shapes)
    compare.equal("order of the parameters", list(factors.shapes), list(dense.shapes))
    compare.equal("size", factors.size, rows.shape[1])
    compare.equal("normalizer of dense()", dense.normalizer, factors.normalizer)
    if factors.nbytes <= 0:
        raise compare.fail("nbytes", f"is {factors.nbytes}; it counts the bytes of the arrays held")
    compare.close("row_weights(0.5)", factors.row_weights(0.5), torch.full((len(rows),), 0.5))


def _check_products(factors: Factors, rows: Tensor, compare: Comparison) -> None:
    weights = _wave(len(rows), 0.3)
    vector, start = {}, 0
    flat = _wave(rows.shape[1], 1.1)
    for name, shape in factors.shapes.items():
        count = torch.Size(shape).numel()
        vector[name] = _like(factors, flat[start : start + count].reshape(shape))
        start += count
    other = factors.scaled(_like(factors, _wave(len(rows), 2.0)))
    # What the library computed with, rounded to its own precision.
    weights_in, flat = _like(factors, weights), _flat(factors, vector)
    weights = numbers(weights_in)
    operations = {
        "gram()": (lambda: factors.gram(), rows @ rows.T),
        "cross_gram(other)": (lambda: factors.cross_gram(other), rows @ _matrix(other).T),
        "cross_gram(dense)": (lambda: factors.cross_gram(other.dense()), rows @ _matrix(other).T),
        "cross_gram of dense with it": (lambda: other.dense().cross_gram(factors), _matrix(other) @ rows.T),
        "matvec (J v)": (lambda: factors.matvec(vector), rows @ flat),
        "rmatvec (Jᵀ w)": (lambda: _flat(factors, factors.rmatvec(weights_in)), rows.T @ weights),
        "rmatvec_lazily, multiplied out": (
            lambda: _flat(factors, evaluated(factors.rmatvec_lazily(weights_in))),
            rows.T @ weights,
        ),
        "combined (Jᵀ w + Oᵀ u)": (
            lambda: _flat(factors, factors.combined(weights_in, other, other.row_weights(0.5))),
            rows.T @ weights + 0.5 * _matrix(other).sum(0),
        ),
        "remembering().cross_gram(other)": (lambda: _remembered(factors).cross_gram(other), rows @ _matrix(other).T),
        "covariance() (JᵀJ)": (lambda: factors.covariance(), rows.T @ rows),
        "diagonal() of JᵀJ": (lambda: _flat(factors, factors.diagonal()), (rows * rows).sum(0)),
    }
    for quantity, (run, expected) in operations.items():
        compare.close(quantity, _guarded(compare, quantity, run), expected)
    for quantity, result in {"rmatvec": factors.rmatvec(weights_in), "diagonal": factors.diagonal()}.items():
        shapes = {name: tuple(array.shape) for name, array in result.items()}
        compare.equal(f"shapes of {quantity}", shapes, factors.shapes)
    results = {"gram()": lambda: {"": factors.gram()}, "rmatvec": lambda: factors.rmatvec(weights_in)}
    for quantity, make in results.items():
        _check_new_arrays(quantity, make, lambda: [numbers(weights_in), _matrix(factors)], compare)


def _check_new_arrays(
    quantity: str, make: Callable[[], dict[str, Array]], others: Callable[[], list[Tensor]], compare: Comparison
) -> None:
    """Check that a result may be changed in place, and that nothing else changes with it."""
    expected = {name: numbers(array).clone() for name, array in make().items()}
    before, results = [one.clone() for one in others()], make()
    try:
        for array in results.values():
            array += 1
    except (RuntimeError, ValueError) as error:  # one number for many places, or read only
        raise compare.fail(quantity, f"is no new array that may be changed: {error}") from error
    if not all(map(torch.equal, others(), before)):
        raise compare.fail(quantity, "is no new array: who changes it changes the factors or the weights")
    for name, array in make().items():
        compare.close(f"{quantity}, changed once in place", results[name], expected[name] + 1)
        compare.close(f"{quantity} after its last result was changed", array, expected[name])


def _remembered(factors: Factors) -> Factors:
    """Return factors that may have kept something of their Gram."""
    kept = factors.remembering()
    kept.gram()
    return kept


def _check_new_factors(factors: Factors, rows: Tensor, compare: Comparison) -> None:
    n = len(rows)
    weights = _like(factors, _wave(n, 0.9))
    scaled = numbers(weights)[:, None] * rows
    picked = [n - 1, 0, 0, n // 2]
    xp = namespace(weights)
    index = xp.asarray(picked, device=device(weights))
    other = factors.scaled(weights)
    names = {name: f"tied.{name}" for name in factors.shapes}
    made = {
        "rows(index)": (lambda: factors.rows(index), rows[picked], None),
        "scaled(weights)": (lambda: other, scaled, factors.normalizer),
        "scaled(0.5)": (lambda: factors.scaled(0.5), rows / 2, factors.normalizer),
        "add(other)": (lambda: factors.add(other), rows + scaled, factors.normalizer),
        "add(dense)": (lambda: factors.add(other.dense()), rows + scaled, factors.normalizer),
        "cat": (lambda: cat([factors, other]), torch.cat([rows, scaled]), 2 * factors.normalizer),
        "cat with dense": (lambda: cat([factors, other.dense()]), torch.cat([rows, scaled]), 2 * factors.normalizer),
        "compact()": (lambda: factors.compact(), rows, factors.normalizer),
        "renamed": (lambda: factors.renamed(names), rows, factors.normalizer),
        "with_samples(3)": (lambda: factors.with_samples(3), rows, 3),
    }
    for quantity, (run, expected, normalizer) in made.items():
        result = _guarded(compare, quantity, run)
        compare.close(f"rows of {quantity}", _matrix(result), expected)
        if normalizer is not None:
            compare.equal(f"normalizer of {quantity}", result.normalizer, normalizer)
        compare.close(f"gram() of {quantity}", result.gram(), expected @ expected.T)
    renamed = factors.renamed(names)
    compare.equal("shapes of renamed", renamed.shapes, {names[name]: shape for name, shape in factors.shapes.items()})


def _check_state(factors: Factors, rows: Tensor, compare: Comparison) -> None:
    restored = _guarded(compare, "unpack(pack(factors))", lambda: unpack(pack(factors)))
    compare.equal("kind of unpack(pack(factors))", type(restored), type(factors))
    compare.close("rows of unpack(pack(factors))", _matrix(restored), rows)
    compare.equal("shapes of unpack(pack(factors))", restored.shapes, factors.shapes)
    compare.equal("normalizer of unpack(pack(factors))", restored.normalizer, factors.normalizer)


def check_kronecker(factors: Factors, compare: Comparison) -> bool:
    """Check the shapes, symmetry and definiteness of a Kronecker pair, where the kind has one; say whether it has.

    For a single row whose two factors have rank one (no weight sharing), ``A ⊗ G`` is ``JᵀJ`` itself, and is compared
    with it.
    """
    try:
        pair = factors.kronecker()
    except CurvatureError:
        return False
    a, g = numbers(pair.inputs), numbers(pair.cotangents)
    for name, matrix in (("A", a), ("G", g)):
        quantity = f"Kronecker factor {name}"
        if matrix.ndim != 3 or matrix.shape[1] != matrix.shape[2]:
            raise compare.fail(quantity, f"has shape {tuple(matrix.shape)}, expected (groups, d, d)")
        compare.close(f"{quantity} transposed", matrix.mT, matrix)
        lowest = float(torch.linalg.eigvalsh(matrix).min())
        if lowest < -compare.tolerance * max(float(matrix.abs().max()), 1e-3) * matrix.shape[1]:
            raise compare.fail(quantity, f"is not positive semidefinite: its lowest eigenvalue is {lowest:.3g}")
    if len(a) != len(g):
        raise compare.fail("Kronecker pair", f"has {len(a)} groups in A and {len(g)} in G")
    groups, d, d_out = len(a), a.shape[1], g.shape[1]
    if groups * d * d_out != factors.size:
        raise compare.fail(
            "Kronecker pair",
            f"of shapes {tuple(a.shape)} and {tuple(g.shape)} does not fit a block of {factors.size} parameters "
            f"{factors.shapes}",
        )
    ranks = {int(torch.linalg.matrix_rank(matrix, rtol=1e-6).max()) for matrix in (a, g)}
    if len(factors) == 1 and ranks <= {0, 1}:
        _check_rank_one(factors, a, g, compare)
    return True


def _check_rank_one(factors: Factors, a: Tensor, g: Tensor, compare: Comparison) -> None:
    groups, d, d_out = len(a), a.shape[1], g.shape[1]
    parts, row = [], _matrix(factors)[0]
    for name, shape in factors.shapes.items():
        count = torch.Size(shape).numel()
        parts.append((name, row[:count].reshape(groups, d_out, -1)))
        row = row[count:]
    # The implicit 1 of a bias is the last input.
    joined = torch.cat([part for _, part in sorted(parts, key=lambda part: part[1].shape[2] == 1)], dim=2)
    if joined.shape != (groups, d_out, d):
        return
    for group in range(groups):
        flat = joined[group].T.reshape(-1)
        compare.close("Kronecker product A ⊗ G of one row", torch.kron(a[group], g[group]), torch.outer(flat, flat))
