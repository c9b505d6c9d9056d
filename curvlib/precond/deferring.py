"""The optimizer's steps that nobody waits for: which may be so, and what becomes of one that failed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from curvlib.capture import GradientRows
from curvlib.capture.autocast import without_autocast
from curvlib.errors import CurvatureError
from curvlib.precond.callbacks import Callback
from curvlib.precond.deferral import InPlace, Later, Unseen
from curvlib.precond.failure import Failures
from curvlib.precond.grouped import Grouped
from curvlib.precond.health import Moved
from curvlib.precond.second_pass import needs_closure

__all__ = ["Deferring"]

_STATE = ("curvature", "solvers", "steps", "_asked", "_due", "_wanting", "_moved")
"""Attributes that a step sets."""


_NOTHING = InPlace({})


class Deferring(Grouped):
    """An optimizer that may leave the checks of a step on the device until the next one begins."""

    failures: Failures
    callbacks: list[Callback]
    _unseen: Unseen | None = None
    _wary = False  # whether a factorisation had failed before anybody looked at it
    _moved: Moved | None = None

    @property
    def needs_closure(self) -> bool:
        """Whether `step` must be given a closure, because the damping or a solver looks at the batch a second time."""
        return bool(needs_closure(self.damping, self.solvers))

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.param_groups[0]["params"][0].device
        return device

    def _may_defer(self) -> bool:
        """Whether nothing about the coming step needs numbers of the step itself."""
        if self._deferred is False or (self._deferred is None and self._device.type != "cuda"):
            return False
        if self._wary or self._wanting or self.callbacks:
            return False
        if self._division.backend != "torch" or self.refresh.tolerance is not None or self.needs_closure:
            return False
        if self.damping.needs_trace and self._due:
            return False
        here = self._device
        return all(p.device == here for group in self.param_groups for p in group["params"])

    def _later(self, rows: Mapping[str, GradientRows]) -> Later | None:
        """Where the checks of this step are kept; None if they are read at once."""
        if not self._may_defer():
            return None
        for block in self._blocks:
            taking_part = block.name in rows or any(p.grad is not None for p in block.parameters.values())
            if taking_part and self.curvature[block.name].inverse is None:
                return None  # there would be nothing to go on with
        return Later()

    def _before(self, later: Later | None) -> tuple[InPlace, dict[str, Any]]:
        """State to go back to when a step whose checks are put off turns out to have failed."""
        if later is None:
            return _NOTHING, {}
        own = [] if self._adamw is None else [p for group in self._adamw.param_groups for p in group["params"]]
        host = {name: getattr(self, name) for name in _STATE}
        return InPlace(self.state, [p for p in own if p.grad is not None]), host

    def _before_pass(self) -> None:
        super()._before_pass()
        self._capture.deferring = self._may_defer()

    def _look(self, stepping: bool = False) -> None:
        """Look at the last step, if its checks were put off; what failed is made good, or the step undone.

        Parameters
        ----------
        stepping
            Whether it is `step` that looks: errors that leave it are counted there.

        Raises
        ------
        CurvatureError
            What the step would have raised; not under ``on_failure="skip"`` what that skips.
        """
        unseen, self._unseen = self._unseen, None
        if unseen is not None and not unseen.verdict.holds():
            self._make_good(unseen, stepping)

    @torch.no_grad()
    def _make_good(self, unseen: Unseen, stepping: bool) -> None:
        after = {name: getattr(self, name) for name in _STATE}
        unseen.in_place.restore()
        vars(self).update(unseen.host)
        try:
            unseen.later.gradients.raise_if_failed()
            with without_autocast(self._generator.device):
                again = unseen.renewal.seen(unseen.step)
            if not again:
                unseen.later.directions.raise_if_failed()
        except CurvatureError as error:
            self._arm()
            if (self.failures.skips(error) or not stepping) and self.failures.refuse(error, unseen.step):
                return
            raise
        # The curvature is good by now. Its step has moved nothing, and such steps had better not be lost again.
        vars(self).update(after)
        self.curvature = {**self.curvature, **again}
        self._wary = True
