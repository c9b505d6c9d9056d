"""The registry of adapters: layer class to function, filled by a decorator from inside or outside the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from curvlib.errors import ConfigurationError
from curvlib.factors import Factors

__all__ = ["Adapter", "adapter_for", "register", "registered"]

F = TypeVar("F", bound=Callable[..., Factors])


@dataclass(frozen=True)
class Adapter:
    """How one layer type turns a recorded call into Factors.

    Parameters
    ----------
    name
        What `explain` and errors call it.
    function
        ``function(layer, x, g) -> Factors``.
    columns
        Whether g comes with an axis of columns, shape ``(n, columns, *output)``, instead of one column a call,
        shape ``(n, *output)``.
    whole_call
        Whether x is the whole recorded call (`curvlib.layers.Call`) and g one cotangent for every output tensor.
    positionwise
        Whether the layer acts on the last axis alone, so that the sample axis may be any of the others.
    closed_form
        Whether the rows come from a formula; otherwise from `torch.func`.
    couples_samples
        Whether the layer's output for one sample depends on the others, always or as a function of the module tells.
    kronecker
        Whether rows may be products of inputs and cotangents, as Kronecker methods need, always or as a function of
        the module tells.
    lookup
        Whether the weight is a table that is looked up in, so that what stands for inputs are places in it.
    saved
        What to look up of a call when it ends, so that rows need not compute it again: ``saved(layer, output)`` is the
        fourth argument of `function`. None for nothing.
    """

    name: str
    function: Callable[..., Factors]
    columns: bool = False
    whole_call: bool = False
    positionwise: bool = False
    closed_form: bool = True
    couples_samples: Callable[[Any], bool] | bool = False
    kronecker: Callable[[Any], bool] | bool = True
    lookup: bool = False
    saved: Callable[[Any, Any], Any] | None = None

    def couples(self, module: nn.Module) -> bool:
        """Whether `module`, as it is now, makes the samples of a batch depend on each other."""
        return self.couples_samples(module) if callable(self.couples_samples) else self.couples_samples

    def multiplies(self, module: nn.Module) -> bool:
        """Whether the rows of `module`, as it is now, may be products of inputs and cotangents."""
        if not self.closed_form:
            return False
        return self.kronecker(module) if callable(self.kronecker) else self.kronecker


_ADAPTERS: dict[type[nn.Module], Adapter] = {}


def register(
    *classes: type[nn.Module],
    columns: bool = False,
    whole_call: bool = False,
    positionwise: bool = False,
    couples_samples: Callable[[Any], bool] | bool = False,
    kronecker: Callable[[Any], bool] | bool = True,
    lookup: bool = False,
    saved: Callable[[Any, Any], Any] | None = None,
    replace: bool = False,
) -> Callable[[F], F]:
    """Decorator that makes a function the adapter of the given layer classes and of their subclasses.

    Parameters
    ----------
    *classes
        Subclasses of `torch.nn.Module`. The most specific registered class of a module's type serves it. The adapter
        covers every parameter of the module and of the modules inside it.
    columns
        Set when the function takes g with an axis of columns, shape ``(n, columns, *output)``. Without it the function
        sees g of shape ``(n, *output)``, once for each column.
    whole_call
        Set when the function needs all arguments: x is then a `curvlib.layers.Call`, and g a tuple with the cotangent
        of every output tensor in its own shape (behind an axis of columns if `columns` is set too), None where none
        arrived.
    positionwise
        Set when the layer acts on the last axis alone, as `torch.nn.Linear` does: its sample axis may then be any of
        the others, and comes first in x and g.
    couples_samples
        Set (or a function of the module that tells) when the output for one sample depends on the others, as batch
        statistics make it. Rows of this layer, and of those before it, are then shares of the gradient at the
        activations: only their plain sum can be checked against the gradient, and is.
    kronecker
        Clear it (or give a function of the module that tells) when the rows are no products of inputs and cotangents,
        so that methods that need such rows say so when they are composed, not at the first step.
    lookup
        Set when the weight is a table that is looked up in, as that of `torch.nn.Embedding`, and not multiplied with
        inputs: methods that follow pre-activations have none to follow, and rows of the same weight as another layer
        multiplies with have no common Kronecker form with these. Both are then said when a method is composed.
    saved
        A function ``saved(layer, output)``, called when a call of the layer has ended, for what the call computed and
        rows need again, such as statistics: what it returns is a fourth argument of the adapter. That must do without
        it, since not every call is seen.
    replace
        Set to replace an adapter that is there.

    Returns
    -------
    Callable
        The decorator; it returns the function as it was. The function is ``adapter(layer, x, g)``: x is the layer's
        input, shape ``(n, *input)``, and g the cotangent of its output for each sample. It returns Factors with n rows
        whose parameter names and shapes are those of `layer.named_parameters()` that require a gradient.

    Raises
    ------
    ConfigurationError
        If a class is no module class, or has an adapter already and `replace` is not set.

    Examples
    --------
    >>> import torch, curvlib
    >>> class Scale(torch.nn.Module):
    ...     def __init__(self, width):
    ...         super().__init__()
    ...         self.gain = torch.nn.Parameter(torch.ones(width))
    ...     def forward(self, x):
    ...         return self.gain * x
    >>> @curvlib.layers.register(Scale)
    ... def scale(layer, x, g):
    ...     return curvlib.factors.Dense(gain=g * x)
    """
    for cls in classes:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise ConfigurationError(f"register takes torch.nn.Module classes, got {cls!r}")
        if cls in _ADAPTERS and not replace:
            raise ConfigurationError(
                f"{cls.__name__} has the adapter {_ADAPTERS[cls].name!r} already; pass replace=True to replace it"
            )
    if not classes:
        raise ConfigurationError("register needs at least one layer class, as in @register(RMSNorm)")

    def decorate(function: F) -> F:
        closed = not getattr(function, "uses_torch_func", False)
        name = getattr(function, "__name__", repr(function))
        for cls in classes:
            _ADAPTERS[cls] = Adapter(
                name,
                function,
                columns=columns,
                whole_call=whole_call or not closed,
                positionwise=positionwise,
                closed_form=closed,
                couples_samples=couples_samples,
                kronecker=kronecker,
                lookup=lookup,
                saved=saved,
            )
        return function

    return decorate


def adapter_for(cls: type[nn.Module]) -> Adapter | None:
    """Adapter of the most specific registered class among `cls` and its bases, or None."""
    for base in cls.__mro__:
        if base in _ADAPTERS:
            return _ADAPTERS[base]
    return None


def registered() -> dict[type[Any], Adapter]:
    """Return all registered classes with their adapters, a copy."""
    return dict(_ADAPTERS)
