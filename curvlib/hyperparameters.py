"""Hyperparameters that are checked when a part is made, so that a wrong one is an error there and not in a step."""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, ParamSpec, TypeVar, cast, get_args, get_origin

from curvlib.errors import ConfigurationError, CurvatureError

__all__ = ["Checked", "check_fields", "checking"]

P = ParamSpec("P")
T = TypeVar("T")

# What Python and torch raise about a value that they cannot even look at.
_ABOUT_VALUES = (TypeError, ValueError, ArithmeticError, AttributeError, LookupError, RuntimeError)


class Checked:
    """Base of dataclasses of hyperparameters.

    After ``__post_init__`` has looked at the values, every field is compared with its annotation; whatever it raises
    about a value is a `ConfigurationError`.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own: Callable[[Any], None] | None = cls.__dict__.get("__post_init__")
        if own is None:
            return

        @wraps(own)
        def check(self: Any) -> None:
            _with_remedy(self, own)
            check_fields(self)

        cls.__post_init__ = check  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        check_fields(self)


def _with_remedy(part: Any, check: Callable[[Any], None]) -> None:
    """Run a check of `part`; what Python raises about a value becomes an error that says which part it was."""
    try:
        check(part)
    except CurvatureError:
        raise
    except _ABOUT_VALUES as error:
        check_fields(part)
        given = ", ".join(f"{field.name}={_shown(getattr(part, field.name, '?'))}" for field in _made_of(type(part)))
        raise ConfigurationError(
            f"{type(part).__name__}({given}) cannot be made ({type(error).__name__}: {error}); see its documentation "
            "for what it takes"
        ) from error


def check_fields(part: Any) -> None:
    """Refuse fields of a dataclass whose values are not of the annotated types, or not a number.

    Parameters
    ----------
    part
        The object. Annotations that it takes more than a look to check are not.

    Raises
    ------
    ConfigurationError
        Naming the field, what it must be and what it is.
    """
    if dataclasses.is_dataclass(part):
        values = {field.name: getattr(part, field.name) for field in _made_of(type(part))}
        _check_all(type(part).__name__, values, _hints(cast("Any", type(part))))


def checking(*first: Any) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Let a function refuse arguments that are not of their annotated types.

    Parameters
    ----------
    first
        Annotations that are checked before the function runs; all, if there are none. The others are looked at when
        the function has failed over a value, so that its own words come first.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            given = signature.bind(*args, **kwargs).arguments
            hints = _hints(function)
            _check_all(function.__name__, given, {key: one for key, one in hints.items() if not first or one in first})
            try:
                return function(*args, **kwargs)
            except CurvatureError:
                raise
            except _ABOUT_VALUES:
                _check_all(function.__name__, given, hints)
                raise

        return checked

    return decorate


def _check_all(what: str, values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            raise ConfigurationError(f"{what} needs {name} as {_words(hints[name])}, got {_shown(value)}")


def _made_of(kind: type) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(kind) if field.init]


@cache
def _hints(kind: Any) -> Mapping[str, Any]:
    try:
        return typing.get_type_hints(kind)
    except (NameError, TypeError):  # names that exist for type checkers alone
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, as far as a look can tell."""
    origin = get_origin(hint)
    if origin is typing.Union or isinstance(hint, types.UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(hint))
    if origin is ClassVar or hint is Any or isinstance(hint, TypeVar | str):
        return True
    if hint in (float, int):
        return _is_number(value, hint)
    if hint is None:
        return value is None
    if origin is tuple:
        return isinstance(value, tuple | list) and _all_fit(value, get_args(hint))
    if origin is Callable or hint is Callable:
        return callable(value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(one, get_args(hint)[1]) for one in value.values())
    if origin is Sequence:
        several = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return several and all(_fits(one, get_args(hint)[0]) for one in value)
    if typing.is_typeddict(hint) or getattr(hint, "_is_protocol", False):
        return True
    return not isinstance(hint, type) or isinstance(value, hint)


def _is_number(value: Any, kind: type) -> bool:
    # bool is a number to Python.
    if type(value) is bool or not isinstance(value, Integral if kind is int else Real):
        return False
    try:
        return kind is int or not math.isnan(value)
    except OverflowError:
        return False


def _all_fit(values: Sequence[Any], hints: Sequence[Any]) -> bool:
    if len(hints) == 2 and hints[1] is Ellipsis:
        return all(_fits(value, hints[0]) for value in values)
    return len(values) == len(hints) and all(map(_fits, values, hints))


def _words(hint: Any) -> str:
    origin = get_origin(hint)
    if origin is typing.Union or isinstance(hint, types.UnionType):
        return " or ".join(_words(one) for one in get_args(hint))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    known = {float: "a number", int: "an integer", bool: "True or False", str: "a string", type(None): "None"}
    if isinstance(hint, type) and hint in known:
        return known[hint]
    if origin in (tuple, Sequence):
        return f"several, each {_words(get_args(hint)[0])}"
    if origin is Callable:
        return "a function"
    name = getattr(origin or hint, "__name__", str(hint))
    return f"{'an' if name[:1] in 'AEIOU' else 'a'} {name}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else text[:200] + "…"
