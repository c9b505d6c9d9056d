"""What the suites share: Factors of one block of every kind, solvers by name, pinned threads."""

import importlib
import os
from statistics import median
from time import perf_counter

import numpy as np
import torch
from torch import nn

from curvlib import factors as kinds
from curvlib import solvers
from curvlib.factors import OuterProduct

THREADS = int(os.environ.get("CURVLIB_BENCHMARK_THREADS", "2"))
DAMPING = 0.1
SOLVERS = {
    "woodbury": ("Woodbury", {}),
    "dense": ("Dense", {}),
    "kfac": ("KFAC", {}),
    "kfac eigen": ("KFAC", {"damping": "exact"}),
    "ekfac": ("EKFAC", {}),
    "skfac": ("SKFAC", {}),
    "diagonal": ("Diagonal", {}),
    "eva": ("Eva", {}),
    "fngd": ("FNGD", {}),
    "hylo kid": ("KID", {}),
    "hylo kis": ("KIS", {}),
    "mkor": ("MKOR", {}),
    "seng": ("SENG", {}),
    "shampoo": ("Shampoo", {}),
    "singd": ("SINGD", {}),
    "soap": ("SOAP", {}),
}
PLACES = ("torch cpu", "torch cuda", "numpy cpu", "cupy cuda")
"""Backend and device."""


def pin():
    """The same threads and seed for every benchmark."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)


def solver(name):
    """Solver of a name; skipped on commits that lack it."""
    kind, options = SOLVERS[name]
    if not hasattr(solvers, kind):
        raise NotImplementedError(f"this commit has no {kind}")
    return getattr(solvers, kind)(**options)


def device_of(place):
    """Device of a place; skipped where there is none."""
    device = place.split()[1]
    if device == "cuda" and not torch.cuda.is_available():
        raise NotImplementedError("no CUDA device")
    return device


def draw(shape, dtype="float32", place="torch cpu"):
    """Random numbers, the same wherever they lie."""
    backend, device = place.split()[0], device_of(place)
    values = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    if backend == "torch":
        return torch.from_numpy(values).to(device)
    try:
        return importlib.import_module(backend).asarray(values)
    except ImportError:
        raise NotImplementedError(f"{backend} is not installed") from None


def linear(width, batch, dtype="float32", place="torch cpu"):
    """A Linear layer, width × width with bias."""
    cotangents = draw((batch, 1, width), dtype, place)
    return OuterProduct(draw((batch, width), dtype, place), cotangents, bias="bias")


def sequence(width, batch, positions, dtype="float32", place="torch cpu"):
    """The same layer on sequences."""
    if not hasattr(kinds, "SharedOuter"):
        raise NotImplementedError("this commit has no SharedOuter")
    return kinds.SharedOuter(
        draw((batch, positions, 1, width), dtype, place),
        draw((batch, 1, positions, 1, width), dtype, place),
        weight_shape=(width, width),
        bias="bias",
    )


def convolution(channels, batch, positions, dtype="float32", place="torch cpu"):
    """A 3 × 3 convolution of `channels` to `channels` on square images of so many positions."""
    try:
        from curvlib.layers import adapter_for
    except ImportError:
        raise NotImplementedError("this commit has no adapter_for") from None
    if not place.startswith("torch"):
        raise NotImplementedError("convolutions are torch's alone")
    side = round(positions**0.5)
    layer = nn.Conv2d(channels, channels, 3, padding=1).to(device_of(place), getattr(torch, dtype))
    images = draw((batch, channels, side, side), dtype, place)
    with torch.no_grad():
        return adapter_for(nn.Conv2d).function(layer, images, draw((batch, 1, channels, side, side), dtype, place))


def block(layer, width, batch, positions, dtype="float32", place="torch cpu"):
    """Factors of a layer; combinations that mean nothing are skipped."""
    if (layer == "linear") != (positions == 1):
        raise NotImplementedError("a linear layer without sharing has one position, the others have several")
    if layer == "linear":
        return linear(width, batch, dtype, place)
    return {"sequence": sequence, "convolution": convolution}[layer](width, batch, positions, dtype, place)


def factorized(solver, estimates):
    """Inverses of all blocks, together on commits that can."""
    if hasattr(solver, "factorize_all"):
        return solver.factorize_all(estimates, [DAMPING] * len(estimates))
    return [solver.factorize(estimate, DAMPING) for estimate in estimates]


def mean_gradient(rows):
    """The gradient that rows stand for, explicitly."""
    return rows.rmatvec(rows.row_weights(1 / len(rows)))


def synchronize(place):
    """Wait for a device, whose work would end up in the next measurement."""
    if place.endswith("cuda"):
        torch.cuda.synchronize()


def in_turns(*functions, rounds=15, seconds=0.1):
    """Median seconds of each, taken in turns, so that all see the same machine.

    There are so many rounds at least, and so many as take this time: the first of short ones are slower than the rest.
    """
    for function in functions:
        function()
    times = [[] for _ in functions]
    start, done = perf_counter(), 0
    while done < rounds or perf_counter() - start < seconds:
        for function, mine in zip(functions, times, strict=True):
            begin = perf_counter()
            function()
            mine.append(perf_counter() - begin)
        done += 1
    return [median(mine) for mine in times]
