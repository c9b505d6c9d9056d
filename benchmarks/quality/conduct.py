"""Tuning and final runs of one method on one task, kept in one file that is written after every run."""

from __future__ import annotations

import gc
import json
import math
import time
from statistics import median

import torch

from benchmarks.quality.search import NEAR, SPREAD, is_better, place_of, values_at
from benchmarks.quality.trial import Run, train
from benchmarks.record import circumstances, write

TUNING_SEED, FINAL_SEEDS = 100, (1, 2, 3)
FINAL_BUDGET = 1.5
"""Seconds of a final run over those of a trial."""


def path_of(folder, task, method):
    plain = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in method.lower())
    return folder / task / f"{plain}.json"


def load(folder, task, name, method, provisional=False):
    """Return what there is of a method on a task, or an empty record."""
    path = path_of(folder, task.name, name)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else _new(task, name, method, provisional)


def tune(task, name, method, folder, provisional=False, say=print):
    """Make the trials that are missing, all from one seed."""
    record, path = load(folder, task, name, method, provisional), path_of(folder, task.name, name)
    if record["done"] or "left_out" in record:
        return record
    space = method.space(task)
    while len(record["trials"]) < SPREAD + NEAR:
        _get_ready(task, method, record)
        number = len(record["trials"])
        ranks = [_rank(trial) for trial in record["trials"]]
        place = place_of(number, space, record["places"], ranks, f"{task.name}-{name}")
        run = train(task, method.build, values_at(space, place), TUNING_SEED, task.budget, _best(record["trials"]))
        record["places"].append(place)
        _keep(record, "trials", run, path, say)
    return _save(path, record)


def finish(task, name, method, folder, number, say=print):
    """Make the final run of seed number `number`, if it is missing and a trial has survived."""
    record, path = load(folder, task, name, method), path_of(folder, task.name, name)
    if record["done"]:
        return record
    if "left_out" in record:
        return _save(path, {**record, "done": True})
    best, failed = _best(record["trials"]), sum(run["reached"] is None for run in record["finals"])
    # Where most seeds have failed the median is known.
    if best is not None and len(record["finals"]) == number and 2 * failed <= len(FINAL_SEEDS):
        _get_ready(task, method, record)
        run = train(task, method.build, best.values, FINAL_SEEDS[number], FINAL_BUDGET * task.budget)
        _keep(record, "finals", run, path, say)
    if number == len(FINAL_SEEDS) - 1:
        for trial in record["trials"]:
            trial["curve"] = trial["curve"][-1:]
        record["done"] = True
    return _save(path, record)


def conduct(tasks, methods, folder, provisional=False, say=print, done=lambda: None):
    """All trials of all, then the final runs seed by seed, so that the methods' runs of a seed are near in time.

    ``done()`` is called whenever a record may have become whole.
    """
    pairs = [(task, name, method) for name, method in methods.items() for task in tasks]
    for task, name, method in pairs:
        tune(task, name, method, folder, provisional, say)
    for number in range(len(FINAL_SEEDS)):
        for task, name, method in sorted(pairs, key=lambda pair: pair[0].name):
            finish(task, name, method, folder, number, say)
            if number == len(FINAL_SEEDS) - 1:
                done()


def seconds_to_target(record):
    """Median over the final seeds, None if most of them did not reach it."""
    times = [math.inf if run["reached"] is None else run["reached"] for run in record["finals"]]
    times += [math.inf] * (len(FINAL_SEEDS) - len(times))
    middle = median(times)
    return middle if math.isfinite(middle) else None


def _new(task, name, method, provisional):
    record = {
        "task": task.name,
        "method": name,
        "kind": method.kind,
        "target": task.target,
        "budget": task.budget,
        "done": False,
        "environment": circumstances(provisional),
        "places": [],
        "reference_ms": [],
        "trials": [],
        "finals": [],
    }
    if task.name in method.leaves_out:
        record["left_out"] = method.leaves_out[task.name]
    return record


def _save(path, record):
    write(path, record)
    return record


def _rank(trial):
    return Run(**trial).rank


def _best(trials):
    """The best run; None if no run has ever had a metric."""
    best = None
    for trial in trials:
        run = Run(**trial)
        if is_better(run.rank, None if best is None else best.rank) and run.curve and math.isfinite(run.best):
            best = run
    return best


_READY = set()


def _get_ready(task, method, record):
    """Data, a few steps that do not count (the first calls of a process load things), and the speed of the machine."""
    if (task.name, method) not in _READY:
        task.warm_up()
        space = method.space(task)
        train(task, method.build, values_at(space, dict.fromkeys(space, 0.0)), TUNING_SEED, 0.2)
        _READY.add((task.name, method))
    record["reference_ms"].append(_reference())


def _keep(record, kind, run, path, say):
    record[kind].append(run.as_dict())
    _save(path, record)
    told = f"reached after {run.reached:.2f} s" if run.reached is not None else f"{run.status}, best {run.best:.4g}"
    say(f"{record['task']}, {record['method']}, {kind} {len(record[kind])}: {told}, {run.values}", flush=True)
    gc.collect()


def _reference():
    """Milliseconds of a fixed piece of work, to see whether the machine was as fast for all."""
    matrix, times = torch.ones(256, 256), []
    for _ in range(15):
        start = time.process_time()
        for _ in range(4):
            matrix @ matrix
        times.append(1e3 * (time.process_time() - start))
    return median(times)
