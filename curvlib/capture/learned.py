"""What a capture found out at its first passes, as plain data: for a resumed run that shall go on bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curvlib.capture.hooks import Capture

__all__ = ["learned", "recall"]


def learned(capture: Capture) -> dict[str, Any]:
    """Return which blocks hand their gradients over, and where their calls have the samples.

    A pass that is checked has explicit gradients, which differ from those as rows by rounding. So a capture that hands
    gradients over takes its check as done when it is resumed, and with it what the check told.
    """
    axes = [[use.module_name, number, axis] for (use, number), axis in capture._axes.items()]
    handed = {"handed": sorted(capture._withholding.names), "always": sorted(capture._withholding.always)}
    return {**handed, "checked": not capture._unchecked, "axes": axes}


def recall(capture: Capture, saved: Mapping[str, Any]) -> None:
    """Take up what `learned` returned."""
    uses = {use.module_name: use for block in capture.blocks for use in block.uses}
    if saved["checked"]:
        capture._unchecked = False
        capture._axes.update({(uses[name], number): axis for name, number, axis in saved["axes"] if name in uses})
        capture.hand_over(saved["always"], with_curvature=saved["handed"])
