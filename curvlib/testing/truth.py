"""Explicit truth for an adapter: one autograd call for each sample and column, float64, without curvlib's layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from curvlib.errors import ConfigurationError
from curvlib.fisher import Fisher
from curvlib.testing.variants import Inputs, Variant

__all__ = ["FixedCotangents", "Probe", "cotangents_for", "per_sample_rows", "prepared"]


@dataclass(frozen=True)
class FixedCotangents(Fisher):
    """Output cotangents given beforehand, shape ``(columns, n, outputs)``."""

    values: Tensor

    def observations(self, outputs: Tensor) -> int:
        return int(outputs.shape[0])

    def cotangents(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.values.to(outputs)


class Probe(nn.Module):
    """A root module around the one to check: all its floating-point outputs side by side, shape ``(n, outputs)``.

    Parameters
    ----------
    module
        What is checked.
    samples
        n.
    axis
        Where the samples are in an output.
    output
        Picks or makes the outputs out of what the module returns.
    second
        Inputs of a second application, None for none.
    strided
        Whether cotangents reach the module's output non-contiguous.
    """

    def __init__(
        self,
        module: nn.Module,
        samples: int,
        axis: int,
        output: Callable[[Any], Any] | None,
        second: Inputs | None = None,
        strided: bool = False,
    ) -> None:
        super().__init__()
        self.module = module
        self._samples, self._axis, self._output = samples, axis, output
        self._second, self._strided = second, strided

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        result = self._gather(self.module(*args, **kwargs))
        if self._second is not None:
            result = result - 2 * self._gather(self.module(*self._second.args, **self._second.kwargs))
        return result

    def _gather(self, returned: Any) -> Tensor:
        picked = returned if self._output is None else self._output(returned)
        tensors = [t for t in pytree.tree_leaves(picked) if isinstance(t, Tensor) and t.requires_grad]
        parts = []
        for tensor in tensors:
            if tensor.ndim <= self._axis or tensor.shape[self._axis] != self._samples:
                raise ConfigurationError(
                    f"an output has shape {tuple(tensor.shape)}, without {self._samples} samples on axis {self._axis}: "
                    "pass output=, which brings them there"
                )
            first = tensor.movedim(self._axis, 0)
            if self._strided:
                parts.append(first.movedim(0, -1).reshape(-1, self._samples).T)
            else:
                parts.append(first.reshape(self._samples, -1))
        if not parts:
            raise ConfigurationError(f"no output of {type(self.module).__name__} depends on its trainable parameters")
        return torch.cat(parts, dim=1)


def prepared(module: nn.Module, variant: Variant) -> nn.Module:
    """Return a copy in the variant's dtype, its parameters moved off symmetric initial values, some of them frozen."""
    copied = copy.deepcopy(module).double()
    with torch.no_grad():
        for number, parameter in enumerate(copied.parameters()):
            # Ones and zeros would hide a factor that is left out.
            pattern = torch.arange(1, parameter.numel() + 1, dtype=torch.float64, device=parameter.device)
            parameter.add_(0.1 * torch.cos(pattern * pattern + number).reshape(parameter.shape))
            parameter.grad = None
    for name, parameter in copied.named_parameters():
        if name in variant.frozen:
            parameter.requires_grad_(False)
    return copied.to(variant.dtype)


def cotangents_for(outputs: Tensor, columns: int) -> Tensor:
    """Fixed output cotangents without structure, representable in half precision."""
    pattern = torch.arange(1, columns * outputs.numel() + 1, dtype=torch.float64, device=outputs.device)
    return torch.cos(pattern * pattern * 0.37 + 2).reshape(columns, *outputs.shape).to(torch.bfloat16).double()


def per_sample_rows(outputs: Tensor, parameters: Mapping[str, Tensor], cotangents: Tensor) -> dict[str, Tensor]:
    """Rows of the Jacobian, one autograd call each.

    Parameters
    ----------
    outputs
        Shape ``(n, outputs)``, in the graph.
    parameters
        Name to parameter.
    cotangents
        Shape ``(columns, n, outputs)``.

    Returns
    -------
    dict
        Name to rows, shape ``(n · columns, *parameter)``, ordered (sample, column), on the CPU.
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for sample in range(outputs.shape[0]):
        for column in cotangents:
            gradients = torch.autograd.grad(
                outputs[sample], list(parameters.values()), column[sample], retain_graph=True, allow_unused=True
            )
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                rows[name].append(torch.zeros_like(parameter) if gradient is None else gradient)
    return {name: torch.stack(values).detach().cpu() for name, values in rows.items()}
