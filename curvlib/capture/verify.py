"""One check, at a model's first pass, that rows and gradients agree.

Hooks see calls of modules, not uses of parameters. A weight that is also used directly, a module that mixes samples or
has them on another axis, a wrong adapter: each would give a wrong curvature without a word. So once, for cotangents and
row weights fixed beforehand, the weighted sum of each block's rows is compared with autograd's gradient.

What decides where a call has its samples is found out at the same occasion (`curvlib.capture.axes`).

Where a module is known to couple samples (batch statistics), the rows of the blocks before it are shares of the
gradient at the activations. Their plain sum alone is the gradient of something, and is what is compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from curvlib.capture.axes import ALONE, possible_axes, told_by
from curvlib.capture.pulling import gradients, pull_back
from curvlib.capture.records import Pass, Record
from curvlib.capture.rows import block_factors
from curvlib.errors import CaptureError
from curvlib.layers import Block
from curvlib.layers.tree import tensors

__all__ = ["verify"]

_MIXING = "the model mixes samples outside any module known to do so, or has them on another axis than the first"

_COLUMNS = 2
"""More than one, so that an adapter that confuses columns with samples is found out too."""

_HELD = 1 << 22
"""Elements of cotangents that are held at a time (16 MiB in float32)."""


def verify(blocks: Sequence[Block], current: Pass, outputs: Tensor) -> None:
    """Compare rows with gradients for every block of a pass; its cotangents are left empty.

    Parameters
    ----------
    blocks
        The blocks to check.
    current
        A pass with records and edges.
    outputs
        The model's outputs, in the graph.

    Raises
    ------
    CaptureError
        Naming the first block whose rows do not add up to its gradient.
    """
    if not current.edges():
        return
    # Any fixed numbers without structure will do; drawing random ones would disturb the user's generators.
    pattern = torch.arange(_COLUMNS * outputs.numel(), device=outputs.device, dtype=torch.float64)
    cotangents = torch.cos(pattern * pattern + 1).reshape(_COLUMNS, *outputs.shape).to(outputs.dtype)
    weights = (1.5 + torch.sin(pattern[: _COLUMNS * outputs.shape[0]] * 2)).reshape(_COLUMNS, -1).to(outputs.dtype)
    uniform = weights.mean(dim=1, keepdim=True).expand_as(weights)
    parameters = [p for block in blocks for p in block.parameters.values()]
    coupled = _before(current.couplings)
    if outputs.shape[0] > 1:
        _find_axes(current, outputs, cotangents[0], coupled)

    def weighted(row_weights: Tensor) -> dict[Tensor, Tensor | None]:
        summed = (cotangents * row_weights.reshape(_COLUMNS, -1, *([1] * (outputs.ndim - 1)))).sum(0)
        found = torch.autograd.grad(outputs, parameters, summed, retain_graph=True, allow_unused=True)
        return dict(zip(parameters, found, strict=True))

    apart = weighted(weights)
    together = weighted(uniform) if coupled else {}
    for some in _by_memory(blocks, current):
        ours = {id(call) for block in some for call in _calls(block, current)}
        edges = [edge for edge in current.edges() if id(edge[0]) in ours]
        try:
            if edges:
                pull_back(edges, outputs, cotangents, batched=False)
            found = [cotangent for call, place, _ in edges if (cotangent := call.cotangents[place]) is not None]
            coarse = max(torch.finfo(tensor.dtype).eps for tensor in (outputs, *found))
            for block in some:
                calls = _calls(block, current)
                plain = any(edge.node in coupled for call in calls for edge in call.edges if edge is not None)
                _compare(
                    block,
                    current,
                    together if plain else apart,
                    (uniform if plain else weights).T.reshape(-1),
                    tolerance=min(10 * math.sqrt(coarse), 0.3),
                    rounding=10 * max(coarse, torch.finfo(torch.float32).eps) * _largest_share(calls),
                )
        finally:
            for call, place, _ in edges:
                call.cotangents[place] = None


def _calls(block: Block, current: Pass) -> list[Record]:
    return [call for use in block.uses for call in current.records.get(use, ())]


def _by_memory(blocks: Sequence[Block], current: Pass) -> list[list[Block]]:
    """Blocks in groups whose cotangents may be held together; each group costs backward passes of its own."""
    groups: list[list[Block]] = []
    held = 0
    for block in blocks:
        places = [place for call in _calls(block, current) for place in call.places if place is not None]
        size = _COLUMNS * sum(math.prod(place.shape) for place in places)
        if not groups or held + size > _HELD:
            groups.append([])
            held = 0
        groups[-1].append(block)
        held += size
    return groups


def _find_axes(current: Pass, outputs: Tensor, cotangents: Tensor, coupled: Set[Node]) -> None:
    """Settle the sample axis of every call of which sizes alone do not tell it."""
    samples = int(outputs.shape[0])
    asked = [
        (use, number, call, edge)
        for use, calls in current.records.items()
        for number, call in enumerate(calls)
        if call.positionwise and call.axis not in (None, ALONE) and call.places[0] is not None
        if (edge := call.edges[0]) is not None and edge.node not in coupled
    ]
    if not asked:
        return
    ends = [0, samples - 1]
    only = torch.zeros(2, *outputs.shape, dtype=outputs.dtype, device=outputs.device)
    only[[0, 1], ends] = cotangents[ends]
    found = gradients(outputs, [edge for *_, edge in asked], only, batched=False)
    for (use, number, call, _), *arrived in zip(asked, *found, strict=True):
        place, shapes = call.places[0], call.shapes()
        assert place is not None  # else it has no axis
        assert shapes is not None
        axes = possible_axes(shapes[0], shapes[1], samples, call.positionwise)
        for sample, gradient in zip(ends, arrived, strict=True):
            if gradient is not None:
                axes = told_by(place.cotangent(gradient), axes, samples, sample)
        if axes and call.axis not in axes:
            call.axis = axes[0]
        elif not axes and not any(tensor.is_floating_point() for tensor in tensors((call.args, call.kwargs))):
            # One cotangent reaches all of a lookup of positions. Features of which it does are those of a model that
            # mixes samples, which is refused.
            call.axis = ALONE
        current.axes[use, number] = cast(int, call.axis)


def _before(edges: Sequence[GradientEdge]) -> set[Node]:
    """All nodes of the autograd graph that the given edges depend on, their own included."""
    waiting = [edge.node for edge in edges]
    seen = set(waiting)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
    return seen


def _largest_share(calls: Sequence[Record]) -> float:
    """Size that what one position contributes to a gradient has, without cancellation between positions."""
    cotangents = [g for call in calls for g in call.cotangents if g is not None]
    inputs = [
        x.detach() for call in calls for x in tensors((call.args, call.kwargs)) if x.is_floating_point() and x.numel()
    ]
    sizes = [float(torch.linalg.vector_norm(g, dtype=torch.float64)) for g in cotangents]
    largest = [max(-float(low), float(high)) for low, high in map(torch.aminmax, inputs)]
    return math.hypot(*sizes) * max([1.0, *largest])


def _compare(
    block: Block,
    current: Pass,
    gradients: dict[Tensor, Tensor | None],
    weights: Tensor,
    tolerance: float,
    rounding: float,
) -> None:
    factors = block_factors(block, current)
    if factors is None and all(gradients[p] is None for p in block.parameters.values()):
        return
    if factors is None:
        called = any(current.records.get(use) for use in block.uses)
        how = "no gradient reached its module's output" if called else "its module was not called"
        raise CaptureError(
            f"block {block.name!r} has a gradient, but {how} in the model's forward pass: its parameters are "
            "used in another way. Register an adapter for the module that uses them, or freeze them"
        )
    sums = factors.rmatvec(weights.to(factors.row_weights(1.0)))
    for name, parameter in block.parameters.items():
        gradient = gradients[parameter]
        expected = torch.zeros_like(sums[name]) if gradient is None else gradient.to_dense().to(sums[name])
        size, difference = float(expected.norm()), float((sums[name] - expected).norm())
        if not math.isfinite(size) or difference <= tolerance * max(size, float(sums[name].norm())):
            continue
        # Rows may cancel (those of a bias before a batch norm do), and so may the positions of a row (a bias of keys
        # moves all scores of a softmax alike); what is left is rounding, of a module's inner float32 at best.
        if difference > rounding and not difference <= tolerance * math.sqrt(float(factors.diagonal()[name].sum())):
            modules = ", ".join(sorted({type(use.module).__name__ for use in block.uses}))
            raise CaptureError(
                f"block {block.name!r} ({modules}): the rows of parameter {name!r} do not add up to its gradient "
                f"(relative difference {difference / max(size, 1e-300):.1e}). Either the parameter is also used "
                f"outside calls of its module, or {_MIXING}, or the adapter is wrong. Register an adapter for the "
                "module that uses it, or pass verify=False if the difference is meant"
            )
