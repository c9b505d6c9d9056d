"""Decompositions and solves of matrices by torch's own routines, on any of its devices: a part of `torch_kernels`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from curvlib.arrays.host import on_host
from curvlib.arrays.pieces import ALONE

__all__ = [
    "FAILURES",
    "cholesky",
    "cholesky_inverse",
    "cholesky_solve",
    "eigh",
    "qr",
    "side_by_side",
    "small_factors",
    "triangular_solve",
]

FAILURES = (torch.linalg.LinAlgError,)  # type: ignore[attr-defined]  # its stub forgets the name
"""What a routine raises for a matrix that it cannot decompose."""

_ROUTINES = {torch.float32: lapack.spotrf, torch.float64: lapack.dpotrf}

_WOKEN_FOR = 128
"""Width of matrices whose Cholesky factors are there before a thread has woken, on a CPU."""

_WORTH_THREADS = 2e7
"""Sum of cubed widths of Cholesky factorisations from which threads of their own make up for their making, on a CPU."""

_ALONE_UP_TO = 2048
"""Width up to which one thread is about as fast with a matrix as all of them: LAPACK wakes them for every panel."""

_TOGETHER_UP_TO = 512
"""Rows up to which torch has cuBLAS solve many triangular systems at once; beyond, it may be MAGMA."""


def cholesky(matrix: Tensor, wait: bool) -> tuple[Tensor, bool | Tensor]:
    """Lower factor, and whether it is one: a bool, or where nobody waits for the device, a tensor on it."""
    if _is_small(matrix):
        factor = _by_columns(matrix.shape, matrix).copy_(matrix.mT)  # the same, as they lie
        if _factorized(factor):
            return factor, True if wait else torch.ones((), dtype=torch.bool)
    factor, info = torch.linalg.cholesky_ex(matrix)
    # LAPACK lets NaN through without a word; one anywhere in a row reaches the diagonal below it. A diagonal of square
    # roots does not overflow when it is summed.
    total = factor.detach().diagonal(dim1=-2, dim2=-1).sum()
    if wait and info.device.type == "cpu":
        return factor, math.isfinite(total) and not torch.count_nonzero(info).item()
    good = torch.isfinite(total) & ~info.any()
    return factor, bool(good) if wait else good


def small_factors(matrices: Sequence[Tensor], dampings: Sequence[float]) -> list[Tensor] | None:
    """Lower factors of ``matrix + damping · identity`` for small matrices of one shape; None if `cholesky` is to do it.

    Which it is where a stack of them is small too: here every matrix is copied by itself, so that no thread is woken.
    """
    count, n = len(matrices), matrices[0].shape[-1]
    if count * n * n <= ALONE or not all(map(_is_small, matrices)):
        return None
    stack = _by_columns((count, n, n), matrices[0])
    arrays = stack.mT.numpy()
    for array, matrix in zip(arrays, matrices, strict=True):
        array[:] = matrix.numpy()
    arrays.reshape(count, -1)[:, :: n + 1] += np.asarray(dampings, dtype=arrays.dtype)[:, None]
    return list(stack.unbind()) if _factorized(stack) else None


def _by_columns(shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory for matrices, shape ``(..., n, n)``, whose columns lie in a row, as LAPACK leaves factors."""
    *batch, n, _ = shape
    strides = [math.prod(shape[place + 1 :]) for place in range(len(batch))]
    return torch.empty_strided(tuple(shape), (*strides, 1, n), dtype=like.dtype)


def _is_small(matrix: Tensor) -> bool:
    """Whether SciPy's routine for one matrix is the faster one.

    Torch's wakes all threads to clear what is above the diagonal, which takes longer than the factorisation.
    """
    return 0 < matrix.shape[-1] <= _WOKEN_FOR and on_host(matrix)


def _factorized(matrices: Tensor) -> bool:
    """Put its lower factor in place of each of symmetric matrices by columns, and tell whether all of them have one."""
    potrf, arrays = _ROUTINES[matrices.dtype], matrices.mT.view(-1, *matrices.shape[-2:]).numpy()
    for array in arrays:
        _, info = potrf(array.T, lower=1, clean=1, overwrite_a=1)
        if info:
            return False
    # LAPACK lets NaN through without a word; one anywhere in a row reaches the diagonal below it.
    return math.isfinite(arrays.diagonal(axis1=1, axis2=2).sum())


