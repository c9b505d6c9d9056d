"""One curvature refresh of a model, watched block by block: sizes, bytes, operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvlib.arrays import Array, map_arrays, nbytes
from curvlib.capture import Capture, Output
from curvlib.errors import CurvatureError
from curvlib.explanation.counting import CountFlops
from curvlib.explanation.watch import Watch
from curvlib.factors import Factors, Plan, Scaled
from curvlib.fisher import Fisher
from curvlib.layers import Block
from curvlib.solvers import Solver

__all__ = ["BlockCost", "Request", "label", "measure"]


@dataclass
class BlockCost:
    """What one block takes; None where it could not be found out, with the reason in `problem`.

    Parameters
    ----------
    rows
        Rows of J.
    factors, kept
        Kind of Factors captured; what the solver keeps of them.
    route
        Which of several exact ways the Factors take, where there are several.
    factor_bytes, inverse_bytes, kept_bytes
        Arrays of the captured Factors; of the solver's inverse; of estimate and inverse, shared ones once.
    capture_flops, refresh_flops, step_flops
        Cotangents and rows; `update` and `factorize`; `solve`.
    problem
        Why there is no curvature.
    doubt
        Why the rows are not, or not exactly, the per-sample Jacobian.
    """

    rows: int = 0
    factors: str = ""
    route: str = ""
    kept: str = ""
    factor_bytes: int = 0
    inverse_bytes: int = 0
    kept_bytes: int = 0
    capture_flops: int = 0
    refresh_flops: int = 0
    step_flops: int = 0
    problem: str = ""
    doubt: str = ""


@dataclass(frozen=True)
class Request:
    """A pass of a model.

    Parameters
    ----------
    model, args, kwargs
        What is called, with what.
    fisher, output, loss, plan
        As for `curvlib.collect`.
    """

    model: nn.Module
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    fisher: Fisher
    output: Output | None
    loss: Callable[[Any], Tensor] | None
    plan: Plan | None = None

    def collect(self, blocks: tuple[Block, ...], verify: bool) -> dict[str, Factors]:
        """Factors of the blocks; the model's buffers and torch's random state are as before."""
        generator = torch.Generator(device=next(self.model.parameters()).device).manual_seed(0)
        with _unchanged(self.model):
            capture = Capture(
                self.model, blocks, self.fisher, self.output, generator, every_pass=True, check=verify, plan=self.plan
            )
            try:
                result = self.model(*self.args, **self.kwargs)
                if self.fisher.needs_backward:
                    parameters = [p for p in self.model.parameters() if p.requires_grad]
                    torch.autograd.grad(self._loss(result), parameters, allow_unused=True)
                return capture.take()
            finally:
                capture.detach()

    def _loss(self, result: Any) -> Tensor:
        if self.loss is not None:
            return self.loss(result)
        # Sizes do not depend on which loss it is.
        outputs = result if self.output is None else self.output(result)
        return outputs.square().sum()


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


def measure(
    request: Request, blocks: tuple[Block, ...], solvers: Mapping[str, Solver], damping: float
) -> dict[str, BlockCost]:
    """Take curvature once, give it to the solvers, and say for each block what that took."""
    # Candidates timed here would be counted as operations, and their times would be those of the counting.
    with nullcontext() if request.plan is None else request.plan.paused():
        return _measured(request, blocks, solvers, damping)


def _measured(
    request: Request, blocks: tuple[Block, ...], solvers: Mapping[str, Solver], damping: float
) -> dict[str, BlockCost]:
    costs = {block.name: BlockCost() for block in blocks}
    counter = CountFlops()
    watch = Watch(request.model, blocks, counter)
    counted = tuple(watch.counted(block) for block in blocks)
    with counter, watch:
        factors = _collected(request, counted, costs, watch)
    for block in blocks:
        rows = factors.get(block.name)
        cost = costs[block.name]
        if rows is None:
            cost.problem = cost.problem or "its module is not called in this forward pass"
            continue
        columns = 0 if request.fisher.needs_backward else max(1, len(rows) // rows.normalizer)
        cost.capture_flops = watch.adapter[block.name] + columns * watch.pulled_back[block.name]
        _use(solvers[block.name], rows, block, damping, cost, counter)
    _doubts(request, blocks, costs, watch)
    return costs


def _collected(
    request: Request, blocks: tuple[Block, ...], costs: dict[str, BlockCost], watch: Watch
) -> dict[str, Factors]:
    """Factors of all blocks; where one of them cannot be captured, of the others."""
    try:
        return request.collect(blocks, verify=False)
    except CurvatureError:
        found: dict[str, Factors] = {}
        for block in blocks:
            watch.clear()
            try:
                found |= request.collect((block,), verify=False)
            except CurvatureError as error:
                costs[block.name].problem = str(error)
        if not found:
            raise
        return found


def _use(solver: Solver, rows: Factors, block: Block, damping: float, cost: BlockCost, counter: CountFlops) -> None:
    cost.rows, cost.factors, cost.factor_bytes = len(rows), _kind(rows), rows.nbytes
    cost.route = rows.route
    like = rows.row_weights(1.0)
    gradient = {name: torch.ones(shape).to(like) for name, shape in rows.shapes.items()}
    start = counter.total
    try:
        with torch.no_grad(), counter:
            estimate = solver.update(None, rows)
            inverse = solver.factorize(estimate, damping)
            refreshed = counter.total
            solver.solve(inverse, gradient)
    except CurvatureError as error:
        cost.problem = f"{label(solver)} cannot be used: {error}"
        return
    cost.refresh_flops, cost.step_flops = refreshed - start, counter.total - refreshed
    cost.inverse_bytes = _bytes(inverse)
    cost.kept_bytes = _bytes((estimate, inverse))
    cost.kept = ", ".join(dict.fromkeys(_kinds((estimate, inverse)))) or type(inverse).__name__


def _kind(rows: Factors) -> str:
    return type(rows.base if isinstance(rows, Scaled) else rows).__name__


def label(part: Any) -> str:
    """Name of a solver or Fisher with those of its hyperparameters that are not the default."""
    if not dataclasses.is_dataclass(part):
        return str(part)
    default = {one.name: one.default for one in dataclasses.fields(part)}
    changed = [f"{name}={value}" for name, was in default.items() if (value := getattr(part, name)) != was]
    return f"{type(part).__name__}({', '.join(changed)})"


def _bytes(state: Any) -> int:
    """Bytes of the different arrays in a state."""
    arrays: dict[int, Array] = {}

    def keep(array: Array) -> Array:
        arrays[id(array)] = array
        return array

    map_arrays(keep, state)
    return sum(nbytes(array) for array in arrays.values())


def _kinds(state: Any) -> Iterator[str]:
    """Kinds of the Factors in a state."""
    if isinstance(state, Factors):
        yield _kind(state)
    elif dataclasses.is_dataclass(state):
        for one in dataclasses.fields(state):
            yield from _kinds(getattr(state, one.name))
    elif isinstance(state, Mapping | list | tuple):
        for item in state.values() if isinstance(state, Mapping) else state:
            yield from _kinds(item)


def _doubts(request: Request, blocks: tuple[Block, ...], costs: dict[str, BlockCost], watch: Watch) -> None:
    """Note where rows are not the per-sample Jacobian: batch statistics, or a failed check."""
    for name, by in watch.coupled.items():
        costs[name].doubt = (
            f"{by} couples samples in this mode, so a row is the share of a sample's activations in the gradient, "
            "not a sample's own gradient"
        )
    sound = tuple(block for block in blocks if costs[block.name].rows)
    if not _problem(request, sound):
        return
    for block in sound:
        costs[block.name].doubt = _problem(request, (block,)) or costs[block.name].doubt


def _problem(request: Request, blocks: tuple[Block, ...]) -> str:
    """What the check of rows against gradients says, "" for nothing."""
    try:
        request.collect(blocks, verify=True)
    except CurvatureError as error:
        return str(error)
    return ""
