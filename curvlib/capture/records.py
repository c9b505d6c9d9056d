"""What a pass leaves behind: where outputs lie in the graph, the calls that were seen, and the pass as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvlib.arrays import Deferred
from curvlib.capture.axes import likely_axis, spread
from curvlib.capture.loans import Loan
from curvlib.errors import CaptureError
from curvlib.factors import Factors
from curvlib.layers import Block, Use
from curvlib.layers.tree import mapped, tensors

__all__ = ["Edge", "Pass", "Place", "Record", "recorded"]


class Place:
    """Where one output tensor of a call lies in the autograd graph.

    A module may return a view of what it computed, as `torch.nn.Linear` does for sequences. An in-place activation on
    the view then replaces the view's node in the graph, so the place of a view is that of its base.
    """

    __slots__ = ("_layout", "shape", "tensor")

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
        if gradient.stride() != of_base[1]:
            gradient = torch.empty_strided(*of_base, dtype=gradient.dtype, device=gradient.device).copy_(gradient)
        return gradient.as_strided(self.shape, stride, offset + gradient.storage_offset())


@dataclass(eq=False, slots=True)
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

    saved: Any = None  # what the adapter looked up when the call ended
    made: Factors | None = None  # its rows, where they were made as soon as the cotangent was there

    axis: int | None = None  # where its one input and output have their samples; None where nothing fits
    alone: dict[int, Tensor] = field(default_factory=dict)  # cotangents of shared outputs while they are gathered

    def shapes(self) -> tuple[Sequence[int], Sequence[int]] | None:
        """Shapes of input and output, if there is one of each."""
        if len(self.inputs) != 1 or len(self.places) != 1 or self.places[0] is None:
            return None
        return self.inputs[0][0].shape, self.places[0].shape

    def forget(self) -> None:
        """Let go of rows, and of what they were made of."""
        self.args, self.kwargs, self.inputs, self.saved, self.made = (), {}, [], None, None
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
        """Add the gradient of one backward pass to what has arrived at an output already.

        Raises
        ------
        CaptureError
            If rows were made of that, so that it is gone.
        """
        if self.made is not None:
            raise CaptureError(
                "backward goes through one forward pass a second time: the first time has to keep the graph, by "
                "backward(retain_graph=True)"
            )
        place, before = self.places[index], self.cotangents[index]
        if place is not None:
            now = place.cotangent(gradient).unsqueeze(0)
            self.cotangents[index] = now if before is None else before + now


def recorded(
    use: Use, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, samples: int
) -> tuple[Record | None, Any]:
    """Record of a call that has just ended, and the output that it goes on with; no record if it needs no gradient.

    Parameters
    ----------
    use, module
        Use, and its module.
    args, kwargs, output
        Of the call.
    samples
        Of the pass, by the root module's input.
    """
    adapter, results = use.adapter, tensors(output)
    needed = 0
    for tensor in results:
        needed += tensor.requires_grad
    if not needed:
        return None, output
    # Attached to the graph, whose hooks hold the record, it would keep both alive for ever.
    saved = None if adapter.saved is None else mapped(Tensor.detach, adapter.saved(module, output))
    if needed > 1:
        # One output may be made of another, as the hidden state of an LSTM cell is of its cell state. What arrives at
        # the other one would hold that too; at a copy it is the cotangent alone.
        output = mapped(lambda tensor: tensor.clone() if tensor.requires_grad else tensor, output)
        results = tensors(output)
    if len(args) == 1 and type(args[0]) is Tensor and not kwargs:  # as nearly all are
        inputs = [args[0].detach()]
        args, kwargs = (inputs[0],), {}
    else:
        args, kwargs = mapped(Tensor.detach, args), mapped(Tensor.detach, kwargs)
        inputs = tensors((args, kwargs))
    if adapter.positionwise and _single(results[0]) and all(map(_single, (*results, *inputs))):
        # One row for all samples (positions, say): broadcast here, so that every sample has its own cotangent.
        one_each = partial(spread, samples=max(samples, 1))
        output, args, kwargs = mapped(one_each, (output, args, kwargs))
        results, inputs = tensors(output), tensors((args, kwargs))
    call = Record(
        args,
        kwargs,
        inputs=[(tensor, tensor._version) for tensor in inputs],
        places=[Place(tensor) if tensor.requires_grad else None for tensor in results],
        edges=[],
        cotangents=[None] * len(results),
        coupled=adapter.couples(module),
        positionwise=adapter.positionwise,
        saved=saved,
    )
    return call, output


def _single(tensor: Tensor) -> bool:
    """Whether the first axis has size 1."""
    return tensor.ndim > 0 and tensor.shape[0] == 1


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
    copies: dict[Any, Tensor] = field(default_factory=dict)  # of inputs whose rows outlast the step, by where they lie
    lent: dict[str, Loan] = field(default_factory=dict)  # inputs of rows that do not, by block

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

    def calls(self, use: Use) -> int:
        """How often a use was recorded, for the curvature or for the gradient."""
        return max(len(self.records.get(use, ())), len(self.handed.get(use, ())))

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
