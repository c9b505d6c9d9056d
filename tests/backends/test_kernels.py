"""Kernels of every library side by side: the same names, the same answers; CuPy's followed on NumPy's arrays."""

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import array_api_compat
import numpy as np
import pytest
import torch
from libraries import EVERY, MAKE, READ
from numpy_as_cupy import modules

from curvlib import arrays
from curvlib.errors import NotPositiveDefiniteError

ROOT = Path(arrays.__file__).parent.parent
LIBRARIES = [*EVERY, "numpy as cupy"]


@pytest.fixture(params=LIBRARIES)
def library(request, monkeypatch):
    """Make and read arrays of a library."""
    if request.param != "numpy as cupy":
        return MAKE[request.param], READ[request.param]
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "curvlib.arrays.cupy_kernels", raising=False)
    module = importlib.import_module("curvlib.arrays.cupy_kernels")
    monkeypatch.delitem(sys.modules, "curvlib.arrays.cupy_kernels")
    monkeypatch.setitem(arrays.namespace.__globals__["_KERNELS"], np.ndarray, module)
    return np.asarray, np.asarray


def numbers(*shape):
    return np.random.default_rng(list(shape)).standard_normal(shape)


def spd(*batch, n=5):
    root = numbers(*batch, n, n)
    return root @ np.swapaxes(root, -1, -2) + np.eye(n)


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("columns", [1, 4])
def test_factorisations_and_solves(library, batch, columns):
    make, read = library
    matrix, rhs = spd(*batch), numbers(*batch, 5, columns)
    factor = np.linalg.cholesky(matrix)
    np.testing.assert_allclose(read(arrays.cholesky(make(matrix))), factor, atol=1e-12)
    noisy = make(factor + np.triu(np.full_like(factor, 9.0), 1))  # above the diagonal nothing is looked at
    for transposed, left in ((False, factor), (True, np.swapaxes(factor, -1, -2))):
        found = read(arrays.triangular_solve(noisy, make(rhs), transposed))
        np.testing.assert_allclose(found, np.linalg.solve(left, rhs), atol=1e-12)
    solved = read(arrays.cholesky_solve(make(factor), make(rhs)))
    np.testing.assert_allclose(solved, np.linalg.solve(matrix, rhs), atol=1e-12)
    np.testing.assert_allclose(read(arrays.cholesky_inverse(make(factor))), np.linalg.inv(matrix), atol=1e-12)
    inverse = read(arrays.cholesky_inverse(make(factor)))
    np.testing.assert_allclose(inverse, np.linalg.inv(matrix), atol=1e-12)
    np.testing.assert_array_equal(inverse, np.swapaxes(inverse, -1, -2))
    values, vectors = (read(part) for part in arrays.eigh(make(matrix)))
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix), atol=1e-12)
    np.testing.assert_allclose(vectors * values[..., None, :] @ np.swapaxes(vectors, -1, -2), matrix, atol=1e-12)
    Q, R = (read(part) for part in arrays.qr(make(rhs)))
    np.testing.assert_allclose(Q @ R, rhs, atol=1e-12)
    np.testing.assert_allclose(
        np.swapaxes(Q, -1, -2) @ Q, np.broadcast_to(np.eye(columns), (*batch, columns, columns)), atol=1e-12
    )


def test_vectors_are_solved_for_too(library):
    make, read = library
    factor, rhs = np.linalg.cholesky(spd()), numbers(5)
    np.testing.assert_allclose(read(arrays.triangular_solve(make(factor), make(rhs))), np.linalg.solve(factor, rhs))
    np.testing.assert_allclose(read(arrays.cholesky_solve(make(factor), make(rhs))), np.linalg.solve(spd(), rhs))


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# With sizes on either side of those at which torch's kernel on a CPU goes another way.
@pytest.mark.parametrize(
    ("n", "d"),
    [(1, 3), (7, 3), (600, 3), (1025, 3), (96, 300), (128, 1000), (256, 1024), (384, 700), (512, 600), (514, 600)],
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_symmetric_products(library, threads, n, d, order):
    make, read = library
    matrix, other = np.asarray(numbers(n, d), order=order), numbers(n, 5)
    gram = matrix @ matrix.T
    found = read(arrays.self_product(make(matrix)))
    np.testing.assert_allclose(found, gram, atol=1e-12)
    for ones in (False, True):
        found = read(arrays.hadamard_gram(make(matrix), make(other), ones))
        np.testing.assert_allclose(found, (gram + ones) * (other @ other.T), atol=1e-10)


@pytest.mark.parametrize(("n", "d"), [(3, 5), (64, 40_000), (66, 40_001), (40_000, 64)])
def test_products_with_vectors(library, threads, n, d):
    make, read = library
    matrix = numbers(n, d)
    for one in (matrix, np.asarray(matrix, order="F"), matrix[:, ::2], matrix[::2]):
        vector = numbers(one.shape[1])
        np.testing.assert_allclose(read(arrays.matrix_vector(make(one), make(vector))), one @ vector, atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 5), (300, 200), (1000, 300)])
