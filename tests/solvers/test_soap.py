"""SOAP against its algorithm written out step by step, moments in the rotated basis as the authors keep them."""

import numpy as np
import pytest
import torch
from single_rows import BUILDS, LIBRARIES, close, linear, steps

from curvlib.solvers import SOAP

DAMPING, MOMENTUM, DECAY = 0.03, 0.8, 0.7
UPDATES = 8


class Truth:
    """One matrix's state; averages start from zero and are corrected, m is rotated with every change of basis."""

    def __init__(self, gradient, largest):
        self.wide = [size > largest for size in gradient.shape]
        self.step, self.stats = 0, [0.0, 0.0]
        self.m = self.v = np.zeros_like(gradient)
        self.take_in(gradient)
        self.Q = [self.eigenvectors(S, wide) for S, wide in zip(self.stats, self.wide, strict=True)]

    @staticmethod
    def eigenvectors(matrix, wide):
        return np.eye(len(matrix)) if wide else np.linalg.eigh(matrix)[1][:, ::-1]

    def take_in(self, gradient):
        products = (gradient @ gradient.T, gradient.T @ gradient)
        self.stats = [DECAY * S + (1 - DECAY) * P for S, P in zip(self.stats, products, strict=True)]

    def natural(self, gradient, other, basis_every):
        """Natural gradient of `other` at the step whose statistics are of `gradient`."""
        L, R = self.Q
        self.step += 1
        m = MOMENTUM * self.m + (1 - MOMENTUM) * (L.T @ other @ R)
        self.m = MOMENTUM * self.m + (1 - MOMENTUM) * (L.T @ gradient @ R)
        self.v = DECAY * self.v + (1 - DECAY) * (L.T @ gradient @ R) ** 2
        corrected_m, corrected_v = m / (1 - MOMENTUM**self.step), self.v / (1 - DECAY**self.step)
        result = L @ (corrected_m / (np.sqrt(corrected_v) + DAMPING)) @ R.T
        self.take_in(gradient)
        if self.step % basis_every == 0:
            plain = L @ self.m @ R.T
            for side in (0, 1):
                if self.wide[side]:
                    continue
                S, Q = self.stats[side], self.Q[side]
                order = np.argsort(-np.diag(Q.T @ S @ Q))
                self.v = np.take(self.v, order, axis=side)
                self.Q[side] = np.linalg.qr(S @ Q[:, order])[0]
            self.m = self.Q[0].T @ plain @ self.Q[1]
        return result


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("basis_every", [1, 3])
@pytest.mark.parametrize("largest", [10_000, 0])
@pytest.mark.parametrize("skip_first", [True, False])
def test_every_step_is_the_algorithms(build, basis_every, largest, skip_first, library):
    solver = SOAP(MOMENTUM, DECAY, basis_every, largest, skip_first)
    blocks, pairs = steps(solver, build, library, DAMPING, UPDATES)
    for group in range(len(pairs[0][0])):
        first, natural = pairs[0][0][group], pairs[0][1][group]
        begin = blocks[0].gradient[group]
        close(natural, 0 * first if skip_first else first / (np.abs(begin) + DAMPING))
        truth = Truth(begin, largest)
        for block, (gradient, natural) in zip(blocks[1:], pairs[1:], strict=True):
            close(natural[group], truth.natural(block.gradient[group], gradient[group], basis_every))


def test_without_a_basis_it_is_adam():
    parameter = torch.nn.Parameter(torch.zeros(5, 5, dtype=torch.float64))
    adam = torch.optim.Adam([parameter], lr=1.0, betas=(0.9, 0.99), eps=1e-3)
    solver = SOAP(0.9, 0.99, largest=0)
    blocks = [linear(LIBRARIES["torch"], seed) for seed in range(5)]
    estimate = solver.update(None, blocks[0].factors)  # the first gradient only starts the basis
    for block in blocks[1:]:
        estimate = solver.update(estimate, block.factors)
        natural = block.matrix(solver.solve(solver.factorize(estimate, 1e-3), block.factors))
        before = parameter.detach().clone()
        parameter.grad = torch.from_numpy(block.gradient[0])
        adam.step()
        np.testing.assert_allclose(natural[0], (before - parameter.detach()).numpy(), rtol=1e-9)


def test_one_side_alone_may_be_too_wide():
    blocks = [linear(LIBRARIES["numpy"], seed) for seed in range(3)]
    solver, estimate = SOAP(largest=4), None
    for block in blocks:
        narrow = block.factors.restricted(["bias"])  # a column: 5 × 1
        estimate = solver.update(estimate, narrow)
    assert estimate.cotangents is None
    assert estimate.cotangent_basis is None
    assert estimate.input_basis.shape == (1, 1, 1)
    natural = solver.solve(solver.factorize(estimate, 0.1), narrow)
    assert natural["bias"].shape == (5,)
