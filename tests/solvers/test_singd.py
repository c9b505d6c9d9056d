"""SINGD and IKFAC against their update written out in explicit matrices, and IKFAC against K-FAC's inverse."""

import numpy as np
import pytest
from single_rows import BUILDS, LIBRARIES, close, linear, steps

from curvlib.solvers import SINGD

LAMBDA, RATE, MOMENTUM = 0.2, 0.05, 0.6


def identity(matrix):
    return np.eye(len(matrix))


def projected(matrix, structure):
    return matrix if structure == "dense" else np.diag(np.diag(matrix))


def mean_trace(matrix):
    return np.trace(matrix) / len(matrix)


def moved(state, A, G, kfac_like, normalized, structures):
    """One update of (K, C, m_K, m_C), every matrix explicit."""
    K, C, m_K, m_C = state
    H = [projected(root.T @ moment @ root, kind) for root, moment, kind in zip((K, C), (A, G), structures, strict=True)]
    inner = [projected(root.T @ root, kind) for root, kind in zip((K, C), structures, strict=True)]
    new = []
    for own, other, root, momentum in ((0, 1, K, m_K), (1, 0, C, m_C)):
        weight = 1 if kfac_like else mean_trace(H[other])
        damping = LAMBDA * (1 if kfac_like else mean_trace(inner[other]))
        change = (weight * H[own] + damping * inner[own] - identity(root)) / 2
        kept = 0 if kfac_like else MOMENTUM
        momentum = kept * momentum + (1 - kept if normalized else 1) * change
        rate = RATE / max(1, np.abs(momentum).max()) if normalized else RATE
        new.append((root @ (identity(root) - rate * momentum), momentum))
    (K, m_K), (C, m_C) = new
    return K, C, m_K, m_C


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kfac_like", [False, True])
@pytest.mark.parametrize(
    ("structures", "normalized"),
    [(("dense", "dense"), False), (("dense", "dense"), True), (("diagonal", "dense"), True),
     (("dense", "diagonal"), False), (("diagonal", "diagonal"), False)],
)  # fmt: skip
def test_updates_are_the_papers(build, sharing, kfac_like, structures, normalized, library):
    solver = SINGD(LAMBDA, RATE, MOMENTUM, kfac_like, *structures, normalized, sharing)
    blocks, pairs = steps(solver, build, library, damping=1.0)
    groups, d_out, d = pairs[0][0].shape
    states = [(np.eye(d), np.eye(d_out), np.zeros((d, d)), np.zeros((d_out, d_out)))] * groups
    for block, (gradient, natural) in zip(blocks, pairs, strict=True):
        A, G = block.moments(sharing)
        states = [moved(s, A[k], G[k], kfac_like, normalized, structures) for k, s in enumerate(states)]
        for (K, C, *_), matrix, given in zip(states, gradient, natural, strict=True):
            close(given, C @ C.T @ matrix @ K @ K.T)


def test_ikfac_follows_kfacs_inverse_to_second_order_in_its_rate():
    blocks = [linear(LIBRARIES["numpy"], seed) for seed in range(4)]

    def distance(rate):
        solver, estimate, A = SINGD(LAMBDA, rate, kfac_like=True), None, np.eye(5)
        for block in blocks:
            estimate = solver.update(estimate, block.factors)
            A = (1 - rate) * A + rate * (block.moments()[0][0] + LAMBDA * np.eye(5))
        root = estimate.inputs[0]
        return np.linalg.norm(root @ root.T - np.linalg.inv(A))

    assert distance(1e-3) == pytest.approx(distance(1e-4) * 100, rel=0.1)
    assert distance(1e-4) > 0


def test_a_diagonal_root_is_kept_as_its_diagonal():
    estimate = SINGD(inputs="diagonal").update(None, linear(LIBRARIES["torch"], 0).factors)
    assert estimate.inputs.shape == estimate.input_momentum.shape == (1, 5)
    assert estimate.cotangents.shape == (1, 5, 5)
