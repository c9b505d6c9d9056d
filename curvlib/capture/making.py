"""When rows are made: of a whole pass at once, or of a call as soon as its cotangent arrives.

Explicit rows hold neither the input nor the cotangent that they were made of. Made inside backward, they let both go
there, so that backward frees the network's tensors layer by layer, as it does without curvature, instead of leaving the
inputs and cotangents of all layers to the step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from curvlib.capture.autocast import without_autocast
from curvlib.capture.loans import Loan, apart
from curvlib.capture.records import Pass, Record
from curvlib.capture.rows import block_factors, call_rows
from curvlib.errors import CurvatureError
from curvlib.factors import Dense, Factors, Plan
from curvlib.layers import Block, Use

__all__ = ["RowMaker"]


class RowMaker:
    """Makes rows of the calls that passes recorded.

    Parameters
    ----------
    plan
        Which exact routes the Factors take.

    Attributes
    ----------
    compacting
        Names of the blocks whose rows are wanted in their compact form.
    held
        Names of those whose rows the solver's states hold on to.
    lasting
        Whether states of this step are used in later ones, when another batch was written over this one perhaps. Then
        rows that are held get memory of their own.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.compacting: frozenset[str] = frozenset()
        self.held: frozenset[str] = frozenset()
        self.lasting = False
        self._factored: set[tuple[Use, torch.Size]] = set()  # calls whose compact form is not explicit, by their sizes

    def of_pass(
        self, current: Pass, records: Mapping[Use, list[Record]], blocks: Sequence[Block], scale: float = 1.0
    ) -> dict[str, Factors]:
        """Factors of all blocks that had a part in a pass, from calls whose cotangents have arrived.

        Parameters
        ----------
        current, records
            Pass, and its calls to make rows of.
        blocks
            All blocks.
        scale
            What rows are multiplied by.

        Raises
        ------
        CaptureError
            If exact rows cannot be formed.
        """
        made: dict[str, Factors] = {}
        for block in blocks if records else ():
            calls = [call for use in block.uses for call in records.get(use, ())]
            rows = calls[0].made if len(calls) == 1 else None
            if rows is None:
                rows = block_factors(block, current, records)
                if rows is None:
                    continue
                rows = rows.planned(self.plan.of(block.name))
            rows = rows if scale == 1 else rows.scaled(scale)
            if block.name in self.compacting:
                # One block after the other, so that cotangents and explicit rows are not all there at once.
                rows = rows.compact()
            # Rows of the loss alone are not kept, but they look at the inputs of those that are.
            if block.name in self.held and (records is current.records or current.copies):
                rows = self._held(block, rows, calls, current)
            if block.name in self.compacting:
                for call in calls:
                    call.forget()
            made[block.name] = rows
        return made

    def at_once(self, block: Block, use: Use, call: Record, current: Pass) -> None:
        """Make the rows of a call whose cotangent has just arrived, where they are explicit and nothing follows.

        Called inside backward. Whatever is wrong is left to `of_pass` to say, so that backward ends as it would have.

        Parameters
        ----------
        block, use
            Whose module was called.
        call, current
            The call, and the pass that it is of.
        """
        arrived = call.cotangents[0]
        if arrived is None or (use, arrived.shape) in self._factored:
            return
        if block.name not in self.compacting or len(block.uses) > 1 or not current.samples or _graph_is_kept():
            return
        if not use.adapter.closed_form or len(call.places) != 1 or current.calls(use) != 1:
            return
        with without_autocast(arrived.device):
            try:
                rows = call_rows(block, use, call, current)
                compact = rows.planned(self.plan.of(block.name)).compact()
            except CurvatureError:
                return
        if type(compact) is Dense:
            held = block.name in self.held and call in current.records.get(use, ())
            made = self._held(block, compact, [call], current) if held else compact
            call.forget()
            call.made = made
        else:
            self._factored.add((use, arrived.shape))

    def _held(self, block: Block, rows: Factors, calls: Sequence[Record], current: Pass) -> Factors:
        """Rows as a solver may hold on to them."""
        inputs = [tensor for call in calls for tensor, _ in call.inputs]
        if self.lasting:
            return apart(rows, inputs, current.copies)
        current.lent[block.name] = Loan(inputs)
        return rows

    def forget(self, blocks: Collection[Block]) -> None:
        """Forget what is known of the calls of other blocks than these."""
        uses = {use for block in blocks for use in block.uses}
        self._factored = {known for known in self._factored if known[0] in uses}


def _graph_is_kept() -> bool:
    """Whether the backward pass that runs may be followed by another one through the same graph."""
    return _keeps_graph is None or bool(_keeps_graph())


_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
