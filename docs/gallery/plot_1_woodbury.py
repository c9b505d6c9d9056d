r"""
The Woodbury identity by example
================================

A block has d parameters and a batch has n rows, usually far fewer. The curvature :math:`F = J^\top J / n` is then a
large matrix of small rank, and all that it knows is in the small kernel :math:`K = J J^\top / n`:

.. math::

    (F + \lambda I)^{-1} g = \frac{1}{\lambda} \left( g - \frac{1}{n} J^\top (K + \lambda I)^{-1} J g \right).

TENGraD inverts the matrix on the right. Here both sides are looked at, in float64.
"""

import time

import matplotlib.pyplot as plt
import torch

import curvlib

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(9, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5)).double()
x = torch.randn(16, 9, dtype=torch.float64)
factors = curvlib.collect(model, curvlib.Sampled(), x, generator=torch.Generator().manual_seed(0))["0"]

# %%
# The two matrices
# ----------------
# J is written out here for the picture. The engine does not: rows of a linear layer are outer products of an input
# and a cotangent, and K is the elementwise product of their two small Gram matrices.

J, n = factors.dense().matrix(), factors.normalizer
F, K = J.T @ J / n, J @ J.T / n
print(f"J is {tuple(J.shape)}, F is {tuple(F.shape)}, K is {tuple(K.shape)}")
gram_difference = (factors.gram() / n - K).abs().max().item()
print(f"K from the two Gram matrices differs by {gram_difference:.1e}")

eigenvalues_f = torch.linalg.eigvalsh(F).flip(0)
eigenvalues_k = torch.linalg.eigvalsh(K).flip(0)
eigenvalue_difference = (eigenvalues_f[: len(eigenvalues_k)] - eigenvalues_k).abs().max().item()
print(f"their leading {len(eigenvalues_k)} eigenvalues differ by {eigenvalue_difference:.1e}; F's others are zero")

figure, axes = plt.subplots(1, 3, figsize=(10, 3.3), layout="constrained", width_ratios=(1, 1, 1.3))
for axis, (name, matrix) in zip(axes, {"F": F, "K": K}.items(), strict=False):
    axis.imshow(matrix.abs().add(1e-6).log10(), cmap="magma")
    axis.set(title=f"log |{name}|, {len(matrix)} × {len(matrix)}", xticks=[], yticks=[])
axes[2].semilogy(range(1, len(eigenvalues_f) + 1), eigenvalues_f.clamp_min(1e-20), "o", mfc="none", label="of F")
axes[2].semilogy(range(1, len(eigenvalues_k) + 1), eigenvalues_k.clamp_min(1e-20), ".", label="of K")
axes[2].set(title="eigenvalues", xlabel="number")
axes[2].legend()
plt.show()

# %%
# The same natural gradient
# -------------------------
# Three ways: the d × d system, the identity written out, and the solver that does it without J.

damping = 0.01
g = torch.randn(factors.size, dtype=torch.float64)
direct = torch.linalg.solve(F + damping * torch.eye(len(F), dtype=F.dtype), g)
identity = (g - J.T @ torch.linalg.solve(K + damping * torch.eye(len(K), dtype=K.dtype), J @ g) / n) / damping
by_solver = curvlib.func.Curvature(factors, damping, curvlib.Woodbury()).solve(g)
differences = {
    "the identity": ((identity - direct).norm() / direct.norm()).item(),
    "curvlib.Woodbury": ((by_solver - direct).norm() / direct.norm()).item(),
}
for name, difference in differences.items():
    print(f"{name} differs from the direct solve by {difference:.1e}")

# %%
# What it saves
# -------------
# The same batch size, layers that grow: the direct way takes time with the cube of the number of parameters, the other
# is nearly free.

sizes, direct_seconds, woodbury_seconds = [], [], []
for width in (8, 12, 16, 24, 32):
    rows = curvlib.factors.OuterProduct(
        torch.randn(16, width, dtype=torch.float64), torch.randn(16, width, dtype=torch.float64), samples=16
    )
    vector = torch.randn(rows.size, dtype=torch.float64)
    seconds = {"direct": [], "woodbury": []}
    for _ in range(5):
        start = time.perf_counter()
        explicit = rows.dense().matrix()
        torch.linalg.solve(explicit.T @ explicit / 16 + damping * torch.eye(rows.size, dtype=torch.float64), vector)
        seconds["direct"].append(time.perf_counter() - start)
        start = time.perf_counter()
        curvlib.func.Curvature(rows, damping).solve(vector)
        seconds["woodbury"].append(time.perf_counter() - start)
    sizes.append(rows.size)
    direct_seconds.append(min(seconds["direct"]))
    woodbury_seconds.append(min(seconds["woodbury"]))
speedup = direct_seconds[-1] / woodbury_seconds[-1]
print(f"at {sizes[-1]} parameters the small system is {speedup:.0f} times faster")

figure, axis = plt.subplots(figsize=(6, 3.3), layout="constrained")
axis.loglog(sizes, direct_seconds, "o-", label="d × d system")
axis.loglog(sizes, woodbury_seconds, "o-", label="n × n system")
axis.set(xlabel="parameters", ylabel="seconds")
axis.legend()
plt.show()

# %%
# Next: :doc:`/concepts/woodbury`.
