"""The order of the mini-batches: a function of the seed alone, with a state that a checkpoint can hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlib.errors import ConfigurationError

__all__ = ["BatchOrder", "Batches"]

# Augmentation draws from a stream of its own, so that switching it on leaves the order as it was.
_AUGMENTATION_STREAM = 0x5EED
_PADDING = 4


class BatchOrder:
    """An endless iterator over index batches: a fresh permutation each epoch, an incomplete last batch dropped.

    Parameters
    ----------
    samples
        The number of samples in an epoch.
    batch_size
        The number of indices in a batch.
    seed
        Equal seeds give equal orders.
    """

    def __init__(self, samples: int, batch_size: int, seed: int) -> None:
        if not 1 <= batch_size <= samples:
            raise ConfigurationError(
                f"a batch of {batch_size} cannot be drawn from {samples} training samples: "
                f"give --batch-size between 1 and {samples}"
            )
        self.samples = samples
        self.batch_size = batch_size
        self.epoch = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._start_epoch()

    @property
    def batches_per_epoch(self) -> int:
        """The number of whole batches in an epoch."""
        return self.samples // self.batch_size

    def __iter__(self) -> BatchOrder:
        return self

    def __next__(self) -> Tensor:
        if self._position == self.batches_per_epoch:
            self.epoch += 1
            self._start_epoch()
        start = self._position * self.batch_size
        self._position += 1
        return self._permutation[start : start + self.batch_size]

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the position in it, and the generator's state from which it was permuted."""
        return {"epoch": self.epoch, "position": self._position, "generator": self._epoch_state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the order with this state stopped."""
        self.epoch = state["epoch"]
        self._generator.set_state(state["generator"])
        self._start_epoch()
        self._position = state["position"]

    def _start_epoch(self) -> None:
        self._epoch_state = self._generator.get_state()
        self._permutation = torch.randperm(self.samples, generator=self._generator)
        self._position = 0


class Batches:
    """Draws mini-batches from tensors in memory, in the order of the seed, shifted and mirrored if asked.

    Parameters
    ----------
    inputs, targets
        The training set, on the device.
    batch_size, seed
        As for `BatchOrder`.
    augment
        Whether images are shifted by up to 4 pixels (with zeros) and mirrored at random.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, batch_size: int, seed: int, *, augment: bool = False) -> None:
        self.order = BatchOrder(len(inputs), batch_size, seed)
        self._inputs = inputs
        self._targets = targets
        self._generator = torch.Generator().manual_seed(seed ^ _AUGMENTATION_STREAM) if augment else None

    def draw(self) -> tuple[Tensor, Tensor]:
        """Return the next batch of inputs and targets."""
        index = next(self.order).to(self._inputs.device)
        inputs = self._inputs[index]
        if self._generator is not None:
            inputs = self._augmented(inputs, self._generator)
        return inputs, self._targets[index]

    def state_dict(self) -> dict[str, Any]:
        """Return the order's state and that of the augmentation."""
        augmentation = None if self._generator is None else self._generator.get_state()
        return {"order": self.order.state_dict(), "augmentation": augmentation}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the batches with this state stopped."""
        self.order.load_state_dict(state["order"])
        if self._generator is not None:
            self._generator.set_state(state["augmentation"])

    @staticmethod
    def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
        n, _, height, width = images.shape
        device = images.device
        shifts = torch.randint(2 * _PADDING + 1, (2, n, 1), generator=generator).to(device)
        mirrored = torch.randint(2, (n, 1), generator=generator).to(device).bool()
        padded = torch.nn.functional.pad(images, (_PADDING,) * 4)
        rows = shifts[0] + torch.arange(height, device=device)
        columns = torch.arange(width, device=device)
        columns = shifts[1] + torch.where(mirrored, columns.flip(0), columns)
        sample = torch.arange(n, device=device)[:, None, None]
        # Advanced indices around a slice put the channels last; the network expects them second.
        picked = padded[sample, :, rows[:, :, None], columns[:, None, :]]
        return picked.permute(0, 3, 1, 2).contiguous()
