"""What a method costs apart from its training: the time to invert all blocks, and the peak of memory."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvlib.capture import collect
from curvlib.cli.data import Dataset
from curvlib.cli.reproduction.plan import Plan
from curvlib.cli.tasks import Task
from curvlib.cli.training import STOPPING_ERRORS, synchronize, training_step
from curvlib.factors import Factors
from curvlib.fisher import Fisher
from curvlib.precond import NaturalGradient
from curvlib.solvers import Identity, Solver
from curvlib.solvers.base import Evaluation, as_vector

__all__ = ["measure_cost"]

_STEPS = 3
_PATIENCE = 600.0
_MEGABYTE = 2**20


def measure_cost(plan: Plan, task: Task, optimizer: str, repeats: int = 5) -> dict[str, Any]:
    """Measure one optimizer on the experiment's network with a batch of its data.

    Parameters
    ----------
    plan, task
        The experiment and its data.
    optimizer
        Who is measured.
    repeats
        Times that each part is measured; the median counts.

    Returns
    -------
    dict
        ``identity``; ``memory``, the peak in megabytes of three steps, None where the system does not tell;
        ``inversion``, milliseconds by part and the number of blocks, None for a method without curvature.
    """
    return {
        "identity": asdict(plan.identity(optimizer, 0)),
        "memory": _peak(plan, task, optimizer),
        "inversion": _inversion(plan, task, optimizer, repeats),
    }


# -- inversion --------------------------------------------------------------------------------------------------------


def _inversion(plan: Plan, task: Task, name: str, repeats: int) -> dict[str, Any] | None:
    model = task.model(0)
    optimizer = plan.optimizer(name, model, task.likelihood, 0)
    if not isinstance(optimizer, NaturalGradient):
        return None
    chosen, fisher = dict(optimizer.solvers), optimizer.fisher
    damping = float(plan.hyperparameters(name)["damping"] or 0)
    optimizer.detach()
    # A block without curvature has nothing to invert.
    chosen = {block: solver for block, solver in chosen.items() if not isinstance(solver, Identity)}
    batch = task.batches(plan.batch_size, 0).draw()
    try:
        rows = _rows(task, model, fisher, batch)
        with torch.no_grad():
            return _timed_parts(plan, task, model, fisher, chosen, rows, damping, batch, repeats)
    except STOPPING_ERRORS as error:
        return {"failure": str(error)}


def _rows(task: Task, model: nn.Module, fisher: Fisher, batch: tuple[Tensor, Tensor]) -> dict[str, Factors]:
    inputs, targets = batch
    generator = torch.Generator(task.device).manual_seed(0)
    return collect(
        model, fisher, inputs, loss=lambda outputs: task.loss(outputs, targets), generator=generator, verify=False
    )


def _timed_parts(
    plan: Plan,
    task: Task,
    model: nn.Module,
    fisher: Fisher,
    chosen: Mapping[str, Solver],
    rows: Mapping[str, Factors],
    damping: float,
    batch: tuple[Tensor, Tensor],
    repeats: int,
) -> dict[str, Any]:
    together: dict[int, list[str]] = {}
    for block, solver in chosen.items():
        together.setdefault(id(solver), []).append(block)

    def update(estimates: Mapping[str, Any]) -> dict[str, Any]:
        return {block: solver.update(estimates.get(block), rows[block]) for block, solver in chosen.items()}

    def factorize(estimates: Mapping[str, Any]) -> dict[str, Any]:
        inverses: dict[str, Any] = {}
        for blocks in together.values():
            own = [estimates[block] for block in blocks]
            made = chosen[blocks[0]].factorize_all(own, [damping] * len(blocks))
            inverses.update(zip(blocks, made, strict=True))
        return inverses

    # The update that counts is one of many, and one that renews the bases where a method has some.
    warm: dict[str, Any] = {}
    for _ in range(max(getattr(solver, "basis_every", 1) for solver in chosen.values())):
        warm = update(warm)
    estimates = update(warm)
    inverses = factorize(estimates)
    gradients = {block: as_vector(rows[block]) for block in chosen}

    def solve() -> None:
        for block, solver in chosen.items():
            solver.solve(inverses[block], gradients[block])

    def clock(work: Callable[[], Any]) -> float:
        return _median(work, task.device, repeats)

    measured = {"blocks": len(chosen), "update": clock(lambda: update(warm)), "solve": clock(solve)}
    if not any(solver.of_second_pass for solver in chosen.values()):
        return {**measured, "factorize": clock(lambda: factorize(estimates))}
    # A quasi-Newton method makes its inverse of the one before, after the step.
    before = {block: Evaluation(_parameters(model, block, rows[block]), rows[block]) for block in chosen}
    for parameter in model.parameters():
        parameter.mul_(0.999)
    with torch.enable_grad():
        moved = _rows(task, model, fisher, batch)
    after = {block: Evaluation(_parameters(model, block, moved[block]), moved[block]) for block in chosen}

    def follow() -> dict[str, Any]:
        return {
            block: solver.follow(estimates[block], inverses[block], before[block], after[block])
            for block, solver in chosen.items()
        }

    followed = follow()
    return {**measured, "factorize": clock(follow) + clock(lambda: factorize(followed))}


def _parameters(model: nn.Module, block: str, rows: Factors) -> dict[str, Tensor]:
    own = dict(model.get_submodule(block).named_parameters())
    return {name: own[name].detach().clone() for name in rows.shapes}


def _median(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the median of the milliseconds that some work takes, after a first time that does not count."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


# -- memory -----------------------------------------------------------------------------------------------------------


def _peak(plan: Plan, task: Task, name: str) -> float | None:
    """Return the megabytes at the peak of some steps: of the GPU, or of a process of its own."""
    if task.device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(task.device)
        torch.cuda.reset_peak_memory_stats(task.device)
        try:
            _steps(plan, task, name)
        except STOPPING_ERRORS:
            return None
        return (torch.cuda.max_memory_allocated(task.device) - before) / _MEGABYTE
    if not Path("/proc/self/clear_refs").exists():
        return None
    # Spawned: a fork of a process that has computed in threads would hang, and its memory would be its parent's.
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    small = _small(task.dataset, plan.batch_size)
    process = context.Process(target=_measure, args=(plan, small, name, torch.get_num_threads(), sending), daemon=True)
    process.start()
    sending.close()
    try:
        peak = receiving.recv() if receiving.poll(_PATIENCE) else None
    except EOFError:
        peak = None
    if peak is None:
        process.kill()
    process.join()
    return peak


def _steps(plan: Plan, task: Task, name: str) -> None:
    model = task.model(0)
    optimizer = plan.optimizer(name, model, task.likelihood, 0)
    batches = task.batches(plan.batch_size, 0)
    for _ in range(_STEPS):
        training_step(task, model, optimizer, batches.draw())


def _small(dataset: Dataset, samples: int) -> Dataset:
    """Return as much of a data set as a batch needs, since memory depends on sizes alone."""
    return replace(
        dataset,
        train_images=np.ascontiguousarray(dataset.train_images[:samples]),
        train_labels=dataset.train_labels[:samples],
        test_images=dataset.test_images[:1],
        test_labels=dataset.test_labels[:1],
    )


def _measure(plan: Plan, dataset: Dataset, name: str, threads: int, sending: Connection) -> None:
    torch.set_num_threads(threads)
    task = plan.task(dataset, torch.device("cpu"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    try:
        _steps(plan, task, name)
    except STOPPING_ERRORS:
        sending.send(None)
        return
    sending.send((_status("VmHWM") - before) / _MEGABYTE)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
