"""Blocks with one row a sample, each as Factors and as raw arrays that definitions are written with."""

from dataclasses import dataclass

import numpy as np
from blocks import LIBRARIES, SAMPLES, numbers, stored

from curvlib.factors import OneHotOuter, OuterProduct, SharedOuter


@dataclass
class Block:
    """Factors; inputs (n, positions, groups, d) with the 1 of a bias; cotangents (n, positions, groups, d_out)."""

    factors: object
    a: np.ndarray
    g: np.ndarray
    bias: bool = False
    lookup: bool = False  # a and g stand the other way round: a are cotangents, g what was looked up

    @property
    def gradient(self):
        """[W, b] of the mean gradient, shape (groups, d_out, d)."""
        return np.einsum("nrgo,nrgi->goi", self.g, self.a) / len(self.a)

    def matrix(self, vector):
        groups, d_out = self.g.shape[2:]
        weight = np.asarray(vector["weight"]).reshape(groups, d_out, -1)
        if not self.bias:
            return weight
        return np.concatenate([weight, np.asarray(vector["bias"]).reshape(groups, d_out, 1)], axis=2)

    def moments(self, sharing="expand"):
        """K-FAC's A and G of every group."""
        a, g = self.a, self.g
        if sharing == "reduce":
            reduced = (np.sum, np.mean) if self.lookup else (np.mean, np.sum)
            a, g = (reduce(rows, axis=1, keepdims=True) for reduce, rows in zip(reduced, (a, g), strict=True))
        n, positions = a.shape[:2]
        A = np.einsum("nrgi,nrgj->gij", a, a) / (n * positions)
        return A, np.einsum("nrgi,nrgj->gij", g, g) / n

    def means(self):
        """Mean input and cotangent of every group, (groups, d) and (groups, d_out)."""
        return self.a.mean((0, 1)), self.g.sum(1).mean(0)


def with_ones(a):
    return np.concatenate([a, np.ones((*a.shape[:-1], 1))], axis=-1)


def linear(library, seed):
    a, g = numbers(SAMPLES, 4, seed=seed), numbers(SAMPLES, 5, seed=seed + 50)
    factors = OuterProduct(library(a), library(g), bias="bias", samples=SAMPLES)
    return Block(factors, with_ones(a)[:, None, None], g[:, None, None], bias=True)


def no_bias(library, seed):
    a, g = numbers(SAMPLES, 5, seed=seed), numbers(SAMPLES, 5, seed=seed + 50)
    return Block(OuterProduct(library(a), library(g), samples=SAMPLES), a[:, None, None], g[:, None, None])


def sequence(library, seed):
    a, g = numbers(SAMPLES, 3, 1, 4, seed=seed), numbers(SAMPLES, 3, 1, 5, seed=seed + 50)
    factors = SharedOuter(library(a), library(g), (5, 4), bias="bias", samples=SAMPLES)
    return Block(factors, with_ones(a), g, bias=True)


def grouped(library, seed):
    a, g = numbers(SAMPLES, 3, 2, 3, seed=seed), numbers(SAMPLES, 3, 2, 4, seed=seed + 50)
    factors = SharedOuter(library(a), library(g), (8, 3), bias="bias", samples=SAMPLES)
    return Block(factors, with_ones(a), g, bias=True)


def table(library, seed):
    """A lookup, in the orientation of its table: rows are one-hot, columns the cotangent."""
    index = np.random.default_rng(seed).permuted(np.tile(np.arange(4), 5))[: SAMPLES * 3].reshape(SAMPLES, 3)
    g = numbers(SAMPLES, 3, 4, seed=seed + 50)
    factors = OneHotOuter(library(index), library(g), vocabulary=4, samples=SAMPLES)
    return Block(factors, g[:, :, None], np.eye(4)[index][:, :, None], lookup=True)


BUILDS = [linear, no_bias, sequence, grouped, table]


def steps(solver, build, library, damping, updates=4):
    """Blocks of successive updates; after each the gradient solved for and the natural gradient, as matrices.

    The gradient is the rows' mean in odd updates (given as Factors) and another one in the others; states go through
    storage between all verbs.
    """
    estimate, blocks, pairs = None, [], []
    for number in range(updates):
        block = build(LIBRARIES[library], number)
        estimate = stored(solver.update(estimate, block.factors))
        inverse = stored(solver.factorize(estimate, damping))
        other = {name: numbers(*shape, seed=9) for name, shape in block.factors.shapes.items()}
        gradient = block.gradient if number % 2 else block.matrix(other)
        given = block.factors if number % 2 else {name: LIBRARIES[library](value) for name, value in other.items()}
        natural = solver.solve(inverse, given)
        assert {name: tuple(value.shape) for name, value in natural.items()} == dict(block.factors.shapes)
        blocks.append(block)
        pairs.append((gradient, block.matrix(natural)))
    return blocks, pairs


def close(given, expected):
    np.testing.assert_allclose(given, expected, rtol=1e-9, atol=1e-10 * np.abs(expected).max())
