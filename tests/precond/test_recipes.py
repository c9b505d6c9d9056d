"""Every recipe trains: below SGD at equal steps, from the same start, on a perceptron and on a small ConvNet."""

import inspect

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from curvlib import NaturalGradient, solvers
from curvlib.precond import recipes
from curvlib.solvers import Solver

STEPS = 120
NAMES = sorted(recipes.__all__)
OPTIONS = {
    "EKFAC": {"estimate_every": 2, "refresh": 10, "lr": 0.05, "damping": 0.1, "weight_decay": 0.0},
    "Eva": {"lr": 0.1, "damping": 0.1},
    "ExactNGD": {"damping": 0.3, "refresh": 40},
    "FNGD": {"first_epoch": 14, "damping": 0.5},
    "HyLo": {"refresh": 10, "ratio": 0.3, "kl_clip": None},
    "IKFAC": {"refresh": 1},
    "KBFGS": {"damping": 0.1},
    "KFAC": {"estimate_every": 5, "refresh": 20, "lr": 0.05, "damping": 0.1, "weight_decay": 0.0},
    "SENG": {"refresh": 10, "lr": 0.1},
    "SINGD": {"refresh": 1, "lr": 0.003},
    "SKFAC": {"lr": 0.05, "damping": 0.1, "weight_decay": 0.0},
    "SOAP": {"lr": 0.03},
    "SPRING": {"lr": 0.3, "damping": 0.3},
    "Shampoo": {"lr": 0.01},
    "TENGraD": {"refresh": 10, "damping": 0.3, "weight_decay": 0.0},
}
"""Where the defaults, which are for long runs, are not for a hundred steps."""


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).float() / 16, torch.from_numpy(labels)


def perceptron():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def convolutions():
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(72, 10),
    )  # fmt: skip


NETWORKS = {"perceptron": perceptron, "convolutions": convolutions}


def train(network, optimizer_of, data):
    torch.manual_seed(0)
    model = NETWORKS[network]()
    optimizer = optimizer_of(model)
    order = torch.Generator().manual_seed(0)
    images = data[0].reshape(-1, 8, 8) if network == "convolutions" else data[0]
    for _ in range(STEPS):
        index = torch.randint(0, len(images), (128,), generator=order)

        def closure(index=index):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images[index]), data[1][index])
            loss.backward()
            return loss

        optimizer.step(closure)
    with torch.no_grad():
        return float(functional.cross_entropy(model(images), data[1]))


@pytest.fixture(scope="module")
def reference(digits):
    def sgd(model):
        return torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)

    return {network: train(network, sgd, digits) for network in NETWORKS}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_ahead_of_sgd_at_equal_steps(name, network, digits, reference):
    made = []

    def build(model):
        made.append(getattr(recipes, name)(model, **OPTIONS.get(name, {})))
        return made[-1]

    assert train(network, build, digits) < 0.9 * reference[network]
    assert isinstance(made[0], NaturalGradient)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_a_paragraph_without_mathematics(name):
    function = getattr(recipes, name)
    body = inspect.getsource(function).replace(function.__doc__, "").split('""""""')[1]
    assert len(body.strip().splitlines()) <= 15
    assert not any(word in body for word in ("torch.", "@", "**2", "sqrt"))


def test_every_published_solver_has_a_recipe():
    plain = {"Solver", "Dense", "Diagonal", "Identity", "Woodbury", "MinSR", "KID", "KIS", "Switch"}
    assert {name for name in solvers.__all__ if issubclass(getattr(solvers, name), Solver)} - plain <= set(NAMES)
