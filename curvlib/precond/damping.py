"""How much damping each block gets at each step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from curvlib.errors import ConfigurationError
from curvlib.hyperparameters import Checked

__all__ = ["Constant", "Damping", "LevenbergMarquardt", "PerBlock", "Schedule", "TraceRelative"]


class Damping(Checked, ABC):
    """Gives λ of ``curvature + λ · identity`` for each step and block."""

    @abstractmethod
    def at(self, step: int, block: str, mean_eigenvalue: float) -> float:
        """Damping of a block, > 0.

        Parameters
        ----------
        step
            Number of the step, 0 for the first.
        block
            Name of the block.
        mean_eigenvalue
            Trace of the block's last curvature over its number of parameters; 0 before the first.
        """

    @property
    def needs_trace(self) -> bool:
        """Whether `mean_eigenvalue` is looked at; it is computed only then."""
        return False

    @property
    def needs_loss(self) -> bool:
        """Whether `adapt` wants the loss before and after steps, which takes a closure."""
        return False

    def adapts_at(self, step: int) -> bool:
        """Whether the reduction ratio of step number `step` is wanted; only asked where `needs_loss`."""
        return False

    def adapt(self, step: int, ratio: float) -> None:  # nothing to do for a damping that stays
        """Take note of the reduction ratio of a step; only called where `needs_loss`."""

    def state(self) -> float | None:
        """Return what a checkpoint must hold; None if nothing."""
        return None

    def restore(self, state: float | None) -> None:  # nothing to take back without a state
        """Take back what `state` returned."""


@dataclass(frozen=True)
class Constant(Damping):
    """The same damping at every step.

    Parameters
    ----------
    value
        λ > 0, in the units of the curvature.
    """

    value: float

    def __post_init__(self) -> None:
        check_damping_value(self.value)

    def at(self, step: int, block: str, mean_eigenvalue: float) -> float:
        return float(self.value)


@dataclass(frozen=True)
class Schedule(Damping):
    """Damping as a function of the step.

    Parameters
    ----------
    rule
        From the number of a step to λ > 0.
    """

    rule: Callable[[int], float]

    def at(self, step: int, block: str, mean_eigenvalue: float) -> float:
        return check_damping_value(self.rule(step))


@dataclass(frozen=True)
class TraceRelative(Damping):
    """Damping in proportion to the mean eigenvalue of each block: the same in whatever units the block is.

    Parameters
    ----------
    factor
        λ over the mean eigenvalue.
    floor
        Least damping, for blocks without any curvature.
    """

    factor: float
    floor: float = 1e-8

    def __post_init__(self) -> None:
        check_damping_value(self.factor)
        check_damping_value(self.floor)

    @property
    def needs_trace(self) -> bool:
        return True

    def at(self, step: int, block: str, mean_eigenvalue: float) -> float:
        return max(self.factor * mean_eigenvalue, self.floor)


@dataclass(frozen=True)
class PerBlock(Damping):
    """A damping for each pattern of block names, the first that matches.

    Parameters
    ----------
    choices
        `fnmatch` pattern to damping, as in ``{"features.*": 0.1, "*": 1.0}``.
    """

    choices: Mapping[str, Damping | float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", {key: as_damping(value) for key, value in self.choices.items()})

    @property
    def needs_trace(self) -> bool:
        return any(as_damping(choice).needs_trace for choice in self.choices.values())

    def at(self, step: int, block: str, mean_eigenvalue: float) -> float:
        for pattern, choice in self.choices.items():
            if fnmatchcase(block, pattern):
                return as_damping(choice).at(step, block, mean_eigenvalue)
        raise ConfigurationError(f"no damping pattern matches block {block!r}; add a last one for '*'")


@dataclass
class LevenbergMarquardt(Damping):
    """Damping that follows how well the quadratic model predicts the loss (Martens & Grosse 2015, section 6.5).

    Every `every` steps the reduction ratio ρ = actual / predicted change of the loss is taken on the step's own batch;
    λ shrinks by ``decay^every`` where ρ > 3/4 and grows by its inverse where ρ < 1/4. The predicted change is
    ``⟨g, δ⟩ + δᵀFδ / 2`` with F the curvature of the whole network from that step's rows, cross terms between blocks
    included. It takes ``optimizer.step(closure)``; the closure is evaluated once more at those steps.

    Parameters
    ----------
    initial
        First λ.
    decay
        Factor a step, in (0, 1).
    every
        Steps between adaptations.
    least, most
        Bounds of λ.
    """

    initial: float
    decay: float = 19 / 20
    every: int = 5
    least: float = 1e-8
    most: float = 1e4
    current: float = field(init=False)

    def __post_init__(self) -> None:
        for value in (self.initial, self.least, self.most):
            check_damping_value(value)
        if not 0 < self.decay < 1 or self.every < 1:
            raise ConfigurationError(
                f"LevenbergMarquardt needs decay in (0, 1) and every ≥ 1, got {self.decay!r} and {self.every!r}"
            )
        self.current = self.initial

    @property
    def needs_loss(self) -> bool:
        return True

    def at(self, step: int, block: str, mean_eigenvalue: float) -> float:
        return self.current

    def adapts_at(self, step: int) -> bool:
        return (step + 1) % self.every == 0

    def adapt(self, step: int, ratio: float) -> None:
        change = self.decay**self.every
        # A ratio that is not a number means that the loss left the range of numbers: trust the model less.
        if ratio > 0.75:
            self.current = max(self.current * change, self.least)
        elif not ratio >= 0.25:
            self.current = min(self.current / change, self.most)

    def state(self) -> float | None:
        return self.current

    def restore(self, state: float | None) -> None:
        self.current = self.initial if state is None else check_damping_value(state)


def check_damping_value(value: float) -> float:
    """Return a damping that is a positive finite number.

    Raises
    ------
    ConfigurationError
        Otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise ConfigurationError(
            f"damping must be a positive finite number, got {value!r}; a batch smaller than the block has a singular "
            "curvature without it"
        )
    return float(value)


def as_damping(damping: Damping | float | Mapping[str, Damping | float]) -> Damping:
    """Return `damping` itself, `Constant` for a number, `PerBlock` for a mapping of patterns.

    Raises
    ------
    ConfigurationError
        If it is none of these.
    """
    if isinstance(damping, Damping):
        return damping
    if isinstance(damping, Mapping):
        return PerBlock(damping)
    if isinstance(damping, bool) or not isinstance(damping, int | float):
        raise ConfigurationError(
            f"damping must be a number > 0, a Damping or a mapping of block names, got {damping!r}"
        )
    return Constant(damping)
