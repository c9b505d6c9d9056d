"""Which of several exact routes a block takes: by the cost model, by a choice of the user, or by timing once."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from curvlib.arrays import Array, Buffers, namespace
from curvlib.errors import ConfigurationError
from curvlib.factors.cost import Sizes

__all__ = ["BlockPlan", "Plan", "Route"]

_QUESTIONS = {
    "rows": ("grouped", "unfold", "forward", "shifted"),
    "gram": ("pairs", "rows"),
    "keep": ("factored", "rows"),
}


class Measured(NamedTuple):
    """What an answer was measured for; see `BlockPlan.choose`."""

    question: str
    sizes: Sizes
    what: Hashable


@dataclass(frozen=True)
class Route:
    """Routes that the user chooses for a block; None leaves a choice to the plan.

    Parameters
    ----------
    rows
        How a convolution makes explicit rows: one "grouped" weight gradient with samples as groups; products of
        cotangents with the "unfold"-ed input; a "forward" convolution of the input with the cotangents as kernels; or
        for each element of the kernel a product of the cotangents with a "shifted" view of the input.
        The cost model chooses between the first two. On a CPU the third gained only with one channel along a long axis
        (1 to 16, kernel of 9, length 4096, 128 samples: 9.5 ms against 12.8), and took two to four times as long as the
        best with 16 channels or more; the fourth took 1.1 to 3 times as long (`docs/performance.md`).
    gram
        Over "pairs" of positions, or from explicit "rows". Rows that are kept explicitly have their Gram from them.
    keep
        What is kept between refreshes: the "factored" form or explicit "rows".
    """

    rows: Literal["grouped", "unfold", "forward", "shifted"] | None = None
    gram: Literal["pairs", "rows"] | None = None
    keep: Literal["factored", "rows"] | None = None

    def __post_init__(self) -> None:
        for question, answers in _QUESTIONS.items():
            if getattr(self, question) not in (None, *answers):
                raise ConfigurationError(
                    f"Route needs {question} to be one of {', '.join(map(repr, answers))} or None, got "
                    f"{getattr(self, question)!r}"
                )


class Plan:
    """Routes of all blocks, each decided once for given sizes and remembered.

    Every route is exact; they differ in time, memory and rounding.

    Parameters
    ----------
    memory_limit
        Bytes that an array of one block may take on a way that needs more than the batch: explicit rows, unfolded
        patches, tables of pairs of positions, lookups and their pairs, rows in a Kronecker eigenbasis. A few of them
        live at a time. Rows that would be larger are never held: their Gram is summed over parts of the parameters, and
        products use the factored form. None for no limit but that on temporaries of pairs of positions. See the notes.
    routes
        Patterns of block names to `Route`; the first that matches wins.
    timed
        Whether candidates are timed when a layer's sizes are first met, instead of asking the cost model: how a
        convolution makes rows, and what a Gram goes over. What is kept is never timed, since it depends on how many
        steps it is kept for. The choice then depends on the machine and the moment, and two runs may differ by
        rounding.

    Attributes
    ----------
    buffers
        Memory of large explicit rows, from one step to the next.

    Raises
    ------
    ConfigurationError
        If the limit is not a positive number of bytes, or a value of `routes` is no `Route`.

    Notes
    -----
    `memory_limit` holds for Grams and cross-Grams, rows that are kept, covariances and diagonals, the factors of K-FAC
    and the moments of EKFAC. It does not cover

    - inputs and cotangents, also padded or in another order;
    - results: a Gram, and temporaries that are no larger, ``(rows, rows)``; Kronecker factors; gradients;
    - one unit of work, where that alone is larger: one sample's patches, its pairs of positions with one other sample;
      one lookup with all that looked up the same; one parameter's column of J, or a kernel's columns; in EKFAC, and for
      covariances and diagonals, one sample's rows;
    - rows that exist only explicitly (`Dense`, the `torch.func` fallback), covariances and diagonals of weights that
      are used in several ways, and the patches of a convolution that is called several times in a pass;
    - rows of inputs and cotangents apart (patches of a convolution among them) in the solvers that keep or combine
      them one by one, such as `SKFAC`, `SENG` or `SINGD`.
    """

    def __init__(
        self, memory_limit: int | None = None, routes: Mapping[str, Route] | None = None, timed: bool = False
    ) -> None:
        if memory_limit is not None and (isinstance(memory_limit, bool) or not memory_limit > 0):
            raise ConfigurationError(f"memory_limit is a positive number of bytes or None, got {memory_limit!r}")
        for pattern, route in (routes or {}).items():
            if not isinstance(route, Route):
                raise ConfigurationError(f"the route of {pattern!r} must be a Route, got {route!r}")
        self.memory_limit = memory_limit
        self.routes = dict(routes or {})
        self.timed = timed
        self.measured: dict[Measured, str] = {}
        self.buffers = Buffers()
        self._paused = False

    def of(self, block: str) -> BlockPlan:
        """Return the plan of one block."""
        for pattern, route in self.routes.items():
            if fnmatchcase(block, pattern):
                return BlockPlan(self, route)
        return BlockPlan(self, _FREE)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time nothing inside: what was not measured before is answered by the cost model."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before


_FREE = Route()


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """The part of a plan that Factors of one block carry with them."""

    plan: Plan
    route: Route

    def choose(
        self,
        question: str,
        sizes: Sizes,
        default: str,
        candidates: Mapping[str, Callable[[], Array]] | None = None,
        what: Callable[[], Hashable] = tuple,
    ) -> str:
        """Answer one question of `Route`.

        Parameters
        ----------
        question
            Name of a field of `Route`.
        sizes
            Of the block.
        default
            What the cost model says.
        candidates
            What to time, where the plan does so: each answer's computation.
        what
            Gives all else that times depend on: the kind of Factors, its kernel, dtype, device.
        """
        forced: str | None = getattr(self.route, question)
        if forced is not None:
            return forced
        if not self.plan.timed or not candidates:
            return default
        key = Measured(question, sizes, what())
        if key not in self.plan.measured:
            if self.plan._paused:
                return default
            times = {answer: _seconds(compute) for answer, compute in candidates.items()}
            self.plan.measured[key] = min(times, key=lambda answer: times[answer])
        return self.plan.measured[key]

    def apart(self) -> BlockPlan:
        """The same choices for a part of the rows, whose memory is not what whole rows take from step to step."""
        plan = copy.copy(self.plan)
        plan.buffers = Buffers()
        return BlockPlan(plan, self.route)

    def foreseen(self, question: str, sizes: Sizes, default: str, what: Callable[[], Hashable]) -> str:
        """Say in words what `choose` will answer where there are candidates, without timing them."""
        forced: str | None = getattr(self.route, question)
        if forced is not None or not self.plan.timed:
            return forced or default
        return self.plan.measured.get(Measured(question, sizes, what()), "a route yet to be timed")

    def limit(self, array: Array) -> int | None:
        """Elements of the dtype of `array` that the limit allows, at least one; None where there is no limit."""
        limit = self.plan.memory_limit
        return None if limit is None else max(1, int(limit // int(array.dtype.itemsize)))


def _seconds(compute: Callable[[], Array]) -> float:
    _wait(compute())  # libraries prepare kernels at the first call
    start = time.perf_counter()
    _wait(compute())
    return time.perf_counter() - start


def _wait(array: Array) -> Any:
    """Wait for the device to have made the array; only while timing."""
    return bool(namespace(array).isfinite(array.reshape(-1)[0]))
