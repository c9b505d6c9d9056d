"""How long inversion takes, by rows and solver."""

import torch

from curvlib.factors import OuterProduct
from curvlib.solvers import Dense, Woodbury

SOLVERS = {"woodbury": Woodbury(), "dense": Dense()}


class Linear:
    """One Linear block, width × width, float32 and float64."""

    params = ([32, 128, 512], [64, 512], ["woodbury", "dense"], ["float32", "float64"])
    param_names = ("rows", "width", "solver", "dtype")

    def setup(self, rows, width, solver, dtype):
        if solver == "dense" and width > 64:
            raise NotImplementedError("the explicit block would not fit")
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, dtype)
        factors = OuterProduct(
            torch.randn(rows, width, generator=generator, dtype=dtype),
            torch.randn(rows, 1, width, generator=generator, dtype=dtype),
            bias="bias",
        )
        self.solver, self.factors = SOLVERS[solver], factors
        self.gradient = factors.rmatvec(factors.row_weights(1 / rows))
        self.estimate = self.solver.update(None, factors)
        self.inverse = self.solver.factorize(self.estimate, 0.1)

    def time_update(self, rows, width, solver, dtype):
        self.solver.update(None, self.factors)

    def time_factorize(self, rows, width, solver, dtype):
        self.solver.factorize(self.estimate, 0.1)

    def time_solve(self, rows, width, solver, dtype):
        self.solver.solve(self.inverse, self.gradient)
