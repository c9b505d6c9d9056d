"""Decompositions and solves of matrices by torch's own routines, on any of its devices: a part of `torch_kernels`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

__all__ = [
    "FAILURES",
    "cholesky",
    "cholesky_inverse",
    "cholesky_solve",
    "eigh",
    "qr",
    "side_by_side",
    "triangular_solve",
]

FAILURES = (torch.linalg.LinAlgError,)  # type: ignore[attr-defined]  # its stub forgets the name
"""What a routine raises for a matrix that it cannot decompose."""

_WOKEN_FOR, _WOKEN_FOR_ALL = 64, 2**20
"""Width of matrices, and multiply-adds of all of them, whose Cholesky factors are there before a thread has woken."""

_WORTH_THREADS = 2e7
"""Sum of cubed widths of Cholesky factorisations from which threads of their own make up for their making, on a CPU."""

_ALONE_UP_TO = 2048
"""Width up to which one thread is about as fast with a matrix as all of them: LAPACK wakes them for every panel."""

_TOGETHER_UP_TO = 512
"""Rows up to which torch has cuBLAS solve many triangular systems at once; beyond, it may be MAGMA."""


def cholesky(matrix: Tensor, wait: bool) -> tuple[Tensor, bool | Tensor]:
    """Lower factor, and whether it is one: a bool, or where nobody waits for the device, a tensor on it."""
    if (small := _small_factor(matrix)) is not None:
        return small, True if wait else torch.ones((), dtype=torch.bool)
    factor, info = torch.linalg.cholesky_ex(matrix)
    # LAPACK lets NaN through without a word; one anywhere in a row reaches the diagonal below it. A diagonal of square
    # roots does not overflow when it is summed.
    total = factor.detach().diagonal(dim1=-2, dim2=-1).sum()
    if wait and info.device.type == "cpu":
        return factor, math.isfinite(total) and not torch.count_nonzero(info).item()
    good = torch.isfinite(total) & ~info.any()
    return factor, bool(good) if wait else good


def _small_factor(matrix: Tensor) -> Tensor | None:
    """Lower factor of small matrices on a CPU by NumPy's routine; None where that is not the faster one, or it failed.

    Torch's wakes all threads to clear what is above the diagonal, which takes longer than the factorisation.
    """
    width = matrix.shape[-1]
    small = width <= _WOKEN_FOR and matrix.numel() * width <= _WOKEN_FOR_ALL and matrix.device.type == "cpu"
    if not small or type(matrix) is not Tensor or matrix.requires_grad or is_compiling():
        return None
    if torch._C._len_torch_dispatch_stack():  # who watches torch's operations, to count them say, would miss this one
        return None
    try:
        # Copied: NumPy's memory may begin inside a line of the cache, and kernels round by where operands begin.
        factor = torch.from_numpy(np.linalg.cholesky(matrix.numpy())).clone()
    except (np.linalg.LinAlgError, RuntimeError, TypeError):  # torch's own routine says what is wrong
        return None
    return factor if math.isfinite(factor.diagonal(dim1=-2, dim2=-1).sum()) else None


def cholesky_inverse(factor: Tensor) -> Tensor:
    """Inverse of L Lᵀ, in about a third of the time of solving for the identity."""
    if factor.is_cuda and factor.shape[:-2].numel() > 1:
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        return _solved_together(factor, eye.expand_as(factor))
    return torch.cholesky_inverse(factor)


def cholesky_solve(factor: Tensor, rhs: Tensor) -> Tensor:
    """Solution of L Lᵀ x = rhs."""
    if factor.is_cuda and factor.shape[:-2].numel() > 1:
        return _solved_together(factor, rhs)
    if rhs.shape[-1] == 1 and factor.device.type == "cpu":
        # The routine for both would copy the factor first.
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
    return values, vectors


def qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Q with orthonormal columns and R, reduced."""
    Q, R = torch.linalg.qr(matrix)
    return Q, R


def side_by_side(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    widths: Sequence[int],
    like: Tensor,
    effort: float,
) -> list[Any]:
    """``function(*one)`` for each of the arguments: on a CPU with a thread for each, the widest matrices first."""
    threads = torch.get_num_threads()
    chosen = [place for place, width in enumerate(widths) if width <= _ALONE_UP_TO]
    work = effort * sum(widths[place] ** 3 for place in chosen)
    if like.device.type != "cpu" or threads == 1 or work < _WORTH_THREADS or is_compiling():
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
