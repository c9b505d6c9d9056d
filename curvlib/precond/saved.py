"""What a checkpoint holds of an optimizer's curvature, and how it is read back: whole, checked, at home."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from curvlib.arrays import map_arrays, pack, unpack
from curvlib.capture.learned import learned
from curvlib.errors import ConfigurationError, CurvatureError, NotPositiveDefiniteError
from curvlib.layers import Block
from curvlib.precond.curvature import BlockState, natural_gradient
from curvlib.precond.damping import Constant, check_damping_value
from curvlib.precond.groups import check_options
from curvlib.solvers import Solver

if TYPE_CHECKING:
    from curvlib.precond.grouped import Grouped

__all__ = ["DAMAGED", "Saved", "complete", "read", "revived", "with_own"]

_VERSION = 1
_ALIGNMENT = 64
DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OverflowError)
"""What comes of state that is not what it should be."""


@dataclass(frozen=True)
class Saved:
    """Curvature as a checkpoint holds it, with what goes with it.

    Parameters
    ----------
    steps, due
        Number of steps, and whether the next one takes new curvature of all blocks.
    wanting
        Blocks that take new curvature at the next step in any case.
    damping, constant
        State of the damping policy; its value if it is a constant.
    generator
        State of the source of the labels; None where the checkpoint comes from another kind of device.
    capture
        What was found out about the model's passes.
    curvature
        Block name to state.
    """

    steps: int
    due: bool
    wanting: frozenset[str]
    damping: Any
    constant: float | None
    generator: Tensor | None
    capture: dict[str, Any]
    curvature: dict[str, BlockState]


def complete(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put the curvature into what torch saves of an optimizer, a `Grouped`; a hook of its `state_dict`."""
    for group in state["param_groups"]:
        group.pop("solver", None)  # a checkpoint is data; what solves comes from the code
    state["curvature"] = _written(cast("Grouped", optimizer))


def _written(optimizer: Grouped) -> dict[str, Any]:
    """Return everything that a resumed run needs beyond what torch's optimizers save, as plain containers."""
    return {
        "version": _VERSION,
        "steps": optimizer.steps,
        "due": optimizer._due,
        "wanting": sorted(optimizer._wanting),
        "damping": optimizer.damping.state(),
        "constant": optimizer.damping.value if isinstance(optimizer.damping, Constant) else None,
        "generator": optimizer._generator.get_state(),
        "generator_device": optimizer._generator.device.type,
        "capture": learned(optimizer._capture) if optimizer._fused else None,
        "solvers": {name: type(solver).__name__ for name, solver in optimizer._asked.items()},
        "dtypes": {block.name: _name(_width(block)) for block in optimizer._blocks},
        "blocks": pack(optimizer.curvature),
    }


def read(state: Mapping[str, Any], optimizer: Grouped) -> Saved:
    """Take the curvature out of an optimizer's state, on the devices and in the precision of this one's parameters.

    Parameters
    ----------
    state
        What `state_dict` returned, perhaps on another device or of parameters of another dtype.
    optimizer
        What it is for; it is not changed.

    Raises
    ------
    CurvatureError
        If it holds no curvature, that of other blocks, solvers or of another version, or is damaged.
    """
    saved = state.get("curvature") if isinstance(state, Mapping) else None
    if not isinstance(saved, Mapping) or "blocks" not in saved:
        raise CurvatureError(
            "this state holds no curvature: it was not saved by a curvlib optimizer, or by something that keeps only "
            "'state' and 'param_groups' (curvlib.flat_state makes tensors of the whole)"
        )
    if saved.get("version") != _VERSION:
        raise CurvatureError(f"this state has version {saved.get('version')!r}, this curvlib reads {_VERSION}")
    try:
        return _read(state, saved, optimizer)
    except ConfigurationError as error:
        raise CurvatureError(f"this state cannot be used: {error}") from error
    except CurvatureError:
        raise
    except DAMAGED as error:
        raise CurvatureError(
            f"this state is damaged ({type(error).__name__}: {error}): load an earlier checkpoint"
        ) from error


def _read(state: Mapping[str, Any], saved: Mapping[str, Any], optimizer: Grouped) -> Saved:
    blocks = optimizer._blocks
    _check_blocks(saved, optimizer)
    for group in state["param_groups"]:
        if "rest" not in group:
            check_options(group, optimizer.transforms)
    for theirs, mine in zip(state["param_groups"], optimizer.param_groups, strict=False):  # torch compares their sizes
        for number, p in zip(theirs["params"], mine["params"], strict=False):
            _check_buffers(state["state"].get(number, {}), p)
    curvature = unpack(saved["blocks"])
    for name, value in curvature.items():
        if not isinstance(value, BlockState):
            raise TypeError(f"the state of block {name!r} is {type(value).__name__}")
    dtypes = saved.get("dtypes", {})
    settled = {block.name: _at_home(curvature[block.name], block, dtypes.get(block.name)) for block in blocks}
    for block in blocks:
        _try(settled[block.name], block, optimizer.solvers[block.name])
    copy.deepcopy(optimizer.damping).restore(saved["damping"])
    generator = saved["generator"].cpu()
    if saved.get("generator_device", "cpu") == optimizer._generator.device.type:
        torch.Generator(device=optimizer._generator.device).set_state(generator)
    else:
        generator = None
    names = {block.name for block in blocks}
    return Saved(
        steps=int(saved["steps"]),
        due=bool(saved["due"]),
        wanting=frozenset(saved.get("wanting", ())) & names,
        damping=saved["damping"],
        constant=None if saved.get("constant") is None else check_damping_value(saved["constant"]),
        generator=generator,
        capture=_found_out(saved.get("capture")),
        curvature=settled,
    )


