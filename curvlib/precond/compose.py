"""The composer: parts in, optimizer out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn

from curvlib.capture import Output
from curvlib.errors import ConfigurationError
from curvlib.factors import Plan
from curvlib.fisher import Fisher
from curvlib.hyperparameters import checking
from curvlib.precond.callbacks import Callback
from curvlib.precond.damping import Damping, as_damping
from curvlib.precond.division import Division
from curvlib.precond.factorized import FactorizeIn
from curvlib.precond.failure import OnFailure
from curvlib.precond.gradients import check_fused
from curvlib.precond.groups import Group
from curvlib.precond.optimizer import NaturalGradient
from curvlib.precond.places import Backend
from curvlib.precond.precision import Precision
from curvlib.precond.refresh import Refresh, as_refresh
from curvlib.precond.transforms import Transform, check_order
from curvlib.solvers import Solver

__all__ = ["compose"]


@checking(bool, int, bool | None)
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
    groups: Sequence[Group] = (),
    maximize: bool = False,
    only: str | Sequence[str] | None = None,
    rest: str | None = None,
    output: Output | None = None,
    seed: int = 0,
    verify: bool = True,
    fused: bool = False,
    plan: Plan | None = None,
    backend: Backend = "torch",
    matmul_precision: Precision = "highest",
    factorize_in: FactorizeIn = None,
    on_failure: OnFailure = "keep",
    deferred: bool | None = None,
    callbacks: Sequence[Callback] = (),
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
        Learning rate, ≥ 0; schedulers change it in ``param_groups``.
    groups
        Parameter groups, as dictionaries: ``blocks`` (a pattern of block names, or several) or ``params`` (parameters
        or their names), with ``lr``, ``damping``, ``weight_decay``, ``momentum``, ``maximize`` or ``solver`` of their
        own. Parameters in none of them make the last group. What a group says is read at every step: a new damping
        factorises again, a new solver begins with the next rows. Parameters of one block may be in groups of
        different learning rates, but have one damping and one solver.
    maximize
        Whether the objective is climbed instead of descended.
    only
        Patterns of block names (or names of parameters outside every block) that this optimizer is for; the others are
        left to other optimizers. By default the whole model. Frozen parameters are in ``param_groups`` too: when they
        are unfrozen they have blocks from the next forward pass on, and lose them when they are frozen.
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
        makes no weight gradient for them, and `.grad` of their parameters stays None, in every step or only in those
        that renew the curvature. The natural gradient is the same.
        For loops that do not look at gradients themselves: clipping outside and a GradScaler are refused at the first
        step; no DDP.
    plan
        Which exact routes Factors take, and a limit on the memory of their rows. By default the cost model decides on a
        CPU, and timings when sizes are first met on a GPU (``Plan(timed=True)``); ``Plan()`` is the same everywhere.
    backend
        Array library that solvers work in: ``"torch"`` on the parameters' device, ``"cupy"`` on their GPU,
        ``"numpy"`` on the CPU. The memory is that of the tensors; what the optimizer keeps is tensors in any case.
    matmul_precision
        Of float32 products and convolutions while solvers work: ``"highest"``, ``"high"`` (TensorFloat-32) or
        ``"medium"``, as in `torch.set_float32_matmul_precision`, whatever is set there for the model. On a CPU
        ``"highest"`` leaves torch's setting alone.
    factorize_in
        "float64": factorisations alone are in float64, for curvature kept in float32. None: in its own precision.
    on_failure
        What becomes of a block whose curvature cannot be renewed, not even in float64 and with more damping.
        ``"keep"``: its last good inverse is used on; an error where there is none. ``"gradient"``: the same, but a
        block without any inverse moves along g/λ until its next refresh. ``"skip"``: the step does nothing, nor does
        one whose gradients are not finite. ``"raise"``: an error. There is one warning a block, and everything is
        counted in ``optimizer.health``.
    deferred
        Whether the checks of a step stay on the device until the next one begins, so that no step waits for a GPU.
        What a step would have raised, warned of or counted comes one call of `step` later (or with ``state_dict()`` or
        ``health``); parameters and state are then as they were before the step that failed. None: where the parameters
        are on a CUDA device. Parts that need numbers of the step itself have its checks read at once all the same:
        closures that are called twice, callbacks, `OnEvidence`, `TraceRelative` when it refreshes, other array
        libraries, parameters on several devices, a block's first curvature, and every step after one whose
        factorisation had failed.
    callbacks
        Functions ``callback(optimizer, loss)`` called after every step, skipped ones too; the loss is what the closure
        returned, None without one. `CSVWriter` and `TensorBoardWriter` are ready ones.

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
    for transform in transforms:
        if not isinstance(transform, Transform):
            raise ConfigurationError(f"transforms must be Transform objects such as Momentum(0.9), got {transform!r}")
    check_order(transforms)
    if not -(2**63) <= seed < 2**64:
        raise ConfigurationError(f"seed must be an integer of 64 bits, got {seed!r}")
    if fused:
        check_fused(transforms)
    division = Division(
        model,
        fisher,
        solver,
        as_refresh(refresh),
        blocks=blocks,
        rest=rest,
        only=(only,) if isinstance(only, str) else None if only is None else tuple(only),
        backend=backend,
        matmul_precision=matmul_precision,
        factorize_in=factorize_in,
    )
    return NaturalGradient(
        division,
        damping=as_damping(damping),
        transforms=tuple(transforms),
        lr=lr,
        groups=groups,
        maximize=maximize,
        output=output,
        seed=seed,
        verify=verify,
        fused=fused,
        plan=plan,
        on_failure=on_failure,
        deferred=deferred,
        callbacks=callbacks,
    )
