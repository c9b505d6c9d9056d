"""Interleaved timing: each window of a method has a window of SGD right before it, on the same machine state."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median, quantiles
from time import perf_counter

FEWEST = 3
"""Rounds of a slow method."""


@dataclass
class Timed:
    """Times of one method, in seconds a step, a pair (SGD, method) each round."""

    period: int
    step: Callable | None = None
    steps: int = 0
    windows: list[tuple[float, float]] = field(default_factory=list)
    error: str = ""

    @property
    def spent(self):
        """Seconds in windows so far."""
        return self.steps * sum(own for _, own in self.windows)

    def summary(self):
        """Median time and median ratio to SGD over the rounds, with the quartiles of the ratio."""
        if self.error:
            return {"error": self.error}
        ratios = [own / reference for reference, own in self.windows]
        low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (ratios[0],) * 3
        return {
            "ms": 1e3 * median(own for _, own in self.windows),
            "ratio": median(ratios),
            "ratio_quartiles": [low, high],
            "rounds": len(ratios),
        }


def interleaved(reference, methods, rounds, window=0.08, most=10, budget=4.0, clock=perf_counter):
    """Time steps of methods against steps of a reference, in turns.

    Parameters
    ----------
    reference
        Called for a step of SGD.
    methods
        Name to ``(period, build)``, where `build` returns what is called for a step. A window is a whole number of
        periods, so that it holds its share of refreshes.
    rounds
        Windows of each method.
    window
        Seconds that a window should last at least, as far as `most` steps allow; a period is never cut short.
    most
        Steps of a window of a method without a period.
    budget
        Seconds after which a method is timed no more, if it has had `FEWEST` rounds.

    Returns
    -------
    dict
        Name to `Timed`. A method that fails on this workload keeps the error instead of times.
    """
    before = _steps(reference, 1, window, most, clock)
    results = {name: _prepared(period, build, window, most, clock) for name, (period, build) in methods.items()}
    for _ in range(rounds):
        for timed in results.values():
            if not timed.error and (len(timed.windows) < FEWEST or timed.spent < budget):
                sgd = _seconds(reference, before, clock)
                timed.windows.append((sgd, _seconds(timed.step, timed.steps, clock)))
    return results


def _prepared(period, build, window, most, clock):
    timed = Timed(period)
    try:
        timed.step = build()
        timed.steps = _steps(timed.step, period, window, most, clock)
    except Exception as error:  # a peer that refuses a workload, or fails on it, is a result
        timed.error = f"{type(error).__name__}: {error}".splitlines()[0]
    return timed


def _steps(step, period, window, most, clock):
    """Warm up, and choose the steps of a window."""
    _seconds(step, 2, clock)  # the first step imports, allocates, and checks what it is checked once
    once = _seconds(step, 1, clock)
    wanted = max(1, math.ceil(window / max(once, 1e-9)))
    if period == 1:
        return min(wanted, most)
    return period * max(1, min(most, wanted) // period)


def _seconds(step, steps, clock):
    begin = clock()
    for _ in range(steps):
        step()
    return (clock() - begin) / steps
