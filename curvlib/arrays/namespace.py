"""The array namespace of given arrays, the kernels of their library, and contractions planned by opt_einsum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any, TypeAlias

import array_api_compat
import opt_einsum

from curvlib.arrays.host import is_compiling

__all__ = ["Array", "Vector", "contract", "device", "dot", "kernels", "namespace", "nbytes", "remember", "same"]

Array: TypeAlias = Any
"""An array of torch, CuPy or NumPy; which one is decided where the array is made, nowhere else."""

Vector: TypeAlias = Mapping[str, Array]
"""A vector of one block: parameter name to array of that parameter's shape."""

_NAMESPACES: dict[type, Any] = {}
_KERNELS: dict[type, Any] = {}
"""What was found for a type of array, as looking it up takes longer than many an operation."""


def namespace(*arrays: Array) -> Any:
    """Return the array-API namespace that the given arrays share.

    Raises
    ------
    TypeError
        If the arrays come from different libraries.
    """
    kind = type(arrays[0]) if arrays else None
    for array in arrays[1:]:
        if type(array) is not kind:
            return array_api_compat.array_namespace(*arrays)
    found = _NAMESPACES.get(kind)  # type: ignore[arg-type]  # None is no key
    if found is None:
        found = array_api_compat.array_namespace(*arrays)
        _NAMESPACES[type(arrays[0])] = found
    return found


def kernels(array: Array) -> Any:
    """Return the module of kernels beyond the standard for the library of `array`.

    They are side by side in `curvlib.arrays.torch_kernels`, `cupy_kernels` and `numpy_kernels`: the same names and
    meanings, each from its library's own routines.

    Raises
    ------
    TypeError
        If it is no array of torch, CuPy or NumPy.
    """
    found = _KERNELS.get(type(array))
    return _load_kernels(array) if found is None else found


def remember(*examples: Array) -> None:
    """Look up what belongs to arrays of these types: in a graph that is compiled nothing can be imported any more."""
    for example in examples:
        namespace(example)
        kernels(example)


def _load_kernels(array: Array) -> Any:
    holds: dict[str, Callable[[Any], bool]] = {
        "torch": array_api_compat.is_torch_array,
        "cupy": array_api_compat.is_cupy_array,
        "numpy": array_api_compat.is_numpy_array,
    }
    for library, belongs in holds.items():
        if belongs(array):
            module = import_module(f"curvlib.arrays.{library}_kernels")
            _KERNELS[type(array)] = module
            return module
    raise TypeError(f"{type(array).__name__} is no array of torch, CuPy or NumPy")


def same(first: Array, second: Array) -> bool:
    """Whether two arrays are views of the same memory in the same layout; False where that cannot be known."""
    if first is second:
        return True
    if type(first) is not type(second):
        return False
    address = kernels(first).address(first)
    return address is not None and bool(address == kernels(second).address(second))


def device(array: Array) -> Any:
    """Return the device that holds `array`, in its library's terms."""
    # NumPy before 2.0 has no such attribute, and no other device.
    return getattr(array, "device", "cpu")


@lru_cache(maxsize=4096)
def _path(expression: str, *shapes: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    path, _ = opt_einsum.contract_path(expression, *shapes, shapes=True, optimize="optimal")
    return tuple(tuple(step) for step in path)


def contract(expression: str, *operands: Array) -> Array:
    """Contract `operands` by Einstein summation.

    Two operands go straight to their library; for three or more, opt_einsum finds the cheapest order once per
    expression and shapes.

    Parameters
    ----------
    expression
        Subscripts such as ``"nrk,mk,nrm->n"``.
    operands
        Arrays of one library.
    """
    if len(operands) <= 2 or is_compiling():
        # einsum is no part of the array-API standard, but each library has it beside what the standard asks for.
        # A compiler can look into torch's, which asks opt_einsum too, but not into a search for an order.
        return namespace(*operands).einsum(expression, *operands)
    path = _path(expression, *(tuple(operand.shape) for operand in operands))
    return opt_einsum.contract(expression, *operands, optimize=list(path))


def dot(left: Vector, right: Vector) -> Array:
    """Inner product of two block vectors, a scalar array."""
    products = [contract("i,i->", left[name].reshape(-1), right[name].reshape(-1)) for name in left]
    total = products[0]
    for product in products[1:]:
        total = total + product
    return total


def nbytes(array: Array) -> int:
    """Bytes that the elements of `array` take."""
    return int(array_api_compat.size(array) or 0) * int(array.dtype.itemsize)
