"""The composer: parts in, optimizer out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from curvlib.capture import Output
from curvlib.errors import ConfigurationError
from curvlib.fisher import Fisher
from curvlib.layers import Block, partition
from curvlib.precond.damping import Damping, as_damping
from curvlib.precond.optimizer import NaturalGradient
from curvlib.precond.refresh import Refresh, as_refresh
from curvlib.precond.rest import check_rest
from curvlib.precond.transforms import Transform
from curvlib.solvers import Solver

__all__ = ["compose"]


def compose(
    model: nn.Module,
    *,
    fisher: Fisher,
    solver: Solver | Mapping[str, Solver],
    damping: Damping | float,
    refresh: Refresh | int = 1,
    transforms: Sequence[Transform] = (),
    lr: float,
    rest: str | None = None,
    output: Output | None = None,
    seed: int = 0,
    verify: bool = True,
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
        λ added to every block's curvature, a number > 0 or a `Damping`.
    refresh
        When curvature is taken anew: every so many steps, or a `Refresh`.
    transforms
        Applied to the natural gradient in this order.
    lr
        Learning rate, > 0; schedulers change it in ``param_groups``.
    rest
        What becomes of trainable parameters outside every block: ``"sgd"``, ``"adamw"`` or ``"freeze"``. Without it
        such parameters are an error.
    output
        Picks the tensor that the likelihood is about out of what the model returns; needed unless it is a tensor.
    seed
        Seed of the sampled labels.
    verify
        Whether the first forward pass checks that every block's rows add up to its gradient (three more backward
        passes, once).

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
    parts = partition(model)
    check_rest(rest, parts.rest)
    return NaturalGradient(
        model,
        parts,
        fisher=fisher,
        solvers=choose_solvers(solver, parts.blocks),
        damping=as_damping(damping),
        refresh=as_refresh(refresh),
        transforms=tuple(transforms),
        lr=lr,
        rest=rest,
        output=output,
        seed=seed,
        verify=verify,
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
