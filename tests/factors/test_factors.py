"""Every kind of Factors against its own explicit rows, and the explicit rows against their definition."""

import dataclasses

import array_api_compat
import numpy as np
import pytest
import torch

from curvlib.errors import ConfigurationError
from curvlib.factors import Dense, Factors, LowRank, OneHotOuter, OuterProduct, SharedOuter, Sum, cat, cost
from curvlib.factors.combine import stack_columns
from curvlib.layers import ConvolutionFactors

N, COLUMNS = 4, 3


def numbers(library, *shape, seed=0):
    values = np.random.default_rng(seed + sum(shape)).standard_normal(shape)
    return torch.from_numpy(values) if library == "torch" else values


def outer(library, seed=0, **names):
    return OuterProduct(numbers(library, N, 5, seed=seed), numbers(library, N, COLUMNS, 2, seed=seed + 1), **names)


def shared(library, seed=0, positions=3, groups=2, **names):
    return SharedOuter(
        numbers(library, N, positions, groups, 4, seed=seed),
        numbers(library, N, COLUMNS, positions, groups, 3, seed=seed + 1),
        weight_shape=(groups * 3, 2, 2),
        **names,
    )


def convolution(library, seed=0, **names):
    assert library == "torch"
    return ConvolutionFactors(
        numbers(library, N, 4, 9, 8, seed=seed),
        numbers(library, N, COLUMNS, 6, 4, 3, seed=seed + 1),
        weight_shape=(6, 2, 2, 3),
        stride=(2, 2),
        dilation=(2, 1),
        groups=2,
        **names,
    )


def onehot(library, seed=0, vocabulary=7, positions=5, **names):
    indices = np.random.default_rng(seed).integers(vocabulary, size=(N, positions))
    cotangents = numbers(library, N, COLUMNS, positions, 2, seed=seed + 1)
    cotangents[1, :, 2] = 0  # a position that does not count
    return OneHotOuter(torch.from_numpy(indices) if library == "torch" else indices, cotangents, vocabulary, **names)


def dense(library, seed=0):
    return Dense(
        weight=numbers(library, N * COLUMNS, 2, 3, seed=seed), bias=numbers(library, N * COLUMNS, 4, seed=seed + 1)
    )


def tied(library, seed=0):
    left = outer(library, seed, weight="w", bias="b")
    return Sum((left, outer(library, seed + 7, weight="w")))


def lowrank(library, seed=0):
    left = numbers(library, N * COLUMNS, 2, seed=seed)
    basis = Dense(weight=numbers(library, 2, 3, 2, seed=seed), bias=numbers(library, 2, 3, seed=seed + 1))
    return LowRank(left, basis)


def several(library, seed=0):
    left = shared(library, seed, weight="w", bias="b")
    rows = {"c": numbers(library, N * COLUMNS, 3, seed=seed), "b": numbers(library, N * COLUMNS, 6, seed=seed + 2)}
    return Sum((left, outer(library, seed + 7, weight="v"), Dense(rows)))


KINDS = {
    "outer": lambda library, seed=0: outer(library, seed),
    "outer with bias": lambda library, seed=0: outer(library, seed, bias="bias"),
    "outer, bias alone": lambda library, seed=0: outer(library, seed, weight=None, bias="bias"),
    "shared": lambda library, seed=0: shared(library, seed),
    "shared with bias": lambda library, seed=0: shared(library, seed, bias="bias"),
    "shared, bias alone": lambda library, seed=0: shared(library, seed, weight=None, bias="bias"),
    "shared, many positions": lambda library, seed=0: shared(library, seed, positions=40, groups=1, bias="bias"),
    "convolution": lambda library, seed=0: convolution(library, seed),
    "convolution with bias": lambda library, seed=0: convolution(library, seed, bias="bias"),
    "convolution, bias alone": lambda library, seed=0: convolution(library, seed, weight=None, bias="bias"),
    "one-hot": lambda library, seed=0: onehot(library, seed),
    "one-hot, table shorter than the sample": lambda library, seed=0: onehot(library, seed, vocabulary=3),
    "dense": dense,
    "low rank": lowrank,
    "sum": tied,
    "sum of several weights": several,
}
CASES = [
    (kind, library)
    for kind in KINDS
    for library in ("torch", "numpy")
    if "convolution" not in kind or library == "torch"
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request):
    kind, library = request.param
    return KINDS[kind], library


def matrix(factors):
    return np.asarray(factors.dense().matrix())


def flat(vector):
    return np.concatenate([np.asarray(value).reshape(-1) for value in vector.values()])


def vector(factors, library):
    return {name: numbers(library, *shape, seed=3) for name, shape in factors.shapes.items()}


def close(left, right):
    np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=1e-11, atol=1e-11)


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


@pytest.mark.parametrize("bias", [None, "bias"])
def test_outer_rows_are_products_of_cotangent_and_input(bias):
    factors = outer("numpy", bias=bias)
    for sample in range(N):
        for column in range(COLUMNS):
            a, g = factors.inputs[sample], factors.cotangents[sample, column]
            expected = np.concatenate([np.outer(g, a).reshape(-1), g if bias else []])
            close(matrix(factors)[sample * COLUMNS + column], expected)


