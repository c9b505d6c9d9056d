"""Step times and peak memory of curvlib and its peers, interleaved with SGD: one command, one table.

    python -m benchmarks.peers.run --out benchmarks/results/peers [--rounds 7] [--workloads W1-b128,W3-b64]
        [--methods "curvlib*,kfac*"] [--threads 2] [--no-memory] [--provisional]

Writes ``peers.json`` and ``peers.md``. `make bench-peers` runs it where the peers are installed.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # NumPy's threads would spin on into SGD's next window

import argparse
import contextlib
import gc
import importlib
import io
import logging
import math
import warnings
from fnmatch import fnmatch
from importlib.metadata import packages_distributions, version
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.memory import peak_increase
from benchmarks.peers import libraries  # noqa: F401  # registers its rows
from benchmarks.peers.methods import METHODS
from benchmarks.peers.report import load, report
from benchmarks.peers.timing import interleaved
from benchmarks.peers.workloads import WORKLOADS, problem
from benchmarks.record import circumstances, write

REFERENCE = "SGD, momentum"
MEMORY_STEPS = 3


def chosen(patterns, names):
    """Names that match one of the comma-separated patterns, in their order; the reference always."""
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    return [name for name in names if name == REFERENCE or any(fnmatch(name, pattern) for pattern in wanted)]


def packages(names):
    """Versions of the packages behind methods, and the packages that are not there with the rows that need them."""
    distributions, found, missing = packages_distributions(), {}, {}
    for name in names:
        package = METHODS[name].package
        if package and METHODS[name].installed:
            distribution = distributions.get(package, [package])[0]
            found[distribution] = version(distribution)
        elif package:
            missing.setdefault(package, []).append(name)
    return found, missing


def peaks(names, workload, threads):
    """Megabytes that a few steps of each method, its model and its state take at their peak, in a fork each."""

    def work(name):
        torch.set_num_threads(threads)
        step = METHODS[name].build(*problem(workload))
        for _ in range(MEMORY_STEPS):
            step()

    def peak(name):
        try:
            return peak_increase(lambda: work(name))
        except RuntimeError:  # it fails in the timing too, where the reason is kept
            return None

    return {name: peak(name) for name in names}


def measured(names, workload, rounds, window):
    """Summaries of all methods on one workload."""

    def prepared(name):
        return METHODS[name].period, lambda: METHODS[name].build(*problem(workload))

    results = {}
    reference = METHODS[REFERENCE].build(*problem(workload))
    for name, timed in interleaved(reference, {name: prepared(name) for name in names}, rounds, window).items():
        results[name] = timed.summary()
        if not timed.error and not math.isfinite(float(timed.step())):
            results[name]["note"] = "loss not finite"
    gc.collect()
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default="*", help="patterns of rows, with commas")
    parser.add_argument("--workloads", default="*", help="patterns of workloads, with commas")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--window", type=float, default=0.08, help="seconds that a window of a method lasts at least")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--provisional", action="store_true", help="mark the figures as those of a busy machine")
    args = parser.parse_args()
    console = Console()
    warnings.filterwarnings("ignore")  # peers warn at every step of hooks, scripts and layers that they leave out
    logging.disable(logging.WARNING)
    names = chosen(args.methods, METHODS)
    found, missing = packages(names)
    for package, rows in missing.items():
        console.print(f"[yellow]not installed:[/] {package} ({len(rows)} rows)")
    names = [name for name in names if METHODS[name].installed]
    for package in {METHODS[name].package for name in names} - {""}:
        importlib.import_module(package)  # before the forks, so that none counts an import as its memory
    workloads = [name for name in WORKLOADS if any(fnmatch(name, p) for p in args.workloads.split(","))]
    memory = {}
    if args.memory:
        for workload in workloads:  # first, while this process has no threads yet
            console.print(f"{workload}: memory of {len(names)} methods")
            with quiet():
                memory[workload] = peaks(names, workload, args.threads)
    torch.set_num_threads(args.threads)
    environment = {**circumstances(args.provisional), "rounds": args.rounds, "packages": found}
    results = {"environment": environment, "missing": missing, "workloads": {}}
    for workload in workloads:
        console.print(f"{workload}: {args.rounds} rounds of {len(names)} methods")
        with quiet():
            summaries = measured(names, workload, args.rounds, args.window)
        base = memory.get(workload, {}).get(REFERENCE)
        for name, summary in summaries.items():
            peak = memory.get(workload, {}).get(name)
            if peak is not None and base is not None:
                summary["mb_above_sgd"] = peak - base
        results["workloads"][workload] = summaries
        write(args.out / "peers.json", results)
    page = report(load(args.out / "peers.json"))
    (args.out / "peers.md").write_text(page, encoding="utf-8")
    console.print(page, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def quiet():
    """Keep what peers print out of the terminal."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


if __name__ == "__main__":
    main()
