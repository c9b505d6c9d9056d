"""Kernels beyond the array-API standard, from torch's own routines, on any of its devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from curvlib.arrays.buffers import SIDE_BY_SIDE
from curvlib.arrays.host import on_host
from curvlib.arrays.pieces import in_pieces, rows_in_pieces
from curvlib.arrays.torch_decompositions import (
    FAILURES,
    cholesky,
    cholesky_inverse,
    cholesky_solve,
    eigh,
    qr,
    side_by_side,
    small_factors,
    triangular_solve,
)

__all__ = [
    "FAILURES",
    "add_diagonal",
    "add_multiples",
    "add_product",
    "address",
    "adjoining",
    "aligned_product",
    "cholesky",
    "cholesky_inverse",
    "cholesky_solve",
    "eigh",
    "hadamard_gram",
    "index_add",
    "is_compiling",
    "is_dynamo_compiling",
    "matrix_vector",
    "positions",
    "product",
    "qr",
    "row_products",
    "scaled_rows",
    "self_product",
    "side_by_side",
    "small_factors",
    "sum_of_squares",
    "triangular_solve",
]

_SPLIT_UP_TO, _PART = 128, 2048
"""Rows up to which, and columns by which, a long product is cut on a CPU."""

_FOR_ONE_THREAD = range(2**13, 2**18 + 1)
"""Multiply-adds of a product that torch wakes its threads for, and NumPy's BLAS (OpenBLAS) does without any."""

_SHARED, _INNER = range(2**18, 2**27), 8
"""Multiply-adds of a product, and its inner size, that are worth a call which gives every thread rows, on a CPU."""

_STREAMED_FROM = 2**23
"""Bytes from which a matrix comes from memory, which one thread alone does not keep busy, on a CPU."""

_HALVED_FROM, _HALVED_SIZE, _BLOCK, _FEW = 256, 2**18, 128, 4
"""Rows, and elements, from which half a Gram matrix is made in blocks, their least rows, and threads they keep busy."""

_ROWS_EACH = 16
"""Rows that a thread needs for its share of a product to be worth a call of its own, on a CPU."""

_LINE = 64
"""Bytes of a line of the cache."""


def add_diagonal(matrix: Tensor, value: Tensor | float, copy: bool) -> Tensor:
    """A + value · I, without an identity."""
    result = matrix.clone() if copy else matrix
    result.diagonal(dim1=-2, dim2=-1).add_(_by_matrix(value))
    return result


def add_multiples(arrays: Sequence[Tensor], others: Sequence[Tensor], multiple: float) -> list[Tensor]:
    """A + multiple · B. All in a row, for elsewhere the product is rounded before it is added."""
    totals = [array.contiguous() for array in arrays]
    torch._foreach_add_(*in_pieces(totals, [other.contiguous() for other in others]), alpha=multiple)
    return totals


def scaled_rows(matrix: Tensor, weights: Tensor) -> Tensor:
    """Each row of A times its weight."""
    n, step, column = matrix.shape[0], rows_in_pieces(matrix), weights[:, None]
    if step >= n or matrix.requires_grad or weights.requires_grad:
        return matrix * column
    result = torch.empty_like(matrix)
    for start in range(0, n, step):
        piece = slice(start, start + step)
        torch.mul(matrix[piece], column[piece], out=result[piece])
    return result


def row_products(first: Tensor, second: Tensor) -> Tensor:
    """Σ over the last axis of A ∘ B, in the memory of A where that is safe."""
    return (first.mul_(second) if _may_write(first, second) else first * second).sum(-1)


def sum_of_squares(array: Tensor) -> Tensor:
    """Σ over the first axis of x², in the memory of the array where that is safe: new memory comes page by page."""
    return array.square_().sum(0) if _may_write(array) else array.square().sum(0)


