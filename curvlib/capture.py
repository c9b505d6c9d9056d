"""From a forward and a backward pass to the Factors of every block.

A forward hook on each block's module stores its input and the *edge* of its output in the autograd graph. An edge,
unlike the output tensor, survives an in-place activation that follows. When the root module returns, sampled and exact
Fishers need only the outputs: their cotangents are pulled back to the edges at once, inside the forward pass. The
empirical Fisher waits for the user's own backward, through tensor hooks.

A pass is held by the graph of its own outputs, so a forward pass that no backward follows vanishes with that graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from curvlib.errors import CaptureError, ConfigurationError
from curvlib.factors import Factors
from curvlib.factors import cat as cat_factors
from curvlib.factors.combine import stack_columns
from curvlib.fisher import Empirical, Fisher
from curvlib.layers import Block, Call, Use, partition

__all__ = ["Capture", "Output", "collect"]

Output = Callable[[Any], Tensor]
"""Picks the tensor that the likelihood is about out of what the model returns."""


@dataclass(eq=False)
class _Record:
    """One call of one module: what went in, where its outputs lie in the graph, what came back for them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[tuple[Tensor, int]]
    edges: list[GradientEdge | None]
    cotangents: list[Tensor | None]  # one an output tensor, shape (n, columns, *output)


