"""What theory promises about whole runs: one step for least squares, a linear rate for wide networks."""

from itertools import pairwise

import pytest
import torch
from corners import batch
from torch import nn
from truth import assert_close, network

import curvlib

HALF_SQUARED = curvlib.Gaussian()  # half the squared error, summed over outputs, mean over samples


def augmented(x):
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)


@pytest.mark.parametrize("solver", [curvlib.Woodbury(), curvlib.solvers.Dense()], ids=str)
@pytest.mark.parametrize("variance", [1.0, 0.1])
def test_one_step_solves_linear_least_squares(solver, variance):
    model, x, y = network(nn.Linear(5, 2)), batch(40, 5), 3 + batch(40, 2).cos()
    solution = torch.linalg.lstsq(augmented(x), y).solution.T
    start = torch.cat([model.weight.detach(), model.bias.detach()[:, None]], dim=1)
    assert float((start - solution).norm() / solution.norm()) > 0.1
    likelihood = curvlib.Gaussian(variance)
    optimizer = curvlib.compose(model, fisher=curvlib.Exact(likelihood), solver=solver, damping=1e-12, lr=1.0)
    likelihood.loss(model(x), y).backward()
    optimizer.step()
    assert_close(torch.cat([model.weight, model.bias[:, None]], dim=1).detach(), solution)


def wide(layers, width, d_in):
    """NTK-sized weights, so that a small step keeps the Jacobian almost as it was."""
    sizes = [d_in] + [width] * (layers - 1)
    hidden = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*hidden, nn.Linear(width, 1)).double()
    torch.manual_seed(0)
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=(2 / module.in_features) ** 0.5)
            nn.init.zeros_(module.bias)
    return model


@pytest.mark.parametrize(("layers", "width", "n"), [(2, 4096, 32), (3, 512, 16)])
def test_block_diagonal_natural_gradient_contracts_the_residual_at_a_linear_rate(layers, width, n):
    model = wide(layers, width, 16)
    x = nn.functional.normalize(batch(n, 16), dim=1) * 4
    y = model(x).detach() + 0.3 * torch.sign(batch(n, 1))
    rate = 0.1 / layers
    optimizer = curvlib.compose(
        model, fisher=curvlib.Exact(HALF_SQUARED), solver=curvlib.Woodbury(), damping=1e-8, lr=rate
    )
    norms = []
    for _ in range(21):
        residual = model(x) - y
        norms.append(float(residual.detach().norm()))
        HALF_SQUARED.loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    ratios = [after / before for before, after in pairwise(norms)]
    assert max(abs(ratio / (1 - layers * rate) - 1) for ratio in ratios) < 0.002, ratios
