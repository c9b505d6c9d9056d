"""One array namespace over torch, CuPy and NumPy, and the few kernels that curvature needs beyond it."""

from curvlib.arrays.indexing import equal_pairs, index_add
from curvlib.arrays.linalg import add_diagonal, cholesky, cholesky_solve, eigh, is_finite, self_product, trace, widen
from curvlib.arrays.namespace import Array, Vector, contract, device, dot, namespace, nbytes
from curvlib.arrays.state import map_arrays, pack, record, unpack

__all__ = [
    "Array",
    "Vector",
    "add_diagonal",
    "cholesky",
    "cholesky_solve",
    "contract",
    "device",
    "dot",
    "eigh",
    "equal_pairs",
    "index_add",
    "is_finite",
    "map_arrays",
    "namespace",
    "nbytes",
    "pack",
    "record",
    "self_product",
    "trace",
    "unpack",
    "widen",
]