@dataclass(eq=False)
class _Pass:
    """One forward pass: the records of every use, and the Factors made of them."""

    records: dict[Use, list[_Record]] = field(default_factory=dict)
    samples: int = 0
    observations: int = 0
    factors: dict[str, Factors] = field(default_factory=dict)


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
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: tuple[Block, ...],
        fisher: Fisher,
        output: Output | None = None,
        generator: torch.Generator | None = None,
        every_pass: bool = False,
    ) -> None:
        self.blocks = blocks
        self.fisher = fisher
        self.generator = generator
        self.armed = True
        self._output = output
        self._every_pass = every_pass
        self._current: _Pass | None = None
        self._used: list[_Pass] = []
        self._pulling_back = False
        self._handles = [model.register_forward_pre_hook(self._begin)]
        for block in blocks:
            for use in block.uses:
                self._handles.append(use.module.register_forward_hook(self._recorder(use), with_kwargs=True))
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
        passes, self._used = self._used, []
        observations = sum(one.observations for one in passes)
        if isinstance(self.fisher, Empirical):
            scale = self.fisher.scale(observations)
            for one in passes:
                one.factors = {name: rows.scaled(scale) for name, rows in self._factors(one).items()}
        taken = {}
        for block in self.blocks:
            parts = [one.factors[block.name] for one in passes if block.name in one.factors]
            if parts:
                taken[block.name] = cat_factors(parts).with_samples(observations)
        return taken

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _listening(self) -> bool:
        return self.armed and not self._pulling_back and torch.is_grad_enabled()

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._current = _Pass() if self._listening() else None

    def _recorder(self, use: Use) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            if self._current is None or not self._listening() or not any(t.requires_grad for t in tensors):
                return
            inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            args, kwargs = pytree.tree_map(_detached, (args, kwargs))
            call = _Record(
                args,
                kwargs,
                versions=[(tensor.detach(), tensor._version) for tensor in inputs],
                edges=[get_gradient_edge(tensor) if tensor.requires_grad else None for tensor in tensors],
                cotangents=[None] * len(tensors),
            )
            self._current.records.setdefault(use, []).append(call)
            if self.fisher.needs_backward:
                call.edges.clear()  # tensor hooks do the work, and an edge would keep its graph alive
                for place, tensor in enumerate(tensors):
                    if tensor.requires_grad:
                        tensor.register_hook(_keeper(call, place))  # type: ignore[no-untyped-call]  # untyped in torch

        return record

    def _finish(self, module: nn.Module, args: Any, output: Any) -> None:
        current, self._current = self._current, None
        if current is None or not self._listening():
            return
        outputs = self._select(output)
        if not outputs.requires_grad:
            return
        current.observations = self.fisher.observations(outputs)
        current.samples = int(outputs.shape[0])
        if not self.fisher.needs_backward:
            self._pulling_back = True
            try:
                self._pull_back(current, outputs)
            finally:
                self._pulling_back = False
            current.factors = self._factors(current)
            current.records.clear()
        if self._every_pass:
            self._used.append(current)
        else:
            outputs.register_hook(self._marker(current))  # type: ignore[no-untyped-call]  # untyped in torch

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

    def _marker(self, current: _Pass) -> Callable[[Tensor], None]:
        def mark(gradient: Tensor) -> None:
            if not self._pulling_back and not any(one is current for one in self._used):
                self._used.append(current)

        return mark

    # -- cotangents and rows ------------------------------------------------------------------------------------------

    def _pull_back(self, current: _Pass, outputs: Tensor) -> None:
        """Send all columns of output cotangents back to the outputs of every recorded call."""
        places = [
            (call, place, edge)
            for calls in current.records.values()
            for call in calls
            for place, edge in enumerate(call.edges)
            if edge is not None
        ]
        if not places:
            return
        columns = self.fisher.cotangents(outputs.detach(), self.generator)
        if columns.shape[1:] != outputs.shape:
            raise CaptureError(
                f"{self.fisher} gave cotangents of shape {tuple(columns.shape)} for outputs of shape "
                f"{tuple(outputs.shape)}; they need shape (columns, *outputs)"
            )
        edges = [edge for _, _, edge in places]
        if columns.shape[0] == 1:
            gradients: Any = torch.autograd.grad(outputs, edges, columns[0], retain_graph=True, allow_unused=True)
            gradients = [None if gradient is None else gradient[:, None] for gradient in gradients]
        else:
            gradients = torch.autograd.grad(
                outputs, edges, columns, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
            gradients = [None if gradient is None else gradient.movedim(0, 1) for gradient in gradients]
        for (call, place, _), gradient in zip(places, gradients, strict=True):
            call.cotangents[place] = gradient

    def _factors(self, current: _Pass) -> dict[str, Factors]:
        factors = {}
        for block in self.blocks:
            parts = [
                _rows(block, use, call, current.samples)
                for use in block.uses
                for call in current.records.get(use, ())
                if any(cotangent is not None for cotangent in call.cotangents)
            ]
            if parts:
                total = parts[0]
                for part in parts[1:]:
                    total = total.add(part)
                factors[block.name] = total
        return factors


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _keeper(call: _Record, place: int) -> Callable[[Tensor], None]:
    def keep(gradient: Tensor) -> None:
        before, now = call.cotangents[place], gradient.detach()[:, None]
        call.cotangents[place] = now if before is None else before + now

    return keep


def _rows(block: Block, use: Use, call: _Record, samples: int) -> Factors:
    """Let a use's adapter turn one recorded call into rows, and check what it returns."""
    where = f"block {block.name!r} ({type(use.module).__name__}, adapter {use.adapter.name})"
    if any(tensor._version != version for tensor, version in call.versions):
        raise CaptureError(
            f"{where}: its input was changed in place after the call, so its rows cannot be formed; "
            "make the operation that changes it out of place"
        )
    given = [cotangent for cotangent in call.cotangents if cotangent is not None]
    for cotangent in given:
        if cotangent.shape[0] != samples:
            raise CaptureError(
                f"{where}: its output has {cotangent.shape[0]} rows on the first axis, the model's output {samples} "
                "samples; the first axis must be the sample axis in both"
            )
    columns = given[0].shape[1]
    cotangents = [None if cotangent is None else _wide(cotangent) for cotangent in call.cotangents]
    function = use.adapter.function
    if use.adapter.whole_call:
        whole = Call(pytree.tree_map(_wide, call.args), pytree.tree_map(_wide, call.kwargs), samples)
        factors = stack_columns(
            [
                function(use.module, whole, tuple(None if g is None else g[:, column] for g in cotangents))
                for column in range(columns)
            ]
        )
    else:
        x, g = _single(call, cotangents, where)
        if x.shape[0] != samples:
            raise CaptureError(
                f"{where}: its input has shape {tuple(x.shape)}, the model's output {samples} samples; "
                "the first axis must be the sample axis in both"
            )
        if use.adapter.columns:
            factors = function(use.module, x, g)
        else:
            factors = stack_columns([function(use.module, x, g[:, column]) for column in range(columns)])
    _check_rows(factors, use, samples * columns, where)
    if any(inner != outer for inner, outer in use.names.items()):
        factors = factors.renamed(use.names)
    return factors


def _single(call: _Record, cotangents: list[Tensor | None], where: str) -> tuple[Tensor, Tensor]:
    inputs = [leaf for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
    if len(inputs) != 1 or len(cotangents) != 1:
        raise CaptureError(
            f"{where}: the call had {len(inputs)} input tensors and {len(cotangents)} output tensors, and the adapter "
            "takes one of each; register it with whole_call=True to see them all"
        )
    return _wide(inputs[0]), cast(Tensor, cotangents[0])


def _wide(leaf: Any) -> Any:
    """Half-precision tensors in float32: products of them are accumulated there."""
    if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.itemsize < 4:
        return leaf.float()
    return leaf


def _check_rows(factors: Any, use: Use, rows: int, where: str) -> None:
    if not isinstance(factors, Factors):
        raise CaptureError(f"{where} returned {type(factors).__name__}; an adapter returns Factors")
    if len(factors) != rows:
        raise CaptureError(f"{where} returned {len(factors)} rows where the batch has {rows}")
    expected = {name: tuple(p.shape) for name, p in use.module.named_parameters() if p.requires_grad}
    if factors.shapes != expected and sorted(factors.shapes.items()) != sorted(expected.items()):
        raise CaptureError(f"{where} returned rows for parameters {factors.shapes}; the trainable ones are {expected}")


def collect(
    model: nn.Module,
    fisher: Fisher,
    *args: Any,
    loss: Callable[[Any], Tensor] | None = None,
    output: Output | None = None,
    generator: torch.Generator | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Factors]:
    """Factors of every block of `model` on one batch, without an optimizer.

    Parameters
    ----------
    model
        Any module whose output's first axis is the samples.
    fisher
        Which cotangents define the curvature.
    *args, kwargs
        What the model is called with.
    loss
        For the empirical Fisher: the loss as a function of what the model returns.
    output
        Picks the tensor that the likelihood is about.
    generator
        Source of the sampled labels.

    Returns
    -------
    dict
        Block name to Factors. Parameters, their `.grad` and the model's hooks are as before.

    Raises
    ------
    ConfigurationError
        If the empirical Fisher is asked for without a loss.
    CaptureError
        If the rows cannot be formed exactly.
    """
    if fisher.needs_backward and loss is None:
        raise ConfigurationError("the empirical Fisher needs loss=, a function of what the model returns")
    capture = Capture(model, partition(model).blocks, fisher, output, generator, every_pass=True)
    try:
        with torch.enable_grad():
            result = model(*args, **(kwargs or {}))
            if fisher.needs_backward and loss is not None:
                parameters = [p for p in model.parameters() if p.requires_grad]
                torch.autograd.grad(loss(result), parameters, allow_unused=True)
        return capture.take()
    finally:
        capture.detach()
