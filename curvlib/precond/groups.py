"""Parameter groups: what may differ between parameters, and what a block may be told by several of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from curvlib.errors import ConfigurationError
from curvlib.layers import Block
from curvlib.precond.damping import Constant, Damping, check_damping_value
from curvlib.precond.division import selected
from curvlib.precond.transforms import Momentum, Transform, WeightDecay
from curvlib.solvers import Solver

__all__ = [
    "ByGroup",
    "Group",
    "assigned",
    "check_lr",
    "check_options",
    "defaults",
    "of_block",
    "one_sign",
    "places",
    "resolved",
]

Group = Mapping[str, Any]

_OWN = ("params", "blocks", "lr", "damping", "weight_decay", "momentum", "solver", "maximize")
_OF_OTHERS = ("name", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")
"""What schedulers and people write into groups, and nobody here reads."""


def check_lr(lr: Any) -> float:
    """Return a learning rate that is a finite number ≥ 0.

    Raises
    ------
    ConfigurationError
        Otherwise.
    """
    if isinstance(lr, bool) or not (isinstance(lr, int | float) and math.isfinite(lr) and lr >= 0):
        raise ConfigurationError(f"lr must be a finite number ≥ 0, got {lr!r}")
    return float(lr)


def defaults(lr: float, damping: Damping, transforms: Sequence[Transform], maximize: bool) -> dict[str, Any]:
    """What a group holds that does not say otherwise, by option.

    A value None leaves it to what was composed: to the damping policy, the transforms, the solvers by pattern.
    """
    values = {
        "lr": check_lr(lr),
        "damping": damping.value if isinstance(damping, Constant) else None,
        "weight_decay": _of_only([one.rate for one in transforms if isinstance(one, WeightDecay)], 0.0),
        "solver": None,
        "maximize": bool(maximize),
    }
    momenta = [one.decay for one in transforms if isinstance(one, Momentum)]
    if momenta:
        # Schedulers that cycle momentum look for this name, and refuse an optimizer without it.
        values["momentum"] = _of_only(momenta, None)
    return values


def _of_only(values: list[float], none: float | None) -> float | None:
    """Return the value that there is one of; None leaves several to speak for themselves."""
    return (values[0] if len(values) == 1 else None) if values else none


def check_options(group: Group, transforms: Sequence[Transform]) -> None:
    """Refuse options of a group that nobody could follow.

    Raises
    ------
    ConfigurationError
        Naming the option and what it may be.
    """
    if "lr" in group:
        check_lr(group["lr"])
    if group.get("damping") is not None:
        if isinstance(group["damping"], Damping | Mapping):
            raise ConfigurationError(
                "a group's damping is a number, or None for that of the optimizer; for a policy write "
                f"damping={{'<pattern of blocks>': {group['damping']!r}, '*': ...}} in compose"
            )
        check_damping_value(group["damping"])
    solver = group.get("solver")
    if solver is not None and not isinstance(solver, Solver):
        raise ConfigurationError(f"a group's solver must be a Solver such as Woodbury(), or None, got {solver!r}")
    if not isinstance(group.get("maximize", False), bool):
        raise ConfigurationError(f"a group's maximize must be True or False, got {group['maximize']!r}")
    for option, kind, most in (("weight_decay", WeightDecay, math.inf), ("momentum", Momentum, 1.0)):
        value = group.get(option)
        if value is None:
            continue
        if isinstance(value, bool) or not (isinstance(value, int | float) and 0 <= value < most):
            raise ConfigurationError(f"a group's {option} must be a number in [0, {most:g}), got {value!r}")
        if value and not any(isinstance(one, kind) for one in transforms):
            raise ConfigurationError(
                f"a group has {option}={value!r}, but no {kind.__name__} is among the transforms, whose order says "
                f"where it acts: add {kind.__name__}(0.0) to transforms"
            )


def assigned(
    groups: Iterable[Group], territory: Mapping[str, nn.Parameter], blocks: Sequence[Block]
) -> list[dict[str, Any]]:
    """Groups with their parameters, in the order given; those that no group takes make one more at the end.

    Parameters
    ----------
    groups
        Each with ``params`` or with ``blocks``, patterns of names; a parameter goes to the first that takes it by name.
    territory
        All parameters of the optimizer, by qualified name.
    blocks
        Blocks of the trainable ones.

    Raises
    ------
    ConfigurationError
        If a group says nothing of its parameters or takes none, or a parameter is not the optimizer's.
    """
    left = dict(territory)
    result = []
    for group in groups:
        made = resolved(group, left, blocks)
        taken = {id(p) for p in made["params"]}
        left = {name: p for name, p in left.items() if id(p) not in taken}
        result.append(made)
    if left:
        result.append({"params": list(left.values())})
    return result


def resolved(group: Group, named: Mapping[str, nn.Parameter], blocks: Sequence[Block]) -> dict[str, Any]:
    """Return a group whose ``blocks``, if it has that, are written out as ``params``.

    Parameters
    ----------
    group
        With ``params`` (parameters, names of parameters, or a single one) or ``blocks`` (a pattern or several).
    named
        Parameters that it may take, by qualified name.
    blocks
        Blocks of the trainable ones.

    Raises
    ------
    ConfigurationError
        As `assigned`.
    """
    if not isinstance(group, Mapping) or ("params" in group) == ("blocks" in group):
        raise ConfigurationError(
            f"a group is a dictionary with either 'params' or 'blocks' (patterns of names), got {group!r}"
        )
    unknown = [key for key in group if key not in (*_OWN, *_OF_OTHERS)]
    if unknown:
        raise ConfigurationError(f"a group has the unknown options {unknown}; there are {list(_OWN)}")
    options = {key: value for key, value in group.items() if key not in ("params", "blocks")}
    if "blocks" in group:
        patterns = _several("blocks", group["blocks"])
        return {"params": list(selected(patterns, named, blocks, "blocks").values()), **options}
    given = _several("params", group["params"])
    known = {id(p): p for p in named.values()}
    chosen = []
    for one in given:
        parameter = named.get(one) if isinstance(one, str) else known.get(id(one))
        if parameter is None:
            what = repr(one) if isinstance(one, str) else f"one of shape {tuple(getattr(one, 'shape', ()))}"
            raise ConfigurationError(
                f"a group names the parameter {what}, which the model does not have, or which is in another group"
            )
        chosen.append(parameter)
    if not chosen:
        raise ConfigurationError("a group has no parameters")
    return {"params": chosen, **options}


def _several(option: str, value: Any) -> list[Any]:
    """Return what an option has, one or several."""
    if isinstance(value, Tensor | str):
        return [value]
    if not isinstance(value, Iterable) or (option == "blocks" and not all(isinstance(one, str) for one in value)):
        raise ConfigurationError(
            f"a group's {option} are {'patterns of names' if option == 'blocks' else 'parameters or their names'}, "
            f"got {value!r}"
        )
    return list(value)


def places(blocks: Iterable[Block], groups: Sequence[Group]) -> dict[str, tuple[int, ...]]:
    """Block name to the numbers of the groups that its parameters are in."""
    number = {p: index for index, group in enumerate(groups) for p in group["params"]}
    return {block.name: tuple(dict.fromkeys(number[p] for p in block.parameters.values())) for block in blocks}


def of_block(option: str, where: Mapping[str, tuple[int, ...]], groups: Sequence[Group]) -> dict[str, Any]:
    """Block name to what the groups of its parameters say about an option.

    Parameters
    ----------
    option
        Its name.
    where
        From `places`.
    groups
        All groups.

    Raises
    ------
    ConfigurationError
        If they say different things: a block has one curvature.
    """
    if len(groups) == 1:
        return dict.fromkeys(where, groups[0].get(option))
    result = {}
    for name, numbers in where.items():
        said = [groups[number].get(option) for number in numbers]
        if any(other is not said[0] and other != said[0] for other in said[1:]):
            raise ConfigurationError(
                f"the parameters of block {name!r} are in groups with different values of {option!r}, "
                f"{said}, but the block has one curvature: give these groups the same"
            )
        result[name] = said[0]
    return result


def one_sign(groups: Iterable[Group]) -> int:
    """1 where the loss is minimised, -1 where it is maximised.

    Raises
    ------
    ConfigurationError
        If groups do both: no change of one loss says how good such a step was.
    """
    signs = {-1 if group.get("maximize") else 1 for group in groups}
    if len(signs) > 1:
        raise ConfigurationError(
            "a damping that follows the loss cannot serve groups that minimise and groups that maximise: use two "
            "optimizers, with only="
        )
    return signs.pop() if signs else 1


class ByGroup(Damping):
    """The damping of each block's group where that has one, otherwise a policy's.

    Parameters
    ----------
    policy
        For the others.
    values
        Block name to λ; None leaves the block to the policy.
    """

    def __init__(self, policy: Damping, values: Mapping[str, float | None]) -> None:
        self.policy = policy
        self.values = values

    @property
    def needs_trace(self) -> bool:
        return self.policy.needs_trace

    def at(self, step: int, block: str, mean_eigenvalue: float) -> float:
        value = self.values.get(block)
        return self.policy.at(step, block, mean_eigenvalue) if value is None else check_damping_value(value)
