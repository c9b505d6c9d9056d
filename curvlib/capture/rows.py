"""Rows of a block from the recorded calls of its modules, by their adapters, and what an adapter may not get wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvlib.arrays import Deferred
from curvlib.capture.axes import ALONE, likely_axis, samples_first
from curvlib.errors import CaptureError, CurvatureError
from curvlib.factors import Factors, cat
from curvlib.factors.combine import stack_columns
from curvlib.layers import Block, Call, Use
from curvlib.layers.tree import mapped, wide

__all__ = ["Edge", "Pass", "Place", "Record", "block_factors", "gradients", "joined", "pull_back"]


class Place:
    """Where one output tensor of a call lies in the autograd graph.

    A module may return a view of what it computed, as `torch.nn.Linear` does for sequences. An in-place activation on
    the view then replaces the view's node in the graph, so the place of a view is that of its base.
    """

    def __init__(self, output: Tensor) -> None:
        base = output._base
        whole = base is not None and base.requires_grad and base.numel() == output.numel()
        self.tensor = base if whole and base is not None else output
        self.shape = tuple(output.shape)
        self._layout: tuple[Any, ...] | None = None
        if whole:
            offset = output.storage_offset() - self.tensor.storage_offset()
            self._layout = (tuple(self.tensor.shape), self.tensor.stride()), output.stride(), offset

    def release(self, followed: bool) -> GradientEdge | None:
        """Let the tensor go, and return the edge into the graph if it is to be followed."""
        edge = get_gradient_edge(self.tensor) if followed else None
        del self.tensor
        return edge

    def cotangent(self, gradient: Tensor) -> Tensor:
        """Cotangent of the output from the gradient that arrived at its place."""
        if self._layout is None:
            return gradient
        of_base, stride, offset = self._layout
        laid_out = torch.empty_strided(*of_base, dtype=gradient.dtype, device=gradient.device)
        return laid_out.copy_(gradient).as_strided(self.shape, stride, offset)


@dataclass(eq=False)
class Record:
    """One call of one module: what went in, where its outputs lie in the graph, what came back for them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[tuple[Tensor, int]]  # all in args and kwargs, and which version they were
    places: list[Place | None]  # one an output tensor, None where it needs no gradient
    edges: list[GradientEdge | None]  # None also where nothing will be sent there
    cotangents: list[Tensor | None]  # shape (columns, *output)
    coupled: bool = False  # whether the module made samples depend on each other
    positionwise: bool = False  # whether the module acts on the last axis alone

    axis: int | None = None  # where its one input and output have their samples; None where nothing fits
    alone: dict[int, Tensor] = field(default_factory=dict)  # cotangents of shared outputs while they are gathered

    def shapes(self) -> tuple[Sequence[int], Sequence[int]] | None:
        """Shapes of input and output, if there is one of each."""
        if len(self.inputs) != 1 or len(self.places) != 1 or self.places[0] is None:
            return None
        return self.inputs[0][0].shape, self.places[0].shape

    def forget(self) -> None:
        """Let go of what the rows were made of."""
        self.args, self.kwargs, self.inputs = (), {}, []
        self.cotangents = [None] * len(self.cotangents)

    def arrived(self, index: int, gradients: Sequence[Tensor | None]) -> None:
        """Keep the cotangents of one output from the gradients of all columns."""
        place = self.places[index]
        columns = [place.cotangent(one) for one in gradients if one is not None] if place is not None else []
        if columns:
            self.cotangents[index] = columns[0].unsqueeze(0) if len(columns) == 1 else torch.stack(columns)
        else:
            self.cotangents[index] = None

    def arrived_too(self, index: int, gradient: Tensor) -> None:
        """Add the gradient of one backward pass to what has arrived at an output already."""
        before = self.cotangents[index]
        self.arrived(index, [gradient])
        now = self.cotangents[index]
        self.cotangents[index] = now if before is None or now is None else before + now


