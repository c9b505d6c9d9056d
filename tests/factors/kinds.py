"""Every kind of Factors in two array libraries; a new kind joins `KINDS`."""

import numpy as np
import torch

from curvlib.factors import Dense, LowRank, OneHotOuter, OuterProduct, SharedOuter, Sum
from curvlib.layers import ConvolutionFactors

N, COLUMNS = 4, 3


def numbers(library, *shape, seed=0):
    values = np.random.default_rng(seed + sum(shape)).standard_normal(shape)
    return torch.from_numpy(values) if library == "torch" else values


def outer(library, seed=0, **names):
    return OuterProduct(numbers(library, N, 5, seed=seed), numbers(library, N, COLUMNS, 2, seed=seed + 1), **names)


def shared(library, seed=0, positions=3, groups=2, **names):
    return SharedOuter(
        numbers(library, N, positions, groups, 4, seed=seed),
        numbers(library, N, COLUMNS, positions, groups, 3, seed=seed + 1),
        weight_shape=(groups * 3, 2, 2),
        **names,
    )


def convolution(library, seed=0, **names):
    assert library == "torch"
    return ConvolutionFactors(
        numbers(library, N, 4, 9, 8, seed=seed),
        numbers(library, N, COLUMNS, 6, 4, 3, seed=seed + 1),
        weight_shape=(6, 2, 2, 3),
        stride=(2, 2),
        dilation=(2, 1),
        groups=2,
        **names,
    )


def onehot(library, seed=0, vocabulary=7, positions=5, **names):
    indices = np.random.default_rng(seed).integers(vocabulary, size=(N, positions))
    cotangents = numbers(library, N, COLUMNS, positions, 2, seed=seed + 1)
    cotangents[1, :, 2] = 0  # a position that does not count
    return OneHotOuter(torch.from_numpy(indices) if library == "torch" else indices, cotangents, vocabulary, **names)


def dense(library, seed=0):
    return Dense(
        weight=numbers(library, N * COLUMNS, 2, 3, seed=seed), bias=numbers(library, N * COLUMNS, 4, seed=seed + 1)
    )


def tied(library, seed=0):
    left = outer(library, seed, weight="w", bias="b")
    return Sum((left, outer(library, seed + 7, weight="w")))


def lowrank(library, seed=0):
    left = numbers(library, N * COLUMNS, 2, seed=seed)
    basis = Dense(weight=numbers(library, 2, 3, 2, seed=seed), bias=numbers(library, 2, 3, seed=seed + 1))
    return LowRank(left, basis)


def several(library, seed=0):
    left = shared(library, seed, weight="w", bias="b")
    rows = {"c": numbers(library, N * COLUMNS, 3, seed=seed), "b": numbers(library, N * COLUMNS, 6, seed=seed + 2)}
    return Sum((left, outer(library, seed + 7, weight="v"), Dense(rows)))


KINDS = {
    "outer": lambda library, seed=0: outer(library, seed),
    "outer with bias": lambda library, seed=0: outer(library, seed, bias="bias"),
    "outer, bias alone": lambda library, seed=0: outer(library, seed, weight=None, bias="bias"),
    "shared": lambda library, seed=0: shared(library, seed),
    "shared with bias": lambda library, seed=0: shared(library, seed, bias="bias"),
    "shared, bias alone": lambda library, seed=0: shared(library, seed, weight=None, bias="bias"),
    "shared, many positions": lambda library, seed=0: shared(library, seed, positions=40, groups=1, bias="bias"),
    "convolution": lambda library, seed=0: convolution(library, seed),
    "convolution with bias": lambda library, seed=0: convolution(library, seed, bias="bias"),
    "convolution, bias alone": lambda library, seed=0: convolution(library, seed, weight=None, bias="bias"),
    "one-hot": lambda library, seed=0: onehot(library, seed),
    "one-hot, table shorter than the sample": lambda library, seed=0: onehot(library, seed, vocabulary=3),
    "dense": dense,
    "low rank": lowrank,
    "sum": tied,
    "sum of several weights": several,
}

CASES = [
    (kind, library)
    for kind in KINDS
    for library in ("torch", "numpy")
    if "convolution" not in kind or library == "torch"
]


def matrix(factors):
    return np.asarray(factors.dense().matrix())


def flat(vector):
    return np.concatenate([np.asarray(value).reshape(-1) for value in vector.values()])


def vector(factors, library):
    return {name: numbers(library, *shape, seed=3) for name, shape in factors.shapes.items()}


def close(left, right):
    np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=1e-11, atol=1e-11)
