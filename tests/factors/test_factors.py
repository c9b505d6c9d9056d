"""Every kind of Factors against its own explicit rows, and the explicit rows against their definition."""

import dataclasses

import array_api_compat
import numpy as np
import pytest
import torch
from kinds import CASES, COLUMNS, KINDS, N, close, dense, flat, matrix, numbers, outer, several, shared, vector

from curvlib.errors import ConfigurationError
from curvlib.factors import Dense, Factors, LowRank, OneHotOuter, OuterProduct, SharedOuter, Sum, cat, cost
from curvlib.factors.combine import stack_columns


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request):
    kind, library = request.param
    return KINDS[kind], library


def test_algebra_equals_that_of_the_explicit_rows(case):
    build, library = case
    factors = build(library)
    rows = matrix(factors)
    assert rows.shape == (len(factors), factors.size) == (N * COLUMNS, sum(np.prod(s) for s in factors.shapes.values()))
    close(factors.gram(), rows @ rows.T)
    close(factors.cross_gram(build(library, seed=5)), rows @ matrix(build(library, seed=5)).T)
    close(factors.matvec(vector(factors, library)), rows @ flat(vector(factors, library)))
    weights = numbers(library, len(factors), seed=4)
    close(flat(factors.rmatvec(weights)), rows.T @ np.asarray(weights))
    close(flat(factors.diagonal()), (rows * rows).sum(0))
    close(factors.covariance(), rows.T @ rows)
    close(factors.row_weights(0.5), np.full(len(factors), 0.5))


def test_new_factors_from_old_ones(case):
    build, library = case
    factors, other = build(library), build(library, seed=5)
    rows, others = matrix(factors), matrix(other)
    xp = array_api_compat.array_namespace(numbers(library, 1))
    index = xp.asarray([7, 0, 0, 11])
    close(matrix(factors.rows(index)), rows[[7, 0, 0, 11]])
    weights = numbers(library, len(factors), seed=4)
    close(matrix(factors.scaled(weights)), rows * np.asarray(weights)[:, None])
    close(matrix(factors.scaled(0.5)), rows * 0.5)
    close(matrix(factors.add(other)), rows + others)
    joined = cat([factors.with_samples(2), other.with_samples(3)])
    close(matrix(joined), np.concatenate([rows, others]))
    close(joined.gram(), matrix(joined) @ matrix(joined).T)
    assert joined.normalizer == 5
    close(matrix(factors.compact()), rows)
    assert factors.with_samples(9).normalizer == 9
    assert factors.normalizer == len(factors)
    renamed = factors.renamed({name: f"tied.{name}" for name in factors.shapes})
    assert list(renamed.shapes) == [f"tied.{name}" for name in factors.shapes]
    close(matrix(renamed), rows)


def test_a_new_kind_needs_dense_alone():
    @dataclasses.dataclass(frozen=True, eq=False)
    class Doubled(Factors):
        half: torch.Tensor

        def dense(self):
            return Dense(weight=2 * self.half, samples=self.samples)

    half = numbers("torch", 6, 2, 3)
    factors, reference = Doubled(half), Dense(weight=2 * half)
    other = Doubled(numbers("torch", 6, 2, 3, seed=1))
    assert len(factors) == 6
    assert factors.shapes == {"weight": (2, 3)}
    assert factors.nbytes == half.numel() * 8
    close(factors.gram(), reference.gram())
    close(factors.cross_gram(other), reference.cross_gram(other))
    close(factors.matvec({"weight": half[0]}), reference.matvec({"weight": half[0]}))
    close(flat(factors.rmatvec(half[:, 0, 0])), flat(reference.rmatvec(half[:, 0, 0])))
    close(flat(factors.diagonal()), flat(reference.diagonal()))
    close(factors.covariance(), reference.covariance())
    close(factors.row_weights(2.0), np.full(6, 2.0))
    close(matrix(factors.rows(torch.tensor([1]))), matrix(reference)[[1]])
    close(matrix(factors.scaled(3.0)), matrix(reference) * 3)
    close(matrix(factors.add(other)), matrix(factors) + matrix(other))
    close(matrix(factors.cat([other])), np.concatenate([matrix(factors), matrix(other)]))
    assert list(factors.renamed({"weight": "w"}).shapes) == ["w"]
    with pytest.raises(ConfigurationError, match="no Kronecker form"):
        factors.kronecker()


