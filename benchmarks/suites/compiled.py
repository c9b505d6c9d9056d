"""A whole training step as one compiled graph (`curvlib.precond.PureStep`), beside the same step without a compiler."""

import torch
from torch.nn import functional

from benchmarks.peers.workloads import problem
from curvlib import Woodbury
from curvlib.precond import Momentum

from . import blocks


class Compiled:
    """One step of exact TENGraD on the loss's own rows, forward and backward included."""

    params = (["W1-b128", "W2-b64"], ["eager", "compiled"])
    param_names = ("workload", "step")
    timeout = 300

    def setup(self, workload, step):
        from curvlib.precond import PureStep

        blocks.pin()
        model, self.x, self.y = problem(workload)
        pure = PureStep(
            model, functional.cross_entropy, solver=Woodbury(), damping=0.1, lr=1e-4, transforms=[Momentum(0.9)]
        )
        self.state = pure.init(self.x)
        torch._dynamo.reset()
        self.step = torch.compile(pure, fullgraph=True) if step == "compiled" else pure
        try:
            self.time_step()
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise NotImplementedError("there is no compiler here") from error

    def time_step(self, *_):
        self.state, _ = self.step(self.state, (self.x,), (self.y,))
