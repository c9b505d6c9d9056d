"""One array namespace over torch, CuPy and NumPy, and the few kernels that curvature needs beyond it."""

from curvlib.arrays.buffers import Buffers
from curvlib.arrays.checks import Deferred, deferred, require
from curvlib.arrays.indexing import equal_pairs, index_add
from curvlib.arrays.linalg import (
    add_diagonal,
    cholesky,
    cholesky_inverse,
    cholesky_solve,
    eigh,
    hadamard_gram,
    is_finite,
    matrix_vector,
    qr,
    require_finite,
    self_product,
    side_by_side,
    trace,
    triangular_solve,
    widen,
)
from curvlib.arrays.namespace import Array, Vector, contract, device, dot, kernels, namespace, nbytes, same
from curvlib.arrays.state import TRANSIENT, altered, map_arrays, pack, record, unpack

__all__ = [
    "TRANSIENT",
    "Array",
    "Buffers",
    "Deferred",
    "Vector",
    "add_diagonal",
    "altered",
    "cholesky",
    "cholesky_inverse",
    "cholesky_solve",
    "contract",
    "deferred",
    "device",
    "dot",
    "eigh",
    "equal_pairs",
    "hadamard_gram",
    "index_add",
    "is_finite",
    "kernels",
    "map_arrays",
    "matrix_vector",
    "namespace",
    "nbytes",
    "pack",
    "qr",
    "record",
    "require",
    "require_finite",
    "same",
    "self_product",
    "side_by_side",
    "trace",
    "triangular_solve",
    "unpack",
    "widen",
]
