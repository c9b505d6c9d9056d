"""Factors of every common kind made by hand, and what tests of solvers do with them."""

from math import prod

import numpy as np
import torch

from curvlib.arrays import pack, unpack
from curvlib.factors import OneHotOuter, OuterProduct, SharedOuter

SAMPLES, VOCABULARY = 6, 7
LIBRARIES = {"torch": torch.from_numpy, "numpy": np.asarray}


def numbers(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def linear(library, seed, columns=2, bias="bias"):
    a, g = numbers(SAMPLES, 5, seed=seed), numbers(SAMPLES, columns, 4, seed=seed + 50)
    return OuterProduct(library(a), library(g), bias=bias, samples=SAMPLES)


def no_bias(library, seed, columns=2):
    return linear(library, seed, columns, bias=None)


def sequence(library, seed, columns=2):
    a, g = numbers(SAMPLES, 3, 1, 5, seed=seed), numbers(SAMPLES, columns, 3, 1, 4, seed=seed + 50)
    return SharedOuter(library(a), library(g), (4, 5), bias="bias", samples=SAMPLES)


def grouped(library, seed, columns=1):
    a, g = numbers(SAMPLES, 3, 2, 5, seed=seed), numbers(SAMPLES, columns, 3, 2, 4, seed=seed + 50)
    return SharedOuter(library(a), library(g), (8, 5, 1), bias="bias", samples=SAMPLES)


def embedding(library, seed, columns=2):
    indices = np.random.default_rng(seed).integers(VOCABULARY, size=(SAMPLES, 3))
    g = numbers(SAMPLES, columns, 3, 2, seed=seed)
    return OneHotOuter(library(indices), library(g), VOCABULARY, samples=SAMPLES)


BUILDS = [linear, no_bias, sequence, grouped, embedding]


def positions(factors):
    """Inputs (n, columns or 1, positions, groups, d) with the 1 of a bias, cotangents (…, d_out).

    A lookup stands the other way round: its cotangents count as inputs, as its table has a column for each of them.
    """
    if isinstance(factors, OneHotOuter):
        chosen = np.eye(VOCABULARY)[np.asarray(factors.indices)]
        return np.asarray(factors.cotangents)[:, :, :, None], chosen[:, None, :, None]
    shared = factors.as_shared() if isinstance(factors, OuterProduct) else factors
    a, g = np.asarray(shared.inputs)[:, None], np.asarray(shared.cotangents)
    return (a if factors.bias is None else np.concatenate([a, np.ones((*a.shape[:-1], 1))], axis=-1)), g


def reduced(factors):
    """Inputs and cotangents with one position: the mean input (or lookup), the summed cotangent."""
    a, g = positions(factors)
    if isinstance(factors, OneHotOuter):
        return a.sum(2, keepdims=True), g.mean(2, keepdims=True)
    return a.mean(2, keepdims=True), g.sum(2, keepdims=True)


def kronecker_pairs(factors, sharing):
    """A and G of every group, from the definition of K-FAC."""
    a, g = reduced(factors) if sharing == "reduce" else positions(factors)
    for group in range(a.shape[3]):
        inputs, cotangents = a[:, :, :, group].reshape(-1, a.shape[4]), g[:, :, :, group].reshape(-1, g.shape[4])
        yield inputs.T @ inputs / (len(a) * a.shape[2]), cotangents.T @ cotangents / factors.normalizer


def matrices(factors, vector):
    """[W, b] of every group, shape (groups, d_out, d)."""
    groups = factors.inputs.shape[2] if isinstance(factors, SharedOuter) else 1
    weight = np.asarray(vector["weight"])
    weight = weight.reshape(groups, -1, prod(weight.shape[1:]))
    if "bias" not in vector:
        return weight
    return np.concatenate([weight, np.asarray(vector["bias"]).reshape(groups, -1, 1)], axis=2)


def flat(vector):
    return np.concatenate([np.asarray(value).reshape(-1) for value in vector.values()])


def gradient_of(factors, library):
    return {name: library(numbers(*shape, seed=9)) for name, shape in factors.shapes.items()}


def stored(state):
    return unpack(pack(state))


def step(solver, estimate, factors, library, damping):
    """Estimate after one more update, a gradient and its natural gradient, flat; states go through storage."""
    estimate, gradient = stored(solver.update(estimate, factors)), gradient_of(factors, library)
    natural = solver.solve(stored(solver.factorize(estimate, damping)), gradient)
    assert list(natural) == list(factors.shapes)
    return estimate, flat(gradient), flat(natural)


def bias_corrected(history, decay):
    weights = np.array([decay ** (len(history) - 1 - i) for i in range(len(history))])
    return sum(w * h for w, h in zip(weights / weights.sum(), history, strict=True))
