"""The same tuning for every method: points spread over its space, then points near the best of those."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

SPREAD, NEAR = 5, 3
"""Trials spread over the space, and near the best one."""
REACH = 0.15
"""How far from the best a near point may lie, as a share of each range."""


@dataclass(frozen=True)
class Log:
    """Numbers between two, evenly on a logarithmic scale."""

    low: float
    high: float

    def at(self, place):
        return float(f"{self.low * (self.high / self.low) ** place:.3g}")


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple

    def at(self, place):
        return self.values[min(int(place * len(self.values)), len(self.values) - 1)]


def spread(space, number, seed):
    """``number`` places in the unit cube, one in each of as many slices of every axis (a Latin hypercube)."""
    generator = random.Random(seed)
    axes = {}
    for name in space:
        slices = [(k + generator.random()) / number for k in range(number)]
        generator.shuffle(slices)
        axes[name] = slices
    return [{name: axes[name][k] for name in space} for k in range(number)]


def near(place, seed):
    """One place around another."""
    generator = random.Random(seed)
    return {name: min(1.0, max(0.0, at + generator.uniform(-REACH, REACH))) for name, at in place.items()}


def place_of(trial, space, places, ranks, seed):
    """Where trial number `trial` is, given the ranks of those before it."""
    if trial < SPREAD:
        return spread(space, SPREAD, seed)[trial]
    best = min(range(len(ranks)), key=lambda k: ranks[k])
    return near(places[best], f"{seed}-{trial}")


def values_at(space, place):
    return {name: axis.at(place[name]) for name, axis in space.items()}


def is_better(rank, other):
    """Whether a run's rank comes before another's; not reached with no finite metric comes last."""
    return other is None or (rank < other and math.isfinite(rank[1]))
