"""How long inversion takes: the estimate, its factorisation, the solve; of one block, and of a network's at once."""

from abc import ABC, abstractmethod

import torch

from curvlib.arrays import cholesky_solve

from . import blocks

try:
    from curvlib.solvers.woodbury import kernel_solutions as solved
except ImportError:  # an older commit

    def solved(factors, rhs):
        return [cholesky_solve(factor, one) for factor, one in zip(factors, rhs, strict=True)]


class Inversion(ABC):
    """What the three verbs of a solver have in common: everything but the timed call is made in `setup`."""

    timeout = 120

    @abstractmethod
    def setup(self, *_):
        """Abstract, or asv would take this class for a benchmark."""

    def prepare(self, solver, rows, place="torch cpu"):
        self.place, self.rows, self.solver = place, rows, blocks.solver(solver)
        self.gradient = blocks.mean_gradient(rows)
        self.estimate = self.solver.update(None, rows)
        self.inverse = self.solver.factorize(self.estimate, blocks.DAMPING)
        self.solver.solve(self.inverse, self.gradient)
        blocks.synchronize(place)

    def time_update(self, *_):
        self.solver.update(None, self.rows)
        blocks.synchronize(self.place)

    def time_factorize(self, *_):
        self.solver.factorize(self.estimate, blocks.DAMPING)
        blocks.synchronize(self.place)

    def time_solve(self, *_):
        self.solver.solve(self.inverse, self.gradient)
        blocks.synchronize(self.place)


class Linear(Inversion):
    """One Linear block, width × width."""

    params = (["woodbury", "kfac", "ekfac", "skfac", "dense"], [64, 512], [32, 128, 512], ["float32", "float64"])
    param_names = ("solver", "width", "batch", "dtype")

    def setup(self, solver, width, batch, dtype):
        if solver == "dense" and width > 64:
            raise NotImplementedError("the explicit block would not fit")
        if solver not in ("woodbury", "kfac") and dtype == "float64":
            raise NotImplementedError("one precision is enough for these")
        blocks.pin()
        self.prepare(solver, blocks.linear(width, batch, dtype))


class Solvers(Inversion):
    """All solvers on the same two blocks, whose shapes are neither square nor powers of two."""

    params = (list(blocks.SOLVERS), ["linear", "sequence"], [96], [64], [1, 12], ["float32"])
    param_names = ("solver", "layer", "width", "batch", "positions", "dtype")

    def setup(self, solver, layer, width, batch, positions, dtype):
        if solver == "dense":
            raise NotImplementedError("the explicit block would not fit")
        blocks.pin()
        self.prepare(solver, blocks.block(layer, width, batch, positions, dtype))


class Shared(Inversion):
    """Layers that use a weight at several positions."""

    params = (["woodbury", "kfac", "ekfac"], ["sequence", "convolution"], [16, 64], [32], [16, 64])
    param_names = ("solver", "layer", "width", "batch", "positions")

    def setup(self, solver, layer, width, batch, positions):
        blocks.pin()
        self.prepare(solver, blocks.block(layer, width, batch, positions))


class Place(Inversion):
    """The same blocks on every backend and device, in both precisions."""

    params = (
        ["woodbury", "kfac", "ekfac"], ["linear", "sequence"], [256], [128], [1, 16], ["float32", "float64"],
        list(blocks.PLACES),
    )  # fmt: skip
    param_names = ("solver", "layer", "width", "batch", "positions", "dtype", "place")

    def setup(self, solver, layer, width, batch, positions, dtype, place):
        if dtype == "float64" and (solver != "woodbury" or layer != "linear"):
            raise NotImplementedError("one block is enough for this precision")
        blocks.pin()
        self.prepare(solver, blocks.block(layer, width, batch, positions, dtype, place), place)


class Network:
    """All kernels of a network, batch × batch each: factorised, and solved for one vector each."""

    params = ([32, 64, 128, 256, 512, 1024], [20])
    param_names = ("batch", "blocks")
    timeout = 120

    def setup(self, batch, count):
        blocks.pin()
        self.solver = blocks.solver("woodbury")
        self.estimates = [self.solver.update(None, blocks.linear(64, batch)) for _ in range(count)]
        self.weights = [estimate.factors.row_weights(1.0) for estimate in self.estimates]
        damping = blocks.DAMPING * torch.eye(batch)
        self.kernels = torch.stack([estimate.kernel + damping for estimate in self.estimates])
        self.columns = torch.stack(self.weights)[..., None]
        self.time_inversion()
        self.time_lapack()
        self.time_calls()

    def time_inversion(self, *_):
        inverses = blocks.factorized(self.solver, self.estimates)
        solved([inverse.factor for inverse in inverses], self.weights)

    def time_lapack(self, *_):
        """Cholesky and triangular solves alone, batched, of matrices that are damped already."""
        torch.cholesky_solve(self.columns, torch.linalg.cholesky(self.kernels))

    def time_calls(self, *_):
        """Like LAPACK's, with what lies around them: matrices of several blocks, undamped, of which one may fail."""
        stack = torch.stack([estimate.kernel for estimate in self.estimates])
        stack.diagonal(dim1=1, dim2=2).add_(blocks.DAMPING)
        factors, failed = torch.linalg.cholesky_ex(stack)
        if failed.any() or not factors.diagonal(dim1=1, dim2=2).sum().isfinite():
            raise ArithmeticError
        factors.unbind()
        columns = torch.stack(self.weights)[..., None]
        halfway = torch.linalg.solve_triangular(factors, columns, upper=False)
        torch.linalg.solve_triangular(factors.mT, halfway, upper=True)[..., 0].unbind()

    def track_against_lapack(self, *_):
        """At most 1/0.6 is asked for."""
        inversion, lapack = blocks.in_turns(self.time_inversion, self.time_lapack)
        return inversion / lapack


Network.track_against_lapack.unit = "ratio"