Edge: TypeAlias = tuple[Record, int, GradientEdge]
"""A recorded call, the number of one of its outputs, and where that lies in the graph."""


@dataclass(eq=False)
class Pass:
    """One forward pass: the records of every use, and the Factors made of them."""

    number: int = 0
    expected: int = 0  # samples by the root module's input
    armed: bool = True  # whether curvature is taken
    records: dict[Use, list[Record]] = field(default_factory=dict)
    handed: dict[Use, list[Record]] = field(default_factory=dict)  # calls whose parameters get their gradient as rows
    withheld: set[Use] = field(default_factory=set)  # of all of them, those whose parameters were kept out of the graph
    samples: int = 0
    observations: int = 0
    factors: dict[str, Factors] = field(default_factory=dict)
    axes: dict[tuple[Use, int], int] = field(default_factory=dict)  # sample axis of each call, once it was told
    couplings: list[GradientEdge] = field(default_factory=list)  # inputs of modules that couple samples, until checked
    blocks: tuple[Block, ...] = ()  # what was watched at the time
    checks: Deferred | None = None  # of its outputs, where they were put off

    def keep(self, blocks: tuple[Block, ...]) -> None:
        """Let go what is not of these blocks.

        Raises
        ------
        CaptureError
            If it is of parameters that these blocks still hold, in another division.
        """
        if self.blocks is blocks:
            return
        gone = [block for block in self.blocks if not any(block is other for other in blocks)]
        still = {id(p) for block in blocks for p in block.parameters.values()}
        for block in gone:
            calls = any(use in self.records or use in self.handed for use in block.uses)
            if (block.name in self.factors or calls) and any(id(p) in still for p in block.parameters.values()):
                raise CaptureError(
                    f"block {block.name!r} was frozen or unfrozen in part between the forward passes of one step, so "
                    "their rows do not belong together: call optimizer.step() or optimizer.zero_grad() before that"
                )
            self.factors.pop(block.name, None)

    def settle(self, samples: int) -> None:
        """Take the number of samples, and with it find the sample axis of every call by what is known and by sizes."""
        self.samples = samples
        for use, calls in (*self.records.items(), *self.handed.items()):
            for number, call in enumerate(calls):
                if (shapes := call.shapes()) is not None:
                    known = self.axes.get((use, number))
                    call.axis = likely_axis(*shapes, samples, call.positionwise, known)
                    if call.axis is not None and samples > 1:  # one sample fits almost any axis, and proves nothing
                        self.axes.setdefault((use, number), call.axis)

    def release(self) -> None:
        """Let go of the graph: its hooks hold the records, so that an edge in them would keep it alive for ever."""
        self.couplings.clear()
        for calls in (*self.records.values(), *self.handed.values()):
            for call in calls:
                call.edges.clear()

    def edges(self) -> list[Edge]:
        """Every recorded output that has a place in the graph."""
        return [
            (call, place, edge)
            for calls in self.records.values()
            for call in calls
            for place, edge in enumerate(call.edges)
            if edge is not None
        ]


def block_factors(block: Block, current: Pass, records: Mapping[Use, list[Record]] | None = None) -> Factors | None:
    """Factors of `block` from a pass whose cotangents have arrived; None if its modules had no part in the outputs.

    Parameters
    ----------
    block, current
        Block and pass.
    records
        Calls to make rows of; those of the pass's curvature if None.

    Raises
    ------
    CaptureError
        If exact rows cannot be formed, or an adapter returned something else.
    """
    parts = [
        _rows(block, use, number, call, current)
        for use in block.uses
        for number, call in enumerate((current.records if records is None else records).get(use, ()))
        if any(cotangent is not None for cotangent in call.cotangents)
    ]
    if not parts:
        return None
    total = parts[0]
    for part in parts[1:]:
        total = total.add(part)
    return total


