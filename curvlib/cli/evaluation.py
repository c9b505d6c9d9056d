"""Loss and accuracy of a network on fixed parts of the training and the test set."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvlib.cli.tasks import Task

__all__ = ["Evaluation", "evaluate"]

_BATCH = 500


@dataclass(frozen=True)
class Evaluation:
    """One point of a training curve.

    Parameters
    ----------
    step, seconds
        Training steps and seconds of training before the evaluation.
    train_loss, test_loss
        Mean loss over the first samples of the training and the test set.
    test_accuracy
        Share of test samples whose class is named rightly; NaN for an autoencoder.
    """

    step: int
    seconds: float
    train_loss: float
    test_loss: float
    test_accuracy: float


def evaluate(task: Task, model: nn.Module, step: int, seconds: float, samples: int) -> Evaluation:
    """Evaluate a network on the first ``samples`` of the training set and of the test set."""
    training = model.training
    model.eval()
    try:
        train_loss, _ = _score(task, model, task.train_inputs[:samples], task.train_targets[:samples])
        test_loss, accuracy = _score(task, model, task.test_inputs[:samples], task.test_targets[:samples])
    finally:
        model.train(training)
    return Evaluation(step, seconds, train_loss, test_loss, accuracy)


@torch.no_grad()
def _score(task: Task, model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
    loss = 0.0
    correct = 0
    for x, y in zip(torch.split(inputs, _BATCH), torch.split(targets, _BATCH), strict=True):
        outputs = model(x)
        loss += float(task.loss(outputs, y)) * len(x)
        if not task.reconstructs:
            correct += int((outputs.argmax(1) == y).sum())
    return loss / len(inputs), math.nan if task.reconstructs else correct / len(inputs)