def test_shared_rows_are_sums_over_positions_within_groups():
    factors = shared("numpy", bias="bias")
    for sample in range(N):
        for column in range(COLUMNS):
            weight = np.zeros((2, 3, 4))
            for position in range(3):
                for group in range(2):
                    weight[group] += np.outer(
                        factors.cotangents[sample, column, position, group], factors.inputs[sample, position, group]
                    )
            bias = factors.cotangents[sample, column].sum(0).reshape(-1)
            close(matrix(factors)[sample * COLUMNS + column], np.concatenate([weight.reshape(-1), bias]))


def test_grams_of_separate_position_sums_are_something_else():
    factors = shared("numpy", groups=1)
    a, g = factors.inputs[:, :, 0].sum(1), factors.cotangents[:, 0, :, 0].sum(1)
    rows = matrix(factors)[::COLUMNS]
    assert np.abs((a @ a.T) * (g @ g.T) - rows @ rows.T).max() > 0.1


@pytest.mark.parametrize("kind", ["shared", "shared with bias", "shared, bias alone", "convolution with bias"])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_both_gram_routes_agree(kind, chunk, monkeypatch):
    monkeypatch.setattr(cost, "chunk", lambda left, right: chunk)
    factors, other = KINDS[kind]("torch"), KINDS[kind]("torch", seed=5)
    for beat in (True, False):
        monkeypatch.setattr(cost, "pairs_beat_rows", lambda left, right, beat=beat: beat)
        close(factors.gram(), matrix(factors) @ matrix(factors).T)
        close(factors.cross_gram(other), matrix(factors) @ matrix(other).T)


@pytest.mark.parametrize("kind", ["shared", "convolution with bias"])
@pytest.mark.parametrize("explicit", [True, False])
def test_both_kept_forms_agree(kind, explicit, monkeypatch):
    monkeypatch.setattr(cost, "rows_are_cheaper_to_keep", lambda sizes: explicit)
    monkeypatch.setattr(cost, "pairs_beat_rows", lambda left, right: not explicit)
    factors = KINDS[kind]("torch")
    kept = factors.compact()
    assert isinstance(kept, Dense) == explicit
    close(matrix(kept), matrix(factors))


def test_route_follows_the_sizes():
    few = cost.Sizes(n=8, columns=1, positions=2, groups=1, d_in=256, d_out=256)
    many = cost.Sizes(n=64, columns=1, positions=1024, groups=1, d_in=27, d_out=16)
    assert cost.pairs_beat_rows(few, few)
    assert not cost.pairs_beat_rows(many, many)
    assert cost.rows_are_cheaper_to_keep(many)
    assert not cost.rows_are_cheaper_to_keep(few)


def test_one_hot_rows_are_sums_of_lookups():
    factors = onehot("numpy")
    for sample in range(N):
        for column in range(COLUMNS):
            table = np.zeros((7, 2))
            for position in range(5):
                table[factors.indices[sample, position]] += factors.cotangents[sample, column, position]
            close(matrix(factors)[sample * COLUMNS + column], table.reshape(-1))


@pytest.mark.parametrize("library", ["torch", "numpy"])
@pytest.mark.parametrize("worth", [0, 4, 10**9])  # every entry in the table; the frequent ones; none
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_all_gram_routes_of_lookups_agree(library, worth, chunk, monkeypatch):
    monkeypatch.setattr(cost, "pairs_worth_a_table", lambda *sizes: worth)
    for name in ("list_chunk", "table_chunk"):
        monkeypatch.setattr(cost, name, lambda *sizes: chunk)
    factors, other = onehot(library), onehot(library, seed=5, positions=6)
    close(factors.gram(), matrix(factors) @ matrix(factors).T)
    close(factors.cross_gram(other), matrix(factors) @ matrix(other).T)
    nothing = factors.scaled(0.0)
    for one, two in ((nothing, other), (other, nothing), (nothing, nothing)):
        close(one.cross_gram(two), np.zeros((len(one), len(two))))


@pytest.mark.parametrize("library", ["torch", "numpy"])
@pytest.mark.parametrize("bias", [None, "bias"])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_a_table_tied_to_a_decoder(library, bias, chunk, monkeypatch):
    monkeypatch.setattr(cost, "chunk", lambda left, right: chunk)
    lookups = onehot(library)
    rows = matrix(lookups)
    single = OuterProduct(numbers(library, N, 2), numbers(library, N, COLUMNS, 7), bias=bias)
    many = SharedOuter(numbers(library, N, 3, 1, 2), numbers(library, N, COLUMNS, 3, 1, 7), (7, 2), bias=bias)
    for decoder in (single, many):
        tied = lookups.add(decoder)
        expected = matrix(decoder).copy()
        expected[:, :14] += rows
        close(matrix(tied), expected)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OneHotOuter, "dense", None)  # the Gram of a tied table never makes rows as long as the table
            close(tied.gram(), expected @ expected.T)
            close(tied.cross_gram(decoder.add(lookups)), expected @ expected.T)
            if bias is None:
                close(lookups.cross_gram(decoder), rows @ (expected - rows).T)
                close(decoder.cross_gram(lookups), (expected - rows) @ rows.T)