def test_a_multiple_of_another_array_is_added(library, shape):
    make, read = library
    one, other = numbers(*shape), numbers(*shape)[::-1]
    expected, found = one + 0.3 * other, []
    for left in (np.ascontiguousarray(one), np.asfortranarray(one)):
        for right in (np.ascontiguousarray(other), np.asfortranarray(other)):
            (total,) = arrays.add_multiples([make(left.copy(order="K"))], [make(right)], 0.3)
            found.append(read(total))
            np.testing.assert_allclose(found[-1], expected, rtol=1e-14, atol=1e-14)
    for layout in found[1:]:
        np.testing.assert_array_equal(layout, found[0])  # to the bit


def test_views_of_the_same_memory_are_the_same(library):
    make, _ = library
    matrix, other = make(numbers(4, 6)), make(numbers(4, 6))
    assert arrays.same(matrix, matrix)
    if isinstance(matrix, np.ndarray) and arrays.kernels(matrix).__name__.endswith("cupy_kernels"):
        pytest.skip("NumPy's arrays have no address on a GPU")
    assert arrays.same(matrix[1:], matrix[1:])
    assert arrays.same(matrix.reshape(2, 12), matrix.reshape(2, 12))
    for one in (other, matrix[:, :5], matrix[1:], matrix.T, matrix.reshape(2, 12)):
        assert not arrays.same(matrix, one)


def test_nothing_is_known_of_memory_that_is_not_there():
    matrix = torch.zeros(2, 2, device="meta")
    assert arrays.same(matrix, matrix)
    assert not arrays.same(matrix, torch.zeros(2, 2, device="meta"))
    apart = torch.vmap(lambda a, b: torch.tensor(float(arrays.same(a[0], b[0]))))(torch.zeros(3, 2), torch.zeros(3, 2))
    assert not apart.any()


