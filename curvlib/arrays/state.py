"""State as data: frozen dataclasses of arrays, packed into plain containers for checkpoints and back.

Packed state holds dictionaries, lists, numbers, strings and arrays alone, so `torch.load(weights_only=True)` reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import array_api_compat

from curvlib.arrays.namespace import Array
from curvlib.arrays.torch_kernels import is_dynamo_compiling
from curvlib.errors import CurvatureError
from curvlib.hyperparameters import check_fields

__all__ = ["TRANSIENT", "altered", "map_arrays", "pack", "record", "unpack"]

TRANSIENT = {"transient": True}
"""Metadata of a field that is no state: `pack` leaves it out, and it takes its default when unpacked."""

_KIND = "__kind__"
_RECORDS: dict[str, type] = {}
T = TypeVar("T")


def record(cls: type[T]) -> type[T]:
    """Class decorator: a dataclass that `pack` and `unpack` know by its qualified name."""
    _RECORDS[_name(cls)] = cls
    return cls


def altered(instance: T, **fields: Any) -> T:
    """Return a copy of a frozen dataclass with other values of fields that need no check, without `__init__`.

    Parameters
    ----------
    instance
        Stays as it is. What it keeps beside its fields goes along, and must hold for the copy too.
    **fields
        By name.
    """
    if is_dynamo_compiling():  # which knows nothing of this short cut, and needs none
        return dataclasses.replace(instance, **fields)  # type: ignore[type-var]  # a dataclass
    made = object.__new__(type(instance))
    vars(made).update(vars(instance), **fields)
    return made


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def pack(value: Any) -> Any:
    """Turn `value` (records, mappings, sequences, arrays, plain values) into plain containers.

    Raises
    ------
    CurvatureError
        If a value inside is of a type that has no packed form.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if array_api_compat.is_array_api_obj(value):
        return value
    if isinstance(value, Mapping):
        return {key: pack(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [pack(item) for item in value]
    if _name(type(value)) in _RECORDS:
        kept = [field.name for field in dataclasses.fields(value) if not field.metadata.get("transient")]
        fields = {name: pack(getattr(value, name)) for name in kept}
        return {_KIND: _name(type(value)), **fields}
    raise CurvatureError(
        f"state of type {type(value).__name__} cannot be saved: make it a dataclass and decorate it with "
        "curvlib.arrays.record"
    )


def unpack(value: Any) -> Any:
    """Rebuild what `pack` made.

    Raises
    ------
    CurvatureError
        If a record's kind is unknown or its fields do not fit.
    """
    if isinstance(value, Mapping):
        fields = {key: unpack(item) for key, item in value.items() if key != _KIND}
        if _KIND not in value:
            return fields
        kind = value[_KIND]
        if kind not in _RECORDS:
            raise CurvatureError(
                f"the saved state has the kind {kind!r}, which is unknown here: import what defines it"
            )
        try:
            made = _RECORDS[kind](**fields)
        except TypeError as error:
            raise CurvatureError(
                f"the saved state of kind {kind} does not fit this version of curvlib: {error}"
            ) from error
        _check_fields(made)
        return made
    if isinstance(value, list | tuple):
        return tuple(unpack(item) for item in value)
    if value is None or isinstance(value, bool | int | float | str) or array_api_compat.is_array_api_obj(value):
        return value
    raise CurvatureError(f"the saved state holds a value of type {type(value).__name__}, which is no state")


def _check_fields(made: Any) -> None:
    """Refuse a record whose fields hold something else than they are annotated with."""
    try:
        check_fields(made)
    except CurvatureError as error:
        raise CurvatureError(f"the saved state is damaged: {error}") from error
    for field in dataclasses.fields(made):
        # An array is of any type to a type checker, so the words of the annotation have to do.
        words, value = str(field.type).split(" | "), getattr(made, field.name)
        values = list(value.values()) if isinstance(value, Mapping) else [value]
        arrays = all(array_api_compat.is_array_api_obj(one) for one in values)
        one_of_them = ("None" in words and value is None) or ("float" in words and isinstance(value, float))
        several = words[0] in ("Vector", "Mapping[str, Array]")
        wanted = (words[0] == "Array" or several) and not one_of_them
        if wanted and not (arrays and isinstance(value, Mapping) == several):
            raise CurvatureError(f"the saved state is damaged: {_name(type(made))} has no array as {field.name}")


def map_arrays(function: Callable[[Array], Array], value: Any) -> Any:
    """Return `value` with `function` applied to every array inside."""
    if array_api_compat.is_array_api_obj(value):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_arrays(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_arrays(function, item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: map_arrays(function, getattr(value, field.name)) for field in dataclasses.fields(value)}
        return type(value)(**fields)
    return value
