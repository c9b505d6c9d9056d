"""`explain`: what will happen to every parameter, before training starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from curvlib.capture import Output
from curvlib.errors import ConfigurationError
from curvlib.explanation.measure import BlockCost, Request, label, measure
from curvlib.explanation.table import Explanation, ParameterRow
from curvlib.fisher import Fisher, Sampled
from curvlib.layers import Block, partition
from curvlib.precond import NaturalGradient
from curvlib.precond.backends import plain
from curvlib.precond.division import choose_solvers
from curvlib.precond.rest import REST
from curvlib.solvers import Solver, Woodbury

__all__ = ["explain"]

_REST = {
    "sgd": "its plain gradient goes through the same transforms",
    "adamw": "it has an AdamW of its own",
    "freeze": "it stays as it is",
}


def explain(
    model: nn.Module | NaturalGradient,
    *inputs: Any,
    fisher: Fisher | None = None,
    solver: Solver | Mapping[str, Solver] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    rest: str | None = None,
    output: Output | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    damping: float = 1.0,
) -> Explanation:
    """Say for every parameter of a model which block, adapter and solver serve it, whether exactly, and at what cost.

    Curvature is taken once, for these inputs, and given to the solvers: bytes are those of the arrays that come out,
    operations are counted from the sizes of their operands (`Explanation.to_dict` lists the formulas; what lies between
    blocks, and transforms, are not counted). Parameters, gradients, buffers, hooks and random state are as before.

    Parameters
    ----------
    model
        A module, or an optimizer of `curvlib.compose`, whose Fisher, solvers and rest are then taken.
    *inputs, kwargs
        What the model is called with.
    fisher
        Which curvature; `Sampled()` by default.
    solver
        One for all blocks, or one for each pattern of block names; `Woodbury()` by default.
    rest
        What becomes of parameters outside every block, as for `compose`; without it they are listed as uncovered.
    output
        Picks the tensor that the likelihood is about.
    loss
        For the empirical Fisher: a function of what the model returns; its sizes do not depend on which.
    damping
        For the trial inverse; sizes do not depend on it.

    Returns
    -------
    Explanation
        Print it, or take `parameters`, `totals`, `to_dict()`.

    Raises
    ------
    ConfigurationError
        If the arguments do not fit, or the model has nothing to train.
    CaptureError
        If no block's rows can be formed at all.

    Examples
    --------
    >>> import torch, curvlib
    >>> table = curvlib.explain(torch.nn.Linear(4, 3), torch.ones(8, 4))
    >>> [(row.name, row.adapter, row.exact) for row in table.parameters]
    [('weight', 'linear', True), ('bias', 'linear', True)]
    """
    if isinstance(model, NaturalGradient):
        if not (fisher is None and solver is None and rest is None and output is None):
            raise ConfigurationError("an optimizer has its own fisher, solver, rest and output: leave these out")
        with model._capture.paused():
            request = Request(model.model, inputs, kwargs or {}, model.fisher, model.output, loss, model.plan)
            solvers = {block: plain(solver) for block, solver in model.solvers.items()}
            return _explained(request, model._blocks, solvers, model.rest, damping)
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"explain takes a torch.nn.Module or a curvlib optimizer, got {type(model).__name__}")
    if rest is not None and rest not in REST:
        raise ConfigurationError(f"rest must be one of {', '.join(map(repr, REST))}, got {rest!r}")
    request = Request(model, inputs, kwargs or {}, fisher or Sampled(), output, loss)
    blocks = partition(model, bare="fallback" if rest == "fallback" else None).blocks
    solvers = choose_solvers(Woodbury() if solver is None else solver, blocks) if blocks else {}
    return _explained(request, blocks, solvers, rest, damping)


def _explained(
    request: Request, blocks: tuple[Block, ...], solvers: Mapping[str, Solver], rest: str | None, damping: float
) -> Explanation:
    model = request.model
    costs = measure(request, blocks, solvers, damping) if blocks else {}
    names = {id(p): name for name, p in model.named_parameters()}
    rows: dict[str, ParameterRow] = {}
    for block in blocks:
        rows |= _block_rows(block, solvers[block.name], costs[block.name], names)
    for name, parameter in model.named_parameters():
        if name not in rows:
            rows[name] = _outside(model, name, parameter, rest)
    ordered = tuple(rows[name] for name, _ in model.named_parameters())
    return Explanation(type(model).__name__, str(request.fisher), ordered)


def _block_rows(block: Block, solver: Solver, cost: BlockCost, names: Mapping[int, str]) -> dict[str, ParameterRow]:
    adapters = ", ".join(dict.fromkeys(use.adapter.name for use in block.uses))
    closed = all(use.adapter.closed_form for use in block.uses)
    reasons = [cost.problem, cost.doubt]
    if not solver.exact:
        reasons.append(f"{type(solver).__name__} approximates the block by definition")
    exact = not any(reasons)
    if len(block.uses) > 1:
        reasons.append(f"one block for the modules {', '.join(use.module_name for use in block.uses)}")
    if not closed:
        reasons.append("no closed form: the module runs again for every sample, vectorised by torch.func")
    shares = {
        one: _split(getattr(cost, one), [p.numel() for p in block.parameters.values()])
        for one in ("factor_bytes", "inverse_bytes", "kept_bytes", "capture_flops", "refresh_flops", "step_flops")
    }
    rows = {}
    for index, parameter in enumerate(block.parameters.values()):
        name = names[id(parameter)]
        rows[name] = ParameterRow(
            name=name,
            shape=tuple(parameter.shape),
            size=parameter.numel(),
            block=block.name,
            adapter=adapters,
            closed_form=closed,
            solver=label(solver),
            exact=exact,
            why="; ".join(reason for reason in reasons if reason),
            rows=cost.rows,
            factors=cost.factors,
            route=cost.route,
            kept=cost.kept,
            **{one: parts[index] for one, parts in shares.items()},
        )
    return rows


def _split(total: int, sizes: list[int]) -> list[int]:
    """Split a whole number in proportion to sizes, so that the parts add up."""
    whole = max(1, sum(sizes))
    ends = [total * sum(sizes[: index + 1]) // whole for index in range(len(sizes))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _outside(model: nn.Module, name: str, parameter: nn.Parameter, rest: str | None) -> ParameterRow:
    owner = model.get_submodule(name.rpartition(".")[0])
    if not parameter.requires_grad:
        adapter, solver, why = "frozen", "—", "it needs no gradient"
    elif rest is not None:
        adapter, solver, why = "rest", rest, _REST.get(rest, "")
    else:
        adapter, solver = "uncovered", "—"
        why = (
            f"no block covers it: register an adapter for {type(owner).__name__} (curvlib.layers.register), or set "
            f"rest= to {', '.join(map(repr, REST))}"
        )
    return ParameterRow(name, tuple(parameter.shape), parameter.numel(), "", adapter, None, solver, False, why)
