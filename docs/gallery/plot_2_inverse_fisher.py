r"""
Inverse Fisher blocks: exact, KFAC, EKFAC
=========================================

TENGraD's paper (`arXiv 2106.03947 <https://arxiv.org/abs/2106.03947>`_) compares what different methods take for the
inverse of one layer's Fisher block, as heat maps of :math:`\log(|F^{-1}| + 10^{-3})` during training. Here is that
picture for a small network on scikit-learn's digits. Curvature and damping are the same for all: only the way of
inverting differs.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import curvlib
from curvlib.solvers import EKFAC, KFAC

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images / 16).unfold(1, 2, 2).unfold(2, 2, 2).mean((-1, -2)).flatten(1)  # 4 × 4 pixels
labels = torch.tensor(digits.target)
model = torch.nn.Sequential(
    torch.nn.Linear(16, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 10)
).double()

# %%
# One block, four inverses
# ------------------------
# The block is that of the second layer. Its rows are collected once, with the exact Fisher of one batch; every solver
# gets the same rows, and its inverse is read off column by column. ``KFAC(damping="exact")`` adds the damping to the
# products of eigenvalues, so that all methods damp alike. What the first column shows is the explicit inverse, made
# without any solver.

DAMPING = 0.01
SOLVERS = {
    "TENGraD (Woodbury)": curvlib.Woodbury(),
    "EKFAC": EKFAC(decay=0.0),
    "KFAC": KFAC(damping="exact", decay=0.0),
}


def inverses(batch):
    """The explicit inverse of the damped block, and each solver's."""
    factors = curvlib.collect(model, curvlib.Exact(), batch)["2"]
    J = factors.dense().matrix()
    eye = torch.eye(factors.size, dtype=J.dtype)
    result = {"explicit inverse": torch.linalg.inv(J.T @ J / factors.normalizer + DAMPING * eye)}
    for name, solver in SOLVERS.items():
        curvature = curvlib.func.Curvature(factors, DAMPING, solver)
        result[name] = torch.stack([curvature.solve(column) for column in eye])
    return result


# %%
# During training
# ---------------

optimizer = curvlib.TENGraD(model, lr=0.1, damping=0.1, refresh=5, weight_decay=0.0)
pictures = {0: inverses(images[:128])}
for epoch in range(1, 7):
    for index in torch.randperm(len(images)).split(128):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images[index]), labels[index])
        loss.backward()
        optimizer.step()
    if epoch in (1, 6):
        pictures[epoch] = inverses(images[:128])
optimizer.detach()
accuracy = (model(images).argmax(1) == labels).double().mean().item()
print(f"after {epoch} epochs the loss is {loss.item():.3f}, the accuracy {accuracy:.3f}")

figure, axes = plt.subplots(3, 4, figsize=(10, 8), layout="constrained")
for row, (epoch, matrices) in zip(axes, pictures.items(), strict=True):
    shown = {name: (matrix.abs() + 1e-3).log() for name, matrix in matrices.items()}
    low, high = shown["explicit inverse"].min(), shown["explicit inverse"].max()
    for axis, (name, picture) in zip(row, shown.items(), strict=True):
        axis.imshow(picture, cmap="viridis", vmin=low, vmax=high)
        axis.set(xticks=[], yticks=[], title=name if epoch == 0 else "")
    row[0].set_ylabel(f"epoch {epoch}")
plt.show()

# %%
# In numbers
# ----------
# The distance from the explicit inverse, relative, in the Frobenius norm. EKFAC corrects KFAC's eigenvalues within
# KFAC's eigenvectors: of all curvatures with these eigenvectors it has the one that is nearest to the Fisher block
# (George et al., `arXiv 1806.03884 <https://arxiv.org/abs/1806.03884>`_). That is a statement about F, so that is
# printed too.


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


errors, forward_errors = {}, {}
for epoch, matrices in pictures.items():
    exact = matrices["explicit inverse"]
    eye = torch.eye(len(exact), dtype=exact.dtype)
    block = torch.linalg.inv(exact) - DAMPING * eye
    for name in SOLVERS:
        errors[epoch, name] = distance(matrices[name], exact)
        forward_errors[epoch, name] = distance(torch.linalg.inv(matrices[name]) - DAMPING * eye, block)
        print(f"epoch {epoch}, {name:18}: F⁻¹ off by {errors[epoch, name]:.1e}, F by {forward_errors[epoch, name]:.1e}")
