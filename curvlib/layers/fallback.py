"""The exact fallback for any module: per-sample vector-Jacobian products by `torch.func`."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from curvlib.errors import CaptureError
from curvlib.factors import Dense, Factors
from curvlib.layers.tree import wide

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


def fallback(
    layer: nn.Module, call: Call, cotangents: tuple[Tensor | None, ...], only: Set[str] | None = None
) -> Factors:
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
    only
        Names of the parameters that are the variables; None for all trainable ones. The others are constants.

    Raises
    ------
    CaptureError
        If the module cannot be run for one sample at a time, its output for one sample is not the sample's output, or
        a call changes its buffers.
    """
    if any(isinstance(leaf, PackedSequence) for leaf in _leaves_or_packed((call.args, call.kwargs))):
        raise CaptureError(
            f"{type(layer).__name__} has no adapter, and a packed sequence has no samples along its first axis; "
            "pack inside the modules that take it, or register an adapter with curvlib.layers.register"
        )
    given_names = {name for name, p in layer.named_parameters() if p.requires_grad} if only is None else only
    everything = {name: wide(p.detach()) for name, p in layer.named_parameters()}
    parameters = {name: value for name, value in everything.items() if name in given_names}
    constants = {name: value for name, value in everything.items() if name not in given_names}
    # Copies, so that a module that updates its buffers updates those.
    buffers = {name: wide(buffer.detach().clone()) for name, buffer in layer.named_buffers()}
    versions = {name: buffer._version for name, buffer in buffers.items()}
    constants.update(buffers)
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
    before = [
        (module, dict(module._parameters), dict(module._buffers), _plain_tensors(module)) for module in layer.modules()
    ]
    try:
        # Of the attention kernels only this one runs for all samples at once under vmap.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
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
        for module, own_parameters, own_buffers, plain in before:
            module._parameters.update(own_parameters)
            module._buffers.update(own_buffers)
            vars(module).update(plain)
    changed = [name for name, buffer in buffers.items() if buffer._version != versions[name]]
    if changed:
        raise CaptureError(
            f"{type(layer).__name__} changes its buffers {changed} when it is called, so it cannot be called again to "
            "the same effect: put it in eval mode"
        )
    return Dense({name: value.detach() for name, value in result.items()})


def _plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    # Hooks such as those of weight norm set the weight as a plain attribute in every call.
    return {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}


def _leaves_or_packed(tree: Any) -> list[Any]:
    return pytree.tree_leaves(tree, is_leaf=lambda node: isinstance(node, PackedSequence))


fallback.uses_torch_func = True  # type: ignore[attr-defined]  # read by `register`: this is no closed form
