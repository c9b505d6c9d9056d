"""Which parameters form a block, and which module's adapter covers them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from curvlib.errors import ConfigurationError
from curvlib.layers.fallback import fallback
from curvlib.layers.parametrized import through_parametrizations
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

    @cached_property
    def renames(self) -> bool:
        """Whether a parameter has another name in the block than in the module."""
        return any(inner != outer for inner, outer in self.names.items())


@dataclass(frozen=True, eq=False)
class Block:
    """Parameters that share one curvature block.

    Parameters
    ----------
    name
        Qualified name of the (first) module, the class name for a root module; with ".(own)" behind it where the block
        is of the bare parameters of that module alone.
    parameters
        Name inside the block to parameter, trainable ones only.
    uses
        The modules that give its rows; several where weights are tied.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    uses: tuple[Use, ...]

    @property
    def kronecker(self) -> bool:
        """Whether rows may be products of inputs and cotangents, as far as can be told before there are any.

        Kronecker factors act on one matrix, of a weight and a bias. Where modules share it, products of their rows have
        a common form only if all of them have both parameters, and either all multiply with it or all look up in it.
        """
        one_matrix = len(self.parameters) <= 2 and sum(p.ndim > 1 for p in self.parameters.values()) <= 1
        alike = len({(use.adapter.lookup, frozenset(use.names.values())) for use in self.uses}) == 1
        return one_matrix and alike and all(use.adapter.multiplies(use.module) for use in self.uses)

    @property
    def preactivations(self) -> bool:
        """Whether rows tell how pre-activations, a trained weight times inputs, move with the parameters."""
        multiplied = not any(use.adapter.lookup for use in self.uses)
        return self.kronecker and multiplied and any(p.ndim > 1 for p in self.parameters.values())


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


def partition(model: nn.Module, bare: str | None = None) -> Partition:
    """Split the trainable parameters of `model` into blocks.

    A module with an adapter covers all parameters inside it. A module without one, with trainable parameters of its own
    and none in modules inside, is covered by the `torch.func` fallback. Where a module's weights are computed from
    other parameters (`torch.nn.utils.parametrize`, weight norm, pruning), the block is of these. Parameters that a
    module holds beside trainable children are bare. Modules that share a parameter share a block.

    Parameters
    ----------
    model
        Any module.
    bare
        What becomes of bare parameters: None leaves them over; ``"fallback"`` makes a block of those of each module,
        named ``"<module>.(own)"``, whose rows come from the fallback over that module, everything else in it constant.

    Raises
    ------
    ConfigurationError
        If the model has no trainable parameters, has uninitialised (lazy) ones, or `bare` is something else.
    """
    if bare not in (None, "fallback"):
        raise ConfigurationError(f"bare must be None or 'fallback', got {bare!r}")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ConfigurationError(f"parameter {name!r} is not initialised: run one forward pass first")
    qualified = {id(parameter): name for name, parameter in model.named_parameters()}
    root = type(model).__name__
    blocks = [_block(group, qualified, group[0].module_name or root) for group in _joined(_covered(model, "", set()))]
    rest = _uncovered(model, blocks)
    if bare == "fallback":
        blocks += [
            _block(group, qualified, f"{group[0].module_name or root}.(own)")
            for group in _joined(_bare(model, {id(p) for p in rest.values()}))
        ]
        rest = _uncovered(model, blocks)
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    blocks.sort(key=lambda block: order[block.uses[0].module_name])
    if not blocks and not rest:
        raise ConfigurationError(
            f"{type(model).__name__} has no trainable parameters: set requires_grad on those that should train"
        )
    return Partition(tuple(blocks), rest)


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _uncovered(model: nn.Module, blocks: Sequence[Block]) -> dict[str, nn.Parameter]:
    inside = {id(p) for block in blocks for p in block.parameters.values()}
    return {name: p for name, p in _trainable(model).items() if id(p) not in inside}


def _holds(module: nn.Module, name: str, child: nn.Module) -> bool:
    """Whether a child is no layer but a place where the module keeps parameters of its own."""
    if isinstance(child, nn.ParameterList | nn.ParameterDict):
        return True
    return name == "parametrizations" and parametrize.is_parametrized(module)


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_children() if not _holds(module, name, child)}


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters that a module holds itself."""
    own = dict(module.named_parameters(recurse=False))
    for name, child in module.named_children():
        if _holds(module, name, child):
            own |= {f"{name}.{inner}": p for inner, p in child.named_parameters()}
    return {name: p for name, p in own.items() if p.requires_grad}


def _computed_by_hook(module: nn.Module) -> bool:
    """Whether a hook computes a weight from other parameters, as older weight norm, spectral norm and pruning do.

    They leave a plain tensor "weight" beside parameters such as "weight_g" or "weight_orig".
    """
    plain = [name for name, value in vars(module).items() if isinstance(value, Tensor)]
    return any(own.startswith(f"{name}_") for name in plain for own in module._parameters)


def _covered(module: nn.Module, prefix: str, seen: set[Any]) -> Iterator[Use]:
    if module in seen:
        return
    seen.add(module)
    adapter = adapter_for(type(module))
    if adapter is not None and any(_computed_by_hook(inner) for inner in module.modules()):
        adapter = _FALLBACK
    elif adapter is not None and any(parametrize.is_parametrized(inner) for inner in module.modules()):
        adapter = through_parametrizations(adapter)
    layers = _layers(module)
    if adapter is None and _own(module) and not any(_trainable(child) for child in layers.values()):
        adapter = _FALLBACK
    if adapter is not None:
        if _trainable(module):
            yield Use(prefix, module, adapter, {name: name for name in _trainable(module)})
        return
    for name, child in layers.items():
        yield from _covered(child, f"{prefix}.{name}" if prefix else name, seen)


def _bare(model: nn.Module, uncovered: Set[int]) -> Iterator[Use]:
    """One use for each module that holds uncovered parameters, of the fallback over these alone."""
    owners: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        names = {}
        for name, p in _own(module).items():
            # A module around this one that holds the same parameter sees its uses in here too.
            around = any(not other or prefix.startswith(f"{other}.") for other in owners.get(id(p), ()))
            if id(p) in uncovered and not around:
                names[name] = name
                owners.setdefault(id(p), []).append(prefix)
        if names:
            function = partial(fallback, only=frozenset(names))
            adapter = Adapter("torch.func fallback", function, whole_call=True, closed_form=False)
            yield Use(prefix, module, adapter, names)


def _joined(uses: Iterable[Use]) -> list[list[Use]]:
    """Uses in groups that share no parameter with each other."""
    groups: list[list[Use]] = []
    for use in uses:
        mine = _identities(use)
        shares = [group for group in groups if any(mine & _identities(other) for other in group)]
        merged = [other for group in shares for other in group] + [use]
        groups = [group for group in groups if group not in shares] + [merged]
    return groups


def _parameters(use: Use) -> dict[str, nn.Parameter]:
    return {name: p for name, p in use.module.named_parameters() if name in use.names}


def _identities(use: Use) -> set[int]:
    return {id(p) for p in _parameters(use).values()}


def _block(uses: list[Use], qualified: dict[int, str], title: str) -> Block:
    # A parameter keeps the name that its module gives it; tied modules need the model's names to tell them apart.
    alone = len(uses) == 1
    parameters: dict[str, nn.Parameter] = {}
    named = []
    for use in uses:
        names = {}
        for name, parameter in _parameters(use).items():
            names[name] = name if alone else qualified[id(parameter)]
            parameters[names[name]] = parameter
        named.append(dataclasses.replace(use, names=names))
    return Block(title, parameters, tuple(named))
