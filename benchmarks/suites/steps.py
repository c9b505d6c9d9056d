"""What a whole training step costs."""

import torch
from torch import nn
from torch.nn import functional

import curvlib


def mlp():
    return nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 500), nn.ReLU(), nn.Linear(500, 10))


def convolutions():
    layers, channels = [], 3
    for width in (32, 64, 128):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


WORKLOADS = {"mlp-128": (mlp, (128, 784)), "mlp-512": (mlp, (512, 784)), "conv-64": (convolutions, (64, 3, 32, 32))}
OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9),
    "tengrad-1": lambda model: curvlib.TENGraD(model, lr=1e-4, refresh=1),
    "tengrad-10": lambda model: curvlib.TENGraD(model, lr=1e-4, refresh=10),
}


class Step:
    """Ten steps (forward, backward, update) on random data."""

    params = (list(WORKLOADS), list(OPTIMIZERS))
    param_names = ("workload", "optimizer")
    timeout = 120

    def setup(self, workload, optimizer):
        torch.manual_seed(0)
        build, shape = WORKLOADS[workload]
        self.model = build()
        self.x, self.y = torch.randn(shape), torch.randint(0, 10, shape[:1])
        self.optimizer = OPTIMIZERS[optimizer](self.model)
        self.time_ten_steps(workload, optimizer)

    def time_ten_steps(self, workload, optimizer):
        for _ in range(10):
            self.optimizer.zero_grad()
            functional.cross_entropy(self.model(self.x), self.y).backward()
            self.optimizer.step()
