"""The composer: parts in, optimizer out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from curvlib.capture import Output
from curvlib.errors import ConfigurationError
from curvlib.fisher import Empirical, Fisher
from curvlib.layers import Block, Partition, Use, partition
from curvlib.precond.damping import Damping, as_damping
from curvlib.precond.gradients import check_fused
from curvlib.precond.optimizer import NaturalGradient
from curvlib.precond.refresh import Refresh, as_refresh
from curvlib.precond.rest import check_rest
from curvlib.precond.transforms import Transform, check_order
from curvlib.solvers import Solver

__all__ = ["compose"]


def compose(
    model: nn.Module,
    *,
    fisher: Fisher,
    solver: Solver | Mapping[str, Solver],
    damping: Damping | float | Mapping[str, Damping | float],
    refresh: Refresh | int = 1,
    transforms: Sequence[Transform] = (),
    blocks: Literal["layer", "network"] = "layer",
    lr: float,
    rest: str | None = None,
    output: Output | None = None,
    seed: int = 0,
    verify: bool = True,
    fused: bool = False,
) -> NaturalGradient:
    """Assemble a natural-gradient optimizer from its parts.

    Parameters
    ----------
    model
        Network whose output's first axis is the samples. Its forward passes are watched by hooks until `detach`.
    fisher
        Which output cotangents define the curvature: `Sampled`, `Exact` or `Empirical`.
    solver
        One for all blocks, or one for each pattern of block names (`fnmatch` patterns such as ``"features.*"``; the
        first that matches wins).
    damping
        λ added to every block's curvature: a number > 0, a `Damping`, or one for each pattern of block names.
    refresh
        When curvature is taken anew and factorised: every so many steps, or a `Refresh`.
    blocks
        "layer": a block for each layer, independent of the others. "network": one block for all of them, the curvature
        of the whole network with its cross terms (with `Woodbury`, one Gram summed over layers).
    transforms
        Applied in this order: those that change the gradient before the curvature, the others after it.
    lr
        Learning rate, > 0; schedulers change it in ``param_groups``.
    rest
        What becomes of bare parameters, those outside every block: ``"fallback"`` (blocks of their own, exact,
        for one more forward and backward pass of the module that holds them), ``"sgd"``, ``"adamw"`` or ``"freeze"``.
        Without it such parameters are an error.
    output
        Picks the tensor that the likelihood is about out of what the model returns; needed unless it is a tensor.
    seed
        Seed of the sampled labels.
    verify
        Whether the first forward pass checks that every block's rows add up to its gradient (three more backward
        passes, once).
    fused
        Whether blocks whose solver gains from it get their gradient as rows, from the second step on: backward then
        makes no weight gradient for them, and `.grad` of their parameters stays None. The natural gradient is the same.
        For loops that do not look at gradients themselves (no clipping outside, no GradScaler, no DDP).

    Returns
    -------
    NaturalGradient
        A `torch.optim.Optimizer`: ``loss.backward(); optimizer.step(); optimizer.zero_grad()``.

    Raises
    ------
    ConfigurationError
        If a part does not fit, with what would.
    UncoveredParameterError
        If parameters lie outside every block and `rest` is not given.

    Examples
    --------
    >>> import torch, curvlib
    >>> model = torch.nn.Linear(4, 3)
    >>> optimizer = curvlib.compose(
    ...     model, fisher=curvlib.Sampled(curvlib.Categorical()), solver=curvlib.Woodbury(), damping=0.1, lr=0.1
    ... )
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(fisher, Fisher):
        raise ConfigurationError(f"fisher must be Sampled(...), Exact(...) or Empirical(...), got {fisher!r}")
    for transform in transforms:
        if not isinstance(transform, Transform):
            raise ConfigurationError(f"transforms must be Transform objects such as Momentum(0.9), got {transform!r}")
    parts = partition(model, bare="fallback" if rest == "fallback" else None)
    check_rest(rest, parts.rest)
    check_order(transforms)
    if fused:
        check_fused(transforms)
    if blocks not in ("layer", "network"):
        raise ConfigurationError(f"blocks must be 'layer' or 'network', got {blocks!r}")
    if blocks == "network":
        parts = one_block(parts)
    chosen, when = choose_solvers(solver, parts.blocks), as_refresh(refresh)
    check_combination(chosen, fisher, when)
    check_kronecker(chosen, parts.blocks)
    return NaturalGradient(
        model,
        parts,
        fisher=fisher,
        solvers=chosen,
        damping=as_damping(damping),
        refresh=when,
        transforms=tuple(transforms),
        lr=lr,
        rest=rest,
        output=output,
        seed=seed,
        verify=verify,
        fused=fused,
    )


