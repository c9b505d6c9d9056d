"""Gather and scatter by integers: the same answer in every library."""

import numpy as np
import pytest
import torch

from curvlib import arrays


@pytest.fixture(params=["torch", "numpy"])
def array(request):
    return torch.from_numpy if request.param == "torch" else (lambda values: values)


def test_index_add_sums_what_has_the_same_index(array):
    index, values = np.array([2, 0, 2, 2]), np.arange(8.0).reshape(4, 2)
    expected = np.zeros((4, 2))
    for place, value in zip(index, values, strict=True):
        expected[place] += value
    np.testing.assert_array_equal(arrays.index_add(4, array(index), array(values)), expected)


@pytest.mark.parametrize(("m", "k"), [(7, 5), (1, 9), (0, 3), (3, 0)])
def test_equal_pairs_are_all_pairs_of_equal_integers(array, m, k):
    rng = np.random.default_rng(m + k)
    left, right = rng.integers(3, size=m), rng.integers(3, size=k)
    here, there = arrays.equal_pairs(array(left), array(right))
    expected = {(i, j) for i in range(m) for j in range(k) if left[i] == right[j]}
    assert sorted(zip(np.asarray(here).tolist(), np.asarray(there).tolist(), strict=True)) == sorted(expected)
