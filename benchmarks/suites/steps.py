"""What a whole training step costs, in time and in memory."""

from inspect import signature

import torch
from torch import nn
from torch.nn import functional

import curvlib
from benchmarks.peers.workloads import problem

from . import blocks


def composed(fisher, solver, refresh=1, **options):
    """Maker of a composed optimizer; options that a commit does not know skip the benchmark."""

    def make(model):
        norms = (nn.LayerNorm, nn.BatchNorm2d)
        solvers = {
            name: blocks.solver("woodbury") for name, module in model.named_modules() if isinstance(module, norms)
        }
        solvers["*"] = blocks.solver(solver)
        if not set(options) <= set(signature(curvlib.compose).parameters):
            raise NotImplementedError(f"this commit has no {', '.join(options)}")
        return curvlib.compose(
            model, fisher=fisher(), solver=solvers, damping=0.1, refresh=refresh, lr=1e-4, **options,
            transforms=[curvlib.Momentum(0.9)],
        )  # fmt: skip

    return make


def sampled():
    return curvlib.Sampled(curvlib.Categorical())


OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9),
    "tengrad empirical": composed(lambda: curvlib.Empirical(), "woodbury", fused=True),
    "tengrad sampled": composed(sampled, "woodbury", fused=True),
    "tengrad refresh 10": composed(sampled, "woodbury", refresh=10, fused=True),
    "kfac refresh 10": composed(sampled, "kfac", refresh=10),
    "ekfac refresh 10": composed(sampled, "ekfac", refresh=10),
}


class Training:
    """A training loop (forward, backward, update) on random data."""

    timeout = 300

    def setup(self, workload, optimizer):
        blocks.pin()
        self.model, self.x, self.y = problem(workload)
        self.optimizer = OPTIMIZERS[optimizer](self.model)

    def steps(self, count=10):
        for _ in range(count):
            self.optimizer.zero_grad()
            functional.cross_entropy(self.model(self.x), self.y).backward()
            self.optimizer.step()


class Step(Training):
    """Time of ten steps; that of SGD is what to compare with."""

    params = (["W1-b128", "W1-b512", "W2-b64", "W3-b64", "W4-b32"], list(OPTIMIZERS))
    param_names = ("workload", "optimizer")

    def setup(self, workload, optimizer):
        super().setup(workload, optimizer)
        self.steps(3)

    def time_ten_steps(self, *_):
        self.steps()


class Memory(Training):
    """Peak of the whole process over three steps, the first with its check of the rows."""

    params = (["W1-b512", "W3-b64", "W4-b32"], ["sgd", "tengrad empirical", "tengrad refresh 10", "kfac refresh 10"])
    param_names = ("workload", "optimizer")

    def peakmem_three_steps(self, *_):
        self.steps(3)


class AgainstSGD(Training):
    """Time of ten steps over that of ten steps of SGD, in turns in one process."""

    params = (["W1-b128", "W2-b64", "W4-b32"], ["tengrad empirical", "tengrad refresh 10", "kfac refresh 10"])
    param_names = ("workload", "optimizer")

    def track_ratio(self, workload, optimizer):
        sgd = Training()
        sgd.setup(workload, "sgd")
        for one in (self, sgd):
            one.steps()  # the first step checks what is checked once
        own, reference = blocks.in_turns(self.steps, sgd.steps, rounds=5)
        return own / reference


AgainstSGD.track_ratio.unit = "ratio"
