"""What the methods cost without the library around them: ``python -m benchmarks.floors --out DIRECTORY``.

Bare steps (`benchmarks.bare`) and whole ones, the same computation, against steps of SGD as `benchmarks.peers` times
them. Where a bare step takes longer than a target allows, no library that uses these kernels meets it. Beside them the
operations of a whole step against those of SGD's (`benchmarks.counting`), which no kernel can be without.
"""

import argparse
import os
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.bare import BareStep
from benchmarks.counting import Operations
from benchmarks.peers.methods import EMPIRICAL, METHODS, SAMPLED
from benchmarks.peers.timing import interleaved
from benchmarks.peers.workloads import WORKLOADS, problem
from benchmarks.record import circumstances, write
from curvlib.solvers import EKFAC, KFAC, Woodbury

BARE = {
    "curvlib TENGraD, empirical": (EMPIRICAL, Woodbury()),
    "curvlib TENGraD, empirical, refresh 10": (EMPIRICAL, Woodbury()),
    "curvlib TENGraD, sampled": (SAMPLED, Woodbury()),
    "curvlib KFAC, refresh 10": (SAMPLED, KFAC()),
    "curvlib EKFAC, refresh 10": (SAMPLED, EKFAC()),
}
"""Row of the peers' table to the Fisher and the solver of its bare step."""


def floors(workload, rounds, window=0.08, budget=12.0):
    """Bare and whole steps of every method, as ratios to SGD's, in turns: ``{method: {"bare": …, "whole": …}}``."""
    methods = {}
    for name, (fisher, solver) in BARE.items():
        period = METHODS[name].period
        methods[name, "bare"] = period, partial(_bare, workload, fisher, solver, period)
        methods[name, "whole"] = period, partial(_whole, workload, name)
    timed = interleaved(METHODS["SGD, momentum"].build(*problem(workload)), methods, rounds, window, budget=budget)
    result = {name: {} for name in BARE}
    for (name, kind), one in timed.items():
        if one.error:
            raise RuntimeError(f"{workload}, {name}, {kind}: {one.error}")
        result[name][kind] = one.summary()
    return result


def operations(workload):
    """Operations of a step of every method over those of SGD's: ``{method: {"products": …, "decompositions": …}}``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # or decompositions go to threads in which nobody counts
    try:
        base = _counted(METHODS["SGD, momentum"], workload).products
        counts = {name: _counted(METHODS[name], workload) for name in BARE}
    finally:
        torch.set_num_threads(threads)
    return {
        name: {"products": count.products / base, "decompositions": count.decompositions / base}
        for name, count in counts.items()
    }


def _counted(method, workload):
    """Operations of a step, on the average of a period after the first."""
    step = method.build(*problem(workload))
    for _ in range(max(2, method.period)):
        step()
    count = Operations()
    with count:
        for _ in range(method.period):
            step()
    count.products, count.decompositions = (total / method.period for total in (count.products, count.decompositions))
    return count


def _bare(workload, fisher, solver, period):
    return BareStep(*problem(workload), fisher, solver, period)


def _whole(workload, name):
    return METHODS[name].build(*problem(workload))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="names, separated by commas")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--provisional", action="store_true", help="mark the figures as those of a busy machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    environment = {**circumstances(args.provisional), "rounds": args.rounds}
    results = {"environment": environment, "workloads": {}, "operations": {}}
    for workload in args.workloads.split(","):
        Console().print(workload)
        results["workloads"][workload] = floors(workload, args.rounds)
        results["operations"][workload] = operations(workload)
    write(args.out / "floors.json", results)


if __name__ == "__main__":
    main()
