r"""
Damping and refresh: two sweeps
===============================

λ decides how far the curvature of a batch is trusted, the refresh interval how long. Both are swept here on a small
network and scikit-learn's digits, with the loss over all digits after a fixed number of steps.
"""

import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import curvlib

digits = load_digits()
images, labels = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
STEPS = 30


def train(lr, damping, refresh):
    """Loss over all digits, and seconds."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 24), torch.nn.Tanh(), torch.nn.Linear(24, 10))
    optimizer = curvlib.compose(
        model, fisher=curvlib.Sampled(), solver=curvlib.Woodbury(), damping=damping, refresh=refresh, lr=lr
    )
    start = time.perf_counter()
    for _ in range(STEPS):
        index = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[index]), labels[index]).backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    optimizer.detach()
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(images), labels).item(), seconds


_ = train(0.1, 0.1, 1)  # the first run of a process pays for its start

# %%
# Learning rate and damping belong together
# -----------------------------------------
# In directions that the batch does not see a step is lr / λ times the gradient. So what is good lies along a diagonal
# of the plane: too little damping needs a smaller rate, and much damping is gradient descent with the rate lr / λ. A
# cross is a run that diverged.

rates = [0.003, 0.01, 0.03, 0.1, 0.3]
dampings = [0.001, 0.01, 0.1, 1.0, 10.0]
losses = torch.tensor([[train(lr, damping, 5)[0] for lr in rates] for damping in dampings])
best = losses.nan_to_num(float("inf")).argmin().item()
best_damping, best_rate = dampings[best // len(rates)], rates[best % len(rates)]
print(f"the least loss, {losses.flatten()[best]:.3f}, is at λ = {best_damping:g}, lr = {best_rate:g}")

figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
image = axis.imshow(losses.clamp(max=5).log10(), origin="lower", cmap="viridis_r")
for i, row in enumerate(losses.tolist()):
    for j, value in enumerate(row):
        axis.text(j, i, f"{value:.2f}" if value < 100 else "✗", ha="center", va="center", color="white", fontsize=8)
axis.set(xlabel="learning rate", ylabel="λ", title=f"loss after {STEPS} steps")
axis.set_xticks(range(len(rates)), [f"{lr:g}" for lr in rates])
axis.set_yticks(range(len(dampings)), [f"{damping:g}" for damping in dampings])
plt.show()

# %%
# Old curvature is cheap
# ----------------------
# At the best pair, for longer and longer intervals between new curvature:

intervals = [1, 2, 5, 10, 30]
sweep = {interval: train(best_rate, best_damping, interval) for interval in intervals}
for interval, (loss, seconds) in sweep.items():
    print(f"refresh every {interval:2} steps: loss {loss:.3f}, {1e3 * seconds / STEPS:.2f} ms a step")

figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
axis.semilogx(intervals, [sweep[i][0] for i in intervals], "o-", color="C0")
axis.set(xlabel="steps between refreshes", ylabel="loss")
axis.yaxis.label.set_color("C0")
other = axis.twinx()
other.semilogx(intervals, [1e3 * sweep[i][1] / STEPS for i in intervals], "s--", color="C1")
other.set_ylabel("milliseconds a step", color="C1")
plt.show()

# %%
# Next: :doc:`/how-to/damping`.
