"""Hooks that record a model's passes inside the user's own loop.

A forward hook on each block's module stores its input and the *edge* of its output in the autograd graph. An edge,
unlike the output tensor, survives an in-place activation that follows. When the root module returns, sampled and exact
Fishers need only the outputs: their cotangents are pulled back to the edges at once, inside the forward pass. The
empirical Fisher waits for the user's own backward, through tensor hooks.

A pass is held by the graph of its own outputs, so a forward pass that no backward follows vanishes with that graph.

Blocks whose gradient is *handed over* as rows keep their parameters out of the graph while their modules run, so that
backward makes no weight gradient for them: what arrives at their outputs is kept instead (`curvlib.capture.handover`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from curvlib.capture.handover import GradientRows, Taken, Withholding
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
        self._withholding = Withholding(self._hands_over)
        self._paused = False
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
        self._withholding.detach()
        self.clear()

    def hand_over(self, names: Collection[str]) -> None:
        """Take the gradients of these blocks as rows from now on; their parameters' `.grad` stays None.

        Blocks of several modules, of modules that compute their parameters, or whose samples depend on each other are
        left as they are, as is a pass that is checked.
        """
        for block in self.blocks:
            if block.name in names:
                self._withholding.add(block)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let passes through unseen, with ordinary gradients."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

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
        return self.taken().factors

    def taken(self) -> Taken:
        """Return what `take` returns, and the gradients of the blocks that hand theirs over, as rows."""
        # Backward visits the last pass first; rows are in the order of the forward passes.
        passes, self._used = sorted(self._used, key=lambda one: one.number), []
        observations = sum(one.observations for one in passes)
        scale = 1.0
        if isinstance(self.fisher, Empirical):
            armed = [one for one in passes if one.armed]
            scale = self.fisher.scale(observations) if armed else 1.0
            for one in armed:
                one.factors = {name: rows.scaled(scale) for name, rows in self._factors(one, one.records).items()}
        factors = _joined([one.factors for one in passes], self.blocks, observations)
        gradients = {}
        for name, rows in _joined(
            [self._factors(one, one.handed) for one in passes], self.blocks, observations
        ).items():
            gradients[name] = GradientRows(rows, float(observations))
        for name in self._withholding.names:
            # The loss's own rows are its gradient too, up to what scaled them.
            if self.fisher.needs_backward and name in factors and all(one.armed for one in passes):
                gradients[name] = GradientRows(factors[name], observations / scale)
        return Taken(factors, gradients)

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _listening(self) -> bool:
        return not (self._paused or self._pulling_back) and torch.is_grad_enabled()

    def _hands_over(self) -> bool:
        return self._current is not None and not self._unchecked and self._listening()

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._current = None
        armed = self.armed
        if self._listening() and (armed or self._withholding.names):
            sizes = [int(tensor.shape[0]) for tensor in tensors((args, kwargs)) if tensor.ndim]
            self._current = Pass(next(self._numbers), expected=sizes[0] if sizes else 0, axes=self._axes, armed=armed)

    def _recorder(self, use: Use) -> Callable[..., Any]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            handed = self._withholding.just_withheld(module)
            if self._current is None or not self._listening() or not (handed or self._current.armed):
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
            curvature = self._current.armed
            # One record serves both where the loss's own rows are the curvature's.
            both = curvature and self.fisher.needs_backward
            of_loss = call if both or not curvature else replace(call, cotangents=[None] * len(results))
            for index, place in enumerate(places):
                if place is not None and (handed or both):
                    place.tensor.register_hook(self._keeper(of_loss, index))  # type: ignore[no-untyped-call]  # in torch
                call.edges.append(None if place is None else place.release())
            if curvature:
                self._current.records.setdefault(use, []).append(call)
            if handed and not both:
                self._current.handed.setdefault(use, []).append(of_loss)
            return output

        return record

    def _coupling(self, adapter: Adapter) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._current is not None and self._current.armed and self._unchecked and adapter.couples(module):
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
            if self._unchecked and current.armed and current.samples > self._checked:
                verify(self.blocks, current, outputs)
                # A single sample does not show where samples are; the first batch of more is checked too.
                self._checked, self._unchecked = 1, current.samples == 1
            current.couplings.clear()
            if current.armed and not self.fisher.needs_backward:
                self._pull_back(current, outputs)
        finally:
            self._pulling_back = False
        if current.armed and not self.fisher.needs_backward:
            current.factors = self._factors(current, current.records)
            current.records.clear()
        # Tensor hooks do the rest of the work, and an edge would keep the graph alive.
        for calls in (*current.records.values(), *current.handed.values()):
            for call in calls:
                call.edges.clear()
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

    def _factors(self, current: Pass, records: Mapping[Use, list[Record]]) -> dict[str, Factors]:
        self._pulling_back = True  # the fallback calls modules again, which is no pass
        try:
            made = {block.name: block_factors(block, current, records) for block in self.blocks} if records else {}
        finally:
            self._pulling_back = False
        return {name: factors for name, factors in made.items() if factors is not None}


def _joined(parts: list[dict[str, Factors]], blocks: tuple[Block, ...], observations: int) -> dict[str, Factors]:
    """Rows of all passes, one pass after the other, for every block that has some."""
    joined = {}
    for block in blocks:
        rows = [one[block.name] for one in parts if block.name in one]
        if rows:
            whole = cat(rows)
            joined[block.name] = whole if whole.normalizer == observations else whole.with_samples(observations)
    return joined


def _spread(tensor: Tensor, samples: int) -> Tensor:
    return tensor.expand(samples, *tensor.shape[1:])
