"""A task: data on a device, a network that fits it, the loss, and the likelihood that the loss belongs to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvlib.cli.batches import Batches
from curvlib.cli.data import Dataset
from curvlib.cli.models import MODELS
from curvlib.errors import ConfigurationError

__all__ = ["Task", "make_task"]


@dataclass(frozen=True)
class Task:
    """What every contestant is given alike.

    Parameters
    ----------
    dataset
        Where the tensors came from.
    model_name
        A name of `curvlib.cli.models.MODELS`.
    train_inputs, train_targets, test_inputs, test_targets
        The data on the device; the autoencoder's targets are its inputs' pixels.
    reconstructs
        Whether the targets are pixels (Bernoulli) instead of classes (categorical).
    device
        Where the tensors are and the network goes.
    augment
        Whether training images are shifted and mirrored at random.
    width
        Factor on the widths of the network's hidden layers.
    """

    dataset: Dataset
    model_name: str
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    reconstructs: bool
    device: torch.device
    augment: bool = False
    width: float = 1.0

    @property
    def likelihood(self) -> str:
        """The distribution whose negative logarithm is the loss: ``"categorical"`` or ``"bernoulli"``."""
        return "bernoulli" if self.reconstructs else "categorical"

    def model(self, seed: int) -> nn.Module:
        """Return a new network whose initial parameters depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = MODELS[self.model_name](self.dataset.shape, self.dataset.classes, self.width)
        return network.to(self.device)

    def batches(self, batch_size: int, seed: int) -> Batches:
        """Return mini-batches whose order depends on the seed alone."""
        return Batches(self.train_inputs, self.train_targets, batch_size, seed, augment=self.augment)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over samples of the cross-entropy, or of the binary one summed over pixels."""
        if self.reconstructs:
            total = nn.functional.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")
            return total / len(outputs)
        return nn.functional.cross_entropy(outputs, targets)


def make_task(
    dataset: Dataset, model_name: str, device: torch.device, *, augment: bool | None = None, width: float = 1.0
) -> Task:
    """Put a data set on a device for a network.

    Parameters
    ----------
    dataset
        The images and labels.
    model_name
        A name of `curvlib.cli.models.MODELS`.
    device
        Where to put the tensors.
    augment
        Whether to shift and mirror training images; by default for colour images that are to be classified.
    width
        Factor on the widths of the network's hidden layers.
    """
    if model_name not in MODELS:
        raise ConfigurationError(f"unknown model {model_name!r}: choose one of {', '.join(MODELS)}")
    reconstructs = MODELS[model_name].reconstructs
    train, test = (
        torch.from_numpy(images.copy()).to(device, torch.float32) / dataset.peak
        for images in (dataset.train_images, dataset.test_images)
    )
    if reconstructs:
        if augment:
            raise ConfigurationError("an autoencoder's targets are the images as they are: leave out --augment")
        targets = [pixels.flatten(1) for pixels in (train, test)]
        return Task(dataset, model_name, train, targets[0], test, targets[1], True, device, width=width)
    # One channel's mean and deviation over the training set, for both parts.
    deviation, mean = torch.std_mean(train, dim=(0, 2, 3), keepdim=True)
    deviation = deviation.clamp_min(1e-6)
    train.sub_(mean).div_(deviation)
    test.sub_(mean).div_(deviation)
    labels = [
        torch.from_numpy(numbers.copy()).to(device, torch.int64)
        for numbers in (dataset.train_labels, dataset.test_labels)
    ]
    colour = dataset.shape[0] == 3
    return Task(
        dataset,
        model_name,
        train,
        labels[0],
        test,
        labels[1],
        False,
        device,
        augment=colour if augment is None else augment,
        width=width,
    )
