"""Which parameters of a model an optimizer moves, how they divide into blocks, and which solver serves each block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from curvlib.errors import ConfigurationError
from curvlib.fisher import Empirical, Fisher
from curvlib.layers import Block, Partition, Use, partition
from curvlib.precond.backends import placed
from curvlib.precond.factorized import FactorizeIn, factorized_in
from curvlib.precond.places import Backend
from curvlib.precond.precision import Precision
from curvlib.precond.refresh import Refresh
from curvlib.precond.rest import check_rest
from curvlib.solvers import Solver

__all__ = ["Division", "choose_solvers", "selected", "unchanged"]


@dataclass(frozen=True, eq=False)
class Division:
    """How a model's trainable parameters divide into blocks, at first and whenever some are frozen, unfrozen or added.

    Parameters
    ----------
    model, fisher, solver, refresh, blocks, rest, only, backend, matmul_precision, factorize_in
        As in `curvlib.compose`.
    """

    model: nn.Module
    fisher: Fisher
    solver: Solver | Mapping[str, Solver]
    refresh: Refresh
    blocks: Literal["layer", "network"] = "layer"
    rest: str | None = None
    only: tuple[str, ...] | None = None
    backend: Backend = "torch"
    matmul_precision: Precision = "highest"
    factorize_in: FactorizeIn = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise ConfigurationError(f"model must be a torch.nn.Module, got {type(self.model).__name__}")
        if not isinstance(self.fisher, Fisher):
            raise ConfigurationError(f"fisher must be Sampled(...), Exact(...) or Empirical(...), got {self.fisher!r}")
        if self.blocks not in ("layer", "network"):
            raise ConfigurationError(f"blocks must be 'layer' or 'network', got {self.blocks!r}")

    def territory(self) -> dict[str, nn.Parameter]:
        """Parameters that the optimizer is for, by qualified name: all of the model, or those that `only` names.

        Frozen ones are among them, as they may be unfrozen.

        Raises
        ------
        ConfigurationError
            If a pattern of `only` matches nothing.
        UncoveredParameterError
            If parameters lie outside every block and `rest` does not say what becomes of them.
        """
        parts = self.parts()
        named = dict(self.model.named_parameters())
        if self.only == ():
            raise ConfigurationError("only=() names nothing to optimize: give patterns of block names, or leave it out")
        if self.only is not None:
            named = selected(self.only, named, parts.blocks, "only")
        uncovered = {name: p for name, p in parts.rest.items() if name in named}
        check_rest(self.rest, uncovered)
        if self.rest == "freeze":
            named = {name: p for name, p in named.items() if name not in uncovered}
        return named

    def divided(self, parameters: Iterable[nn.Parameter]) -> Partition:
        """Blocks of the trainable ones among these parameters, and those outside every block.

        Raises
        ------
        ConfigurationError
            If a block is of other parameters too.
        UncoveredParameterError
            As `territory`.
        """
        mine = {id(p) for p in parameters}
        if not any(p.requires_grad for p in self.model.parameters()):
            return Partition((), {})
        parts = self.parts()
        blocks = tuple(block for block in parts.blocks if any(id(p) in mine for p in block.parameters.values()))
        for block in blocks:
            outside = [name for name, p in block.parameters.items() if id(p) not in mine]
            if outside:
                raise ConfigurationError(
                    f"the parameters of block {block.name!r} have one curvature, but {outside} of them are not this "
                    f"optimizer's: name the whole block, add them with add_param_group, or freeze them"
                )
        rest = {name: p for name, p in parts.rest.items() if id(p) in mine}
        check_rest(self.rest, rest)
        parts = Partition(blocks, rest)
        return one_block(parts) if self.blocks == "network" else parts

    def solvers(self, blocks: Sequence[Block], own: Mapping[str, Solver | None], strict: bool) -> dict[str, Solver]:
        """Solver of every block: that of its parameter group, or the first whose pattern matches.

        Parameters
        ----------
        blocks
            All blocks.
        own
            Block name to the solver that its group asks for, None where it asks for none.
        strict
            Whether a pattern that matches nothing is an error.

        Raises
        ------
        ConfigurationError
            If a solver cannot serve its block, this Fisher or this refresh policy.
        """
        chosen = choose_solvers(self.solver, blocks, strict)
        chosen |= {name: solver for name, solver in own.items() if solver is not None}
        check_combination(chosen, self.fisher, self.refresh)
        check_rows(chosen, blocks)
        return chosen

    def at_work(self, solvers: Mapping[str, Solver], blocks: Sequence[Block]) -> dict[str, Solver]:
        """Return these solvers where, and in what precision, they work."""
        devices = {p.device for block in blocks for p in block.parameters.values()}
        solvers = factorized_in(self.factorize_in, solvers)
        return placed(solvers, self.backend, self.matmul_precision, devices)

    def parts(self) -> Partition:
        """All trainable parameters of the model, whosever they are."""
        return partition(self.model, bare="fallback" if self.rest == "fallback" else None)


def selected(
    patterns: Sequence[str], named: Mapping[str, nn.Parameter], blocks: Sequence[Block], what: str
) -> dict[str, nn.Parameter]:
    """Parameters whose own name, block, or a module around them matches one of the patterns.

    Parameters
    ----------
    patterns
        `fnmatch` patterns.
    named
        Parameters by qualified name.
    blocks
        Blocks of the trainable ones.
    what
        Name of the option, for the error.

    Raises
    ------
    ConfigurationError
        If a pattern matches nothing.
    """
    block_of = {id(p): block.name for block in blocks for p in block.parameters.values()}
    found = {}
    unmatched = set(patterns)
    for name, p in named.items():
        parts = name.split(".")
        known = {".".join(parts[:end]) for end in range(1, len(parts) + 1)} | {block_of.get(id(p), name)}
        hits = {pattern for pattern in patterns if any(fnmatchcase(one, pattern) for one in known)}
        unmatched -= hits
        if hits:
            found[name] = p
    if unmatched:
        raise ConfigurationError(
            f"{what}: nothing matches {sorted(unmatched)}; the blocks are {[block.name for block in blocks]}"
        )
    return found


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


def check_rows(solvers: Mapping[str, Solver], blocks: Sequence[Block]) -> None:
    """Refuse solvers for blocks whose rows are not of the kind that they need, as far as that can be told beforehand.

    Raises
    ------
    ConfigurationError
        Naming the blocks, their solvers, and what to use instead.
    """
    refused = [block for block in blocks if solvers[block.name].of_kronecker_rows and not block.kronecker]
    if refused:
        raise ConfigurationError(
            "Kronecker solvers need rows that are products of inputs and cotangents of one weight matrix; those of "
            f"{_listed(refused, solvers)} are not: use Woodbury, Dense or Diagonal there, as in "
            f"{_instead(refused[0], solvers)}"
        )
    refused = [block for block in blocks if solvers[block.name].of_preactivations and not block.preactivations]
    if refused:
        first = refused[0]
        reason = "is a table that is looked up in" if any(use.adapter.lookup for use in first.uses) else "is frozen"
        raise ConfigurationError(
            f"{type(solvers[first.name]).__name__} follows pre-activations, a trained weight times inputs, and there "
            f"are none in {_listed(refused, solvers)}: the weight of {first.name!r} {reason}; use Woodbury, Diagonal "
            f"or KFAC there, as in {_instead(first, solvers)}"
        )


def _listed(blocks: Iterable[Block], solvers: Mapping[str, Solver]) -> str:
    return ", ".join(
        f"{block.name!r} ({' + '.join(dict.fromkeys(use.adapter.name for use in block.uses))}; "
        f"{type(solvers[block.name]).__name__})"
        for block in blocks
    )


def _instead(block: Block, solvers: Mapping[str, Solver]) -> str:
    return f"solver={{{block.name!r}: Woodbury(), '*': {type(solvers[block.name]).__name__}(...)}}"


def choose_solvers(
    solver: Solver | Mapping[str, Solver], blocks: Sequence[Block], strict: bool = True
) -> dict[str, Solver]:
    """Solver of every block: the first pattern that matches its name.

    Parameters
    ----------
    solver
        One for all, or one for each pattern.
    blocks
        All blocks.
    strict
        Whether a pattern that matches nothing is an error.

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
        if strict and not matching and pattern != "*":
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


def unchanged(old: Iterable[Block], new: Iterable[Block]) -> tuple[Block, ...]:
    """Return the new blocks, those that are as before as the objects that they were."""
    before = {block.name: block for block in old}
    return tuple(
        before[block.name] if block.name in before and _alike(before[block.name], block) else block for block in new
    )


def _alike(left: Block, right: Block) -> bool:
    def identity(block: Block) -> tuple[Set[tuple[str, int]], list[tuple[str, int, dict[str, str]]]]:
        named = {(name, id(p)) for name, p in block.parameters.items()}
        return named, [(use.module_name, id(use.module), use.names) for use in block.uses]

    return identity(left) == identity(right)
