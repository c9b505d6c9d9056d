r"""
A new solver: only the leading directions
=========================================

A solver is three pure functions on explicit state. This one keeps the k leading eigenvectors of the curvature and
treats the rest as zero. It has an error bound to be tested against: the natural gradient is off by at most

.. math::

    \frac{\|g\|}{\lambda} \cdot \frac{s_{k+1}}{s_{k+1} + \lambda}

for the largest eigenvalue :math:`s_{k+1}` that was left out, and one gradient reaches the bound.
"""

from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import curvlib
from curvlib.arrays import eigh, record
from curvlib.factors import Factors
from curvlib.solvers import Solver

# %%
# The solver
# ----------
# The eigenvectors of F are :math:`J^\top v / \sqrt{n s}` for those v of the kernel, so J itself is all that is kept.


@record
@dataclass(frozen=True, eq=False)
class LeadingEstimate:
    factors: Factors
    values: Any  # the k leading eigenvalues s, shape (k,)
    vectors: Any  # those of the kernel, shape (rows, k)


@dataclass(frozen=True)
class Leading(Solver):
    """The inverse of the damped block with its k leading eigenvalues alone."""

    directions: int = 8

    @property
    def exact(self):
        return False

    def update(self, estimate, factors):
        kept = factors.compact()
        values, vectors = eigh(kept.gram() / factors.normalizer)
        count = min(self.directions, len(values), factors.size)
        return LeadingEstimate(kept, values[-count:], vectors[:, -count:])

    def factorize(self, estimate, damping):
        if not 0 < damping < float("inf"):
            raise curvlib.ConfigurationError(f"damping must be a positive finite number, got {damping}")
        # (F_k + λI)⁻¹ = (I − Jᵀ V (s + λ)⁻¹ Vᵀ J / n) / λ: Woodbury's identity for the rows V Vᵀ J.
        return estimate.factors, estimate.vectors, 1 / (estimate.values + damping), damping

    def solve(self, inverse, gradient):
        rows, vectors, weights, damping = inverse
        if isinstance(gradient, Factors):
            gradient = gradient.rmatvec(gradient.row_weights(1 / gradient.normalizer))
        inner = vectors @ (weights * (vectors.T @ rows.matvec(gradient))) / rows.normalizer
        seen = rows.rmatvec(inner)
        return {name: (gradient[name] - seen[name]) / damping for name in gradient}


# %%
# Tested against its bound
# ------------------------

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.data / 16), torch.tensor(digits.target)
model = torch.nn.Sequential(torch.nn.Linear(64, 10)).double()
factors = curvlib.collect(model, curvlib.Sampled(), images[:96], generator=torch.Generator().manual_seed(0))["0"]
J = factors.dense().matrix()
spectrum, basis = (part.flip(-1) for part in torch.linalg.eigh(J.T @ J / factors.normalizer))
damping = 0.01
g = torch.randn(factors.size, dtype=torch.float64)
exact = curvlib.func.Curvature(factors, damping).solve(g)

counts, errors, bounds, worst = (1, 4, 16, 48, 64, 80), [], [], []
for count in counts:
    curvature = curvlib.func.Curvature(factors, damping, Leading(count))
    errors.append(((curvature.solve(g) - exact).norm() / g.norm()).item())
    bounds.append((spectrum[count] / (spectrum[count] + damping) / damping).item())
    left_out = basis[:, count]
    worst.append((curvature.solve(left_out) - curvlib.func.Curvature(factors, damping).solve(left_out)).norm().item())
whole = curvlib.func.Curvature(factors, damping, Leading(len(factors))).solve(g)
whole_difference = ((whole - exact).norm() / exact.norm()).item()
print(f"with all directions it differs from the exact solve by {whole_difference:.1e}")
print(f"the bound is reached to {max(abs(w / b - 1) for w, b in zip(worst, bounds, strict=True)):.1e}")

figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
axis.loglog(counts, bounds, "k--", label="bound")
axis.loglog(counts, worst, "x", label="the gradient along the first direction left out")
axis.loglog(counts, errors, "o-", label="a random gradient")
axis.set(xlabel="directions kept", ylabel="error / ‖g‖")
axis.legend()
plt.show()

# %%
# The conformance kit, and a training run
# ---------------------------------------
# ``check_solver`` checks the laws that hold for every solver, on Factors of every kind; then it composes like any
# other.

outcome = curvlib.testing.check_solver(Leading(3))
print(f"checked on {len(outcome['checked'])} kinds of Factors, refused {len(outcome['refused'])}")


def train(solver, steps=25):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
    optimizer = curvlib.compose(model, fisher=curvlib.Sampled(), solver=solver, damping=0.1, lr=0.05, refresh=2)
    losses = []
    for _ in range(steps):
        index = torch.randint(len(images), (128,))
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images[index].float()), labels[index])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


curves = {f"Leading({count})": train(Leading(count)) for count in (4, 32)} | {"Woodbury": train(curvlib.Woodbury())}
figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
for name, losses in curves.items():
    axis.semilogy(losses, label=name)
    print(f"{name}: loss {losses[0]:.2f} → {losses[-1]:.3f}")
axis.set(xlabel="step", ylabel="training loss")
axis.legend()
plt.show()

# %%
# Next: :doc:`/how-to/write-a-solver`.
