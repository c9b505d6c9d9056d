"""MKOR against explicit inverses of the matrices that its rank-one updates stand for."""

import numpy as np
import pytest
from single_rows import BUILDS, LIBRARIES, close, linear, steps

from curvlib.solvers import MKOR


def updated(inverse, vector, decay):
    mixed = np.eye(len(vector)) if inverse is None else decay * inverse + (1 - decay) * np.eye(len(vector))
    return np.linalg.inv(np.linalg.inv(mixed) + np.outer(vector, vector))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("decay", [0.95, 0.5])
def test_mkor_inverts_what_its_updates_stand_for(build, decay, library):
    blocks, pairs = steps(MKOR(decay), build, library, damping=0.3)
    groups = blocks[0].a.shape[2]
    A, G = [None] * groups, [None] * groups
    for block, (gradient, natural) in zip(blocks, pairs, strict=True):
        a, g = block.means()
        A = [updated(old, vector, decay) for old, vector in zip(A, a, strict=True)]
        G = [updated(old, vector, decay) for old, vector in zip(G, g, strict=True)]
        expected = np.stack([G[k] @ gradient[k] @ A[k] for k in range(groups)])
        close(natural, expected * np.linalg.norm(gradient) / np.linalg.norm(expected))
        for inverse in (*A, *G):
            values = np.linalg.eigvalsh(inverse)
            assert 0 < values.min() <= values.max() <= 1 + 1e-12


def test_the_length_is_the_gradients_and_damping_changes_nothing():
    solver, block = MKOR(), linear(LIBRARIES["torch"], 0)
    estimate = solver.update(None, block.factors)
    one, other = (block.matrix(solver.solve(solver.factorize(estimate, d), block.factors)) for d in (1e-3, 1e3))
    np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(np.linalg.norm(one), np.linalg.norm(block.gradient), rtol=1e-12)
