"""One check, at a model's first pass, that rows and gradients agree.

Hooks see calls of modules, not uses of parameters. A weight that is also used directly, a module that mixes samples or
has them on another axis, a wrong adapter: each would give a wrong curvature without a word. So once, for cotangents and
row weights fixed beforehand, the weighted sum of each block's rows is compared with autograd's gradient.

Where a module is known to couple samples (batch statistics), the rows of the blocks before it are shares of the
gradient at the activations. Their plain sum alone is the gradient of something, and is what is compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from curvlib.capture.rows import Pass, block_factors, pull_back
from curvlib.errors import CaptureError
from curvlib.layers import Block

__all__ = ["verify"]

_MIXING = "the model mixes samples outside any module known to do so, or has them on another axis than the first"

_COLUMNS = 2
"""More than one, so that an adapter that confuses columns with samples is found out too."""


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
    edges = current.edges()
    if not edges:
        return
    # Any fixed numbers without structure will do; drawing random ones would disturb the user's generators.
    pattern = torch.arange(_COLUMNS * outputs.numel(), device=outputs.device, dtype=torch.float64)
    cotangents = torch.cos(pattern * pattern + 1).reshape(_COLUMNS, *outputs.shape).to(outputs.dtype)
    weights = (1.5 + torch.sin(pattern[: _COLUMNS * outputs.shape[0]] * 2)).reshape(_COLUMNS, -1).to(outputs.dtype)
    uniform = weights.mean(dim=1, keepdim=True).expand_as(weights)
    parameters = [p for block in blocks for p in block.parameters.values()]
    pull_back(current, outputs, cotangents, batched=False)
    found = [cotangent for call, place, _ in edges if (cotangent := call.cotangents[place]) is not None]
    coarse = max(torch.finfo(tensor.dtype).eps for tensor in (outputs, *found))
    coupled = _before(current.couplings)
    current.couplings.clear()

    def gradients(row_weights: Tensor) -> dict[Tensor, Tensor | None]:
        weighted = (cotangents * row_weights.reshape(_COLUMNS, -1, *([1] * (outputs.ndim - 1)))).sum(0)
        found = torch.autograd.grad(outputs, parameters, weighted, retain_graph=True, allow_unused=True)
        return dict(zip(parameters, found, strict=True))

    try:
        apart = gradients(weights)
        together = gradients(uniform) if coupled else {}
        for block in blocks:
            calls = [call for use in block.uses for call in current.records.get(use, ())]
            plain = any(edge.node in coupled for call in calls for edge in call.edges if edge is not None)
            _compare(
                block,
                current,
                together if plain else apart,
                (uniform if plain else weights).T.reshape(-1),
                tolerance=min(10 * math.sqrt(coarse), 0.3),
            )
    finally:
        for call, place, _ in edges:
            call.cotangents[place] = None


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


def _compare(
    block: Block, current: Pass, gradients: dict[Tensor, Tensor | None], weights: Tensor, tolerance: float
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
        # Rows may cancel (those of a bias before a batch norm do), and what is left of them is rounding.
        if not difference <= tolerance * math.sqrt(float(factors.diagonal()[name].sum())):
            modules = ", ".join(sorted({type(use.module).__name__ for use in block.uses}))
            raise CaptureError(
                f"block {block.name!r} ({modules}): the rows of parameter {name!r} do not add up to its gradient "
                f"(relative difference {difference / max(size, 1e-300):.1e}). Either the parameter is also used "
                f"outside calls of its module, or {_MIXING}, or the adapter is wrong. Register an adapter for the "
                "module that uses it, or pass verify=False if the difference is meant"
            )
