"""A recorded call run once more in plain operations, to find the cotangents of what lies inside it.

A module such as an LSTM or an attention computes linear maps that no hook sees. Its adapter repeats the call for all
samples at once, with a *probe*, zeros that require a gradient, added to every linear map's output. One backward pass
from the module's outputs to the probes gives the cotangents of these maps, and with their inputs the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from curvlib.errors import CaptureError
from curvlib.factors import Factors, SharedOuter

__all__ = ["linear_rows", "names_of", "pull_back", "refuse", "replaying"]


def refuse(layer: nn.Module, reason: str) -> CaptureError:
    """Return the error that says why a call of `layer` has no exact rows."""
    return CaptureError(f"{type(layer).__name__}: {reason}")


@contextmanager
def replaying(like: Tensor) -> Iterator[None]:
    """Record a graph, in the precision of the tensors: autocast is off."""
    with torch.enable_grad(), torch.autocast(like.device.type, enabled=False):
        yield


def names_of(layer: nn.Module) -> dict[str, str]:
    """Every name of a trainable parameter to the one that `named_parameters` gives it (tied ones have several)."""
    first: dict[int, str] = {}
    named = layer.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(p), name) for name, p in named if p.requires_grad}


def pull_back(
    outputs: Sequence[Tensor | None], cotangents: Sequence[Tensor | None], probes: Sequence[Tensor]
) -> list[Tensor]:
    """Cotangents of the probes from those of the outputs.

    Parameters
    ----------
    outputs
        In the graph; None only where no cotangent arrived.
    cotangents
        Shape ``(columns, *output)``, None where none arrived.
    probes
        Leaves of the graph.

    Returns
    -------
    list
        One for each probe, shape ``(columns, *probe)``.
    """
    pairs = [(o, g) for o, g in zip(outputs, cotangents, strict=True) if o is not None and g is not None]
    reached, arrived = [o for o, _ in pairs], [g.to(o.dtype) for o, g in pairs]
    columns = int(arrived[0].shape[0])
    if columns == 1:
        single = torch.autograd.grad(reached, probes, [g[0] for g in arrived], allow_unused=True)
        gradients = [None if g is None else g.unsqueeze(0) for g in single]
    else:
        gradients = list(torch.autograd.grad(reached, probes, arrived, allow_unused=True, is_grads_batched=True))
    return [
        probe.new_zeros(columns, *probe.shape) if gradient is None else gradient
        for probe, gradient in zip(probes, gradients, strict=True)
    ]


def linear_rows(
    inputs: Tensor, cotangents: Tensor, samples: int, names: Mapping[str, str], weight: str, bias: str | None = None
) -> list[Factors]:
    """Rows of a linear map that is applied at every position of a sequence.

    Parameters
    ----------
    inputs
        Shape ``(positions, batch, d_in)``, or ``(positions, batch, groups, d_in)`` for a weight of `groups` blocks of
        rows with an input each.
    cotangents
        Shape ``(columns, positions, batch, d_out)``, or with groups ``(columns, positions, batch, groups, d_out)``.
    samples
        n; where the batch is a multiple, so many elements in a row belong to one sample and count as positions.
    names
        As of `names_of`.
    weight, bias
        Names of the parameters; those that are frozen are left out.

    Returns
    -------
    list
        One Factors, or none if both parameters are frozen.
    """
    kept, kept_bias = names.get(weight), None if bias is None else names.get(bias)
    if kept is None and kept_bias is None:
        return []
    if inputs.ndim == 3:
        inputs, cotangents = inputs.unsqueeze(2), cotangents.unsqueeze(3)
    groups, d_in = inputs.shape[2:]
    columns, d_out = cotangents.shape[0], cotangents.shape[-1]
    a = inputs.detach().transpose(0, 1).reshape(samples, -1, groups, d_in)
    g = cotangents.transpose(1, 2).reshape(columns, samples, -1, groups, d_out).transpose(0, 1)
    return [SharedOuter(a, g, weight_shape=(groups * d_out, d_in), weight=kept, bias=kept_bias)]
