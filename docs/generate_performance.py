"""Write docs/performance.md from the committed measurements: ``python docs/generate_performance.py``.

They are ``peers/peers.json`` and those of ``floors``, ``growth`` and ``asv`` in benchmarks/results.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.peers import report  # noqa: E402
from benchmarks.record import PROVISIONAL, table, where  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"

TEXT = """# Performance

<!-- Written by docs/generate_performance.py from benchmarks/results; edit that, not this. -->

Every number below is generated from a committed JSON file. `make figures` measures them all again and rewrites the
tables (about half an hour on an idle machine), `make bench-peers` those of other libraries alone.

## How it is measured

Claims about speed are ratios to SGD with momentum *in the same process*: each window of a method has a window of SGD
right before it, and the median over rounds of their ratio is reported. What slows the whole machine slows both. Time
is wall clock, threads are pinned, data are random, hyperparameters are the same for all and nothing is tuned: it is the
cost of a step, no claim about convergence. `OMP_WAIT_POLICY=PASSIVE`, and for NumPy's BLAS `OPENBLAS_THREAD_TIMEOUT=4`,
keep waiting threads from spinning: else NumPy's slow torch's down for a while after each call.
Memory is the peak of the resident set of a process of its own for each method, minus that of SGD's process.

{conditions}

## What a step costs

A whole step (zero_grad, forward, backward, curvature, update) over one of SGD; W1 is an MLP 784-1000-500-10, W2 three
convolutions, W3 ResNet-20, W4 two transformer encoder layers, "b" the batch. The README has the same
table with other libraries.

{ratios}
Peak memory above SGD's, MB:

{megabytes}
## Where the time goes

A fresh TENGraD step of the empirical Fisher, in milliseconds; its parts measured alone. Rows and Gram grow with the
data that a layer sees, the factorisation with the cube of the batch, the solve is as dear as one weight gradient.

{anatomy}
{growth_where}

**Routes.** A layer's Gram and products have several exact routes, which differ by an order of magnitude either way: a
Hadamard product of two small Grams (no sharing), pairs of positions, explicit rows from a grouped weight gradient, or
from unfolded patches. `curvlib.factors.cost` picks one from the sizes alone, by counting multiply-adds and charging a
pass over memory at what it costs against arithmetic. The choice is deterministic and the same on every CPU (on a GPU
candidates are timed when sizes are first met; `plan=Plan()` has them counted there too), and
`curvlib.explain` shows what it costs. No temporary above 64 MiB (in float32) is made where work can be split.

The rows of a convolution have four. Milliseconds for the rows of 32 samples, the cost model's choice in bold:

{routes}
A forward convolution with the cotangents as kernels comes close to the best with very few channels a group, and gains
repeatedly only with one channel along a long axis (length 4096, 128 samples: 9.5 ms against 12.8; with 32 it depends on
the moment). A product for each tap with shifted views is often second where grouped rows are first. Neither is worth
a rule on a CPU, so the cost model chooses neither; `Plan(timed=True)` tries all four, and `Route(rows=…)` forces one.

**Fused.** `compose(..., fused=True)` hands the gradient to solvers that gain from it as rows, from the second step
on. With fresh empirical factors the exact natural gradient is `Jᵀw` with `w = (K + λI)⁻¹1/n`, at the price of one
weight gradient; the ordinary one, of the same price, is then never made: in every step, or where factors are kept for
several, in those that renew them. With sampled labels or stale factors `J g` becomes a cross-Gram where that is
cheaper. Sampled rows and the gradient's come from one pass, so that a linear layer's inputs are the same in both: their
Gram is made once, and one product with them makes the natural gradient. It is for loops that do not look at `.grad`
themselves.

**Refresh.** With `refresh=T` rows, Gram and factorisation are paid once in T steps; two products with the kept rows
remain.

