"""CuPy's names for NumPy's arrays, as far as curvlib uses them: so its kernels can be followed without a GPU.

Signatures and refusals are those of CuPy 14: no lists for arrays, no 64-bit signed atomics, nothing checked by default.
"""

import contextlib
import types

import numpy as np
import scipy.linalg

NAMES = [
    "arange", "asarray", "ascontiguousarray", "broadcast_to", "cumsum", "diagonal", "eye", "int64", "isfinite",
    "ndarray", "searchsorted", "stack", "swapaxes", "tril", "uint64", "zeros",
]  # fmt: skip


def modules(version="14.2.0", runtime=12090, available=True, log=None):
    """Modules to be put in `sys.modules`; `log` takes notes of streams, devices and allocators in use."""
    log = [] if log is None else log
    cupy = types.ModuleType("cupy")
    for name in NAMES:
        setattr(cupy, name, getattr(np, name))
    cupy.__version__ = version
    cupy.linalg = types.SimpleNamespace(cholesky=_cholesky, eigh=_one(np.linalg.eigh), qr=np.linalg.qr)
    cupy.cublas = types.SimpleNamespace(syrk=_syrk)
    cupy.from_dlpack = lambda tensor: (log.append("from_dlpack"), np.asarray(tensor))[1]
    cupy.cuda = types.SimpleNamespace(
        is_available=lambda: available,
        runtime=types.SimpleNamespace(runtimeGetVersion=lambda: runtime),
        Device=_noted(log, "device"),
        Stream=types.SimpleNamespace(from_external=lambda stream: _noted(log, "stream")(stream.__cuda_stream__())),
        using_allocator=_noted(log, "allocator"),
        get_current_stream=lambda: types.SimpleNamespace(ptr=77),
        PythonFunctionAllocator=lambda allocate, release: types.SimpleNamespace(malloc=(allocate, release)),
    )
    cupyx = types.ModuleType("cupyx")
    cupyx.errstate, cupyx.scatter_add = _errstate, _scatter_add
    solvers = types.ModuleType("cupyx.scipy.linalg")
    solvers.solve_triangular = _solve_triangular
    return {
        "cupy": cupy, "cupyx": cupyx, "cupyx.scipy": types.ModuleType("cupyx.scipy"), "cupyx.scipy.linalg": solvers,
    }  # fmt: skip


RAISING = []


@contextlib.contextmanager
def _errstate(*, linalg):
    RAISING.append(linalg)
    try:
        yield
    finally:
        RAISING.pop()


def _noted(log, what):
    @contextlib.contextmanager
    def use(value):
        log.append((what, value))
        yield
        log.append((f"end of {what}", value))

    return use


def _one(function):
    def call(matrix):
        assert matrix.ndim == 2, "the routine for stacks is Jacobi's"
        return function(matrix)

    return call


def _cholesky(matrix):
    try:
        return np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        if RAISING[-1:] == ["raise"]:
            raise
        return matrix


def _syrk(trans, a, out=None, alpha=1.0, beta=0.0, lower=False):
    assert trans == "N"
    assert lower
    out[...] = np.tril(a @ a.T) + np.triu(np.full_like(out, np.nan), 1)  # the other triangle is not to be looked at
    return out


def _scatter_add(a, slices, value):
    if a.dtype not in (np.int32, np.float16, np.float32, np.float64, np.uint32, np.uint64):
        raise TypeError(f"cupy.add.at does not support {a.dtype}")
    np.add.at(a, slices, value)


def _solve_triangular(a, b, trans=0, lower=False, unit_diagonal=False, overwrite_b=False, check_finite=False):
    if a.ndim == 2:
        return scipy.linalg.solve_triangular(a, b, trans, lower=lower, check_finite=False)
    assert a.shape[:-2] == b.shape[:-2]
    flat = zip(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), strict=True)
    return np.stack([_solve_triangular(one, rhs, trans, lower) for one, rhs in flat]).reshape(b.shape)