def check_combination(solvers: Mapping[str, Solver], fisher: Fisher, refresh: Refresh) -> None:
    """Refuse solvers that a Fisher or a refresh policy cannot serve.

    Raises
    ------
    ConfigurationError
        Naming the solver and what it needs.
    """
    for block, solver in solvers.items():
        name = f"{type(solver).__name__} (block {block!r})"
        if (solver.of_gradient or solver.of_fresh_rows) and not isinstance(fisher, Empirical):
            raise ConfigurationError(
                f"{name} works on the loss's own gradient, so it needs fisher=Empirical(), not {fisher}"
            )
        if solver.of_fresh_rows and not all(refresh.due(step) and refresh.inverse_due(step) for step in range(4)):
            raise ConfigurationError(f"{name} solves with the rows of the step's own gradient: use refresh=1")


def check_kronecker(solvers: Mapping[str, Solver], blocks: Sequence[Block]) -> None:
    """Refuse Kronecker solvers for blocks whose rows are no products of inputs and cotangents.

    Raises
    ------
    ConfigurationError
        Naming the blocks, their solvers, and what to use instead.
    """
    refused = [block for block in blocks if solvers[block.name].of_kronecker_rows and not block.kronecker]
    if not refused:
        return
    listed = ", ".join(
        f"{block.name!r} ({' + '.join(dict.fromkeys(use.adapter.name for use in block.uses))}; "
        f"{type(solvers[block.name]).__name__})"
        for block in refused
    )
    first = refused[0].name
    raise ConfigurationError(
        "Kronecker solvers need rows that are products of inputs and cotangents of one weight matrix; those of "
        f"{listed} are not: use Woodbury, Dense or Diagonal there, as in solver={{{first!r}: Woodbury(), "
        f"'*': {type(solvers[first]).__name__}(...)}}"
    )


def choose_solvers(solver: Solver | Mapping[str, Solver], blocks: Sequence[Block]) -> dict[str, Solver]:
    """Solver of every block: the first pattern that matches its name.

    Raises
    ------
    ConfigurationError
        If a value is no solver, a pattern matches no block, or a block matches no pattern.
    """
    patterns = solver if isinstance(solver, Mapping) else {"*": solver}
    names = [block.name for block in blocks]
    chosen: dict[str, Solver] = {}
    for pattern, candidate in patterns.items():
        if not isinstance(candidate, Solver):
            raise ConfigurationError(
                f"the solver for {pattern!r} must be a Solver such as Woodbury(), got {candidate!r}"
            )
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching and pattern != "*":
            raise ConfigurationError(f"the pattern {pattern!r} matches no block; the blocks are {names}")
        for name in matching:
            chosen.setdefault(name, candidate)
    missing = [name for name in names if name not in chosen]
    if missing:
        raise ConfigurationError(f"no solver pattern matches the blocks {missing}; add a last one for '*'")
    return chosen


def one_block(parts: Partition) -> Partition:
    """Return the partition with all blocks joined to one named "network", its parameters named as in the model."""
    if len(parts.blocks) < 2:
        return parts
    parameters: dict[str, nn.Parameter] = {}
    uses: list[Use] = []
    for block in parts.blocks:
        # Blocks of tied modules name their parameters as the model does already.
        module = block.uses[0].module_name
        prefix = f"{module}." if module and len(block.uses) == 1 else ""
        parameters.update({prefix + name: p for name, p in block.parameters.items()})
        uses += [replace(use, names={inner: prefix + name for inner, name in use.names.items()}) for use in block.uses]
    return replace(parts, blocks=(Block("network", parameters, tuple(uses)),))