def cholesky_inverse(factor: Tensor) -> Tensor:
    """Inverse of L Lᵀ, in about a third of the time of solving for the identity."""
    if factor.is_cuda and factor.shape[:-2].numel() > 1:
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        return _solved_together(factor, eye.expand_as(factor))
    return torch.cholesky_inverse(factor).mT.contiguous()  # symmetric; in rows, as one is that was loaded


def cholesky_solve(factor: Tensor, rhs: Tensor) -> Tensor:
    """Solution of L Lᵀ x = rhs."""
    if factor.is_cuda and factor.shape[:-2].numel() > 1:
        return _solved_together(factor, rhs)
    if rhs.shape[-1] == 1 and factor.device.type == "cpu":
        # The routine for both would copy the factor first. Loaded ones lie in rows, from which others round otherwise.
        factor = factor if factor.stride(-2) == 1 else factor.mT.contiguous().mT
        return triangular_solve(factor, triangular_solve(factor, rhs, False), True)
    return torch.cholesky_solve(rhs, factor)


def _solved_together(factors: Tensor, rhs: Tensor) -> Tensor:
    """Solutions of several systems on a GPU, where torch's own routine would turn to MAGMA, which waits for the device.

    Up to 512 rows torch gives triangular systems to cuBLAS, all at once; larger ones are worth a call each.
    """
    if factors.shape[-1] <= _TOGETHER_UP_TO:
        return triangular_solve(factors, triangular_solve(factors, rhs, False), True)
    n, k = rhs.shape[-2:]
    each = factors.expand(*rhs.shape[:-2], n, n)
    pairs = zip(rhs.reshape(-1, n, k), each.reshape(-1, n, n), strict=True)
    return torch.stack([torch.cholesky_solve(one, factor) for one, factor in pairs]).reshape(rhs.shape)


def triangular_solve(factor: Tensor, rhs: Tensor, transposed: bool) -> Tensor:
    """Solution of L x = rhs, or of Lᵀ x = rhs."""
    solution: Tensor = torch.linalg.solve_triangular(factor.mT if transposed else factor, rhs, upper=transposed)
    return solution


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors. On CUDA the routine itself waits for the device."""
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors.contiguous()  # in rows, as those are that were loaded: products round by how factors lie


def qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Q with orthonormal columns and R, reduced."""
    Q, R = torch.linalg.qr(matrix)
    return Q.contiguous(), R  # as `eigh`


def side_by_side(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    widths: Sequence[int],
    like: Tensor,
    effort: float,
) -> list[Any]:
    """``function(*one)`` for each of the arguments: on a CPU with a thread for each, the widest matrices first."""
    if is_dynamo_compiling():  # which knows no threads
        return [function(*one) for one in arguments]
    threads = torch.get_num_threads()
    chosen = [place for place, width in enumerate(widths) if width <= _ALONE_UP_TO]
    work = effort * sum(widths[place] ** 3 for place in chosen)
    if like.device.type != "cpu" or threads == 1 or work < _WORTH_THREADS:
        return [function(*one) for one in arguments]
    chosen.sort(key=lambda place: -widths[place])
    grad = torch.is_grad_enabled()

    def run(one: tuple[Any, ...]) -> Any:
        with torch.set_grad_enabled(grad):  # which every thread has for itself
            return function(*one)

    results: dict[int, Any] = {}
    try:
        with ThreadPoolExecutor(min(threads, len(chosen)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            waiting = {place: pool.submit(copy_context().run, run, arguments[place]) for place in chosen}
            results = {place: waiting[place].result() for place in sorted(waiting)}
    finally:
        # Each thread keeps its own number; what is put back is the one that threads made later begin with.
        torch.set_num_threads(threads)
    return [results[place] if place in results else function(*one) for place, one in enumerate(arguments)]