**Side by side.** LAPACK wakes all threads for every panel of a matrix, and below a width of a thousand or so the waking
costs more than the panel: with two threads the eigenvectors of a 256 × 256 matrix take several times as long as with
one. So on a CPU the decompositions of all blocks are shared out among threads, one matrix a thread
(`curvlib.arrays.side_by_side`), where enough of them are worth the threads. Products stay on one thread of Python,
which was faster (measured). Small ones, and blocks of the lower half of large Gram matrices, go to the library as
batches, a product for each of its threads.

**Together.** Under a passive wait policy every call that uses two threads wakes the second one, for 0.05 to 0.1 ms: a
product of two 32 × 32 matrices takes fifty times as long as with one thread. So kernels and covariances of one size are
factorised in one call for all blocks, small explicit rows of equal shape have their Grams in one product, KFAC's and
EKFAC's inverses of small layers are applied to all of them at once, and a single right-hand side is solved for by one
thread. Explicit rows of equal shape from 1 to 8 MiB are made as parts of one tensor, once a step has asked for several
of them (`curvlib.arrays.Buffers`): then one call makes the Grams of all, a thread for each, and another their weighted
sums. Twelve Grams of a transformer's Linear layers at batch 32 take 8.4 instead of 11 ms. A product of a part has the
same bits as that of the same rows by themselves, so that a run that is resumed goes on as it was. Updates, momentum and
corrections of tensors of 2^15 to 2^18 elements are made piece by piece, so that none of them wakes a thread
(`curvlib.arrays.in_pieces`): 27 instead of 76 µs for 65 536 elements. Momentum and a correction read and write memory
once. Where the natural gradient ends with a product of two matrices, as that of a Linear layer's rows does, and K-FAC's
and EKFAC's of any layer, momentum is the product's addend (`curvlib.arrays.Product`), so that it takes no pass at all.
Products of 2^13 to 2^18 multiply-adds, for which torch wakes threads, are made by NumPy, which wakes none
(`curvlib.arrays.product`): that is 1 % of a step on W1 and W4. Those of up to 2^27 go to the library with rows of their
own for each thread: left to share one out, it has its threads wait for each other, for 0.03 to 0.07 ms. Kernels of up
to 128 rows are factorised by SciPy's LAPACK, one by one: three of 128 rows take 0.16 instead of 0.41 ms.

**Cold code.** Between two kernels that sweep the caches, a line of Python costs what its code takes to come back, not
what it takes in a loop: torch's note for profilers around `step` and `zero_grad` 0.15 ms each, entering `torch.no_grad`
0.04, comparing a tensor with None 0.05. So notes are made while a profiler is at work only, and a step's bookkeeping is
by the ids of parameters, asks no question twice and takes few ways. On W1-b128 that is about 5 % of a step.

**Widths.** A bias makes 785 columns of 784, and then no row but the first begins at a line of the cache. Large products
that are multiplied again are put where every row does (`curvlib.arrays.aligned_product`): 1000 × 1000 times 1000 × 785
takes 8.3 instead of 12.8 ms. The weight's part and the bias's are multiplied out apart at the end, so that none is
taken out of the other. EKFAC's moments of a convolution with fewer positions than rows come from the convolution
itself, with the eigenvectors of A as its filters, and rows are squared while they are in the cache: 21 instead of 38 ms
for 64 to 128 channels on 64 images of 8 × 8.

**Memory.** Rows of the loss itself that are kept explicitly are made inside backward, as soon as a layer's cotangent is
there; input and cotangent then go, layer by layer, as they do without curvature. What stays above SGD's peak are the
rows of this step and of the last one, whose inverse is what a failed refresh falls back on. A backward pass that keeps
its graph (`retain_graph=True`) keeps inputs and cotangents too, for another one may follow. Patches of a convolution
are unfolded for some samples at a time. Sampled cotangents come from a pass of their own, all layers' at once.

