"""Kronecker factors, rows and moments against their textbook definitions."""

import dataclasses

import numpy as np
import pytest
import torch
from kinds import COLUMNS, KINDS, N, close, convolution, flat, numbers, onehot, outer, shared

from curvlib.factors import Factors, Scaled, SharedOuter, cost


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


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("cotangents", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "shared" in kind or "convolution" in kind])
def test_moments_in_a_basis_whatever_is_rotated_first(kind, inputs, cotangents, chunked, monkeypatch):
    factors = KINDS[kind]("torch").scaled(0.5)
    apart = factors.kronecker_rows()
    sizes = apart.input_moments().shape[-1], apart.cotangents.shape[2]
    basis = [torch.linalg.qr(numbers("torch", apart.layout.groups, size, size, seed=1)).Q for size in sizes]
    expected = Factors.rotated_squares(factors, *basis)
    monkeypatch.setattr(cost, "rotates_positions", lambda sizes: cost.PositionsFirst(inputs, cotangents))
    if chunked:
        monkeypatch.setattr(cost, "_TEMPORARY", 1)
        monkeypatch.setattr(cost, "_ROTATED", 1)
    close(factors.rotated_squares(*basis), expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("dense", "low rank") and "sum" not in kind])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_scaled_pairs_are_pairs_of_scaled_rows(kind, sharing):
    factors = KINDS[kind]("torch")
    pair, expected = Scaled(factors, 3.0).kronecker(sharing), factors.kronecker(sharing)
    close(pair.inputs, expected.inputs)
    close(pair.cotangents, 9 * expected.cotangents)
