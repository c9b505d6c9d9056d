"""Decompositions side by side: the same results in the same order, errors, and threads left as they were."""

import threading

import numpy as np
import pytest
import torch

from curvlib.arrays import deferred, eigh, require, side_by_side


def matrices(*widths):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(width, width, generator=generator, dtype=torch.float64) for width in widths]
    return [one @ one.T for one in made]


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def decomposed(function, given):
    return side_by_side(function, [(one,) for one in given], [one.shape[-1] for one in given], given[0])


def test_results_are_those_of_one_call_after_the_other(threads):
    given = matrices(5, 250, 64, 231)
    for matrix, (values, vectors) in zip(given, decomposed(eigh, given), strict=True):
        torch.testing.assert_close((vectors * values) @ vectors.T, matrix)
    assert torch.get_num_threads() == threads


def test_each_call_has_a_thread_and_one_core_to_itself_where_the_work_is_worth_it(threads):
    seen = decomposed(lambda matrix: (threading.get_ident(), torch.get_num_threads()), matrices(250, 251))
    assert all(number == 1 for _, number in seen)
    assert (threads == 1) == any(ident == threading.get_ident() for ident, _ in seen)
    little = decomposed(lambda matrix: threading.get_ident(), matrices(40, 50))
    assert little == [threading.get_ident()] * 2


def test_the_caller_s_modes_hold_in_every_thread(threads):
    given = matrices(250, 251)
    with torch.no_grad():
        assert decomposed(lambda matrix: torch.is_grad_enabled(), given) == [False, False]
    with deferred() as checks:
        decomposed(lambda matrix: require(matrix.sum() > 1e9, lambda: "small"), given)
        assert not bool(checks.good)


def test_an_error_is_raised_and_threads_are_as_before(threads):
    def fail(matrix):
        raise ArithmeticError(f"{matrix.shape[-1]}")

    with pytest.raises(ArithmeticError, match="250"):
        decomposed(fail, matrices(250, 251))
    assert torch.get_num_threads() == threads


def test_other_libraries_call_one_after_the_other():
    given = [np.eye(200) * 2.0, np.eye(150) * 3.0]
    assert [float(values[0]) for values, _ in decomposed(eigh, given)] == [2.0, 3.0]
