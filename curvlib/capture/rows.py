"""Rows of a block from the recorded calls of its modules, by their adapters, and what an adapter may not get wrong."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from curvlib.capture.axes import ALONE, samples_first
from curvlib.capture.records import Pass, Record
from curvlib.errors import CaptureError, CurvatureError
from curvlib.factors import Factors, cat
from curvlib.factors.combine import stack_columns
from curvlib.layers import Block, Call, Use
from curvlib.layers.tree import mapped, wide

__all__ = ["block_factors", "call_rows", "joined"]

_NO_GRAPH = nullcontext()


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
    total = None
    for use in block.uses:
        for call in (current.records if records is None else records).get(use, ()):
            if any(cotangent is not None for cotangent in call.cotangents):
                part = call_rows(block, use, call, current)
                total = part if total is None else total.add(part)
    return total


def call_rows(block: Block, use: Use, call: Record, current: Pass) -> Factors:
    """Let a use's adapter turn one recorded call into rows, and check what it returns.

    Raises
    ------
    CaptureError
        As `block_factors`.
    """
    samples = current.samples

    def failed(what: str) -> CaptureError:
        return CaptureError(f"block {block.name!r} ({type(use.module).__name__}, adapter {use.adapter.name}){what}")

    for tensor, version in call.inputs:
        if tensor._version != version:
            raise failed(
                ": its input was changed in place after the call, so its rows cannot be formed; "
                "make the operation that changes it out of place"
            )
    if use.adapter.couples(use.module) != call.coupled:
        raise failed(
            ": it went between training and eval mode after the forward pass, so its rows cannot be formed; "
            "change the mode after the step"
        )
    cotangents = tuple([None if cotangent is None else wide(cotangent) for cotangent in call.cotangents])
    arrived = cotangents[0]
    if arrived is None:
        arrived = next(cotangent for cotangent in cotangents if cotangent is not None)
    columns = int(arrived.shape[0])
    adapter = use.adapter
    # What was looked up lies as the call's tensors do; an adapter's input has its samples first.
    in_place = adapter.whole_call or call.axis == 0
    saved = () if adapter.saved is None else (call.saved if in_place else None,)

    def run(x: Any, g: Any, rows: int) -> Factors:
        # An adapter that reads parameters would otherwise keep a graph alive in the rows.
        with torch.no_grad() if torch.is_grad_enabled() else _NO_GRAPH:
            try:
                factors = adapter.function(use.module, x, g, *saved)
            except (CurvatureError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # the adapter may be anyone's, and the layer a subclass that it does not know
                kind = type(use.module).__name__
                raise failed(
                    f": the adapter failed ({type(error).__name__}: {error}). If {kind} computes something else "
                    f"than the class that the adapter was written for, register one for it; the exact fallback serves "
                    f"any module: curvlib.layers.register({kind})(curvlib.layers.fallback)"
                ) from error
        if wrong := _wrong_rows(factors, use, rows, arrived):
            raise failed(wrong)
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
        if len(call.inputs) != 1 or len(cotangents) != 1:
            raise failed(
                f": the call had {len(call.inputs)} input tensors and {len(cotangents)} output tensors, and the "
                "adapter takes one of each; register it with whole_call=True to see them all"
            )
        x, g = wide(call.inputs[0][0]), arrived
        if call.axis is None:
            raise failed(
                f": its input has shape {tuple(x.shape)} and its output {tuple(g.shape[1:])}, the model's "
                f"output {samples} samples; the first axis must be the sample axis in all of them"
            )
        if call.axis == ALONE and (call.places[0] is None or g.ndim != len(call.places[0].shape) + 2):
            raise failed(
                f": all samples share its output of shape {tuple(g.shape[1:])}, and the backward pass of the "
                "loss shows the sum of their cotangents alone: use Sampled or Exact, or give it a first axis of size 1"
            )
        x, g = samples_first(x, g, samples, call.axis)
        if adapter.columns:
            factors = run(x, g.transpose(0, 1), samples * columns)
        else:
            factors = stack_columns([run(x, one, samples) for one in g])
    return factors.renamed(use.names) if use.renames else factors


def joined(parts: list[dict[str, Factors]], blocks: tuple[Block, ...], observations: int) -> dict[str, Factors]:
    """Rows of all passes, one pass after the other, for every block that has some."""
    joined = {}
    for block in blocks:
        rows = [one[block.name] for one in parts if block.name in one]
        if rows:
            whole = cat(rows)
            joined[block.name] = whole if whole.normalizer == observations else whole.with_samples(observations)
    return joined


def _wrong_rows(factors: Any, use: Use, rows: int, like: Tensor) -> str | None:
    """What is wrong with what an adapter returned, if something is."""
    if not isinstance(factors, Factors):
        return f" returned {type(factors).__name__}; an adapter returns Factors"
    if len(factors) != rows:
        return f" returned {len(factors)} rows where the batch has {rows}"
    shapes, expected = factors.shapes, _shapes(use)
    if shapes != expected:
        return f" returned rows for parameters {shapes}; the trainable ones are {expected}"
    one = factors.like
    if one.dtype != like.dtype or one.device != like.device:
        return f" returned rows of {one.dtype} on {one.device}; its cotangents are {like.dtype} on {like.device}"
    return None


def _shapes(use: Use) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter that the rows of a use are of."""
    own = use.module._parameters
    if own.keys() >= use.names.keys():
        return {name: tuple(p.shape) for name in use.names if (p := own[name]) is not None}
    return {name: tuple(p.shape) for name, p in use.module.named_parameters() if name in use.names}
