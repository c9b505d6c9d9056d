"""The situations that an adapter has to be right in, and the inputs for each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from curvlib.errors import ConfigurationError

__all__ = ["VARIANTS", "Inputs", "Variant", "variants_of"]

VARIANTS = (
    "float64", "float32", "bfloat16", "sum", "mean", "batch 1", "batch 7", "frozen", "twice", "non-contiguous",
    "channels_last",
)  # fmt: skip
"""Names of the groups of variants that `check_adapter` runs, in order."""


@dataclass(frozen=True)
class Variant:
    """One situation.

    Parameters
    ----------
    group, name
        Which of `VARIANTS` it belongs to, and what messages call it.
    dtype
        Of the module and of its floating-point inputs.
    columns
        Output cotangents a sample.
    batch
        Samples; None for as many as the caller gave.
    reduction
        "sum" or "mean" for the empirical Fisher of such a loss; None for cotangents given by a Fisher.
    frozen
        Names of parameters that need no gradient.
    twice
        Whether the module is applied a second time, to other inputs.
    layout
        "non-contiguous" or "channels_last"; None for inputs as they are.
    """

    group: str
    name: str
    dtype: torch.dtype = torch.float64
    columns: int = 2
    batch: int | None = None
    reduction: str | None = None
    frozen: tuple[str, ...] = ()
    twice: bool = False
    layout: str | None = None


def variants_of(module: nn.Module, inputs: Inputs, chosen: Sequence[str] | None) -> list[Variant]:
    """Variants of the chosen groups, all by default, that apply to the module and its inputs.

    Raises
    ------
    ConfigurationError
        If a name is unknown.
    """
    unknown = [name for name in chosen or () if name not in VARIANTS]
    if unknown:
        raise ConfigurationError(f"variants {unknown} are unknown; the known ones are {list(VARIANTS)}")
    every = [
        Variant("float64", "float64, one column", columns=1),
        Variant("float64", "float64, three columns", columns=3),
        Variant("float32", "float32", dtype=torch.float32),
        Variant("bfloat16", "bfloat16", dtype=torch.bfloat16),
        Variant("sum", "summed loss", columns=1, reduction="sum"),
        Variant("mean", "mean loss", columns=1, reduction="mean"),
        Variant("batch 1", "one sample, one column", columns=1, batch=1),
        Variant("batch 1", "one sample, two columns", batch=1),
        Variant("batch 7", "seven samples", batch=7),
        *(Variant("frozen", f"{', '.join(names)} frozen", frozen=names) for names in _subsets(module)),
        Variant("twice", "applied twice", twice=True),
        Variant("non-contiguous", "non-contiguous", layout="non-contiguous"),
    ]
    if any(leaf.ndim in (4, 5) for leaf in inputs.tensors):
        every.append(Variant("channels_last", "channels_last", layout="channels_last"))
    return [variant for variant in every if chosen is None or variant.group in chosen]


def _subsets(module: nn.Module) -> Iterator[tuple[str, ...]]:
    """Every proper subset of up to three parameters; of more, each alone; of many, every second one."""
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    if len(names) <= 3:
        for size in range(1, len(names)):
            yield from itertools.combinations(names, size)
    elif len(names) <= 8:
        yield from ((name,) for name in names)
    else:
        yield from (tuple(names[::2]), tuple(names[1::2]))


@dataclass(frozen=True)
class Inputs:
    """What a module is called with, and where its samples are.

    Parameters
    ----------
    args, kwargs
        Of the call.
    axes
        For every tensor in them, in order, the axis of its samples; None for a tensor that all samples share.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    axes: tuple[int | None, ...]

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any], sample_axis: int | Sequence[int | None]) -> Inputs:
        """Find the sample axis of every tensor.

        Raises
        ------
        ConfigurationError
            If no tensor has samples, tensors disagree on their number, or `sample_axis` has another length.
        """
        tensors = [leaf for leaf in pytree.tree_leaves((tuple(args), dict(kwargs))) if isinstance(leaf, Tensor)]
        if isinstance(sample_axis, int):
            n = next((t.shape[sample_axis] for t in tensors if t.ndim > sample_axis), None)
            axes = [sample_axis if t.ndim > sample_axis and t.shape[sample_axis] == n else None for t in tensors]
        else:
            axes = list(sample_axis)
            if len(axes) != len(tensors):
                raise ConfigurationError(
                    f"sample_axis has {len(axes)} entries for {len(tensors)} input tensors of shapes "
                    f"{[tuple(t.shape) for t in tensors]}; give one for each, None where samples share it"
                )
        inputs = cls(tuple(args), dict(kwargs), tuple(axes))
        sizes = {t.shape[axis] for t, axis in zip(tensors, axes, strict=True) if axis is not None}
        if len(sizes) != 1:
            raise ConfigurationError(
                f"the inputs have {sorted(sizes)} samples on the axes {axes} of shapes "
                f"{[tuple(t.shape) for t in tensors]}; say with sample_axis= where the samples are"
            )
        return inputs

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in order."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def samples(self) -> int:
        """Number of samples."""
        return next(t.shape[axis] for t, axis in zip(self.tensors, self.axes, strict=True) if axis is not None)

    def map(self, function: Callable[[Tensor, int | None], Tensor]) -> Inputs:
        """Return the same call with ``function(tensor, axis)`` in place of every tensor."""
        axes = iter(self.axes)

        def change(leaf: Any) -> Any:
            return function(leaf.detach(), next(axes)) if isinstance(leaf, Tensor) else leaf

        args, kwargs = pytree.tree_map(change, (self.args, dict(self.kwargs)))
        return replace(self, args=args, kwargs=kwargs)

    def pick(self, index: Sequence[int]) -> Inputs:
        """Return the samples at `index`."""

        def picked(tensor: Tensor, axis: int | None) -> Tensor:
            return tensor if axis is None else tensor.index_select(axis, torch.tensor(index, device=tensor.device))

        return self.map(picked)

    def to(self, dtype: torch.dtype) -> Inputs:
        """Return floating-point tensors in another dtype."""
        return self.map(lambda tensor, _: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def laid_out(self, layout: str | None) -> Inputs:
        """Return the same values with other strides."""
        return self if layout is None else self.map(lambda tensor, _: _strided(tensor, layout))

    def other(self) -> Inputs:
        """Return other values of the same shapes: samples in reverse, floating-point ones that vary also halved."""

        def changed(tensor: Tensor, axis: int | None) -> Tensor:
            if axis is None:
                return tensor
            flipped = tensor.flip(axis)
            return flipped * -0.5 if tensor.is_floating_point() and bool(torch.isfinite(tensor).all()) else flipped

        return self.map(changed)


def _strided(tensor: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return tensor.contiguous(memory_format=formats[tensor.ndim]) if tensor.ndim in formats else tensor
    if tensor.ndim == 0:
        return tensor
    # Axes stored in reverse order, with a gap between elements.
    wide = torch.zeros(*reversed(tensor.shape), 2, dtype=tensor.dtype, device=tensor.device)
    view = wide[..., 0].permute(*reversed(range(tensor.ndim)))
    return view.copy_(tensor)
