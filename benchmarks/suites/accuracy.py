"""How far solves are from the dense truth: relative error of the natural gradient, by solver, layer and precision."""

import torch

from . import blocks


def truth(rows, gradient, damping):
    """``(JᵀJ / n + λI)⁻¹ g`` from explicit rows, in float64."""
    J = torch.cat([value.double().flatten(1) for value in rows.dense().values.values()], dim=1)
    g = torch.cat([value.double().flatten() for value in gradient.values()])
    F = J.T @ J / rows.normalizer + damping * torch.eye(J.shape[1], dtype=torch.float64)
    return torch.linalg.solve(F, g)


class Error:
    """Exact solvers are at rounding; for the others it is what the approximation costs on random rows."""

    params = (
        ["woodbury", "dense", "kfac", "kfac eigen", "ekfac", "skfac", "diagonal"],
        ["linear", "sequence", "convolution"], ["float32", "float64"], [1e-3, 0.1],
    )  # fmt: skip
    param_names = ("solver", "layer", "dtype", "damping")
    timeout = 120
    unit = "relative error"

    def setup(self, solver, layer, dtype, damping):
        blocks.pin()
        width, positions = {"linear": (24, 1), "sequence": (24, 8), "convolution": (8, 16)}[layer]
        self.rows = blocks.block(layer, width, 32, positions, dtype)
        self.solver = blocks.solver(solver)

    def track_error(self, solver, layer, dtype, damping):
        gradient = blocks.mean_gradient(self.rows)
        inverse = self.solver.factorize(self.solver.update(None, self.rows), damping)
        natural = self.solver.solve(inverse, gradient)
        expected = truth(self.rows, gradient, damping)
        given = torch.cat([natural[name].double().flatten() for name in self.rows.shapes])
        return float((given - expected).norm() / expected.norm())