def _may_write(*tensors: Tensor) -> bool:
    """Whether nothing that follows operations on these tensors minds results in memory that is given."""
    if is_dynamo_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return not any(tensor.requires_grad for tensor in tensors)


def _by_matrix(value: Tensor | float) -> Tensor | float:
    """What broadcasts against matrices, so that it does against their diagonals."""
    return value[..., 0] if isinstance(value, Tensor) and value.ndim > 0 else value


def product(first: Tensor, second: Tensor) -> Tensor:
    """A B of matrices, or of stacks of them."""
    if first.ndim == 3 and first.shape[0] == second.shape[0] == 1:
        return product(first[0], second[0])[None]
    if first.ndim != 2 or second.ndim != 2:
        return first @ second
    if is_dynamo_compiling():
        return first @ second
    if first.shape[0] * second.numel() in _FOR_ONE_THREAD and on_host(first, second):
        return _alone(first, second)
    parts = _shares(first, second)
    return first @ second if parts is None else torch.bmm(*parts).flatten(0, 1)


def _alone(first: Tensor, second: Tensor) -> Tensor:
    """A B of small matrices, by one thread."""
    a, b = (array.numpy() if 1 in array.stride() else array.contiguous().numpy() for array in (first, second))
    if first.data_ptr() == second.data_ptr():
        a = a.copy()  # else NumPy notices the symmetry, and its routine for that wakes threads
    return torch.from_numpy(a @ b)


