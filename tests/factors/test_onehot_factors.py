"""Lookups in a table: rows from the definition, and every route to the same Gram."""

import numpy as np
import pytest
import torch
from kinds import COLUMNS, N, close, matrix, numbers, onehot

from curvlib.factors import OneHotOuter, OuterProduct, SharedOuter, cat, cost


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
    monkeypatch.setattr(cost, "chunk", lambda *sizes: chunk)
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