def _found_out(saved: Mapping[str, Any] | None) -> dict[str, Any]:
    if saved is None:
        return {"handed": [], "always": [], "checked": False, "axes": []}
    axes = [[str(name), int(number), int(axis)] for name, number, axis in saved["axes"]]
    handed = [str(name) for name in saved["handed"]]
    always = [str(name) for name in saved.get("always", handed)]
    return {"handed": handed, "always": always, "checked": bool(saved["checked"]), "axes": axes}


def _check_buffers(held: Mapping[str, Any], p: Tensor) -> None:
    for name, value in held.items():
        # Those of transforms have a dot in their names; AdamW also counts its steps.
        fits = isinstance(value, Tensor) and (value.shape == p.shape or (value.ndim == 0 and "." not in name))
        if not (fits and value.is_floating_point()):
            raise TypeError(f"the buffer {name!r} of a parameter of shape {tuple(p.shape)} is no tensor like it")


def _check_blocks(saved: Mapping[str, Any], optimizer: Grouped) -> None:
    theirs, ours = list(saved["blocks"]), [block.name for block in optimizer._blocks]
    if set(theirs) != set(ours):
        raise CurvatureError(
            f"this state belongs to the blocks {theirs}; the model has {ours}: compose it as it was, and freeze what "
            "was frozen"
        )
    for name, solver in optimizer._asked.items():
        used = saved.get("solvers", {}).get(name)
        if used not in (None, type(solver).__name__):
            raise CurvatureError(
                f"this state of block {name!r} is that of {used}, the optimizer solves with {type(solver).__name__}: "
                "compose it with the same solvers"
            )


def _width(block: Block) -> torch.dtype:
    """Precision of a block's curvature: that of its parameters, at least float32."""
    width = torch.float32
    for p in block.parameters.values():
        width = torch.promote_types(width, p.dtype)
    return width


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _at_home(state: BlockState, block: Block, saved_in: str | None) -> BlockState:
    """Return a block's state on the device of its parameters; in their precision where they now have another."""
    device, width = next(iter(block.parameters.values())).device, _width(block)
    cast = saved_in is not None and saved_in != _name(width)
    moved: dict[int, tuple[Tensor, Tensor]] = {}

    def settle(array: Tensor) -> Tensor:
        if id(array) not in moved:
            dtype = width if cast and array.is_floating_point() else array.dtype
            there = array.to(device=device, dtype=dtype)
            # A file mapped into memory puts arrays anywhere, and kernels round by where their operands begin.
            there = there.clone() if there.data_ptr() % _ALIGNMENT else there
            # What estimate and inverse share stays shared.
            moved[id(array)] = array, there
        return moved[id(array)][1]

    settled: BlockState = map_arrays(settle, state)
    return settled


def _try(state: BlockState, block: Block, solver: Solver) -> None:
    """Refuse an estimate that cannot be factorised, and an inverse that does not solve for this block.

    Raises
    ------
    CurvatureError
        Naming the block.
    """
    if state.estimate is not None and state.damping is not None:
        with suppress(NotPositiveDefiniteError), torch.no_grad():
            solver.factorize(state.estimate, state.damping)
    if state.inverse is None or solver.of_fresh_rows:  # the latter solve for no other gradient than their rows'
        return
    gradient = {name: torch.ones_like(p, dtype=_width(block)) for name, p in block.parameters.items()}
    with torch.no_grad():
        natural = natural_gradient(solver, state, gradient)
    shapes = {name: tuple(value.shape) for name, value in natural.items()}
    if shapes != {name: tuple(p.shape) for name, p in block.parameters.items()}:
        raise CurvatureError(f"this state is damaged: the inverse of block {block.name!r} gives {shapes}")
    if not all(bool(torch.isfinite(value).all()) for value in natural.values()):
        raise CurvatureError(f"this state is damaged: the inverse of block {block.name!r} is not finite")


def with_own(groups: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Saved groups with what a checkpoint does not hold (solvers) or did not hold (newer options) from the present."""
    if len(groups) != len(own):
        return [dict(group) for group in groups]  # refused by torch, which says why
    return [{**mine, **theirs, "params": theirs["params"]} for theirs, mine in zip(groups, own, strict=True)]


def revived(kind: type[Grouped], arguments: dict[str, Any], state: dict[str, Any], detached: bool) -> Grouped:
    """Return an optimizer as it was when it was copied or pickled, on its own copy of the model."""
    optimizer = kind(**arguments)
    optimizer.load_state_dict(state)
    if detached:
        optimizer.detach()
    return optimizer
