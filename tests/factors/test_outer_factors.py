"""Outer products and their sums over positions: rows from the definition, and every route to the same Gram."""

import dataclasses

import numpy as np
import pytest
from kinds import COLUMNS, KINDS, N, close, matrix, numbers, outer, shared

from curvlib.factors import Dense, cost


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
    monkeypatch.setattr(cost, "chunk", lambda *sizes: chunk)
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


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("bias", [None, "bias"])
@pytest.mark.parametrize("scales", [(1, 1), (1, 3.0), (0.5, 1), (0.5, 3.0)])
@pytest.mark.parametrize("together", [False, True])
def test_rows_of_one_pass_combine_as_any_others(library, bias, scales, together):
    first, second = outer(library, bias=bias), outer(library, seed=1, bias=bias)
    if together:
        second = dataclasses.replace(second, inputs=first.inputs.reshape(first.inputs.shape))
    rows, other = (one if scale == 1 else one.scaled(scale) for one, scale in zip((first, second), scales, strict=True))
    assert rows.same_inputs(other) == other.same_inputs(rows) == together
    weights = [numbers(library, len(rows), seed=seed) for seed in (2, 3)]
    expected = matrix(rows).T @ np.asarray(weights[0]) + matrix(other).T @ np.asarray(weights[1])
    found = rows.combined(weights[0], other, weights[1])
    close(np.concatenate([np.asarray(value).reshape(-1) for value in found.values()]), expected)
    expected = matrix(rows) @ matrix(other).T
    kept = rows.remembering()
    for _ in range(2):  # what was kept serves once
        close(kept.gram(), matrix(rows) @ matrix(rows).T)
        close(kept.cross_gram(other), expected)
        close(kept.cross_gram(other), expected)
        close(other.cross_gram(kept), expected.T)


@pytest.mark.parametrize("scales", [(0.5, 0.5), (0.5, 3.0), (0.5, 1)])
def test_rows_times_a_number_are_never_written_out(scales, monkeypatch):
    first, second = (
        one if scale == 1 else one.scaled(scale)
        for one, scale in zip((outer("torch"), outer("torch", seed=1)), scales, strict=True)
    )
    expected = np.concatenate([matrix(first), matrix(second)])
    rolled = np.roll(expected, len(second), 0)
    monkeypatch.setattr(Dense, "__init__", None)
    close(first.cat([second]).gram(), expected @ expected.T)
    close(second.cat([first]).gram(), rolled @ rolled.T)