def _rows(block: Block, use: Use, number: int, call: Record, current: Pass) -> Factors:
    """Let a use's adapter turn one recorded call into rows, and check what it returns."""
    samples = current.samples
    where = f"block {block.name!r} ({type(use.module).__name__}, adapter {use.adapter.name})"
    if any(tensor._version != version for tensor, version in call.inputs):
        raise CaptureError(
            f"{where}: its input was changed in place after the call, so its rows cannot be formed; "
            "make the operation that changes it out of place"
        )
    if use.adapter.couples(use.module) != call.coupled:
        raise CaptureError(
            f"{where}: it went between training and eval mode after the forward pass, so its rows cannot be formed; "
            "change the mode after the step"
        )
    cotangents = tuple(None if cotangent is None else wide(cotangent) for cotangent in call.cotangents)
    arrived = next(cotangent for cotangent in cotangents if cotangent is not None)
    columns = int(arrived.shape[0])
    adapter = use.adapter

    def run(x: Any, g: Any, rows: int) -> Factors:
        # An adapter that reads parameters would otherwise keep a graph alive in the rows.
        with torch.no_grad():
            try:
                factors = adapter.function(use.module, x, g)
            except (CurvatureError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # the adapter may be anyone's, and the layer a subclass that it does not know
                kind = type(use.module).__name__
                raise CaptureError(
                    f"{where}: the adapter failed ({type(error).__name__}: {error}). If {kind} computes something else "
                    f"than the class that the adapter was written for, register one for it; the exact fallback serves "
                    f"any module: curvlib.layers.register({kind})(curvlib.layers.fallback)"
                ) from error
        _check_rows(factors, use, rows, arrived, where)
        return factors

    if adapter.whole_call:
        args, kwargs = mapped(wide, (call.args, call.kwargs))
        whole = Call(args, kwargs, samples)
        if adapter.columns:
            factors = run(whole, cotangents, samples * columns)
        else:
            one_column = [tuple(None if g is None else g[column] for g in cotangents) for column in range(columns)]
            factors = stack_columns([run(whole, g, samples) for g in one_column])
    else:
        x, g = _single(call, cotangents, where)
        if call.axis is None:
            raise CaptureError(
                f"{where}: its input has shape {tuple(x.shape)} and its output {tuple(g.shape[1:])}, the model's "
                f"output {samples} samples; the first axis must be the sample axis in all of them"
            )
        if call.axis == ALONE and (call.places[0] is None or g.ndim != len(call.places[0].shape) + 2):
            raise CaptureError(
                f"{where}: all samples share its output of shape {tuple(g.shape[1:])}, and the backward pass of the "
                "loss shows the sum of their cotangents alone: use Sampled or Exact, or give it a first axis of size 1"
            )
        x, g = samples_first(x, g, samples, call.axis)
        if adapter.columns:
            factors = run(x, g.transpose(0, 1), samples * columns)
        else:
            factors = stack_columns([run(x, one, samples) for one in g])
    if any(inner != outer for inner, outer in use.names.items()):
        factors = factors.renamed(use.names)
    return factors


def joined(parts: list[dict[str, Factors]], blocks: tuple[Block, ...], observations: int) -> dict[str, Factors]:
    """Rows of all passes, one pass after the other, for every block that has some."""
    joined = {}
    for block in blocks:
        rows = [one[block.name] for one in parts if block.name in one]
        if rows:
            whole = cat(rows)
            joined[block.name] = whole if whole.normalizer == observations else whole.with_samples(observations)
    return joined


def pull_back(edges: Sequence[Edge], outputs: Tensor, columns: Tensor, batched: bool) -> bool:
    """Send columns of output cotangents back to the outputs of recorded calls.

    Parameters
    ----------
    edges
        From `Pass.edges`.
    outputs
        The model's outputs, in the graph.
    columns
        Shape ``(columns, *outputs.shape)``.
    batched
        Whether to try to send all columns at once, vectorised, rather than one after the other.

    Returns
    -------
    bool
        Whether that may be tried again.

    Notes
    -----
    An output without a sample axis is shared by all samples, and what arrives there is their sum. Its cotangents are
    taken one sample at a time: exact, at the price of a backward pass for each.
    """
    try:
        _pull_back(edges, outputs, columns, batched)
    except RuntimeError:
        # A compiled backward, or a function of the user's, may have no vectorised form.
        if not batched:
            raise
        _pull_back(edges, outputs, columns, batched=False)
        return False
    return batched


def _pull_back(edges: Sequence[Edge], outputs: Tensor, columns: Tensor, batched: bool) -> None:
    samples = outputs.shape[0]
    apart = [place for place in edges if place[0].axis != ALONE]
    alone = [place for place in edges if place[0].axis == ALONE]
    if apart:
        found = gradients(outputs, [edge for _, _, edge in apart], columns, batched)
        for (call, index, _), *arrived in zip(apart, *found, strict=True):
            call.arrived(index, arrived)
    if alone:
        eye = torch.eye(samples, dtype=columns.dtype, device=columns.device)
        masks = eye.reshape(samples, samples, *([1] * (outputs.ndim - 1)))
        for column, one in enumerate(columns):
            found = gradients(outputs, [edge for _, _, edge in alone], masks * one, batched)
            for (call, index, _), *arrived in zip(alone, *found, strict=True):
                call.arrived(index, arrived)
                mine, before = call.cotangents[index], call.alone.get(index)
                if mine is not None:
                    mine = mine[None]
                    call.alone[index] = mine if column == 0 or before is None else torch.cat([before, mine])
        for call, index, _ in alone:
            call.cotangents[index] = call.alone.pop(index, None)


def gradients(
    outputs: Tensor, edges: list[GradientEdge], columns: Tensor, batched: bool
) -> list[tuple[Tensor | None, ...]]:
    """Gradients at the edges, one tuple a column."""
    if not batched or columns.shape[0] == 1:
        return [torch.autograd.grad(outputs, edges, one, retain_graph=True, allow_unused=True) for one in columns]
    found = torch.autograd.grad(outputs, edges, columns, retain_graph=True, allow_unused=True, is_grads_batched=True)
    return [tuple(None if g is None else g[column] for g in found) for column in range(columns.shape[0])]


def _single(call: Record, cotangents: tuple[Tensor | None, ...], where: str) -> tuple[Tensor, Tensor]:
    if len(call.inputs) != 1 or len(cotangents) != 1:
        raise CaptureError(
            f"{where}: the call had {len(call.inputs)} input tensors and {len(cotangents)} output tensors, and the "
            "adapter takes one of each; register it with whole_call=True to see them all"
        )
    return wide(call.inputs[0][0]), cast(Tensor, cotangents[0])


def _check_rows(factors: Any, use: Use, rows: int, like: Tensor, where: str) -> None:
    if not isinstance(factors, Factors):
        raise CaptureError(f"{where} returned {type(factors).__name__}; an adapter returns Factors")
    if len(factors) != rows:
        raise CaptureError(f"{where} returned {len(factors)} rows where the batch has {rows}")
    shapes, expected = factors.shapes, _shapes(use)
    if shapes != expected:
        raise CaptureError(f"{where} returned rows for parameters {shapes}; the trainable ones are {expected}")
    one = factors.like
    if one.dtype != like.dtype or one.device != like.device:
        raise CaptureError(
            f"{where} returned rows of {one.dtype} on {one.device}; its cotangents are {like.dtype} on {like.device}"
        )


def _shapes(use: Use) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter that the rows of a use are of."""
    own = use.module._parameters
    if all(name in own for name in use.names):
        return {name: tuple(p.shape) for name in use.names if (p := own[name]) is not None}
    return {name: tuple(p.shape) for name, p in use.module.named_parameters() if name in use.names}