glibc gives large blocks back to the system when they are freed, and new ones come page by page, zeroed, which takes
several times as long as filling them. So explicit rows of more than 16 MiB take the memory that the rows before the
last ones left (`curvlib.arrays.Buffers`), which stays from one refresh to the next: there it is needed again, and the
peak is as without it. What a refresh does not take is let go. A step on two layers of 768 × 768 and 16 sequences of 64
takes 66 instead of 96 ms with it. Smaller blocks stay in the heap, but its end is given back too: with
`MALLOC_TRIM_THRESHOLD_` and `MALLOC_MMAP_THRESHOLD_` set to some gigabytes in the environment (or with another
allocator preloaded) all pages are kept, for SGD's activations as well as for rows.

## Floors

A bare step is one that is written by hand around the same kernels, in their order (`benchmarks/bare.py`): the model's
passes with weight gradients only where a solver wants them, rows as soon as their cotangents arrive, products,
factorisations, solves, momentum and the update. It checks nothing and knows one kind of network; a test holds it to the
very numbers of a whole step. What it takes longer than a step of SGD is the method's price on this machine, and no
library around these kernels can be cheaper; what a whole step takes longer than that is curvlib's. Both against SGD, in
the same process, in turns with each other: bare … whole step. They are one computation, so where a bare step comes out
slower, the difference is what this machine's figures are worth.

{floors}
{floors_where}

Every step also has operations that no kernel can do without. Those of products and convolutions, and after the plus
those of Cholesky factors, inverses and eigenvectors (`benchmarks/counting.py`), over the products of a step of SGD:

{operations}
Decompositions run at a fifth to a half of the rate of products, and eigenvectors far below that, so that a sum here is
a ratio of times only where all goes at SGD's rate.

## Aims

What curvlib set out to reach on two cores, as ratios to SGD: aim, median of {runs} runs of `benchmarks.peers` (lowest
to highest), bare step. A cell above its aim is bold; there the bare step, or the count of operations above, is beyond
the aim too, or as near to it as two runs are to each other. Sampled rows, fresh, may take half as long again as the
first row.

{aims}
Of memory, an exact step on the loss's own rows was to take at most 150 MB more than SGD on W3 and 60 MB on W1-b512 (the
table above). Sampled rows come from a pass of their own, whose cotangents of all layers live beside the first pass;
K-FAC and EKFAC hold averages and inverses of the factors, and the inverses of the refresh before, which are not freed
until the new ones have proved good.

## Growth

