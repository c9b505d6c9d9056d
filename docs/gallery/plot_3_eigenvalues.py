r"""
Eigenvalues and effective dimension during training
===================================================

How many directions does the curvature decide, and how many the damping? The *effective dimension* :math:`\sum_i k_i /
(k_i + \lambda)` counts the former, block by block. Here both are followed while a small network learns scikit-learn's
digits: the spectra of the exact Fisher blocks of one fixed batch, and what ``optimizer.health`` says.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import curvlib

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)


def network():
    return torch.nn.Sequential(
        torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10)
    )


model = network()
NAMES = {"0": "first layer", "2": "second layer", "4": "last layer"}
probe = images[:64].double()
BATCH = 128

# %%
# The spectrum of a block is that of its kernel
# ---------------------------------------------
# The blocks here have up to thousands of parameters, the kernel has a row for each sample and class. Both have the same
# eigenvalues apart from zeros, and the kernel's come cheaply from the Factors.


def spectra():
    """Eigenvalues of every block, the largest first."""
    double = network().double()  # training is in float32, looking in float64
    double.load_state_dict(model.state_dict())
    blocks = curvlib.collect(double, curvlib.Exact(), probe)
    values = {name: torch.linalg.eigvalsh(f.gram() / f.normalizer).clamp_min(0).flip(0) for name, f in blocks.items()}
    traces = {name: curvlib.func.Curvature(f).trace() for name, f in blocks.items()}
    return values, traces


# %%
# Train and look
# --------------

optimizer = curvlib.TENGraD(model, lr=0.1, damping=0.1, refresh=4, weight_decay=0.0)
torch.manual_seed(0)
(first, traces), steps, dimensions, losses = spectra(), [], {name: [] for name in NAMES}, []
trace_difference = max(abs(float(first[name].sum() / traces[name]) - 1) for name in NAMES)
snapshots, step = {0: first}, 0
for _ in range(6):
    for index in torch.randperm(len(images)).split(BATCH):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images[index]), labels[index])
        loss.backward()
        optimizer.step()
        if step % 4 == 0:
            steps.append(step)
            losses.append(loss.item())
            for name, health in optimizer.health.items():
                dimensions[name].append(health.effective_dimension)
        step += 1
    if step in (15, 90):
        snapshots[step] = spectra()[0]
optimizer.detach()
print(f"eigenvalues of the kernels add up to the traces of the blocks, to {trace_difference:.1e}")
print(f"the loss went from {losses[0]:.2f} to {losses[-1]:.2f} in {step} steps")

# %%
# The picture
# -----------

figure, axes = plt.subplots(1, 3, figsize=(10, 3.3), layout="constrained", sharey=True)
for axis, (name, title) in zip(axes, NAMES.items(), strict=True):
    for at, values in snapshots.items():
        axis.loglog(range(1, len(values[name]) + 1), values[name].clamp_min(1e-12), label=f"step {at}")
    axis.axhline(0.1, color="gray", lw=0.8, ls=":")
    axis.set(title=title, xlabel="number", ylim=(1e-8, None))
axes[0].set_ylabel("eigenvalue (dotted: λ)")
axes[0].legend()
plt.show()

# %%

figure, axes = plt.subplots(1, 2, figsize=(10, 3.3), layout="constrained")
for name, title in NAMES.items():
    axes[0].plot(steps, dimensions[name], label=title)
axes[0].set(xlabel="step", ylabel="effective dimension", title="of the curvature of one batch, one label a sample")
axes[0].legend()
axes[1].plot(steps, losses, color="black")
axes[1].set(xlabel="step", ylabel="training loss")
plt.show()

# %%
# A spectrum spans many orders of magnitude, and only a few directions stand above λ. While the model learns, the
# leading eigenvalues grow and the tail falls, for there is less and less that it is unsure of. So the number of
# directions that the curvature decides rises at first, and then falls; it differs from batch to batch.

for name, title in NAMES.items():
    most, last = max(dimensions[name]), dimensions[name][-1]
    print(f"{title}: {most:.1f} directions at most, {last:.1f} at the end, of {BATCH} rows")

# %%
# A λ that stays where it is does not mean the same all along: reason for ``Schedule`` or ``TraceRelative``
# (:doc:`/how-to/damping`).
