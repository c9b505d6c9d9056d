"""Conducts an experiment: all its runs, what each method costs, and the report, which is written after every run."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from curvlib.cli.data import Dataset
from curvlib.cli.environment import describe_environment
from curvlib.cli.interruption import StopOnInterrupt
from curvlib.cli.models import MODELS
from curvlib.cli.outputs import prepare_folder, write_text
from curvlib.cli.reproduction.cost import measure_cost
from curvlib.cli.reproduction.plan import Plan
from curvlib.cli.reproduction.report import write_report
from curvlib.cli.reproduction.results import default_target
from curvlib.cli.reproduction.runs import Record, execute, plain, read_record
from curvlib.cli.tasks import Task
from curvlib.errors import ConfigurationError

__all__ = ["conduct"]

RUNS = "runs"
"""Where the runs' own folders are, inside that of the experiment."""


def conduct(
    plan: Plan,
    dataset: Dataset,
    device: torch.device,
    folder: Path,
    say: Callable[[str], None],
    *,
    resume: bool = False,
    costs: bool = True,
) -> bool:
    """Do all runs of an experiment that are not done, and write its report.

    Parameters
    ----------
    plan
        What to run.
    dataset
        The whole data set.
    device
        Where to run it.
    folder
        For the report; the runs have folders below it.
    say
        Called with lines of text on what happens.
    resume
        Whether to go on with what the folder holds; without it such a folder is refused.
    costs
        Whether to measure inversion and memory too.

    Returns
    -------
    bool
        Whether everything is done; False after Ctrl-C.

    Raises
    ------
    ConfigurationError
        If the folder holds runs and is not to be resumed, or runs of another plan.
    DataError
        If files are damaged or cannot be written.
    """
    runs = folder / RUNS
    if runs.exists() and any(runs.iterdir()) and not resume:
        raise ConfigurationError(f"{folder} holds runs already: go on with them by --resume, or give another --out")
    prepare_folder(runs)
    task = plan.task(dataset, device)
    order = [(name, seed) for seed in range(plan.seeds) for name in plan.optimizers]
    records: list[Record] = []
    measured: dict[str, Any] = {}
    # Seeds outermost: what slows the machine for an hour then slows all optimizers alike.
    with StopOnInterrupt() as stop:
        for name, seed in order:
            label = f"{plan.experiment.name}, {name}, seed {seed}"
            record = execute(plan, task, name, seed, runs / f"{name}-{seed}", partial(_labelled, say, label), stop)
            if record is None:
                break
            records.append(record)
            if record["status"] != "finished":
                say(f"{label}: {record['status']}")
            if stop.requested:
                break
        for name in plan.optimizers if costs and not stop.requested else ():
            measured[name] = _cost(plan, task, name, runs / f"{name}-cost.json", say)
            if stop.requested:
                break
    complete = len(records) == len(order) and not stop.requested
    write_report(folder, _results(plan, task, records, measured, complete))
    return complete


def _labelled(say: Callable[[str], None], label: str, text: str) -> None:
    say(f"{label}: {text}")


def _cost(plan: Plan, task: Task, name: str, path: Path, say: Callable[[str], None]) -> dict[str, Any]:
    done = read_record(path)
    if done is not None:
        plan.identity(name, 0).require_equal(done.get("identity", {}))
        return done
    say(f"{plan.experiment.name}, {name}: measuring inversion and memory")
    cost: dict[str, Any] = plain(measure_cost(plan, task, name))
    write_text(path, json.dumps(cost, indent=1) + "\n")
    return cost


def _results(plan: Plan, task: Task, records: list[Record], measured: dict[str, Any], complete: bool) -> dict[str, Any]:
    targets = [
        {"quantity": target.quantity, "value": target.value, "label": str(target)} for target in plan.experiment.targets
    ]
    baseline = default_target(records, task.reconstructs)
    spec = MODELS[plan.experiment.model]
    results: dict[str, Any] = plain(
        {
            "experiment": plan.experiment.name,
            "title": plan.experiment.title,
            "complete": complete,
            "plan": plan.record(),
            "data": {
                "name": task.dataset.name,
                "source": task.dataset.source,
                "shape": task.dataset.shape,
                "classes": task.dataset.classes,
            },
            "network": spec.description,
            "parameters": sum(parameter.numel() for parameter in task.model(0).parameters()),
            "reconstructs": task.reconstructs,
            "targets": [*targets, baseline] if baseline else targets,
            "environment": describe_environment(task.device),
            "costs": measured,
            "runs": records,
        }
    )
    return results
