"""Tensors inside the arguments and results of a module, packed sequences included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

__all__ = ["mapped", "tensors", "wide"]

_PLAIN = frozenset({type(None), bool, int, float, str})

# Versions of torch differ in whether a PackedSequence is one leaf or four. Here it is one tensor, its data: the batch
# sizes and indices beside it are bookkeeping.


# Arguments are nearly always tensors in tuples and dictionaries; `pytree`, which knows every registered container,
# takes twenty times as long for these.


def _is_packed(node: Any) -> bool:
    return isinstance(node, PackedSequence)


def tensors(tree: Any) -> list[Tensor]:
    """All tensors in a nested structure, in order; of a packed sequence its data."""
    if isinstance(tree, Tensor):
        return [tree]
    found: list[Tensor] = []
    _gather(tree, found)
    return found


def _gather(node: Any, found: list[Tensor]) -> None:
    kind = type(node)
    if isinstance(node, Tensor):
        found.append(node)
    elif isinstance(node, PackedSequence):
        found.append(node.data)
    elif kind is tuple or kind is list or kind is dict:
        for item in node.values() if kind is dict else node:
            if isinstance(item, Tensor):
                found.append(item)
            else:
                _gather(item, found)
    elif kind not in _PLAIN:
        for leaf in pytree.tree_leaves(node, is_leaf=_is_packed):
            if leaf is not node:
                _gather(leaf, found)


def mapped(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Return the same structure with `function` applied to each of its `tensors`."""
    kind = type(tree)
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, PackedSequence):
        return PackedSequence(function(tree.data), tree.batch_sizes, tree.sorted_indices, tree.unsorted_indices)
    if kind is tuple or kind is list:
        return kind([function(item) if isinstance(item, Tensor) else mapped(function, item) for item in tree])
    if kind is dict:
        return {key: mapped(function, item) for key, item in tree.items()}
    if kind in _PLAIN:
        return tree

    def apply(leaf: Any) -> Any:
        return mapped(function, leaf) if isinstance(leaf, Tensor | PackedSequence) else leaf

    return pytree.tree_map(apply, tree, is_leaf=_is_packed)


def wide(tensor: Tensor) -> Tensor:
    """Half-precision tensors in float32: what is summed of them needs it."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor
