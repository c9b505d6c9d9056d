"""An optimizer's state as named tensors and a text, for formats that hold nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from curvlib.errors import CurvatureError

__all__ = ["flat_state", "nested_state"]

_TENSOR, _PAIRS = "__tensor__", "__pairs__"


def flat_state(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Return an optimizer's state as named tensors and a text that says where each belongs.

    Parameters
    ----------
    state
        What ``optimizer.state_dict()`` returned, or any containers of tensors, numbers and strings.

    Returns
    -------
    tuple
        Contiguous tensors by name, none sharing memory with another, as safetensors and
        `torch.distributed.checkpoint` want them; and JSON. `nested_state` puts them together again.

    Raises
    ------
    CurvatureError
        If a value has no such form.

    Examples
    --------
    >>> import curvlib, torch
    >>> model = torch.nn.Linear(4, 3)
    >>> tensors, text = curvlib.flat_state(curvlib.TENGraD(model).state_dict())
    >>> # safetensors.torch.save_file(tensors, path, metadata={"structure": text})
    """
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()

    def visit(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            value = value.detach()
            place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride(), value.storage_offset())
            if place not in names or not value.numel():
                names[place] = path
                tensors[path] = _apart(value, storages)
            return {_TENSOR: names[place]}
        if isinstance(value, Mapping):
            if all(isinstance(key, str) for key in value):
                return {key: visit(item, f"{path}.{key}" if path else key) for key, item in value.items()}
            return {_PAIRS: [[key, visit(item, f"{path}.{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return [visit(item, f"{path}.{index}") for index, item in enumerate(value)]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise CurvatureError(f"{path or 'the state'} is a {type(value).__name__}, which is no tensor, number or text")

    return tensors, json.dumps(visit(state, ""))


def nested_state(tensors: Mapping[str, Tensor], text: str) -> dict[str, Any]:
    """Put together again what `flat_state` took apart.

    Parameters
    ----------
    tensors, text
        What it returned.

    Raises
    ------
    CurvatureError
        If the text is damaged or a tensor is missing.
    """

    def visit(value: Any) -> Any:
        if isinstance(value, list):
            return [visit(item) for item in value]
        if not isinstance(value, dict):
            return value
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        if _PAIRS in value:
            return {key: visit(item) for key, item in value[_PAIRS]}
        return {key: visit(item) for key, item in value.items()}

    try:
        state = visit(json.loads(text))
    except (KeyError, TypeError, ValueError) as error:
        raise CurvatureError(
            f"the state cannot be put together ({type(error).__name__}: {error}): tensors and text must come from one "
            "call of flat_state"
        ) from error
    if not isinstance(state, dict):
        raise CurvatureError("the text describes no optimizer's state: it must come from flat_state")
    return state


def _apart(tensor: Tensor, storages: set[int]) -> Tensor:
    """Return the tensor in memory of its own."""
    storage = tensor.untyped_storage()
    whole = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.itemsize
    if whole and storage.data_ptr() not in storages:
        storages.add(storage.data_ptr())
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
