"""Shampoo against fractional powers of explicit matrices by singular values."""

import numpy as np
import pytest
from blocks import bias_corrected
from single_rows import BUILDS, LIBRARIES, close, linear, steps

from curvlib.solvers import Shampoo

DAMPING = 0.3


def power(matrix, exponent):
    U, values, V = np.linalg.svd(matrix)
    return U @ np.diag(values**exponent) @ V


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("decay", [0.0, 0.8, None])
@pytest.mark.parametrize("exponent", [0.25, 0.5])
def test_shampoo_divides_by_roots_of_both_sides(build, decay, exponent, library):
    blocks, pairs = steps(Shampoo(decay, exponent), build, library, DAMPING)
    for number, (gradient, natural) in enumerate(pairs):
        for group, matrix in enumerate(gradient):
            seen = [block.gradient[group] for block in blocks[: number + 1]]
            outer, inner = [G @ G.T for G in seen], [G.T @ G for G in seen]
            L, R = (sum(side) if decay is None else bias_corrected(side, decay) for side in (outer, inner))
            left, right = (power(M + DAMPING * np.eye(len(M)), -exponent) for M in (L, R))
            close(natural[group], left @ matrix @ right)


def test_the_default_exponent_is_a_quarter():
    block = linear(LIBRARIES["numpy"], 0)
    solver = Shampoo()
    natural = block.matrix(solver.solve(solver.factorize(solver.update(None, block.factors), 1e-14), block.factors))
    # (G Gᵀ)^−1/4 G (Gᵀ G)^−1/4 is orthogonal.
    np.testing.assert_allclose(natural[0] @ natural[0].T, np.eye(5), atol=1e-9)
