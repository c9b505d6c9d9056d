"""Moments in an eigenbasis, also where products lie with gaps between their rows."""

import numpy as np
import pytest
import torch

from curvlib.arrays import sum_of_squares, torch_kernels
from curvlib.factors import OuterProduct, SharedOuter, cost
from curvlib.factors.rotation import rotated_product_squares, rotated_row_squares


def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(one, other):
    torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=1e-11, atol=1e-11)


@pytest.fixture(autouse=True, params=[False, True])
def rows_lie_apart(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(torch_kernels, "_SHARED", range(1))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("library", [torch.Tensor.clone, torch.Tensor.numpy])
def test_explicit_rows(groups, library):
    rows, Q_A, Q_G = numbers(3, groups, 4, 66), numbers(groups, 66, 66, seed=1), numbers(groups, 4, 4, seed=2)
    expected = sum((Q_G.mT @ row @ Q_A).square() for row in rows)
    before = rows.clone()
    close(rotated_row_squares(library(rows), library(Q_A), library(Q_G)), expected)
    assert torch.equal(rows, before)
    close(rotated_row_squares(library(rows), library(Q_A), None), sum((row @ Q_A).square() for row in rows))
    assert torch.equal(rows, before)


@pytest.mark.parametrize("limit", [1, 1 << 30])
@pytest.mark.parametrize(("columns", "groups"), [(1, 1), (3, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("library", [torch.Tensor.clone, torch.Tensor.numpy])
def test_products(columns, groups, limit, library, monkeypatch):
    monkeypatch.setattr(cost, "_ROTATED", limit)
    g, a, Q = numbers(5, columns, groups, 4, 7), numbers(5, groups, 7, 6, seed=1), numbers(groups, 4, 4, seed=2)
    rows = torch.einsum("ncgor,ngri->ncgoi", g, a)
    close(rotated_product_squares(library(g), library(a), None), rows.square().sum((0, 1)))
    expected = torch.einsum("gop,ncgoi->ncgpi", Q, rows).square().sum((0, 1))
    close(rotated_product_squares(library(g), library(a), library(Q)), expected)


@pytest.mark.parametrize("positions_first", [False, True])
@pytest.mark.parametrize("bias", [None, "bias"])
@pytest.mark.parametrize("d_in", [63, 64, 65])
def test_sequences_of_any_width(d_in, bias, positions_first, monkeypatch):
    monkeypatch.setattr(cost, "rotates_positions", lambda sizes: cost.PositionsFirst(positions_first, True))
    d = d_in + (bias is not None)
    factors = SharedOuter(numbers(4, 3, 1, d_in), numbers(4, 2, 3, 1, 5), (5, d_in), "weight", bias)
    Q_A, Q_G = numbers(1, d, d, seed=1), numbers(1, 5, 5, seed=2)
    rows = factors.dense().values
    matrices = rows["weight"] if bias is None else torch.cat([rows["weight"], rows["bias"][..., None]], 2)
    made = factors.rotated_squares(Q_A, Q_G)
    assert made.shape == (1, 5, d)
    close(made, (Q_G[0].mT @ matrices @ Q_A[0]).square().sum(0)[None])


def test_a_linear_layer_in_a_basis_that_lies_by_columns():
    factors = OuterProduct(numbers(4, 3), numbers(4, 2, 5), "weight", "bias")
    Q_A, Q_G = numbers(1, 4, 4, seed=1), numbers(1, 5, 5, seed=2)
    rows = factors.dense().values
    matrices = torch.cat([rows["weight"], rows["bias"][..., None]], 2)
    close(factors.rotated_squares(Q_A, Q_G.mT.contiguous().mT), (Q_G[0].mT @ matrices @ Q_A[0]).square().sum(0)[None])


def test_squares_are_summed_in_place_but_where_that_is_not_safe():
    array = numbers(3, 4)
    expected = array.square().sum(0)
    assert torch.equal(torch.func.vmap(sum_of_squares)(torch.stack([array, array]))[1], expected)
    tracked = array.clone().requires_grad_()
    sum_of_squares(tracked).sum().backward()
    assert torch.equal(tracked.grad, 2 * array)
    plain = array.numpy().copy()
    np.testing.assert_allclose(sum_of_squares(plain), expected.numpy())
    close(plain, array.square())
    assert torch.equal(sum_of_squares(array.clone()), expected)
