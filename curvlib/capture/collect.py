"""Factors of a model on one batch, without an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvlib.capture.hooks import Capture, Output
from curvlib.errors import ConfigurationError, UncoveredParameterError
from curvlib.factors import Factors, Plan
from curvlib.fisher import Fisher
from curvlib.hyperparameters import checking
from curvlib.layers import partition

__all__ = ["collect"]


@checking()
def collect(
    model: nn.Module,
    fisher: Fisher,
    *args: Any,
    loss: Callable[[Any], Tensor] | None = None,
    output: Output | None = None,
    generator: torch.Generator | None = None,
    kwargs: Mapping[str, Any] | None = None,
    verify: bool = True,
    rest: str | None = None,
    plan: Plan | None = None,
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
    verify
        Whether to check that every block's rows add up to its gradient.
    rest
        ``"fallback"`` for blocks of the bare parameters too, those that modules hold beside other layers, as in
        `partition`; ``"freeze"`` to leave them out. Without it such parameters are an error.
    plan
        Which exact routes the Factors take, and a limit on their memory.

    Returns
    -------
    dict
        Block name to Factors. Parameters, their `.grad` and the model's hooks are as before.

    Raises
    ------
    ConfigurationError
        If the empirical Fisher is asked for without a loss.
    UncoveredParameterError
        If parameters lie outside every block and `rest` is not given.
    CaptureError
        If the rows cannot be formed exactly.
    """
    if fisher.needs_backward and loss is None:
        raise ConfigurationError("the empirical Fisher needs loss=, a function of what the model returns")
    if rest not in (None, "fallback", "freeze"):
        raise ConfigurationError(f"rest must be 'fallback' or 'freeze', got {rest!r}")
    parts = partition(model, bare="fallback" if rest == "fallback" else None)
    if rest is None and parts.rest:
        raise UncoveredParameterError(
            f"no block covers the parameters {', '.join(map(repr, parts.rest))}: modules hold them beside other "
            "layers. Pass rest='fallback' for blocks of their own, rest='freeze' to leave them out, or register an "
            "adapter for the module that owns them (curvlib.layers.register)"
        )
    capture = Capture(model, parts.blocks, fisher, output, generator, every_pass=True, check=verify, plan=plan)
    try:
        with torch.enable_grad():
            result = model(*args, **(kwargs or {}))
            if fisher.needs_backward and loss is not None:
                parameters = [p for p in model.parameters() if p.requires_grad]
                torch.autograd.grad(loss(result), parameters, allow_unused=True)
        return capture.take()
    finally:
        capture.detach()
