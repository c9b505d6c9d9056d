r"""
TENGraD against SGD, Adam and KFAC
==================================

Four optimizers train one small ConvNet from the same start for the same number of steps; the curves are drawn over
steps and over seconds, since a step of each costs differently. This page shows scikit-learn's digits, which need no
download. With ``CURVLIB_GALLERY_DATA=fashion-mnist`` in the environment the script takes Fashion-MNIST from where it
is installed; the real comparison, with tuned rates, several seeds and equal time, is ``curvlib race``.
"""

import os
import time

import matplotlib.pyplot as plt
import torch

import curvlib
from curvlib.cli.data import load_dataset

data = load_dataset(os.environ.get("CURVLIB_GALLERY_DATA", "digits"))
images, labels = torch.as_tensor(data.train_images).float() / data.peak, torch.as_tensor(data.train_labels).long()
test_images, test_labels = (
    torch.as_tensor(data.test_images).float() / data.peak,
    torch.as_tensor(data.test_labels).long(),
)
print(f"{data.name}: {len(images)} images of {tuple(images.shape[1:])}")
STEPS, BATCH = 50, 64


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(images.shape[1], 8, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(8, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(4),
        torch.nn.Flatten(), torch.nn.Linear(256, 10),
    )  # fmt: skip


# %%
# Each has the best of three learning rates, by the training loss at the end; nothing else is tuned.

OPTIMIZERS = {
    "SGD": ((0.03, 0.1, 0.3), lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)),
    "Adam": ((3e-3, 1e-2, 3e-2), lambda model, lr: torch.optim.Adam(model.parameters(), lr=lr)),
    "KFAC": ((0.01, 0.03, 0.1), lambda model, lr: curvlib.recipes.KFAC(
        model, lr=lr, damping=0.1, estimate_every=5, refresh=10, weight_decay=0.0)),
    "TENGraD": ((0.03, 0.1, 0.3), lambda model, lr: curvlib.TENGraD(
        model, lr=lr, damping=0.1, refresh=10, weight_decay=0.0)),
}  # fmt: skip


def train(make, lr):
    """Losses, seconds after each step, and the accuracy on images that were not trained on."""
    model, generator = network(), torch.Generator().manual_seed(0)
    optimizer = make(model, lr)
    losses, seconds, spent = [], [], 0.0
    for _ in range(STEPS):
        index = torch.randint(len(images), (BATCH,), generator=generator)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images[index]), labels[index])
        loss.backward()
        optimizer.step()
        spent += time.perf_counter() - start
        losses.append(loss.item())
        seconds.append(spent)
    with torch.no_grad():
        accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
    return losses, seconds, accuracy


def smooth(losses, width=5):
    """Means of the last few losses."""
    windows = [losses[max(0, i - width + 1) : i + 1] for i in range(len(losses))]
    return [sum(window) / len(window) for window in windows]


runs = {}
for name, (rates, make) in OPTIMIZERS.items():
    tried = {lr: train(make, lr) for lr in rates}
    lr = min(rates, key=lambda lr: smooth(tried[lr][0])[-1])
    runs[name] = tried[lr]
    losses, seconds, accuracy = tried[lr]
    print(f"{name:8} lr {lr:<6g} loss {smooth(losses)[-1]:.3f}, accuracy {accuracy:.3f}, {seconds[-1]:.2f} s")

figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained", sharey=True)
for name, (losses, seconds, _) in runs.items():
    axes[0].semilogy(smooth(losses), label=name)
    axes[1].semilogy(seconds, smooth(losses), label=name)
axes[0].set(xlabel="step", ylabel="training loss (mean of five)")
axes[1].set(xlabel="seconds")
axes[0].legend()
plt.show()
