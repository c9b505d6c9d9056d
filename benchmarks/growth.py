"""How time and memory grow with every size, compared with the exponents of the theory; and the anatomy of a step.

    python -m benchmarks.growth --out benchmarks/results/growth [--rounds 15] [--threads 2] [--provisional]

Writes ``growth.json``, from which ``docs/generate_performance.py`` makes the tables of docs/performance.md.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import argparse
from dataclasses import dataclass, replace
from math import log
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional

from benchmarks import anatomy
from benchmarks.memory import peak_increase
from benchmarks.peers.methods import METHODS
from benchmarks.record import circumstances, write
from benchmarks.suites.blocks import DAMPING, block, in_turns
from curvlib.factors import Dense
from curvlib.solvers import Woodbury

SGD, TENGRAD = "SGD, momentum", "curvlib TENGraD, empirical"


@dataclass(frozen=True)
class Size:
    """A network of `depth` stages of `blocks` parallel Linear layers, for `batch` samples of `positions` vectors."""

    batch: int = 64
    width: int = 512
    positions: int = 1
    depth: int = 4
    blocks: int = 1


SWEEPS = {
    "batch": (Size(width=512, depth=4), (128, 256, 512, 1024)),
    "width": (Size(batch=64, depth=3), (512, 1024, 2048)),
    "positions": (Size(batch=32, width=128, depth=2), (16, 32, 64, 128)),
    "depth": (Size(batch=128, width=512), (4, 8, 16)),
    "blocks": (Size(batch=128, width=512, depth=1), (4, 8, 16)),
}


class Parallel(nn.Module):
    """Linear layers side by side, summed."""

    def __init__(self, width, count):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, x):
        return functional.relu(sum(branch(x) for branch in self.branches))


class Network(nn.Module):
    """The stages, the mean over positions, a small head."""

    def __init__(self, size):
        super().__init__()
        self.stages = nn.Sequential(*(Parallel(size.width, size.blocks) for _ in range(size.depth)))
        self.head = nn.Linear(size.width, 10)

    def forward(self, x):
        x = self.stages(x)
        return self.head(x.mean(1) if x.ndim == 3 else x)


def problem(size):
    """Model, inputs and labels of a size, on random data."""
    torch.manual_seed(0)
    shape = (size.batch, size.positions, size.width) if size.positions > 1 else (size.batch, size.width)
    return Network(size), torch.randn(shape), torch.randint(0, 10, shape[:1])


def layer(size):
    """Rows of one of its layers."""
    return block("sequence" if size.positions > 1 else "linear", size.width, size.batch, size.positions)


# -- theory: multiply-adds and elements, counted for the layers between input and head ---------------------------------


def pairs(s):
    """Whether the Gram goes over pairs of positions, by the multiply-adds of both routes."""
    return s.positions**2 * 2 * s.width < s.width**2 * (1 + s.positions / s.batch)


def gram_work(s):
    if s.positions == 1:
        return 2 * s.batch**2 * s.width
    if pairs(s):
        return 2 * s.batch**2 * s.positions**2 * s.width
    return s.batch * s.positions * s.width**2 + s.batch**2 * s.width**2


def factorize_work(s):
    return s.batch**3 / 6


def solve_work(s):
    """One solve, and one weighted sum of the rows in the form that is kept."""
    explicit = isinstance(layer(s).compact(), Dense)
    return s.batch**2 + s.batch * (1 if explicit else s.positions) * s.width**2


def sgd_work(s):
    return s.depth * s.blocks * 3 * s.batch * s.positions * s.width**2


def tengrad_work(s):
    """The ordinary weight gradient is not made: the weighted sum takes its place."""
    return sgd_work(s) + s.depth * s.blocks * (gram_work(s) + factorize_work(s) + s.batch**2)


def sgd_elements(s):
    """Parameters, gradients and momentum; activations."""
    return s.depth * (s.blocks * 3 * s.width**2 + 2 * s.batch * s.positions * s.width)


def tengrad_elements(s):
    """Moves instead of gradients; cotangents and kernels as well, and explicit rows where the Gram is made of them."""
    kept = s.batch * s.positions * s.width + 2 * s.batch**2
    rows = 0 if s.positions == 1 or pairs(s) else s.batch * s.width**2
    return sgd_elements(s) + s.depth * s.blocks * (kept + rows)


# -- measurement -------------------------------------------------------------------------------------------------------


def times(size, rounds):
    """Seconds of steps, and of the parts of one layer's inversion."""
    solver, rows = Woodbury(), layer(size)
    estimate = solver.update(None, rows)
    inverse = solver.factorize(estimate, DAMPING)
    steps = [METHODS[name].build(*problem(size)) for name in (SGD, TENGRAD)]
    functions = (
        *steps,
        rows.gram,
        lambda: solver.factorize(estimate, DAMPING),
        lambda: solver.solve(inverse, inverse.factors),
    )
    return dict(zip(TIMES, in_turns(*functions, rounds=rounds), strict=True))


