"""Tensors inside the arguments and results of a module, packed sequences included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

__all__ = ["mapped", "tensors", "wide"]

# Versions of torch differ in whether a PackedSequence is one leaf or four. Here it is one tensor, its data: the batch
# sizes and indices beside it are bookkeeping.


def _is_packed(node: Any) -> bool:
    return isinstance(node, PackedSequence)


def tensors(tree: Any) -> list[Tensor]:
    """All tensors in a nested structure, in order; of a packed sequence its data."""
    leaves = pytree.tree_leaves(tree, is_leaf=_is_packed)
    data = (leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in leaves)
    return [leaf for leaf in data if isinstance(leaf, Tensor)]


def mapped(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Return the same structure with `function` applied to each of its `tensors`."""

    def apply(leaf: Any) -> Any:
        if isinstance(leaf, PackedSequence):
            return PackedSequence(function(leaf.data), leaf.batch_sizes, leaf.sorted_indices, leaf.unsorted_indices)
        return function(leaf) if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(apply, tree, is_leaf=_is_packed)


def wide(tensor: Tensor) -> Tensor:
    """Half-precision tensors in float32: what is summed of them needs it."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor
