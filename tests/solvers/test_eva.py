"""Eva against the explicit solve with the Kronecker product of its two vectors."""

import numpy as np
import pytest
from blocks import bias_corrected
from single_rows import BUILDS, LIBRARIES, close, steps

from curvlib.solvers import Eva

DAMPING = 0.3


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("decay", [0.0, 0.05, 0.7])
def test_eva_solves_with_the_product_of_the_mean_vectors(build, decay, library):
    blocks, pairs = steps(Eva(decay), build, library, DAMPING)
    for number, (gradient, natural) in enumerate(pairs):
        seen = [block.means() for block in blocks[: number + 1]]
        for group, matrix in enumerate(gradient):
            a, g = (bias_corrected([means[side][group] for means in seen], decay) for side in (0, 1))
            curvature = np.kron(np.outer(a, a), np.outer(g, g)) + DAMPING * np.eye(matrix.size)
            expected = np.linalg.solve(curvature, matrix.reshape(-1, order="F")).reshape(matrix.shape, order="F")
            close(natural[group], expected)