Exponents of the power law that fits best, against those of the number of multiply-adds (or of elements held) over the
same sizes: the theory. Measured exponents are lower where small sizes pay costs that do not grow, and where large
products run at a better rate than small ones. They are higher where memory is counted in arrays but measured in pages
that the allocator keeps (memory against batch and positions: libraries' workspaces grow with the batch too), and where
the theory says 0, for what a quantity costs there lies in the caches less and less (a factorisation after wider rows).

{growth}
## How near to the machine

Share of the rate of a large matrix product on the same machine ({product:.0f} GFLOP/s), for Linear blocks 1024 wide.
The Gram is counted as the full product, 4 n² d; symmetry, which is used from 256 rows on, can take it above what it
would reach otherwise. A Cholesky factorisation is counted as n³/3.

{roofline}
## Inversion

The time to factorise and solve for all of a network's blocks, against LAPACK's Cholesky and triangular solves alone
on the same matrices (batched, damped beforehand). At most 1/0.6 = 1.67 is asked for. Between the two, the calls that
separate matrices of several blocks need: put together, damped, factorised, looked at for a failure, taken apart,
solved with. What is left is Python, 3 µs a block. Up to 128 rows SciPy's routine
factorises: torch's wakes all threads to clear the upper triangles, which takes longer than the factorisation.

{inversion}
## History

Medians over this repository's own commits ({machine}), `python -m benchmarks.history`: milliseconds to factorise and
solve for 20 blocks, by batch.{provisional}

{history}
Ten steps against ten of SGD in the same process, in turns (without `fused=True` for K-FAC; where a cell is empty, the
commit lacks an option or refused the model):

{steps}
The same results as <a href="asv/index.html">asv's pages</a>, which `make docs` builds beside this one: the grid shows
one plot a benchmark, with a line for each combination of parameters; the boxes on the left choose which. Dots are
commits, and "Regressions" lists where a line has stepped up. (The pages load their plotting library from the
network.)

`make bench` runs every suite once on the commit at hand and prints the tables. `make bench-compare BASE=v0.1` runs
the inversion suites on two commits, in environments of their own, and fails if one became more than {threshold} times
slower, and did so again when it was measured once more.
"""

THRESHOLD, TORCH = 1.3, ("SGD, momentum", "Adam")
AIMS = {
    "curvlib TENGraD, empirical": (1.3, 1.8, 1.5, 1.6, 1.5, 1.4),
    "curvlib TENGraD, empirical, refresh 10": (1.8, 1.8, 1.1, 1.15, 1.15, 1.15),
    "curvlib TENGraD, sampled": (1.95, 2.7, 2.25, 2.4, 2.25, 2.1),
    "curvlib KFAC, refresh 10": (3.0, 2.0, 1.15, 1.15, 1.4, 1.15),
    "curvlib EKFAC, refresh 10": (5.0, 3.0, 1.4, 1.4, 1.8, 1.3),
}
"""Of each workload, in the order of the tables."""


def load(path: str) -> dict[str, Any]:
    """Return a committed measurement."""
    return json.loads((RESULTS / path).read_text(encoding="utf-8"))


def own_rows(results: dict[str, Any]) -> dict[str, Any]:
    """Return the results of curvlib and torch alone."""
    workloads = {
        workload: {
            name: cell
            for name, cell in cells.items()
            if name.startswith("curvlib") or name in ("SGD, momentum", "Adam")
        }
        for workload, cells in results["workloads"].items()
    }
    return {**results, "workloads": workloads}


def anatomy(growth: dict[str, Any]) -> str:
    """Return the table of a step's parts."""
    names = ("sgd", "tengrad", "rows_and_gram", "factorize", "solve")
    rows = [[name, *(f"{parts[part]:.2f}" for part in names)] for name, parts in growth["anatomy"].items()]
    return table(["workload", "SGD step", "TENGraD step", "rows and Gram", "factorisation", "solve"], rows)


def floors(measured: dict[str, Any]) -> str:
    """Return the table of bare steps and whole ones."""
    workloads = measured["workloads"]
    methods = list(next(iter(workloads.values())))
    rows = [
        [
            method,
            *(
                f"{cells[method]['bare']['ratio']:.2f} … {cells[method]['whole']['ratio']:.2f}"
                for cells in workloads.values()
            ),
        ]
        for method in methods
    ]
    return table(["method", *workloads], rows)


def operations(measured: dict[str, Any]) -> str:
    """Return the table of counted operations."""
    counts = measured["operations"]
    rows = [
        [method, *(f"{one[method]['products']:.2f} + {one[method]['decompositions']:.2f}" for one in counts.values())]
        for method in next(iter(counts.values()))
    ]
    return table(["method", *counts], rows)


def aims(runs: list[dict[str, Any]], least: dict[str, Any]) -> str:
    """Return the table of aims, with what was measured."""
    workloads = list(runs[0]["workloads"])
    rows = []
    for method, targets in AIMS.items():
        row = [method]
        for workload, target in zip(workloads, targets, strict=True):
            ratios = [run["workloads"][workload][method]["ratio"] for run in runs]
            middle, bare = median(ratios), least["workloads"][workload][method]["bare"]["ratio"]
            cell = f"{target:g}: {middle:.2f} ({min(ratios):.2f}–{max(ratios):.2f}), {bare:.2f}"
            row.append(f"**{cell}**" if round(middle, 2) > target else cell)
        rows.append(row)
    return table(["method", *workloads], rows)


def slopes(growth: dict[str, Any]) -> str:
    """Return measured exponents and the theory's."""
    rows = []
    for entry in growth["growth"]:
        values, amounts = entry["values"], entry["amounts"]
        ends = f"{amounts[0]:.3g} … {amounts[-1]:.3g} {entry['unit']}"
        rows.append(
            [entry["quantity"], entry["axis"], f"{values[0]} … {values[-1]}", ends,
             f"{entry['slope']:.2f}", f"{entry['theory']:.2f}"]
        )  # fmt: skip
    return table(["quantity", "against", "from … to", "measured", "exponent", "theory"], rows)


def routes(growth: dict[str, Any]) -> str:
    """Return the times of the routes to a convolution's rows."""
    answers = ("grouped", "unfold", "forward", "shifted")
    rows = [
        [name, *(f"**{times[one]:.2f}**" if one == times["chosen"] else f"{times[one]:.2f}" for one in answers)]
        for name, times in growth["routes"].items()
    ]
    return table(["convolution", *answers], rows)


def roofline(growth: dict[str, Any]) -> str:
    """Return the shares of the rate of a large product."""
    product = growth["roofline"]["product"]
    rows = [
        [row["n"], f"{100 * row['gram'] / product:.0f} %", f"{100 * row['factorize'] / product:.0f} %"]
        for row in growth["roofline"]["rows"]
    ]
    return table(["rows", "Gram", "factorisation"], rows)


def inversion(growth: dict[str, Any]) -> str:
    """Return inversion against LAPACK."""
    rows = [
        [
            f"{row['n']} × {row['n']}",
            row["blocks"],
            f"{row['ms']:.2f}",
            f"{row['calls_ms']:.2f}",
            f"{row['lapack_ms']:.2f}",
            f"{row['calls_ratio']:.2f}",
            f"{row['ratio']:.2f}",
        ]
        for row in growth["inversion"]
    ]
    return table(
        ["matrices", "blocks", "curvlib, ms", "calls, ms", "LAPACK, ms", "calls, ratio", "curvlib, ratio"], rows
    )


def history() -> tuple[str, str, str]:
    """Return the machine of asv's results, and by commit, oldest first, inversion times and steps against SGD's."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("asv/*/*-*.json"))]
    inversions, steps = [], []
    for result in sorted(results, key=lambda result: result["date"]):
        day = datetime.fromtimestamp(result["date"] / 1e3, tz=timezone.utc).date()
        commit = [f"`{result['commit_hash'][:7]}`", day.isoformat()]
        times, (batches, _), *_ = result["results"]["inversion.Network.time_inversion"]
        inversions.append([*commit, *(f"{1e3 * value:.2f}" for value in times)])
        ratios, kinds, *_ = result["results"]["steps.AgainstSGD.track_ratio"]
        steps.append([*commit, *("" if value is None or value != value else f"{value:.2f}" for value in ratios)])
    combinations = [", ".join(word.strip("'") for word in pair) for pair in product(*kinds)]
    head = ["commit", "date"]
    return results[0]["params"]["machine"], table([*head, *batches], inversions), table([*head, *combinations], steps)


def text() -> str:
    """Return the whole page."""
    peers, growth = own_rows(load("peers/peers.json")), load("growth/growth.json")
    least = load("floors/floors.json")
    repeats = [load(f"peers/repeats/{path.name}") for path in sorted(RESULTS.glob("peers/repeats/*.json"))]
    runs = [peers, *repeats]
    machine, past, steps = history()
    return TEXT.format(
        conditions=report.conditions({**peers, "missing": {}, "environment": {**peers["environment"], "packages": {}}}),
        ratios=report.ratios(peers),
        megabytes=report.megabytes(peers),
        anatomy=anatomy(growth),
        growth_where=where(growth["environment"]),
        floors=floors(least),
        floors_where=where(least["environment"]),
        operations=operations(least),
        runs=len(runs),
        aims=aims(runs, least),
        growth=slopes(growth),
        product=growth["roofline"]["product"],
        routes=routes(growth),
        roofline=roofline(growth),
        inversion=inversion(growth),
        machine=machine,
        history=past,
        steps=steps,
        provisional=f" {PROVISIONAL}" if growth["environment"]["provisional"] else "",
        threshold=THRESHOLD,
    )


if __name__ == "__main__":
    Path(__file__).with_name("performance.md").write_text(text(), encoding="utf-8")
