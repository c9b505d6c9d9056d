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
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from curvlib.arrays import deferred
from curvlib.capture.attached import Hooks, Silence, owners
from curvlib.capture.autocast import without_autocast
from curvlib.capture.handover import Taken, Withholding, gradient_rows, rooted
from curvlib.capture.making import RowMaker
from curvlib.capture.outputs import Output, likelihood_outputs, output_cotangents
from curvlib.capture.pulling import pull_back
from curvlib.capture.records import Pass, Record, recorded
from curvlib.capture.rows import joined
from curvlib.capture.verify import verify
from curvlib.errors import NonFiniteError
from curvlib.factors import Factors, Plan
from curvlib.fisher import Empirical, Fisher
from curvlib.layers import Adapter, Block, Use, adapter_for
from curvlib.layers.tree import tensors

__all__ = ["Capture", "Output"]


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
    plan
        Which exact routes the Factors take; by the cost model if None.
    before
        Called before each forward pass that is looked at; it may change what is watched.
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
        plan: Plan | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.blocks = blocks
        self.fisher = fisher
        self.generator = generator
        self.armed = True
        self.lenient = False  # whether a pass that is not finite is left out instead of refused
        self.deferring = False  # whether the check of outputs is left to whoever takes the rows
        self.rows = RowMaker(Plan() if plan is None else plan)
        self._output = output
        self._every_pass = every_pass
        self._unchecked = check
        self._checked = 0  # samples of the largest pass that was checked, while there may be another check
        self._numbers = itertools.count()
        self._current: Pass | None = None
        self._used: list[Pass] = []
        self._axes: dict[tuple[Use, int], int] = {}
        self._model = model
        self._before = before
        self._check = check
        self._withholding = Withholding(self._hands_over)
        self._paused = False
        self._batched = True
        self._silence = Silence()
        for other in owners(model):
            if isinstance(other, Capture):
                other._silence = self._silence
        self._root, self._hooks = Hooks(self), Hooks(self)
        self._root.before(model, self._begin, with_kwargs=True)
        self._attach()

    def _attach(self) -> None:
        for block in self.blocks:
            for use in block.uses:
                # Before the user's own hooks: what these make of an output is a part of the graph behind it.
                self._hooks.after(use.module, self._recorder(block, use), with_kwargs=True, prepend=True)
        for module in self._model.modules():
            adapter = adapter_for(type(module))
            if adapter is not None and adapter.couples_samples:
                self._hooks.after(module, self._coupling(adapter), with_kwargs=True)
        self._hooks.after(self._model, self._finish)  # after the hook of a root module that is a block itself
        self._hooks.after(self._model, self._abandon, always_call=True)

    def watch(self, blocks: tuple[Block, ...]) -> None:
        """Capture these blocks from now on; passes go on counting for those that stay, the same objects."""
        staying = [block for block in blocks if any(block is other for other in self.blocks)]
        handed, always = self._withholding.of(staying)
        self._hooks.remove()
        self._withholding.detach()
        self.blocks = blocks
        self._attach()
        self.hand_over(always, with_curvature=handed)
        self._checked, self._unchecked = 0, self._check
        self.rows.forget(blocks)

    def detach(self) -> None:
        """Remove every hook; the model is as it was."""
        self._root.remove()
        self._hooks.remove()
        self._withholding.detach()
        self.clear()

    @property
    def detached(self) -> bool:
        """Whether the hooks were removed."""
        return not self._root

    @property
    def waiting(self) -> bool:
        """Whether something was captured and not yet taken."""
        return bool(self._used)

    def handed_over(self, always: bool = False) -> Collection[str]:
        """Names of the blocks whose gradients are taken as rows, or of those of them of which every pass's is."""
        return self._withholding.always if always else self._withholding.names

    def hand_over(self, names: Collection[str], with_curvature: Collection[str] = ()) -> None:
        """Take the gradients of these blocks as rows from now on; their parameters' `.grad` stays None.

        Those of `with_curvature` are so only in passes that are the curvature's too. Left as they are: blocks of
        several modules, of modules that compute their parameters or mix samples, and a pass that is checked.
        """
        for block in self.blocks:
            if block.name in names or block.name in with_curvature:
                self._withholding.add(block, always=block.name in names)

    def keep_gradients(self, but_with_curvature: bool) -> None:
        """Take no gradients as rows from now on, or only in passes that are the curvature's too."""
        if but_with_curvature:
            self._withholding.always.clear()
        else:
            self._withholding.detach()

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
        self._discard()
        if self._used:
            self._used.clear()
            self.rows.plan.buffers.restart()

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
        for one in passes:
            one.keep(self.blocks)
        observations = sum(one.observations for one in passes)
        scale = 1.0
        if isinstance(self.fisher, Empirical):
            armed = [one for one in passes if one.armed]
            scale = self.fisher.scale(observations) if armed else 1.0
            for one in armed:
                one.factors = self._factors(one, one.records, scale)
        factors = joined([one.factors for one in passes], self.blocks, observations)
        handed = [self._factors(one, one.handed) if one.handed else {} for one in passes]
        gradients = gradient_rows(passes, handed, factors, self.blocks, observations, scale)
        for one in passes:
            one.factors, one.copies = {}, {}  # the graph of a loss that is kept holds its pass
        lent = {name: loan for one in passes for name, loan in one.lent.items()}
        self.rows.plan.buffers.trim()  # what these rows did not take, the next ones will not either
        return Taken(factors, gradients, [one.checks for one in passes if one.checks is not None], lent)

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _listening(self) -> bool:
        return not (self._paused or self._silence.on) and torch.is_grad_enabled()

    def _hands_over(self, name: str) -> bool:
        if self._current is None or self._unchecked or not self._listening():
            return False
        return self._current.armed or name in self._withholding.always

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._discard()
        if not self._listening():
            return
        if self._before is not None:
            self._before()
        if self.armed or self._withholding.always:
            sizes = [int(tensor.shape[0]) for tensor in tensors((args, kwargs)) if tensor.ndim]
            self._current = Pass(
                next(self._numbers),
                expected=sizes[0] if sizes else 0,
                armed=self.armed,
                axes=self._axes,
                blocks=self.blocks,
            )

    def _abandon(self, module: nn.Module, args: Any, output: Any) -> None:
        """Runs after `_finish`, and instead of it when the forward pass failed."""
        self._discard()

    def _discard(self) -> None:
        """Let go of a pass that was begun and not finished."""
        if self._current is not None:
            self._current.release()
            self._current = None
        self._withholding.restore()

    def _recorder(self, block: Block, use: Use) -> Callable[..., Any]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            current = self._current
            if current is None:
                return None
            handed = self._withholding.end(module)
            if handed:
                output = rooted(output)
            if not (handed or current.armed) or not self._listening():
                return output
            call, output = recorded(use, module, args, kwargs, output, current.expected)
            if call is None:
                return output
            curvature = current.armed
            # One record serves both where the loss's own rows are the curvature's.
            both = curvature and self.fisher.needs_backward
            of_loss = call if both or not curvature else replace(call, cotangents=[None] * len(call.cotangents))
            followed = curvature and (self._unchecked or not both)  # whether cotangents will be sent there
            for index, place in enumerate(call.places):
                if place is not None and (handed or both):
                    keep = partial(self._keep, current, block, use, of_loss, index)
                    place.tensor.register_hook(keep)  # type: ignore[no-untyped-call]  # untyped in torch
                call.edges.append(None if place is None else place.release(followed))
            if curvature:
                current.records.setdefault(use, []).append(call)
            if handed:
                current.withheld.add(use)
            if handed and not both:
                current.handed.setdefault(use, []).append(of_loss)
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
        try:
            outputs = likelihood_outputs(output, self._output)
        except BaseException:
            current.release()
            raise
        if not outputs.requires_grad:
            return
        try:
            with without_autocast(outputs.device):
                self._complete(current, outputs)
        except NonFiniteError:
            if not self.lenient:
                raise
            return
        finally:
            # Tensor hooks do the rest of the work.
            current.release()
        if self._every_pass:
            self._used.append(current)
        else:
            # Whatever the model returns may be what the loss is made of; `output` may have made a new tensor.
            mark = partial(self._mark, current)
            for tensor in tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(mark)  # type: ignore[no-untyped-call]  # untyped in torch

    def _complete(self, current: Pass, outputs: Tensor) -> None:
        """Do what can be done before the loss exists: all, unless rows are the loss's own."""
        current.observations = self.fisher.observations(outputs)
        current.settle(int(outputs.shape[0]))
        with self._silence:
            if self._unchecked and current.armed and current.samples > self._checked:
                verify(self.blocks, current, outputs)
                # A single sample does not show where samples are; the first batch of more is checked too.
                self._checked, self._unchecked = 1, current.samples == 1
            if current.armed and not self.fisher.needs_backward:
                self._pull_back(current, outputs)
        if current.armed and not self.fisher.needs_backward:
            current.factors = self._factors(current, current.records)
            current.records.clear()

    def _keep(self, current: Pass, block: Block, use: Use, call: Record, index: int, gradient: Tensor) -> None:
        """Hook of an output tensor: keep what arrives there."""
        if not self._silence.on:
            call.arrived_too(index, gradient.detach())
            self.rows.at_once(block, use, call, current)

    def _mark(self, current: Pass, gradient: Tensor) -> None:
        """Hook of what the model returned: a backward goes through this pass."""
        if not self._silence.on and not any(one is current for one in self._used):
            self._used.append(current)

    # -- cotangents and rows ------------------------------------------------------------------------------------------

    def _pull_back(self, current: Pass, outputs: Tensor) -> None:
        """Send all columns of output cotangents back to the outputs of every recorded call."""
        edges = current.edges()
        if not edges:
            return
        with deferred() if self.deferring else nullcontext() as current.checks:
            columns = output_cotangents(self.fisher, outputs, self.generator)
        self._batched = pull_back(edges, outputs, columns, self._batched)

    def _factors(self, one: Pass, records: Mapping[Use, list[Record]], scale: float = 1.0) -> dict[str, Factors]:
        with self._silence:  # the fallback calls modules again, which is no pass
            return self.rows.of_pass(one, records, self.blocks, scale)
