"""The array namespace of given arrays, and contractions planned by opt_einsum."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeAlias

import array_api_compat
import opt_einsum

__all__ = ["Array", "Vector", "contract", "device", "dot", "namespace", "nbytes"]

Array: TypeAlias = Any
"""An array of torch, CuPy or NumPy; which one is decided where the array is made, nowhere else."""

Vector: TypeAlias = Mapping[str, Array]
"""A vector of one block: parameter name to array of that parameter's shape."""


def namespace(*arrays: Array) -> Any:
    """Return the array-API namespace that the given arrays share.

    Raises
    ------
    TypeError
        If the arrays come from different libraries.
    """
    return array_api_compat.array_namespace(*arrays)


def device(array: Array) -> Any:
    """Return the device that holds `array`, in its library's terms."""
    return array_api_compat.device(array)


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
    if len(operands) <= 2:
        # einsum is no part of the array-API standard, but each library has it beside what the standard asks for.
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
