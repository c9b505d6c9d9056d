"""Where a step's time goes, how near its kernels are to the machine's rate, what inversion and rows' routes cost."""

import torch
from torch.nn import functional

import curvlib
from benchmarks.peers.methods import METHODS
from benchmarks.peers.workloads import problem
from benchmarks.suites.blocks import DAMPING, factorized, in_turns, linear
from benchmarks.suites.inversion import Network
from benchmarks.suites.layers import CONVOLUTIONS, ConvolutionRows
from curvlib.solvers import Woodbury

ROWS = (32, 64, 128, 256, 512, 1024)
WORKLOADS = ("W1-b128", "W1-b512", "W2-b128", "W3-b64", "W4-b32")


def split(workload, rounds):
    """Milliseconds of a fresh TENGraD step of the empirical Fisher: the whole, and its parts measured alone."""
    model, x, y = problem(workload)
    rows = curvlib.collect(
        model, curvlib.Empirical(), x, loss=lambda outputs: functional.cross_entropy(outputs, y), rest="freeze"
    )
    solver = Woodbury()
    estimates = {name: solver.update(None, own) for name, own in rows.items()}
    inverses = {name: solver.factorize(estimate, DAMPING) for name, estimate in estimates.items()}
    # A solver takes its own rows for a gradient where it has them.
    gradients = {name: getattr(inverse, "factors", rows[name]) for name, inverse in inverses.items()}
    build = {name: METHODS[name].build for name in ("SGD, momentum", "curvlib TENGraD, empirical")}
    sgd, tengrad = (make(*problem(workload)) for make in build.values())
    times = in_turns(
        sgd,
        tengrad,
        lambda: [solver.update(None, own) for own in rows.values()],
        lambda: factorized(solver, list(estimates.values())),
        lambda: [solver.solve(inverse, gradients[name]) for name, inverse in inverses.items()],
        rounds=rounds,
    )
    names = ("sgd", "tengrad", "rows_and_gram", "factorize", "solve")
    return {name: 1e3 * seconds for name, seconds in zip(names, times, strict=True)}


def roofline(rounds):
    """Rates in GFLOP/s: of a large product, and of the Gram and the factorisation of Linear blocks 1024 wide."""
    a = torch.randn(2048, 2048)
    result = {"product": 2 * 2048**3 / min(in_turns(lambda: a @ a, rounds=rounds)) / 1e9, "rows": []}
    solver, width = Woodbury(), 1024
    for n in ROWS[2:]:
        rows = linear(width, n)
        estimate = solver.update(None, rows)
        gram, factorize = in_turns(rows.gram, lambda own=estimate: solver.factorize(own, DAMPING), rounds=rounds)
        rates = {"gram": 2 * n * n * 2 * width / gram / 1e9, "factorize": n**3 / 3 / factorize / 1e9}
        result["rows"].append({"n": n, **rates})
    return result


def inversion(rounds, count=20):
    """Factorise and solve for all blocks of a network, against LAPACK's kernels on the same matrices, alone and not."""
    result = []
    for n in ROWS:
        network = Network()
        network.setup(n, count)
        timed = network.time_inversion, network.time_calls, network.time_lapack
        own, calls, lapack = (1e3 * seconds for seconds in in_turns(*timed, rounds=rounds, seconds=0.5))
        times = {"ms": own, "calls_ms": calls, "lapack_ms": lapack}
        result.append({"n": n, "blocks": count, **times, "ratio": own / lapack, "calls_ratio": calls / lapack})
    return result


def routes(rounds, batch=32):
    """Milliseconds that the rows of a convolution take by each route, and which one the cost model chooses."""
    answers, result = ConvolutionRows.params[1], {}
    for name in CONVOLUTIONS:
        forms = [ConvolutionRows() for _ in answers]
        for form, answer in zip(forms, answers, strict=True):
            form.setup(name, answer, batch, "cpu")
        free = forms[0].rows.planned(curvlib.Plan().of(""))
        times = in_turns(*(form.time_rows for form in forms), rounds=rounds)
        chosen = next(answer for answer in answers if f"rows by {answer}," in free.route)
        ms = {answer: 1e3 * seconds for answer, seconds in zip(answers, times, strict=True)}
        result[name] = {**ms, "chosen": chosen}
    return result
