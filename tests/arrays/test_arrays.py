"""The array namespace: the same answer in every library, clear failures, state that survives a checkpoint."""

import dataclasses
import io

import numpy as np
import pytest
import torch

from curvlib import arrays
from curvlib.arrays import products, torch_kernels
from curvlib.errors import CurvatureError, NotPositiveDefiniteError
from curvlib.factors import OuterProduct
from curvlib.solvers import Woodbury


@pytest.fixture(params=["torch", "numpy"])
def array(request):
    return torch.from_numpy if request.param == "torch" else (lambda values: values)


def spd(n=5, batch=()):
    root = np.random.default_rng(0).standard_normal((*batch, n, n))
    return root @ np.swapaxes(root, -1, -2) + np.eye(n)


def test_contractions_of_three_operands_follow_a_planned_path(array):
    rng = np.random.default_rng(0)
    a, b, c = rng.standard_normal((4, 3)), rng.standard_normal((3, 5)), rng.standard_normal((5, 2))
    np.testing.assert_allclose(arrays.contract("ij,jk,kl->il", array(a), array(b), array(c)), a @ b @ c)
    np.testing.assert_allclose(arrays.contract("ij,jk->ik", array(a), array(b)), a @ b)


SIZES = (1, 5, 128, 129)
"""On both sides of the widths up to which torch tensors have SciPy's routine."""


@pytest.mark.parametrize("n", SIZES)
def test_cholesky_solves_vectors_and_batches(array, n):
    matrices, rhs = spd(n, batch=(3,)), np.random.default_rng(1).standard_normal((3, n, 2))
    factor = arrays.cholesky(array(matrices))
    np.testing.assert_allclose(factor, np.linalg.cholesky(matrices), atol=1e-11)
    np.testing.assert_allclose(arrays.cholesky_solve(factor, array(rhs)), np.linalg.solve(matrices, rhs), atol=1e-11)
    single, vector = arrays.cholesky(array(matrices[0])), rhs[0, :, 0]
    solution = np.linalg.solve(matrices[0], vector)
    np.testing.assert_allclose(arrays.cholesky_solve(single, array(vector)), solution, atol=1e-11)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_solutions_do_not_depend_on_how_a_factor_lies(n, batch):
    """A factor that was saved as its numbers alone is loaded in rows, and a resumed run goes on bit for bit."""
    factor = arrays.cholesky(torch.from_numpy(spd(n, batch)).float())
    rhs = torch.randn(*batch, n, 1)
    assert torch.equal(arrays.cholesky_solve(factor, rhs), arrays.cholesky_solve(factor.contiguous(), rhs))


@pytest.mark.parametrize("n", SIZES)
def test_a_factor_of_torch_keeps_type_place_and_gradient(n):
    matrix = torch.from_numpy(spd(n, batch=(2,)))
    single = arrays.cholesky(matrix.float())
    assert (single.dtype, single.data_ptr() % 64) == (torch.float32, 0)
    torch.testing.assert_close(single.double(), arrays.cholesky(matrix), rtol=1e-4, atol=1e-4)
    assert torch.equal(matrix, torch.from_numpy(spd(n, batch=(2,))))
    (gradient,) = torch.autograd.grad(torch.linalg.cholesky(leaf := matrix.clone().requires_grad_()).sum(), leaf)
    (own,) = torch.autograd.grad(arrays.cholesky(leaf).sum(), leaf)
    torch.testing.assert_close(own, gradient)
    batched = torch.func.vmap(lambda one: arrays.kernels(one).cholesky(one, wait=False)[0])(matrix)
    torch.testing.assert_close(batched, arrays.cholesky(matrix))


@pytest.mark.parametrize("shape", [(0, 0), (2, 0, 0), (0, 3, 3)])
def test_nothing_has_a_factor_too(array, shape):
    assert arrays.cholesky(array(np.zeros(shape))).shape == shape


