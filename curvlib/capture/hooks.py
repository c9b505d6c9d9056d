"""Hooks that record a model's passes inside the user's own loop.

A forward hook on each block's module stores its input and the *edge* of its output in the autograd graph. An edge,
unlike the output tensor, survives an in-place activation that follows. When the root module returns, sampled and exact
Fishers need only the outputs: their cotangents are pulled back to the edges at once, inside the forward pass. The
empirical Fisher waits for the user's own backward, through tensor hooks.

A pass is held by the graph of its own outputs, so a forward pass that no backward follows vanishes with that graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from curvlib.capture.rows import Pass, Place, Record, block_factors, pull_back
from curvlib.capture.verify import verify
from curvlib.errors import CaptureError
from curvlib.factors import Factors, cat
from curvlib.fisher import Empirical, Fisher
from curvlib.layers import Adapter, Block, Use, adapter_for
from curvlib.layers.tree import mapped, tensors

__all__ = ["Capture", "Output"]

Output = Callable[[Any], Tensor]
"""Picks the tensor that the likelihood is about out of what the model returns."""


class Capture:
    """Hooks on a model that turn its passes into Factors for each block.

    Parameters
    ----------
    model
        The root module; curvature is taken of calls of this module.
    blocks
        The blocks to capture.
    fisher
        Which cotangents define the curvature.
    output
        Picks the tensor that the likelihood is about, first axis samples, out of what the model returns.
    generator
        Source of the sampled labels; None for torch's default.
    every_pass
        Whether forward passes count without a backward pass.
    check
        Whether the first pass checks that rows and gradients agree, for a few more backward passes, once.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: tuple[Block, ...],
        fisher: Fisher,
        output: Output | None = None,
        generator: torch.Generator | None = None,
        every_pass: bool = False,
        check: bool = True,
    ) -> None:
        self.blocks = blocks
        self.fisher = fisher
        self.generator = generator
        self.armed = True
        self._output = output
        self._every_pass = every_pass
        self._unchecked = check
        self._checked = 0  # samples of the largest pass that was checked, while there may be another check
        self._numbers = itertools.count()
        self._current: Pass | None = None
        self._used: list[Pass] = []
        self._pulling_back = False
        self._axes: dict[tuple[Use, int], int] = {}
        self._handles = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for block in blocks:
            for use in block.uses:
                self._handles.append(use.module.register_forward_hook(self._recorder(use), with_kwargs=True))
        for module in model.modules():
            adapter = adapter_for(type(module))
            if adapter is not None and adapter.couples_samples:
                self._handles.append(module.register_forward_hook(self._coupling(adapter), with_kwargs=True))
        # Last, so that it runs after the hook of a root module that is a block itself.
        self._handles.append(model.register_forward_hook(self._finish))

    def detach(self) -> None:
        """Remove every hook; the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def clear(self) -> None:
        """Forget what was captured and not yet taken."""
        self._current = None
        self._used.clear()

    def take(self) -> dict[str, Factors]:
        """Factors of every block over all passes that a backward went through since the last call.

        Returns
        -------
        dict
            Block name to Factors; empty if there was no such pass. A block whose module was not called is missing.

        Raises
        ------
        CaptureError
            If what was recorded makes no exact rows.
        """
        # Backward visits the last pass first; rows are in the order of the forward passes.
        passes, self._used = sorted(self._used, key=lambda one: one.number), []
        observations = sum(one.observations for one in passes)
        if isinstance(self.fisher, Empirical):
            scale = self.fisher.scale(observations)
            for one in passes:
                one.factors = {name: rows.scaled(scale) for name, rows in self._factors(one).items()}
        taken = {}
        for block in self.blocks:
            parts = [one.factors[block.name] for one in passes if block.name in one.factors]
            if parts:
                taken[block.name] = cat(parts).with_samples(observations)
        return taken

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _listening(self) -> bool:
        return self.armed and not self._pulling_back and torch.is_grad_enabled()

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._current = None
        if self._listening():
            sizes = [int(tensor.shape[0]) for tensor in tensors((args, kwargs)) if tensor.ndim]
            self._current = Pass(next(self._numbers), expected=sizes[0] if sizes else 0, axes=self._axes)

    def _recorder(self, use: Use) -> Callable[..., Any]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._current is None or not self._listening():
                return None
            results = tensors(output)
            needed = sum(tensor.requires_grad for tensor in results)
            if not needed:
                return None
            if needed > 1:
                # One output may be made of another, as the hidden state of an LSTM cell is of its cell state. What
                # arrives at the other one would hold that too; at a copy it is the cotangent alone.
                output = mapped(lambda tensor: tensor.clone() if tensor.requires_grad else tensor, output)
                results = tensors(output)
            inputs = tensors((args, kwargs))
            if use.adapter.positionwise and all(tensor.shape[:1] == (1,) for tensor in (*inputs, *results)):
                # One row for all samples (positions, say): broadcast here, so that every sample has its own cotangent.
                spread = partial(_spread, samples=max(self._current.expected, 1))
                output, args, kwargs = mapped(spread, (output, args, kwargs))
                results = tensors(output)
            args, kwargs = mapped(Tensor.detach, (args, kwargs))
            places = [Place(tensor) if tensor.requires_grad else None for tensor in results]
            call = Record(
                args,
                kwargs,
                versions=[(tensor.detach(), tensor._version) for tensor in inputs],
                places=places,
                edges=[],
                cotangents=[None] * len(results),
                coupled=use.adapter.couples(module),
                positionwise=use.adapter.positionwise,
            )
            for index, place in enumerate(places):
                if place is not None and self.fisher.needs_backward:
                    place.tensor.register_hook(self._keeper(call, index))  # type: ignore[no-untyped-call]  # in torch
                call.edges.append(None if place is None else place.release())
            self._current.records.setdefault(use, []).append(call)
            return output

        return record

    def _coupling(self, adapter: Adapter) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._current is not None and self._unchecked and self._listening() and adapter.couples(module):
                inputs = [tensor for tensor in tensors((args, kwargs)) if tensor.requires_grad]
                self._current.couplings += [get_gradient_edge(tensor) for tensor in inputs]

        return note

    def _finish(self, module: nn.Module, args: Any, output: Any) -> None:
        current, self._current = self._current, None
        if current is None or not self._listening():
            return
        outputs = self._select(output)
        if not outputs.requires_grad:
            return
        current.observations = self.fisher.observations(outputs)
        current.settle(int(outputs.shape[0]))
        self._pulling_back = True
        try:
            if self._unchecked and current.samples > self._checked:
                verify(self.blocks, current, outputs)
                # A single sample does not show where samples are; the first batch of more is checked too.
                self._checked, self._unchecked = 1, current.samples == 1
            current.couplings.clear()
            if not self.fisher.needs_backward:
                self._pull_back(current, outputs)
        finally:
            self._pulling_back = False
        if self.fisher.needs_backward:
            for call, _, _ in current.edges():
                call.edges.clear()  # tensor hooks do the work now, and an edge would keep the graph alive
        else:
            current.factors = self._factors(current)
            current.records.clear()
        if self._every_pass:
            self._used.append(current)
        else:
            # Whatever the model returns may be what the loss is made of; `output` may have made a new tensor.
            mark = self._marker(current)
            for tensor in tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(mark)  # type: ignore[no-untyped-call]  # untyped in torch

    def _select(self, output: Any) -> Tensor:
        if self._output is not None:
            output = self._output(output)
        if not isinstance(output, Tensor):
            raise CaptureError(
                f"the model returns {type(output).__name__}, not a tensor: say which tensor the likelihood is about, "
                "as in output=lambda result: result.logits"
            )
        if output.ndim == 0 or output.shape[0] == 0:
            raise CaptureError(
                f"the model's output has shape {tuple(output.shape)}: its first axis must be the samples, at least "
                "one; skip empty batches"
            )
        return output

    def _keeper(self, call: Record, index: int) -> Callable[[Tensor], None]:
        def keep(gradient: Tensor) -> None:
            if not self._pulling_back:
                before = call.cotangents[index]
                call.arrived(index, [gradient.detach()])
                now = call.cotangents[index]
                call.cotangents[index] = now if before is None or now is None else before + now

        return keep

    def _marker(self, current: Pass) -> Callable[[Tensor], None]:
        def mark(gradient: Tensor) -> None:
            if not self._pulling_back and not any(one is current for one in self._used):
                self._used.append(current)

        return mark

    # -- cotangents and rows ------------------------------------------------------------------------------------------

    def _pull_back(self, current: Pass, outputs: Tensor) -> None:
        """Send all columns of output cotangents back to the outputs of every recorded call."""
        if not current.edges():
            return
        columns = self.fisher.cotangents(outputs.detach(), self.generator)
        if columns.shape[1:] != outputs.shape:
            raise CaptureError(
                f"{self.fisher} gave cotangents of shape {tuple(columns.shape)} for outputs of shape "
                f"{tuple(outputs.shape)}; they need shape (columns, *outputs)"
            )
        pull_back(current, outputs, columns, batched=True)

    def _factors(self, current: Pass) -> dict[str, Factors]:
        self._pulling_back = True  # the fallback calls modules again, which is no pass
        try:
            made = {block.name: block_factors(block, current) for block in self.blocks}
        finally:
            self._pulling_back = False
        return {name: factors for name, factors in made.items() if factors is not None}


def _spread(tensor: Tensor, samples: int) -> Tensor:
    return tensor.expand(samples, *tensor.shape[1:])