@pytest.mark.parametrize("rest", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
@pytest.mark.parametrize("m", [0, 9])
def test_one_hot_products(library, rest, dtype, m):
    make, read = library
    index, values = np.random.default_rng(m).integers(4, size=m), (10 * numbers(m, *rest)).astype(dtype)
    found = read(arrays.index_add(4, make(index), make(values)))
    assert found.dtype == dtype
    np.testing.assert_allclose(found, np.tensordot(np.eye(4)[index].T, values, 1), rtol=1e-5)
    here, there = (read(part) for part in arrays.equal_pairs(make(index), make(index[::2].copy())))
    table = np.zeros((m, len(index[::2])), dtype=int)
    table[here, there] += 1
    np.testing.assert_array_equal(table, index[:, None] == index[None, ::2])


@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize("bad", [-np.eye(3), np.zeros((3, 3)), np.full((3, 3), np.nan), np.diag([1.0, np.inf, 1.0])])
def test_what_cannot_be_factorised_is_refused(library, bad, stack):
    make, _ = library
    matrix = make(np.stack([np.eye(3), bad]) if stack else bad)
    with pytest.raises(NotPositiveDefiniteError, match=re.escape(str(tuple(matrix.shape)))):
        arrays.cholesky(matrix)
    if not np.isfinite(bad).all():
        with pytest.raises(NotPositiveDefiniteError, match="it is not finite"):
            arrays.eigh(matrix)
        with pytest.raises(NotPositiveDefiniteError, match="the rows of shape"):
            arrays.require_finite("rows", matrix)


def diverging(matrix):
    raise np.linalg.LinAlgError("no convergence")


def without_a_word(matrix):
    return np.ones(len(matrix)), np.full_like(matrix, np.nan)


@pytest.mark.parametrize("fails", [diverging, without_a_word])
def test_an_iteration_that_does_not_converge_is_made_again_in_double_precision(monkeypatch, fails):
    original = np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda m: fails(m) if m.dtype == np.float32 else original(m))
    values, vectors = arrays.eigh(np.diag([1.0, 2.0, 3.0]).astype(np.float32))
    assert (values.dtype, vectors.dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(values, [1, 2, 3])
    monkeypatch.setattr(np.linalg, "eigh", fails)
    with pytest.raises(NotPositiveDefiniteError, match="did not converge, not in float64 either"):
        arrays.eigh(np.eye(3))


def test_other_arrays_have_no_kernels():
    with pytest.raises(TypeError, match="list is no array"):
        arrays.kernels([1.0])


# -- the same names everywhere ----------------------------------------------------------------------------------------


def functions(path):
    """Names of a module's public functions, with those of their parameters."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    return {node.name: [argument.arg for argument in node.args.args] for node in named}


def test_kernels_have_the_same_names_and_parameters():
    decompositions = functions(ROOT / "arrays" / "torch_decompositions.py")
    first, *others = (functions(ROOT / "arrays" / f"{name}_kernels.py") for name in ("torch", "numpy", "cupy"))
    first |= decompositions
    others = [own | functions(ROOT / "arrays" / "plain_kernels.py") for own in others]
    assert first.keys() >= {"cholesky", "cholesky_solve", "eigh", "index_add", "qr", "self_product", "triangular_solve"}
    assert others == [first, first]


def used(path):
    """Names that a file takes from an array namespace: ``xp.name``, ``xp.linalg.name``, ``namespace(…).name``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            owner = node.value
            linear = isinstance(owner, ast.Attribute) and owner.attr == "linalg"
            owner = owner.value if linear else owner
            called = isinstance(owner, ast.Call) and getattr(owner.func, "id", "") == "namespace"
            if called or getattr(owner, "id", "") == "xp":
                found.add(f"linalg.{node.attr}" if linear else node.attr)
    return found


NAMES = sorted(
    set().union(*(used(path) for room in ("arrays", "factors", "solvers") for path in (ROOT / room).glob("*.py")))
)


def lacking(namespace):
    def has(name):
        owner = namespace
        for part in name.split("."):
            owner = getattr(owner, part, None)
        return owner is not None

    return [name for name in NAMES if not has(name)]


@pytest.mark.parametrize("example", [torch.zeros(1), np.zeros(1)], ids=["torch", "numpy"])
def test_every_name_that_is_used_exists(example):
    assert len(NAMES) > 30
    assert lacking(array_api_compat.array_namespace(example)) == []


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy (no GPU)")
def test_every_name_that_is_used_exists_in_cupy():
    assert lacking(importlib.import_module("array_api_compat.cupy")) == []


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy (no GPU)")
def test_cupy_has_the_routines_with_the_parameters_that_are_given():
    import cupy
    import cupyx

    expected = {
        cupy.linalg.cholesky: ["a"],
        cupy.linalg.eigh: ["a"],
        cupy.linalg.qr: ["a"],
        cupyx.errstate: ["linalg"],
        cupyx.scatter_add: ["a", "slices", "value"],
        cupy.cuda.Stream.from_external: ["obj"],
        cupy.searchsorted: ["a", "v", "side"],
    }
    for function, parameters in expected.items():
        assert set(parameters) <= set(inspect.signature(function).parameters), function
    for compiled in (cupy.from_dlpack, cupy.cuda.using_allocator, cupy.cuda.PythonFunctionAllocator, cupy.cuda.Device):
        assert callable(compiled)
    try:
        from cupy.cublas import syrk
        from cupyx.scipy.linalg import solve_triangular
    except ImportError as error:
        pytest.skip(f"CuPy is here, CUDA's libraries are not: {error}")
    assert set(inspect.signature(syrk).parameters) >= {"trans", "a", "out", "lower"}
    assert set(inspect.signature(solve_triangular).parameters) >= {"a", "b", "trans", "lower"}
