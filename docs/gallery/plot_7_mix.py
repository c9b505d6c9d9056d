r"""
A solver for each block
=======================

Convolutions have many rows and few parameters a filter, the last layer few rows and many parameters: no one method of
inversion suits all. A composition names a solver for each block, and what becomes of every parameter is shown before
anything is trained.
"""

import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import curvlib
from curvlib.precond import Graft, TraceRelative
from curvlib.solvers import EKFAC, KFAC, Diagonal, Woodbury

digits = load_digits()
images, labels = torch.tensor(digits.images / 16).float()[:, None], torch.tensor(digits.target)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.GroupNorm(2, 8), torch.nn.ReLU(),
        torch.nn.Conv2d(8, 16, 3, stride=2, padding=1), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(256, 10),
    )  # fmt: skip


# %%
# Four compositions
# -----------------
# The first pattern that matches a block's name wins. ``Graft`` gives every step the length of SGD's, so that one
# learning rate serves all. ``print(curvlib.explain(...))`` is a table, with sizes and costs too; here are three
# of its columns.

MIXES = {
    "exact everywhere": Woodbury(),
    "KFAC, diagonal for the norm": {"1": Diagonal(), "*": KFAC()},
    "KFAC on convolutions, exact elsewhere": {"[03]": KFAC("reduce"), "*": Woodbury()},
    "one of each": {"0": Woodbury(), "1": Diagonal(), "3": EKFAC(), "6": KFAC()},
}


def compose(model, solver):
    return curvlib.compose(
        model,
        fisher=curvlib.Sampled(),
        solver=solver,
        damping=TraceRelative(1.0),
        refresh=5,
        transforms=[Graft("sgd"), curvlib.Momentum(0.9)],
        lr=0.1,
    )


model = network()
optimizer = compose(model, MIXES["one of each"])
for row in curvlib.explain(optimizer, images[:64]).parameters:
    print(f"{row.name:9} {row.solver:11} {'exact' if row.exact else 'approximate'}")
optimizer.detach()

# %%
# All of them train
# -----------------

curves, milliseconds = {}, {}
for name, solver in MIXES.items():
    model = network()
    optimizer = compose(model, solver)
    generator, losses, seconds = torch.Generator().manual_seed(0), [], []
    for _ in range(30):
        index = torch.randint(len(images), (128,), generator=generator)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images[index]), labels[index])
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    curves[name], milliseconds[name] = losses, 1e3 * sum(seconds) / len(seconds)
    last = sum(losses[-5:]) / 5
    print(f"{name}: loss {losses[0]:.2f} → {last:.3f}, {milliseconds[name]:.1f} ms a step")
    optimizer.detach()

figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained", width_ratios=(1.3, 1))
for name, losses in curves.items():
    axes[0].semilogy(losses, label=name)
axes[0].set(xlabel="step", ylabel="training loss")
axes[0].legend(fontsize=8)
axes[1].barh(list(milliseconds), list(milliseconds.values()), color=[f"C{i}" for i in range(len(MIXES))])
axes[1].invert_yaxis()
axes[1].set(xlabel="milliseconds a step", yticks=[])
plt.show()

# %%
# Next: :doc:`/compose-a-variant`.
