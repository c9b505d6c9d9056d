"""Results of an experiment: everything that was measured as plain data, and what it comes to for each run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from curvlib.cli.evaluation import Evaluation
from curvlib.cli.targets import Target, seconds_to

__all__ = ["Outcome", "curve", "default_target", "outcomes", "targets_of"]

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What one run came to.

    Parameters
    ----------
    optimizer, seed, status
        Which run, and how it ended.
    steps, epochs, seconds, milliseconds
        Length of the run, its training time, and time for a step.
    train_loss, test_loss, test_accuracy
        At the end; None if the run diverged, or where there is no accuracy.
    best
        Highest test accuracy of all evaluations, or lowest test loss of an autoencoder.
    to_targets
        Seconds and epochs to each target, None if it was not reached.
    """

    optimizer: str
    seed: int
    status: str
    steps: int
    epochs: float
    seconds: float
    milliseconds: float | None
    train_loss: float | None
    test_loss: float | None
    test_accuracy: float | None
    best: float | None
    to_targets: tuple[tuple[float, float] | None, ...]


def curve(run: Mapping[str, Any]) -> list[Evaluation]:
    """Return the evaluations of a run; numbers that are missing become NaN."""
    whole: list[dict[str, Any]] = [
        {key: math.nan if value is None else value for key, value in point.items()} for point in run["curve"]
    ]
    return [Evaluation(**point) for point in whole]


def outcomes(results: Results) -> list[Outcome]:
    """Return what every run came to, in the order in which they were done."""
    return [_outcome(run, results["plan"], targets_of(results)) for run in results["runs"]]


def targets_of(results: Results) -> list[Target]:
    """Return the targets whose time is reported."""
    return [Target(target["quantity"], target["value"]) for target in results["targets"]]


def default_target(runs: Sequence[Mapping[str, Any]], reconstructs: bool) -> dict[str, Any] | None:
    """Return as a target what SGD comes to at its end, on average over seeds: None if SGD did not finish."""
    sgd = [run for run in runs if run["identity"]["optimizer"] == "sgd" and run["status"] == "finished"]
    key = "train_loss" if reconstructs else "test_accuracy"
    values = [run["curve"][-1][key] for run in sgd]
    if not values or None in values:
        return None
    quantity = "loss" if reconstructs else "accuracy"
    return {"quantity": quantity, "value": statistics.fmean(values), "label": f"SGD's final {quantity}"}


def _outcome(run: Mapping[str, Any], plan: Mapping[str, Any], targets: Sequence[Target]) -> Outcome:
    points = curve(run)
    last = run["curve"][-1]
    diverged = run["status"].startswith("diverged")
    per_epoch = plan["steps_per_epoch"]
    accuracies = [point.test_accuracy for point in points if math.isfinite(point.test_accuracy)]
    losses = [point.test_loss for point in points if math.isfinite(point.test_loss)]
    return Outcome(
        optimizer=run["identity"]["optimizer"],
        seed=run["identity"]["seed"],
        status=run["status"],
        steps=run["steps"],
        epochs=run["steps"] / per_epoch,
        seconds=run["seconds"],
        milliseconds=1e3 * run["seconds"] / run["steps"] if run["steps"] else None,
        train_loss=None if diverged else last["train_loss"],
        test_loss=None if diverged else last["test_loss"],
        test_accuracy=None if diverged else last["test_accuracy"],
        best=max(accuracies) if accuracies else min(losses, default=None),
        to_targets=tuple(_reached(target, points, per_epoch) for target in targets),
    )


def _reached(target: Target, points: Sequence[Evaluation], per_epoch: int) -> tuple[float, float] | None:
    if seconds_to(target, points) is None:
        return None
    first = next(point for point in points if target.reached_by(point))
    return first.seconds, first.step / per_epoch
