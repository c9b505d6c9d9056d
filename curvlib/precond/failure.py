"""What becomes of a step whose curvature fails: the policy, what it counts, and what it says once."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, get_args

import torch

from curvlib.arrays import record
from curvlib.errors import (
    ConfigurationError,
    CurvatureError,
    FailureWarning,
    NonFiniteError,
    NotPositiveDefiniteError,
    RefreshError,
)

__all__ = ["REFRESH_FAILURES", "Failures", "OnFailure", "PlainGradient", "as_failure", "raise_naming"]

OnFailure = Literal["keep", "gradient", "skip", "raise"]
"""What a block does whose curvature cannot be renewed, not even after retries."""

_CHOICES: tuple[str, ...] = get_args(OnFailure)

REFRESH_FAILURES = (
    RuntimeError, MemoryError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError,
)  # fmt: skip
"""What a solver may raise. `as_failure` says whether it is the numbers' or the memory's fault."""

# What allocators say whose errors have no class of their own.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@record
@dataclass(frozen=True, eq=False)
class PlainGradient:
    """Stands for an inverse under ``on_failure="gradient"``: the block moves along g/λ until its next refresh."""


def as_failure(error: BaseException) -> NotPositiveDefiniteError | None:
    """Return what made a refresh fail in one class; None for an error that is a mistake in the code or the set-up.

    Parameters
    ----------
    error
        One of `REFRESH_FAILURES`.
    """
    if isinstance(error, NotPositiveDefiniteError):
        return error
    if isinstance(error, CurvatureError):
        return None
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY):
        return NotPositiveDefiniteError(f"the memory did not suffice ({_first_line(error)})")
    if isinstance(error, torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # its stub forgets the name
        return NotPositiveDefiniteError(f"a decomposition failed ({_first_line(error)})")
    return None


def raise_naming(error: Exception, *blocks: str) -> NoReturn:
    """Raise what a solver raised, saying in which block, or one of which, it was."""
    where = f"block {' or '.join(map(repr, blocks))}"
    if isinstance(error, ConfigurationError | NotPositiveDefiniteError):
        raise type(error)(f"{where}: {error}") from error
    if isinstance(error, CurvatureError | torch.OutOfMemoryError):
        raise error
    raise CurvatureError(
        f"{where}: its solver failed ({type(error).__name__}: {error}); parameters and state are unchanged"
    ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


@dataclass(eq=False)
class Failures:
    """The policy of an optimizer, and what it had to do.

    Parameters
    ----------
    policy
        "keep": the last good inverse is used on, and there is an error where there is none. "gradient": as "keep", but
        a block without any inverse moves along g/λ until its next refresh. "skip": the whole step does nothing, as it
        does too where gradients are not finite. "raise": an error.

    Attributes
    ----------
    skipped
        Steps that did nothing.
    refused
        Steps that raised an error.
    by_block
        Refreshes that made a step skip or raise, by block.
    last
        The last failure in words; empty if there was none.
    """

    policy: OnFailure = "keep"
    skipped: int = field(default=0, init=False)
    refused: int = field(default=0, init=False)
    by_block: Counter[str] = field(default_factory=Counter, init=False)
    last: str = field(default="", init=False)
    _told: set[tuple[str, str]] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.policy, str) or self.policy not in _CHOICES:
            raise ConfigurationError(f"on_failure must be one of {', '.join(map(repr, _CHOICES))}, got {self.policy!r}")

    def give_up(self, block: str, step: int, cause: Exception, factorized: int | None) -> bool:
        """Decide what becomes of a block whose curvature cannot be renewed.

        Parameters
        ----------
        block, step
            Which block, at which step.
        cause
            What was raised.
        factorized
            Step at which its last good inverse was made; None if there is none.

        Returns
        -------
        bool
            Whether the last good inverse is used on; otherwise the plain gradient is.

        Raises
        ------
        RefreshError
            Where the policy lets nothing stand in.
        """
        if self.policy in ("keep", "gradient") and factorized is not None:
            self._tell(block, step, str(cause), "kept", f"the inverse of step {factorized} is used on")
            return True
        if self.policy == "gradient":
            self._tell(block, step, str(cause), "gradient", "it moves along the plain gradient until its next refresh")
            return False
        raise RefreshError(
            block,
            step,
            cause,
            "A smaller block (one for each layer), a smaller batch or a solver that keeps less needs less memory"
            if "memory" in str(cause)
            else "Look for non-finite activations or labels; otherwise raise the damping",
        ) from cause

    def retried(self, block: str, step: int, what: list[str]) -> None:
        """Take note of a factorisation that needed more than one attempt."""
        self._tell(block, step, "not positive definite at first", "retried", f"it was factorised {'; '.join(what)}")

    def skips(self, error: CurvatureError) -> bool:
        """Whether a step that fails in this way is to be skipped instead of raised."""
        return self.policy == "skip" and isinstance(error, RefreshError | NonFiniteError)

    def refuse(self, error: CurvatureError, step: int) -> bool:
        """Take note of a step that failed, and return whether it is to be skipped instead of raised."""
        self.last = str(error)
        if isinstance(error, RefreshError):
            self.by_block[error.block] += 1
        if self.skips(error):
            self.skipped += 1
            self._tell("", step, str(error).removeprefix(f"step {step}: "), "skipped", "the step was skipped")
            return True
        self.refused += 1
        return False

    def _tell(self, block: str, step: int, cause: str, action: str, done: str) -> None:
        warning = FailureWarning(block, step, cause, action, done)
        self.last = str(warning)
        if (block, action) not in self._told:
            warnings.warn(warning, stacklevel=8)
            self._told.add((block, action))

    def __getstate__(self) -> dict[str, Any]:
        # A copy speaks for itself once more.
        return {**self.__dict__, "_told": set()}
