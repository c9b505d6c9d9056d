"""One training run: the metric against CPU seconds of training, until the target or a hopeless state."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import asdict, dataclass, field

import torch

from curvlib import CurvatureError, CurvatureWarning

EVALUATIONS = 30
"""Evaluations in a tuning trial's budget."""
IN_A_ROW = 2
"""Evaluations at the target that count as reaching it: one alone may be noise."""


@dataclass
class Run:
    """What became of one run; the curve has a triple (seconds, steps, metric) for each evaluation."""

    values: dict
    seed: int
    curve: list = field(default_factory=list)
    reached: float | None = None
    status: str = "out of time"

    @property
    def best(self):
        return min((metric for _, _, metric in self.curve if math.isfinite(metric)), default=math.inf)

    @property
    def rank(self):
        """Sorts runs: soonest at the target first, then the lowest metric."""
        return (0, self.reached) if self.reached is not None else (1, self.best)

    def best_until(self, seconds):
        """Least metric that was seen by then."""
        return min((metric for spent, _, metric in self.curve if spent <= seconds), default=math.inf)

    def as_dict(self):
        return {
            key: [list(point) for point in value] if key == "curve" else value for key, value in asdict(self).items()
        }


def hopeless(run, rival):
    """Whether a trial is behind where the best trial so far was in half the time; never in the first part of it."""
    if rival is None:
        return False
    spent = run.curve[-1][0]
    if rival.reached is not None and spent > rival.reached:
        return True
    return len(run.curve) > 5 and run.best > rival.best_until(spent / 2)


def train(task, make, values, seed, seconds, rival=None, clock=time.process_time):
    """Train until the target, `seconds`, divergence, or until it is hopeless against `rival`.

    Parameters
    ----------
    make
        ``make(task, model, values, seed)``: the optimizer.
    values
        Hyperparameters; ``batch`` is the batch size.
    seconds
        CPU time of the process in the training loop: batch, forward, backward, curvature, update.
    rival
        The best run so far, while tuning.
    """
    run = Run(dict(values), seed)
    model, generator = task.model(seed), torch.Generator().manual_seed(seed)
    optimizer, size = make(task, model, values, seed), int(values["batch"])
    every = task.budget / EVALUATIONS
    steps, spent, due, below = 0, 0.0, 0.0, 0

    def evaluate():
        with torch.no_grad():
            metric = task.evaluate(model)
        run.curve.append((spent, steps, metric))
        return metric

    first = evaluate()
    try:
        with warnings.catch_warnings():
            # A failed factorisation is the method's own trouble: what is done then is part of it.
            warnings.simplefilter("ignore", CurvatureWarning)
            while spent < seconds:
                start = clock()
                inputs, targets = task.batch(size, generator)

                def closure(inputs=inputs, targets=targets):
                    optimizer.zero_grad()
                    loss = task.loss(model(inputs), targets)
                    if torch.is_grad_enabled():
                        loss.backward()
                    return loss

                optimizer.step(closure)
                spent += clock() - start
                steps += 1
                if spent < due:
                    continue
                due = spent + every
                metric = evaluate()
                if not math.isfinite(metric) or metric > 20 * first:
                    run.status = "diverged"
                    break
                below = below + 1 if metric <= task.target else 0
                if below == IN_A_ROW:
                    run.reached, run.status = run.curve[-IN_A_ROW][0], "reached"
                    break
                if hopeless(run, rival):
                    run.status = "behind"
                    break
    except (CurvatureError, torch.linalg.LinAlgError, RuntimeError) as error:
        run.status = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    finally:
        if hasattr(optimizer, "detach"):
            optimizer.detach()
    return run