def test_lookups_of_different_lengths_combine():
    short, long = onehot("numpy", positions=3), onehot("numpy", positions=6, seed=2)
    for one, two in ((short, long), (long, short)):
        assert isinstance(cat([one, two]), OneHotOuter)
        close(matrix(cat([one, two])), np.concatenate([matrix(one), matrix(two)]))
        assert isinstance(one.add(two), OneHotOuter)
        close(matrix(one.add(two)), matrix(one) + matrix(two))


def test_a_large_table_costs_nothing_but_what_is_looked_up():
    indices = torch.arange(N * 5).reshape(N, 5) * 10**14
    factors = OneHotOuter(indices, numbers("torch", N, COLUMNS, 5, 2), vocabulary=10**18)
    for kept in (factors, factors.compact(), cat([factors, factors]).rows(torch.arange(N * COLUMNS))):
        blocks = [g.flatten(1) @ g.flatten(1).T for g in factors.cotangents]  # no two samples share an entry
        close(kept.gram(), torch.block_diag(*blocks))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kronecker_pairs_of_lookups_are_those_of_a_linear_map_of_one_hot_vectors(sharing):
    factors = dataclasses.replace(onehot("numpy"), cotangents=numbers("numpy", N, COLUMNS, 5, 2))
    linear = SharedOuter(np.eye(7)[factors.indices][:, :, None], factors.cotangents[:, :, :, None], (2, 7))
    mine, theirs = factors.kronecker(sharing), linear.kronecker(sharing)
    close(np.kron(mine.cotangents[0], mine.inputs[0]), np.kron(theirs.inputs[0], theirs.cotangents[0]))


def kronecker_definition(inputs, cotangents, bias):
    """Textbook factors from (rows, d) inputs and cotangents of one group."""
    if bias:
        inputs = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
    return inputs.T @ inputs / len(inputs), cotangents.T @ cotangents


@pytest.mark.parametrize("bias", [None, "bias"])
def test_kronecker_pairs_are_the_textbook_ones(bias):
    factors = outer("numpy", bias=bias)
    pair = factors.kronecker()
    A, G = kronecker_definition(factors.inputs, factors.cotangents.reshape(-1, 2), bias)
    close(pair.inputs[0], A)
    close(pair.cotangents[0], G)

    factors = shared("numpy", bias=bias)
    pair = factors.kronecker()
    for group in range(2):
        inputs = factors.inputs[:, :, group].reshape(-1, 4)
        A, G = kronecker_definition(inputs, factors.cotangents[:, :, :, group].reshape(-1, 3), bias)
        close(pair.inputs[group], A)
        close(pair.cotangents[group], G)

    images = convolution("torch", bias=bias)
    close(images.kronecker().inputs, images.patches().kronecker().inputs)
    alone = outer("numpy", weight=None, bias="bias").kronecker()
    close(alone.inputs, np.ones((1, 1, 1)))


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


@pytest.mark.parametrize("bias", [None, "bias"])
def test_reduced_kronecker_rows_average_inputs_and_sum_cotangents(bias):
    factors = shared("numpy", bias=bias)
    pair = factors.kronecker("reduce")
    for group in range(2):
        inputs = factors.inputs[:, :, group].mean(1)
        A, G = kronecker_definition(inputs, factors.cotangents[:, :, :, group].sum(2).reshape(-1, 3), bias)
        close(pair.inputs[group], A)
        close(pair.cotangents[group], G)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("dense", "low rank") and "sum" not in kind])
def test_moments_in_a_kronecker_basis_and_the_matrix_form(kind):
    factors = KINDS[kind]("torch")
    apart = factors.kronecker_rows()
    layout = apart.layout
    groups, _, d_out = apart.cotangents.shape
    d = apart.input_moments().shape[-1]
    basis = [torch.linalg.qr(numbers("torch", groups, size, size, seed=1)).Q for size in (d, d_out)]
    rows = factors.dense().values
    expected = torch.zeros(groups, d_out, d, dtype=torch.float64)
    for row in range(len(factors)):
        vector = {name: array[row] for name, array in rows.items()}
        close(flat(layout.vector(layout.matrix(vector))), flat(vector))
        expected += (basis[1].mT @ layout.matrix(vector) @ basis[0]).square()
    close(factors.rotated_squares(*basis), expected)
    close(Factors.rotated_squares(factors, *basis), expected)
    assert dict(layout.shapes) == factors.shapes
    if layout.weight is not None:
        ones = torch.ones(*apart.inputs.shape[:2], 1, dtype=torch.float64)
        inputs = apart.inputs if layout.bias is None else torch.cat([apart.inputs, ones], 2)
        close(apart.project_inputs(basis[0]), inputs @ basis[0])


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
