"""The exact fallback for any module: per-sample vector-Jacobian products by `torch.func`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils import _pytree as pytree

from curvlib.errors import CaptureError
from curvlib.factors import Dense, Factors

__all__ = ["Call", "fallback"]


@dataclass(frozen=True)
class Call:
    """One recorded call of a module.

    Parameters
    ----------
    args, kwargs
        What the module was called with, tensors detached.
    samples
        n, the size of the sample axis.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    samples: int


def fallback(layer: nn.Module, call: Call, cotangents: tuple[Tensor | None, ...]) -> Factors:
    """Per-sample rows of any module, exact as long as the module treats samples independently.

    The module is run once more for every sample, vectorised by `torch.func.vmap`, with its parameters as the variables.

    Parameters
    ----------
    layer
        Any module; parameters of modules inside it count as its own.
    call
        Its recorded call. Tensors whose first axis has the size of the sample axis are split along it; everything else
        is given to every sample as it is.
    cotangents
        One for every tensor that the module returned, shape ``(n, *output)``; None where none arrived.

    Raises
    ------
    CaptureError
        If the module cannot be run for one sample at a time, or its output for one sample is not the sample's output.
    """
    parameters = {name: _wide(p.detach()) for name, p in layer.named_parameters() if p.requires_grad}
    constants = {name: _wide(p.detach()) for name, p in layer.named_parameters() if not p.requires_grad}
    constants.update({name: _wide(buffer) for name, buffer in layer.named_buffers()})
    leaves, structure = pytree.tree_flatten((call.args, dict(call.kwargs)))
    split = [isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == call.samples for leaf in leaves]
    batched = [leaf for leaf, flag in zip(leaves, split, strict=True) if flag]
    given = [index for index, cotangent in enumerate(cotangents) if cotangent is not None]
    seeds = [cotangent for cotangent in cotangents if cotangent is not None]

    def rows(sample: list[Tensor], sample_seeds: list[Tensor]) -> dict[str, Tensor]:
        values = iter(sample)
        filled = [next(values).unsqueeze(0) if flag else leaf for leaf, flag in zip(leaves, split, strict=True)]
        args, kwargs = pytree.tree_unflatten(filled, structure)

        def outputs(variables: dict[str, Tensor]) -> tuple[Tensor, ...]:
            out = functional_call(layer, {**variables, **constants}, args, kwargs)
            tensors = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
            return tuple(tensors[index] for index in given)

        values_out, pull_back = vjp(outputs, parameters)[:2]
        for seed, value in zip(sample_seeds, values_out, strict=True):
            if seed.shape != value.shape[1:] or value.shape[0] != 1:
                raise CaptureError(
                    f"run for one sample, {type(layer).__name__} gives an output of shape {tuple(value.shape)} where "
                    f"its share of the batch's output has {(1, *seed.shape)}: its first axis is not the sample axis; "
                    "register an adapter for it with curvlib.layers.register"
                )
        return pull_back(tuple(seed.unsqueeze(0) for seed in sample_seeds))[0]  # type: ignore[no-any-return]  # vjp is untyped

    # functional_call does not put back the parameters of a module that it can reach under two names.
    before = [(module, dict(module._parameters), dict(module._buffers)) for module in layer.modules()]
    try:
        with torch.enable_grad():
            result = vmap(rows)(batched, seeds)
    except CaptureError:
        raise
    except Exception as error:  # vmap raises many types; each means that this module has no per-sample form here
        raise CaptureError(
            f"{type(layer).__name__} has no adapter, and torch.func cannot run it for one sample at a time ({error}). "
            "If it mixes samples (batch statistics) or draws random numbers (dropout) in training mode, put it in eval "
            "mode or leave its parameters to rest=; otherwise register an adapter with curvlib.layers.register"
        ) from error
    finally:
        for module, own_parameters, own_buffers in before:
            module._parameters.update(own_parameters)
            module._buffers.update(own_buffers)
    return Dense({name: value.detach() for name, value in result.items()})


def _wide(tensor: Tensor) -> Tensor:
    # The call was recorded in float32 at least; the module has to run in the same precision.
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor


fallback.uses_torch_func = True  # type: ignore[attr-defined]  # read by `register`: this is no closed form
