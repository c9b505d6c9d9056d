"""Which parameters form a block, and which module's adapter covers them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from curvlib.errors import ConfigurationError
from curvlib.layers.fallback import fallback
from curvlib.layers.registry import Adapter, adapter_for

__all__ = ["Block", "Partition", "Use", "partition"]

_FALLBACK = Adapter("torch.func fallback", fallback, whole_call=True, closed_form=False)


@dataclass(frozen=True, eq=False)
class Use:
    """One module whose call gives rows of a block.

    Parameters
    ----------
    module_name
        Qualified name; "" for the root.
    module
        The module itself.
    adapter
        What turns its calls into Factors.
    names
        Parameter name inside the module to parameter name inside the block.
    """

    module_name: str
    module: nn.Module
    adapter: Adapter
    names: dict[str, str]


@dataclass(frozen=True, eq=False)
class Block:
    """Parameters that share one curvature block.

    Parameters
    ----------
    name
        Qualified name of the (first) module; the class name for a root module.
    parameters
        Name inside the block to parameter, trainable ones only.
    uses
        The modules that give its rows; several where weights are tied.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    uses: tuple[Use, ...]


@dataclass(frozen=True)
class Partition:
    """All trainable parameters of a model: in blocks, or left over.

    Parameters
    ----------
    blocks
        The blocks, in the model's order.
    rest
        Qualified name to parameter, for those outside every block.
    """

    blocks: tuple[Block, ...]
    rest: dict[str, nn.Parameter]


def partition(model: nn.Module) -> Partition:
    """Split the trainable parameters of `model` into blocks.

    A module with an adapter covers all parameters inside it. A module without one, with parameters of its own and no
    parametrised module inside, is covered by the `torch.func` fallback. Parameters that a module holds beside
    parametrised children are left over. Modules that share a parameter share a block.

    Raises
    ------
    ConfigurationError
        If the model has no trainable parameters, or has uninitialised (lazy) ones.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ConfigurationError(f"parameter {name!r} is not initialised: run one forward pass first")
    covered = list(_covered(model, "", set()))
    groups: list[list[Use]] = []
    for use in covered:
        mine = {id(p) for p in _trainable(use.module).values()}
        shares = [
            group for group in groups if any(mine & {id(p) for p in _trainable(u.module).values()} for u in group)
        ]
        merged = [other for group in shares for other in group] + [use]
        groups = [group for group in groups if group not in shares] + [merged]
    qualified = {id(parameter): name for name, parameter in model.named_parameters()}
    blocks = [_block(group, qualified, type(model).__name__) for group in groups]
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    blocks.sort(key=lambda block: order[block.uses[0].module_name])
    inside = {id(p) for block in blocks for p in block.parameters.values()}
    rest = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside}
    if not blocks and not rest:
        raise ConfigurationError(
            f"{type(model).__name__} has no trainable parameters: set requires_grad on those that should train"
        )
    return Partition(tuple(blocks), rest)


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _covered(module: nn.Module, prefix: str, seen: set[Any]) -> Iterator[Use]:
    if module in seen:
        return
    seen.add(module)
    adapter = adapter_for(type(module))
    own = any(p.requires_grad for p in module.parameters(recurse=False))
    parametrised_children = any(True for child in module.children() for _ in child.parameters())
    if adapter is None and own and not parametrised_children:
        adapter = _FALLBACK
    if adapter is not None:
        if _trainable(module):
            yield Use(prefix, module, adapter, {})
        return
    for name, child in module.named_children():
        yield from _covered(child, f"{prefix}.{name}" if prefix else name, seen)


def _block(uses: list[Use], qualified: dict[int, str], root: str) -> Block:
    # A parameter keeps the name that its module gives it; tied modules need the model's names to tell them apart.
    alone = len(uses) == 1
    parameters: dict[str, nn.Parameter] = {}
    named = []
    for use in uses:
        names = {}
        for name, parameter in _trainable(use.module).items():
            names[name] = name if alone else qualified[id(parameter)]
            parameters[names[name]] = parameter
        named.append(Use(use.module_name, use.module, use.adapter, names))
    return Block(uses[0].module_name or root, parameters, tuple(named))