TIMES = {
    "SGD step": sgd_work,
    "TENGraD step": tengrad_work,
    "Gram of a layer": gram_work,
    "factorisation of a layer": factorize_work,
    "solve of a layer": solve_work,
}
MEMORY = {"SGD memory": (SGD, sgd_elements), "TENGraD memory": (TENGRAD, tengrad_elements)}


def memory(name, size, threads):
    """Peak megabytes of three steps."""

    def work():
        torch.set_num_threads(threads)
        step = METHODS[name].build(*problem(size))
        for _ in range(3):
            step()

    return peak_increase(work)


def slope(values, amounts):
    """Exponent of the power law that fits best, by least squares of logarithms."""
    x, y = ([log(value) for value in side] for side in (values, amounts))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def sizes(axis):
    base, values = SWEEPS[axis]
    return [replace(base, **{axis: value}) for value in values]


def entry(axis, quantity, unit, amounts, theory):
    """One line: what was measured, its exponent, and that of the count of operations or elements."""
    values = SWEEPS[axis][1]
    return {
        "axis": axis, "quantity": quantity, "unit": unit, "values": list(values), "amounts": amounts,
        "slope": slope(values, amounts), "theory": slope(values, [theory(size) for size in sizes(axis)]),
    }  # fmt: skip


def memory_entries(threads):
    """Memory above that of a tiny network, which torch itself takes."""
    entries = []
    for quantity, (name, theory) in MEMORY.items():
        floor = memory(name, Size(batch=8, width=8, depth=1), threads)
        if floor is None:
            return []
        for axis in SWEEPS:
            amounts = [max(memory(name, size, threads) - floor, 0.1) for size in sizes(axis)]
            entries.append(entry(axis, quantity, "MB", amounts, theory))
    return entries


def time_entries(rounds):
    entries = []
    for axis in SWEEPS:
        measured = [times(size, rounds) for size in sizes(axis)]
        for quantity, theory in TIMES.items():
            if not (axis in ("depth", "blocks") and quantity.endswith("layer")):
                amounts = [1e3 * one[quantity] for one in measured]
                entries.append(entry(axis, quantity, "ms", amounts, theory))
    return entries


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--provisional", action="store_true", help="mark the figures as those of a busy machine")
    args = parser.parse_args()
    console = Console()
    console.print("memory")
    entries = memory_entries(args.threads)  # first, while this process has no threads yet
    torch.set_num_threads(args.threads)
    results = {"environment": {**circumstances(args.provisional), "rounds": args.rounds}}
    console.print("inversion")  # the shortest calls, before other work
    results["inversion"] = anatomy.inversion(args.rounds)
    console.print("growth")
    results["growth"] = time_entries(args.rounds) + entries
    console.print("roofline")
    results["roofline"] = anatomy.roofline(args.rounds)
    console.print("routes")
    results["routes"] = anatomy.routes(args.rounds)
    console.print("anatomy")
    results["anatomy"] = {name: anatomy.split(name, args.rounds) for name in anatomy.WORKLOADS}
    write(args.out / "growth.json", results)


if __name__ == "__main__":
    main()