def test_unlike_kinds_combine_exactly():
    left, right = outer("torch", bias="bias"), Dense(weight=numbers("torch", 12, 2, 5), bias=numbers("torch", 12, 2))
    flat_shared = SharedOuter(
        numbers("torch", N, 3, 1, 5),
        numbers("torch", N, COLUMNS, 3, 1, 2),
        weight_shape=(2, 5),
        bias="bias",
    )
    for one in (left, right, flat_shared):
        for two in (left, right, flat_shared):
            close(matrix(one.add(two)), matrix(one) + matrix(two))
            close(matrix(cat([one, two])), np.concatenate([matrix(one), matrix(two)]))
            close(one.cross_gram(two), matrix(one) @ matrix(two).T)
    without_bias = outer("torch")
    total = left.add(without_bias)
    assert total.shapes == left.shapes
    expected = matrix(left).copy()
    expected[:, :10] += matrix(without_bias)
    close(matrix(total), expected)
    close(matrix(right.add(without_bias)), matrix(right) + np.pad(matrix(without_bias), ((0, 0), (0, 2))))
    three = total.add(left)
    close(matrix(three), expected + matrix(left))


def test_columns_interleave_within_samples():
    columns = [Dense(weight=numbers("torch", N, 2, seed=seed)) for seed in range(3)]
    stacked = stack_columns(columns)
    for sample in range(N):
        for column in range(3):
            close(matrix(stacked)[sample * 3 + column], matrix(columns[column])[sample])
    assert stack_columns(columns[:1]) is columns[0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Dense(), "one array"),
        (lambda: Dense(a=torch.ones(2, 3), b=torch.ones(3, 3)), r"\{'a': 2, 'b': 3\}"),
        (lambda: Dense(a=torch.tensor(1.0)), "leading sizes"),
        (lambda: OuterProduct(torch.ones(2, 3), torch.ones(3, 4)), r"\(2, 3\) and \(3, 1, 4\)"),
        (lambda: OuterProduct(torch.ones(2, 3), torch.ones(2, 4), weight=None), "name of a weight"),
        (lambda: SharedOuter(torch.ones(2, 3, 1, 4), torch.ones(2, 2, 1, 4), (4, 4)), "positions"),
        (lambda: SharedOuter(torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1, 4), (5, 4)), r"\(5, 4\) does not fit"),
        (lambda: SharedOuter(torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1, 4), (4, 4), None), "name of a weight"),
        (lambda: OneHotOuter(torch.ones(2, 3).long(), torch.ones(2, 4, 5), 7), r"\(2, 3\) and \(2, 1, 4, 5\)"),
        (lambda: OneHotOuter(torch.ones(2, 3), torch.ones(2, 3, 5), 7), "indices must be integers, got torch.float32"),
        (lambda: Sum((outer("torch"), Dense(weight=torch.ones(2, 2, 5)))), r"\[12, 2\] rows"),
        (lambda: Sum((outer("torch"), Dense(weight=torch.ones(12, 5, 2)))), "shape"),
        (lambda: outer("torch").cross_gram(outer("torch", bias="bias")), "different blocks"),
        (lambda: LowRank(torch.ones(4, 3), Dense(weight=torch.ones(2, 5))), r"\(rows, 2\).*\(4, 3\)"),
        (lambda: cat([outer("torch"), outer("torch", bias="bias")]), "different blocks"),
        (lambda: cat([]), "at least one"),
        (lambda: dense("torch").kronecker(), "no Kronecker form"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_shapes(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()


def test_sums_of_different_weights_never_leave_their_own_kinds(monkeypatch):
    def build(seed):
        left, right = outer("torch", seed, weight="w", bias="b"), shared("torch", seed + 3, positions=2, weight="v")
        return Sum((left, right))

    one, two = build(0), build(5)
    expected, squares = matrix(one) @ matrix(two).T, (matrix(one) ** 2).sum(0)
    total, both = matrix(one) + matrix(two), np.concatenate([matrix(one), matrix(two)])
    monkeypatch.setattr(cost, "pairs_beat_rows", lambda left, right: True)
    with monkeypatch.context() as patch:
        for kind in (OuterProduct, SharedOuter, Sum):
            patch.setattr(kind, "dense", lambda self: pytest.fail("explicit rows were made"))
        gram, joined, added = one.cross_gram(two), cat([one, two]), one.add(two)
        grams = joined.gram(), added.gram()
        diagonal = Sum((one.terms[0],)).diagonal()
    close(gram, expected)
    close(grams[0], both @ both.T)
    close(grams[1], total @ total.T)
    close(flat(diagonal), squares[: sum(value.numel() for value in diagonal.values())])
    assert len(added.terms) == len(joined.terms) == 2


def test_restricted_factors_are_columns_of_the_rows():
    for build in (outer, shared):
        factors = build("torch", weight="w", bias="b")
        whole = factors.dense().values
        for names in ({"w"}, {"b"}, {"w", "b"}):
            part = factors.restricted(names)
            assert type(part) is type(factors)
            assert set(part.shapes) == names
            close(matrix(part), matrix(Dense({name: whole[name] for name in part.shapes})))
    factors = several("torch")
    assert set(factors.restricted({"b", "c"}).shapes) == {"b", "c"}
    close(factors.restricted({"b"}).dense().values["b"], factors.dense().values["b"])
