"""Modules whose weights `torch.nn.utils.parametrize` computes: weight norm, spectral norm, orthogonal, low-rank.

The class of such a module is a subclass made on the fly, whose weight is a property: the adapter of its base would give
rows of a weight that is no parameter. Pulled back, they are rows of the parameters that the weight is computed from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from curvlib.factors import Dense, Factors, Sum
from curvlib.layers.registry import Adapter
from curvlib.layers.replay import pull_back

__all__ = ["through_parametrizations"]


def through_parametrizations(adapter: Adapter) -> Adapter:
    """Return the adapter that serves modules with parametrizations, inside them too, as `adapter` does plain ones."""
    name = f"{adapter.name} through parametrizations"
    return dataclasses.replace(adapter, name=name, function=partial(_rows, adapter), kronecker=False, saved=None)


def _rows(adapter: Adapter, layer: nn.Module, x: Any, g: Any) -> Factors:
    computed: dict[str, Tensor] = {}
    with _without_updates(layer), torch.enable_grad():
        plain = _plain(layer, "", computed)
    factors = adapter.function(plain, x, g)
    through = factors.shapes.keys() & computed.keys()
    others = factors.shapes.keys() - through
    if not through:
        return factors
    rows = factors.restricted(through).dense().values
    originals = {name: p for name, p in layer.named_parameters() if p.requires_grad and name not in others}
    # Every row is a cotangent of the computed weights.
    pulled = pull_back([computed[name] for name in rows], list(rows.values()), list(originals.values()))
    like = next(iter(rows.values()))
    explicit = Dense({name: value.to(like.dtype) for name, value in zip(originals, pulled, strict=True)})
    return Sum((explicit, factors.restricted(others))) if others else explicit


def _plain(module: nn.Module, prefix: str, computed: dict[str, Tensor]) -> nn.Module:
    """Return a module like this one that has its weights for parameters, and put the weights, in the graph, aside."""
    parametrized = parametrize.is_parametrized(module)
    cls: type[Any] = type(module).__bases__[0] if parametrized else type(module)
    plain: nn.Module = object.__new__(cls)
    parameters = dict(module._parameters)
    if parametrized:
        for name in module.parametrizations:  # type: ignore[union-attr]  # a ModuleDict where there are parametrizations
            computed[prefix + name] = weight = getattr(module, name)
            parameters[name] = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    children = {
        name: None if child is None else _plain(child, f"{prefix}{name}.", computed)
        for name, child in module._modules.items()
        if not (parametrized and name == "parametrizations")
    }
    vars(plain).update(vars(module), _parameters=parameters, _modules=children)
    return plain


@contextmanager
def _without_updates(layer: nn.Module) -> Iterator[None]:
    """Keep spectral norms from another power iteration; the weight of the recorded call is made of what they have."""
    inside = [
        part
        for module in layer.modules()
        if parametrize.is_parametrized(module)
        for part in module.parametrizations.modules()  # type: ignore[union-attr]
        if part.training
    ]
    for part in inside:
        part.training = False
    try:
        yield
    finally:
        for part in inside:
            part.training = True