def aligned_product(first: Tensor, second: Tensor) -> Tensor:
    """A B; on a CPU with rows that begin at a line of the cache, so not contiguous, where the product is large."""
    if first.ndim == 3 and first.shape[0] == second.shape[0] == 1:
        return aligned_product(first[0], second[0])[None]
    if first.ndim != 2 or second.ndim != 2 or first.device.type != "cpu" or not _may_write(first, second):
        return product(first, second)
    (m, k), n = first.shape, second.shape[1]
    rest = -n % (_LINE // first.element_size())
    if rest == 0 or m * k * n < _SHARED.stop:
        return product(first, second)
    return torch.mm(first, second, out=first.new_empty(m, n + rest)[:, :n])


def add_product(total: Tensor, first: Tensor, second: Tensor, decay: float) -> None:
    """``total ← decay · total + A B`` for contiguous totals, in one pass over them."""
    parts = _shares(first, second)
    if parts is None:
        total.addmm_(first, second, beta=decay)
    else:
        total.view(len(parts[0]), -1, total.shape[1]).baddbmm_(*parts, beta=decay)


def _shares(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor] | None:
    """Factors of a product in which every thread has rows of its own; None where BLAS had better share it out.

    It has its threads wait for each other, which takes longer than a small product.
    """
    if first.device.type != "cpu" or is_dynamo_compiling():
        return None
    (m, k), n = first.shape, second.shape[1]
    threads = torch.get_num_threads()
    evenly = threads > 1 and m % threads == 0 and (threads <= _FEW or m // threads >= _ROWS_EACH)
    sized = k >= _INNER and m * k * n in _SHARED
    if not (evenly and sized):
        return None
    return first.view(threads, -1, k), second.expand(threads, k, n)


def self_product(matrix: Tensor) -> Tensor:
    """A Aᵀ; torch has no symmetric product, so on a CPU the blocks above the diagonal of large ones are mirrored."""
    n, d = matrix.shape
    if matrix.device.type != "cpu":
        return matrix @ matrix.T
    if n <= _SPLIT_UP_TO and d >= 4 * _PART:
        # A flat product is cut along its short sides by BLAS; cut along the long one, its parts stay in the cache.
        width = _part(d)
        whole = d - d % width
        parts = matrix[:, :whole].reshape(n, -1, width).transpose(0, 1)
        products = torch.bmm(parts, parts.mT).view(len(parts), -1)
        # As a product, since a sum of so few would wake another thread for its half.
        total: Tensor = (products.new_ones(len(parts)) @ products).view(n, n)
        return total if whole == d else total + matrix[:, whole:] @ matrix[:, whole:].T
    if is_dynamo_compiling() or matrix.requires_grad:
        return matrix @ matrix.T
    if _halved(n, d):
        return _symmetric(matrix, lambda width, below: _products(matrix, width, below))
    return product(matrix, matrix.T)


def _part(d: int) -> int:
    """Width of the parts that d columns are cut into; without a rest, if they need not be twice as wide for that."""
    most = d // _PART
    return next((d // parts for parts in range(most, most // 2, -1) if d % parts == 0), _PART)


def hadamard_gram(first: Tensor, second: Tensor, ones: bool) -> Tensor:
    """(A Aᵀ) ∘ (B Bᵀ), or (A Aᵀ + 1) ∘ (B Bᵀ); on a CPU block by block, while they are in the cache."""
    n, d = first.shape
    plain = first.device.type != "cpu" or is_dynamo_compiling() or first.requires_grad or second.requires_grad
    if plain or not _halved(n, d + second.shape[1]):
        return _hadamard(self_product(first), self_product(second), ones)

    def blocks(width: int, below: bool) -> Tensor:
        return _hadamard(_products(first, width, below), _products(second, width, below), ones)

    return _symmetric(first, blocks)


def _hadamard(first: Tensor, second: Tensor, ones: bool) -> Tensor:
    """A ∘ B, or (A + 1) ∘ B in one pass."""
    return torch.addcmul(second, second, first) if ones else first * second


def _halved(n: int, d: int) -> bool:
    """Whether blocks at and below the diagonal of an n × n Gram matrix of d columns are faster than all of it."""
    return n >= _HALVED_FROM and n % 2 == 0 and n * d >= _HALVED_SIZE and torch.get_num_threads() <= _FEW


def stacked(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices of one shape as one tensor: that which they are the parts of, or a copy that is laid out as they are."""
    whole = matrices[0]._base
    if whole is not None and _are_parts(matrices, whole):
        return whole
    if matrices[0].is_contiguous():
        return torch.stack(list(matrices))
    # LAPACK leaves factors with their columns in a row, and wants them so: as transposes they are copied as they lie.
    return torch.stack([matrix.mT for matrix in matrices]).mT


def _are_parts(matrices: Sequence[Tensor], whole: Tensor) -> bool:
    """Whether matrices are all the parts of a tensor along its first axis, in their order."""
    if whole.shape != (len(matrices), *matrices[0].shape):
        return False
    place, strides = whole.storage_offset(), whole.stride()
    for one in matrices:
        if one._base is not whole or one.storage_offset() != place or one.stride() != strides[1:]:
            return False
        place += strides[0]
    return True


def adjoining(matrices: Sequence[Tensor]) -> list[tuple[list[int], Tensor]]:
    """Stacks of matrices of one shape, of those together that `Buffers` put side by side; none where they gain nothing.

    Whether there are stacks depends on the matrices' number and shape alone, and a product of a stack has the same bits
    for a matrix however many others are in it: so that nothing depends on where memory happens to lie, which is not as
    before in a run that is resumed.
    """
    first = matrices[0]
    wide, size = first.shape[1] * first.element_size(), first.numel()
    apart = is_dynamo_compiling() or first.device.type != "cpu" or any(type(one) is not Tensor for one in matrices)
    # Routines take other ways through rows that do not begin at a line of the cache.
    if apart or wide % _LINE or size * first.element_size() not in SIDE_BY_SIDE or not _shared_evenly(len(matrices)):
        return []
    try:
        where = [(one.untyped_storage().data_ptr(), one.storage_offset()) for one in matrices]
    except (RuntimeError, NotImplementedError):  # inside a transform of torch.func
        return []
    runs: list[list[int]] = []
    for place in sorted(range(len(matrices)), key=where.__getitem__):
        storage, offset = where[place]
        if runs and where[runs[-1][-1]] == (storage, offset - size) and matrices[place].is_contiguous():
            runs[-1].append(place)
        else:
            runs.append([place])
    return [(run, _one_behind_the_other(matrices[run[0]], len(run))) for run in runs]


def _one_behind_the_other(first: Tensor, count: int) -> Tensor:
    stack = first[None]
    return stack if count == 1 else stack.as_strided((count, *first.shape), (first.numel(), *first.stride()))


def _shared_evenly(count: int) -> bool:
    """Whether so many equal pieces of work, one after the other in each thread, keep most threads busy to the end."""
    threads = torch.get_num_threads()
    return count > 1 and -(-count // threads) * threads <= 1.25 * count


def _rows_each(n: int) -> int:
    """Number of threads that share n rows evenly, with enough for each; 1 if they cannot."""
    threads = torch.get_num_threads()
    return threads if n % threads == 0 and n // threads >= _ROWS_EACH else 1


def matrix_vector(matrix: Tensor, vector: Tensor) -> Tensor:
    """A v; torch's product of a matrix and a vector keeps one thread busy, one of a batch of them all."""
    m, d = matrix.shape
    large = matrix.numel() * matrix.element_size() >= _STREAMED_FROM
    if not large or matrix.device.type != "cpu" or is_dynamo_compiling() or (threads := _rows_each(m)) == 1:
        return matrix @ vector
    # As rows times matrices: the other way round, torch's batched product walks the matrix with long strides.
    rows = matrix.view(threads, -1, d)
    return torch.bmm(vector.expand(threads, 1, d), rows.mT).flatten()


def _symmetric(like: Tensor, blocks: Callable[[int, bool], Tensor]) -> Tensor:
    """Return a symmetric matrix with as many rows as another, of blocks at and below its diagonal.

    Parameters
    ----------
    like
        Gives the number of rows, the dtype and the device.
    blocks
        From the width of square blocks, and whether they are below the diagonal, to all blocks of that width: those in
        the lower left of the diagonal blocks of twice their width, or those that fill the diagonal.
    """
    n = like.shape[0]
    result, width = like.new_empty(n, n), n
    while width % 2 == 0 and width // 2 >= _BLOCK:
        strides, half = (width * n + width, n, 1), width // 2
        below = blocks(half, True)
        result.as_strided(below.shape, strides, half * n).copy_(below)
        result.as_strided(below.shape, strides, half).copy_(below.mT)
        width = half
    diagonal = blocks(width, False)
    result.as_strided(diagonal.shape, (width * n + width, n, 1)).copy_(diagonal)
    return result


def _products(matrix: Tensor, width: int, below: bool) -> Tensor:
    """Blocks of A Aᵀ as `_symmetric` asks for them; torch gives one product of a batch to each thread."""
    d = matrix.shape[1]
    parts = matrix.view(-1, width, d)
    if not below:
        return torch.bmm(parts, parts.mT)
    lower, upper = parts[1::2], parts[::2].mT
    threads = _rows_each(width)
    if len(lower) > 1 or threads == 1:
        return torch.bmm(lower, upper)
    return torch.bmm(lower[0].view(threads, -1, d), upper.expand(threads, d, width)).view(1, width, width)


def address(array: Tensor) -> Any:
    """What two views of the same memory in the same layout have in common; None where that cannot be known."""
    if is_dynamo_compiling() or array.is_meta:
        return None
    try:
        return array.data_ptr(), tuple(array.shape), array.stride(), array.dtype, array.device
    except RuntimeError:  # inside a transform of torch.func
        return None


def index_add(size: int, index: Tensor, values: Tensor) -> Tensor:
    """Eᵀ V for the one-hot rows E of the indices."""
    return values.new_zeros((size, *values.shape[1:])).index_add_(0, index, values)


def positions(counts: Tensor) -> Tensor:
    """Every position as often as its count says, in order."""
    return torch.repeat_interleave(counts)