@pytest.mark.parametrize("n", [3, 129])
@pytest.mark.parametrize("wrong", [-1.0, 0.0, np.nan, np.inf])
def test_what_is_not_positive_definite_says_so(array, n, wrong):
    one = np.diag([1.0, wrong, *np.ones(n - 2)])
    for bad in (one, np.full((n, n), wrong), np.diag([wrong] * n), np.stack([np.eye(n), one])):
        with pytest.raises(NotPositiveDefiniteError, match=rf"{n}, {n}\)"):
            arrays.cholesky(array(bad))


def test_matrices_put_together(array):
    several = array(spd(batch=(4,)))
    factors = list(arrays.cholesky(several))
    orders = {"in order": [0, 1, 2, 3], "out of order": [1, 0, 2, 3], "some": [0, 1], "one twice": [0, 0, 2, 3]}
    for order in orders.values():
        whole = arrays.stacked([factors[place] for place in order])
        np.testing.assert_allclose(whole, np.stack([np.asarray(factors[place]) for place in order]))
        assert np.asarray(whole).shape == (len(order), 5, 5)
    transposed = arrays.stacked([factor.T for factor in factors])
    np.testing.assert_allclose(transposed, np.stack([np.asarray(factor).T for factor in factors]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["rows", "columns", "part of a larger one"])
def test_small_matrices_are_damped_and_factorised_one_by_one(dtype, layout):
    whole = torch.from_numpy(spd(128, batch=(3,))).to(dtype)
    own = list({"rows": whole, "columns": whole.mT.contiguous().mT}.get(layout, torch.nn.functional.pad(whole, [1, 2])))
    own = [one[:, 1:129] for one in own] if layout == "part of a larger one" else own
    factors = arrays.small_factors(own, dampings := [0.1, 0.2, 0.3])
    assert torch.equal(torch.stack(own), whole)
    for factor, matrix, damping in zip(factors, whole, dampings, strict=True):
        truth = torch.linalg.cholesky(matrix.double() + damping * torch.eye(128, dtype=torch.float64))
        assert factor.dtype == dtype
        assert torch.equal(factor, factor.tril())
        tolerance = 1e-12 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(factor.double(), truth, rtol=tolerance, atol=tolerance)
    assert arrays.stacked(factors).data_ptr() == factors[0].data_ptr()  # put together without a copy


def test_what_is_not_small_or_not_positive_definite_is_left_to_others():
    several = list(torch.from_numpy(spd(128, batch=(3,))))
    assert arrays.small_factors(several, [0.1] * 3) is not None
    assert arrays.small_factors(several[:1], [0.1]) is None  # one call is as fast
    assert arrays.small_factors([torch.eye(129)] * 3, [0.1] * 3) is None
    assert arrays.small_factors([one.numpy() for one in several], [0.1] * 3) is None
    assert arrays.small_factors([one.clone().requires_grad_() for one in several], [0.1] * 3) is None
    for wrong in (-1e6, np.nan, np.inf):
        several[1][5, 5] = wrong
        assert arrays.small_factors(several, [0.1] * 3) is None


def test_what_products_are_made_with_lies_in_rows():
    """As it does once it was saved as its numbers alone and loaded: products round by how their factors lie."""
    matrix = torch.from_numpy(spd(16, batch=(2,)))
    for made in (arrays.eigh(matrix)[1], arrays.qr(matrix)[0], arrays.cholesky_inverse(arrays.cholesky(matrix))):
        assert made.is_contiguous()


PRODUCTS = [
    (1, 1, 1), (5, 3, 4), (8, 12, 30), (7, 40, 40), (64, 9, 50), (2, 2000, 3), (64, 64, 64), (63, 64, 80), (256, 64, 40)
]  # fmt: skip
"""Rows, inner size and columns: for one thread, shared out to threads and not, divisible by them and not."""


@pytest.mark.parametrize(("m", "k", "n"), PRODUCTS)
@pytest.mark.parametrize("threads", [1, 2, 4, 16])
def test_products_are_products(array, m, k, n, threads):
    generator = np.random.default_rng(0)
    first, second, total = (generator.standard_normal(shape) for shape in ((m, k), (k, n), (m, n)))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for one in (array(first), array(first.T.copy()).T):
            np.testing.assert_allclose(arrays.product(one, array(second)), first @ second, atol=1e-11)
            stack = arrays.product(one[None], array(second.T.copy()).T[None])
            np.testing.assert_allclose(stack, (first @ second)[None], atol=1e-11)
        several = arrays.product(array(np.stack([first, -first])), array(np.stack([second, second])))
        np.testing.assert_allclose(several, np.stack([first @ second, -first @ second]), atol=1e-11)
        sum_ = array(total.copy())
        arrays.add_product(sum_, array(first), array(second), 0.25)
        np.testing.assert_allclose(sum_, 0.25 * total + first @ second, atol=1e-11)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize(("m", "k", "n"), PRODUCTS)
def test_products_with_gaps_between_rows(array, m, k, n, gaps, monkeypatch):
    if gaps:
        monkeypatch.setattr(torch_kernels, "_SHARED", range(1))
    generator = np.random.default_rng(0)
    first, second = (generator.standard_normal(shape) for shape in ((m, k), (k, n)))
    made = arrays.aligned_product(array(first), array(second))
    np.testing.assert_allclose(made, first @ second, atol=1e-11)
    np.testing.assert_allclose(arrays.aligned_product(array(first)[None], array(second)[None])[0], made, atol=1e-11)
    several = arrays.aligned_product(array(np.stack([first, -first])), array(second))
    np.testing.assert_allclose(several, np.stack([first @ second, -first @ second]), atol=1e-11)
    if gaps and isinstance(made, torch.Tensor):
        assert made.stride(0) == -(-n // 8) * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_products_go_to_numpy_where_nobody_would_miss_them(dtype, monkeypatch):
    wanted = []

    def alone(first, second, own=torch_kernels._alone):
        wanted.append(first.shape)
        return own(first, second)

    monkeypatch.setattr(torch_kernels, "_alone", alone)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(32, 40, generator=generator, dtype=dtype), torch.randn(40, 16, generator=generator, dtype=dtype)
    gaps = torch.randn(80, 32, 2, generator=generator, dtype=dtype)[::2, :, 0].T  # no axis in a row
    for one in (a, a.T.contiguous().T, a.repeat(1, 2)[:, 40:], gaps):
        made = torch_kernels.product(one, b)
        torch.testing.assert_close(made, one @ b)
        assert made.dtype == dtype
        torch.testing.assert_close(torch_kernels.self_product(one), one @ one.T)
    assert len(wanted) == 8

    followed = torch_kernels.product(a.clone().requires_grad_(), b)
    assert followed.requires_grad
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        torch_kernels.product(a, b)
    assert counter.get_total_flops() == 2 * 32 * 40 * 16
    made = torch.func.vmap(lambda one: torch_kernels.product(one, b))(a[None])
    torch.testing.assert_close(made[0], a @ b)
    assert torch_kernels.product(a.bfloat16(), b.bfloat16()).dtype == torch.bfloat16
    assert torch_kernels.product(a[:4], b[:, :2]).shape == (4, 2)
    assert len(wanted) == 8


def test_what_is_left_as_a_product_has_any_shape(array):
    first, second = np.random.default_rng(0).standard_normal((2, 4, 4))
    one = arrays.Product(array(first), array(second), (2, 2, 4))
    assert one.shape == arrays.as_array(one).shape == (2, 2, 4)
    assert arrays.Product(array(first), array(second)).shape == (4, 4)
    np.testing.assert_allclose(arrays.as_array(one), (first @ second).reshape(2, 2, 4), atol=1e-13)
    total = array(np.ones((2, 2, 4)))
    one.add_to(total, 0.5)
    np.testing.assert_allclose(total, 0.5 + (first @ second).reshape(2, 2, 4), atol=1e-13)


@pytest.mark.parametrize(("worth", "kind"), [(15, arrays.Product), (16, arrays.Product), (17, None)])
def test_small_products_are_multiplied_at_once(worth, kind, array, monkeypatch):
    monkeypatch.setattr(products, "_WORTH", worth)
    first, second = np.random.default_rng(0).standard_normal((2, 4, 4))
    made = arrays.lazily(array(first), array(second), (2, 8))
    assert isinstance(made, arrays.Product) == (kind is not None)
    np.testing.assert_allclose(arrays.as_array(made), (first @ second).reshape(2, 8), atol=1e-13)


def test_what_is_left_as_a_product_takes_another_array_along(array):
    first, second, third = np.random.default_rng(0).standard_normal((3, 4, 4))
    before = third.copy()
    one = arrays.Product(array(first), array(second), (2, 2, 4), array(third.reshape(2, 2, 4)), -0.3)
    expected = (first @ second - 0.3 * third).reshape(2, 2, 4)
    np.testing.assert_allclose(arrays.as_array(one), expected, atol=1e-13)
    total = array(np.ones((2, 2, 4)))
    one.add_to(total, 0.5)
    np.testing.assert_allclose(total, 0.5 + expected, atol=1e-13)
    np.testing.assert_array_equal(third, before)
    assert arrays.add_multiples([], [], 2.0) == []


@pytest.mark.parametrize("function", [arrays.product, arrays.aligned_product])
def test_products_inside_a_transform(function, monkeypatch):
    if function is arrays.aligned_product:
        monkeypatch.setattr(torch_kernels, "_SHARED", range(1))
    first, second = torch.randn(3, 64, 32, dtype=torch.float64), torch.randn(3, 32, 16, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(function)(first, second), first @ second)
    gradient = torch.func.grad(lambda a: function(a, second[0]).sum())(first[0])
    torch.testing.assert_close(gradient, second[0].sum(1).expand(64, 32))


@pytest.mark.parametrize("shape", [(4, 3), (300, 200), (3, 40_000), (600, 600)])
def test_rows_times_weights(array, shape):
    matrix, weights = np.random.default_rng(0).standard_normal(shape), np.arange(shape[0], dtype=float)
    np.testing.assert_array_equal(arrays.scaled_rows(array(matrix), array(weights)), matrix * weights[:, None])


def test_rows_times_weights_inside_a_transform():
    matrix, weights = torch.randn(2, 300, 200), torch.randn(2, 300)
    torch.testing.assert_close(torch.func.vmap(arrays.scaled_rows)(matrix, weights), matrix * weights[..., None])
    gradient = torch.func.grad(lambda w: arrays.scaled_rows(matrix[0], w).sum())(weights[0])
    torch.testing.assert_close(gradient, matrix[0].sum(1))


def test_parts_of_one_tensor_are_put_together_without_a_copy():
    whole = torch.linalg.cholesky(torch.from_numpy(spd(batch=(3,))))
    assert arrays.stacked(list(whole)) is whole
    again = arrays.stacked([part.clone() for part in whole])
    assert again.stride() == whole.stride()  # as LAPACK leaves factors and wants them


@pytest.mark.parametrize("bad", [[0], [2], [0, 1, 2]])
@pytest.mark.parametrize("value", [np.nan, np.inf, -5.0])
def test_one_bad_matrix_of_several_is_enough(array, bad, value):
    several = spd(batch=(3,))
    several[bad, 2, 2] = value
    with pytest.raises(NotPositiveDefiniteError, match=r"\(3, 5, 5\)"):
        arrays.cholesky(array(several))


def test_small_operations(array):
    matrix = array(spd())
    np.testing.assert_allclose(arrays.add_diagonal(matrix, 2.0), spd() + 2 * np.eye(5))
    np.testing.assert_allclose(arrays.trace(matrix), np.trace(spd()))
    assert arrays.is_finite(matrix)
    assert not arrays.is_finite(array(np.array([1.0, np.nan])))
    assert arrays.nbytes(matrix) == 200
    assert arrays.widen(array(spd().astype(np.float32))).dtype == matrix.dtype
    left, right = {"a": matrix, "b": matrix}, {"a": matrix, "b": 2 * matrix}
    np.testing.assert_allclose(arrays.dot(left, right), 3 * (spd() ** 2).sum())


def test_mixed_libraries_are_refused():
    with pytest.raises(TypeError):
        arrays.namespace(torch.ones(1), np.ones(1))


def test_state_survives_a_checkpoint_that_may_not_run_code():
    factors = OuterProduct(torch.randn(4, 30), torch.randn(4, 1, 20), bias="bias", samples=4)
    estimate = Woodbury().update(None, factors)
    buffer = io.BytesIO()
    torch.save(arrays.pack({"a": estimate, "b": [1, "x", None, 2.5]}), buffer)
    buffer.seek(0)
    back = arrays.unpack(torch.load(buffer, weights_only=True))
    assert back["b"] == (1, "x", None, 2.5)
    assert type(back["a"]) is type(estimate)
    assert isinstance(back["a"].factors, OuterProduct)
    assert torch.equal(back["a"].kernel, estimate.kernel)
    assert torch.equal(back["a"].factors.inputs, factors.inputs)
    assert back["a"].factors.bias == "bias"


def test_arrays_inside_state_can_be_mapped():
    factors = OuterProduct(torch.ones(2, 3), torch.ones(2, 1, 2), samples=2)
    doubled = arrays.map_arrays(lambda a: a.double(), {"x": (factors, [torch.ones(1)]), "y": "text"})
    assert doubled["x"][0].inputs.dtype == torch.float64
    assert doubled["x"][1][0].dtype == torch.float64
    assert doubled["y"] == "text"


def test_foreign_state_is_refused():
    @dataclasses.dataclass
    class Unknown:
        x: int = 0

    with pytest.raises(CurvatureError, match="Unknown cannot be saved"):
        arrays.pack(Unknown())
    with pytest.raises(CurvatureError, match="unknown here"):
        arrays.unpack({"__kind__": "os.system", "command": "ls"})
    packed = arrays.pack(OuterProduct(torch.ones(2, 3), torch.ones(2, 1, 2)))
    with pytest.raises(CurvatureError, match="does not fit this version"):
        arrays.unpack({**packed, "surplus": 1})


@pytest.mark.parametrize("shape", [(3, 5), (7, 9000), (7, 9001), (6, 9216), (128, 8192), (130, 9000), (513, 40)])
def test_a_product_with_itself_is_the_same_however_it_is_cut(shape):
    rows = torch.cos(torch.arange(shape[0] * shape[1], dtype=torch.float64) ** 2).reshape(shape)
    expected = torch.einsum("id,jd->ij", rows, rows)
    torch.testing.assert_close(arrays.self_product(rows), expected, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(arrays.self_product(rows.T.contiguous().T), expected, rtol=1e-12, atol=1e-9)


def test_products_of_rows_are_made_in_place_but_where_that_is_not_safe():
    first, second = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 4)))
    expected = torch.einsum("ij,ij->i", first, second)
    # Of the others alone there is one a place, so that their products do not fit into the first.
    mapped = torch.func.vmap(arrays.row_products, in_dims=(None, 0))(first, torch.stack([second, second]))
    torch.testing.assert_close(mapped, expected.expand(2, 3))
    tracked = first.clone().requires_grad_()
    arrays.row_products(tracked, second).sum().backward()
    assert torch.equal(tracked.grad, second)
    plain = first.numpy().copy()
    np.testing.assert_allclose(arrays.row_products(plain, second.numpy()), expected.numpy())
    np.testing.assert_array_equal(plain, (first * second).numpy())
    own = first.clone()
    torch.testing.assert_close(arrays.row_products(own, second), expected)
    assert torch.equal(own, first * second)
