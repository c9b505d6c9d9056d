"""Adapters of `torch.nn.RNN`, `LSTM`, `GRU` and of their cells: exact through time, one row a sample.

With pre-activations ``W_ih x_t + b_ih`` and ``W_hh h_{t-1} + b_hh`` of every step, and ζ_t their cotangents through
all of the time that follows, the row of a sample is ``Σ_t ζ_t x_tᵀ`` for W_ih, ``Σ_t ζ_t h_{t-1}ᵀ`` for W_hh and
``Σ_t ζ_t`` for the biases: a shared outer product a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from curvlib.factors import Factors, Sum
from curvlib.layers.fallback import Call
from curvlib.layers.registry import register
from curvlib.layers.replay import linear_rows, names_of, pull_back, refuse, replaying
from curvlib.layers.tree import wide

__all__ = ["recurrent", "recurrent_cell"]

State = tuple[Tensor, ...]
"""Hidden state, and for an LSTM the cell state, each of shape ``(batch, width)``."""

Step = Callable[[Tensor, Tensor, State], State]
"""``step(W_ih x + b_ih, W_hh h + b_hh, state) -> next state``, the formulas of torch's documentation."""


def _tanh(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).tanh(),)


def _relu(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).relu(),)


def _lstm(x: Tensor, h: Tensor, state: State) -> State:
    enter, keep, new, show = (x + h).chunk(4, dim=-1)
    cell = keep.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
    return show.sigmoid() * cell.tanh(), cell


def _gru(x: Tensor, h: Tensor, state: State) -> State:
    (reset, keep, new), (reset_h, keep_h, new_h) = x.chunk(3, dim=-1), h.chunk(3, dim=-1)
    kept = (keep + keep_h).sigmoid()
    candidate = (new + (reset + reset_h).sigmoid() * new_h).tanh()
    return (candidate + kept * (state[0] - candidate),)


_STEPS: dict[str, Step] = {"RNN_TANH": _tanh, "RNN_RELU": _relu, "LSTM": _lstm, "GRU": _gru}


@dataclass
class _Linear:
    """One linear map of a recurrence: its inputs at every step, and the probe at its outputs."""

    weight: str
    bias: str | None
    inputs: Tensor
    probe: Tensor
    shared: bool = False  # whether the probe is that of the map before: both outputs enter the step as a sum


@dataclass
class _Replay:
    """A recurrence in the course of being run again; every array has time in front of the batch."""

    step: Step
    weights: dict[str, Tensor]
    maps: list[_Linear] = field(default_factory=list)

    def direction(
        self, x: Tensor, state: State, suffix: str = "", valid: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, State]:
        """Run one direction of one layer.

        Parameters
        ----------
        x
            Shape ``(steps, batch, d_in)``.
        state
            Before the first step.
        suffix
            Of the parameters' names.
        valid
            Which steps belong to a sequence, shape ``(steps, batch, 1)``; None for all. Others leave the state alone.
        reverse
            Whether the last step comes first.

        Returns
        -------
        tuple
            Hidden states after every step, shape ``(steps, batch, width)``, and the state after the last one.
        """
        weights = self.weights
        into, over, project = (f"{name}{suffix}" for name in ("weight_ih", "weight_hh", "weight_hr"))
        b_into, b_over = (name if name in weights else None for name in (f"bias_ih{suffix}", f"bias_hh{suffix}"))
        steps, batch = x.shape[:2]

        def probe(width: int) -> Tensor:
            return x.new_zeros(steps, batch, width, requires_grad=True)

        gates = probe(weights[into].shape[0])
        # The gates of a GRU weigh what comes from the state, so its cotangents differ from those of the input's map.
        state_gates = probe(weights[over].shape[0]) if self.step is _gru else None
        projected = probe(weights[project].shape[0]) if project in weights else None
        entering = functional.linear(x, weights[into], weights.get(b_into or "")) + gates
        bias = weights.get(b_over or "")
        before: list[Tensor] = [x] * steps
        unprojected: list[Tensor] = [x] * steps
        after: list[Tensor] = [x] * steps
        for t in reversed(range(steps)) if reverse else range(steps):
            before[t] = state[0].detach()
            from_state = functional.linear(state[0], weights[over], bias)
            if state_gates is not None:
                from_state = from_state + state_gates[t]
            new = self.step(entering[t], from_state, state)
            if projected is not None:
                unprojected[t] = new[0].detach()
                new = (functional.linear(new[0], weights[project]) + projected[t], *new[1:])
            state = (
                new if valid is None else tuple(torch.where(valid[t], n, o) for n, o in zip(new, state, strict=True))
            )
            after[t] = state[0]
        self.maps.append(_Linear(into, b_into, x.detach(), gates))
        hidden = torch.stack(before)
        if state_gates is None:
            self.maps.append(_Linear(over, b_over, hidden, gates, shared=True))
        else:
            self.maps.append(_Linear(over, b_over, hidden, state_gates))
        if projected is not None:
            self.maps.append(_Linear(project, None, torch.stack(unprojected), projected))
        return torch.stack(after), state

    def rows(
        self, layer: nn.Module, outputs: Sequence[Tensor], cotangents: Sequence[Tensor | None], samples: int
    ) -> Factors:
        """Rows of all parameters, from the cotangents of the outputs."""
        own = [one.probe for one in self.maps if not one.shared]
        arrived = {id(probe): g for probe, g in zip(own, pull_back(outputs, cotangents, own), strict=True)}
        names = names_of(layer)
        terms: list[Factors] = []
        for one in self.maps:
            terms += linear_rows(one.inputs, arrived[id(one.probe)], samples, names, one.weight, one.bias)
        return terms[0] if len(terms) == 1 else Sum(tuple(terms))


def _weights(layer: nn.Module) -> dict[str, Tensor]:
    return {name: wide(p.detach()) for name, p in layer.named_parameters(remove_duplicate=False)}


def _check_batch(layer: nn.Module, batch: int, samples: int) -> None:
    if batch % samples:
        raise refuse(layer, f"it was called with a batch of {batch}, and the model's output has {samples} samples")


@register(nn.RNN, nn.LSTM, nn.GRU, columns=True, whole_call=True)
def recurrent(layer: Any, call: Call, cotangents: tuple[Tensor | None, ...]) -> Factors:
    """Rows of a recurrent layer of any depth and direction, for padded batches and packed sequences.

    Parameters
    ----------
    layer
        Any `num_layers`, `bidirectional`, `proj_size`, `bias` and `batch_first`.
    call
        The input, batched or a `PackedSequence`, and the initial state if one was given.
    cotangents
        Of the output (of its data if packed), of the last hidden state and, for an LSTM, of the last cell state, each
        behind an axis of columns.

    Raises
    ------
    CaptureError
        If the input is not batched, or dropout between layers was active.
    """
    if layer.training and layer.dropout and layer.num_layers > 1:
        raise refuse(layer, "its dropout draws numbers that cannot be drawn again; set dropout=0 or use eval mode")
    given, state = _arguments(call, ("input", "hx"))
    unpack = _Packing(given) if isinstance(given, PackedSequence) else None
    if unpack is None and given.ndim != 3:
        raise refuse(layer, f"an input of shape {tuple(given.shape)} has no sample axis; add one in front of it")
    if unpack is not None:
        x, valid = unpack.padded, unpack.valid
    else:
        x, valid = given.transpose(0, 1) if layer.batch_first else given, None
    batch = x.shape[1]
    _check_batch(layer, batch, call.samples)
    weights = _weights(layer)
    directions = 2 if layer.bidirectional else 1
    widths = [layer.proj_size or layer.hidden_size] + [layer.hidden_size] * (layer.mode == "LSTM")
    if state is None:
        state = [x.new_zeros(layer.num_layers * directions, batch, width) for width in widths]
    states: list[Tensor] = [state] if isinstance(state, Tensor) else list(state)
    replay = _Replay(_STEPS[layer.mode], weights)
    last: list[State] = []
    with replaying(x):
        for depth in range(layer.num_layers):
            hidden = []
            for direction in range(directions):
                start = tuple(one[depth * directions + direction] for one in states)
                suffix = f"_l{depth}" + "_reverse" * direction
                out, end = replay.direction(x, start, suffix, valid, reverse=direction == 1)
                hidden.append(out)
                last.append(end)
            x = torch.cat(hidden, dim=-1)
        if unpack is not None:
            x = x[unpack.time, unpack.sequence]
        elif layer.batch_first:
            x = x.transpose(0, 1)
        outputs = [x, *(torch.stack(parts) for parts in zip(*last, strict=True))]
        return replay.rows(layer, outputs, cotangents, call.samples)


@register(nn.RNNCell, nn.LSTMCell, nn.GRUCell, columns=True, whole_call=True)
def recurrent_cell(layer: Any, call: Call, cotangents: tuple[Tensor | None, ...]) -> Factors:
    """Rows of one step; those of several calls are added, so a recurrence unrolled by hand is exact through time.

    Parameters
    ----------
    layer
        With or without biases.
    call
        The input, shape ``(batch, d_in)``, and the state if one was given.
    cotangents
        Of the next hidden state and, for an LSTM, of the next cell state, each behind an axis of columns.

    Raises
    ------
    CaptureError
        If the input is not batched.
    """
    x, state = _arguments(call, ("input", "hx"))
    if x.ndim != 2:
        raise refuse(layer, f"an input of shape {tuple(x.shape)} has no sample axis; add one in front of it")
    _check_batch(layer, x.shape[0], call.samples)
    mode = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU"}
    kind = next((name for cls, name in mode.items() if isinstance(layer, cls)), None)
    step = _STEPS[kind or f"RNN_{layer.nonlinearity.upper()}"]
    if state is None:
        state = tuple(x.new_zeros(x.shape[0], layer.hidden_size) for _ in range(2 if step is _lstm else 1))
    replay = _Replay(step, _weights(layer))
    with replaying(x):
        start = (state,) if isinstance(state, Tensor) else tuple(state)
        _, end = replay.direction(x.unsqueeze(0), start)
        return replay.rows(layer, end, cotangents, call.samples)


def _arguments(call: Call, names: Sequence[str]) -> list[Any]:
    given = dict(zip(names, call.args, strict=False)) | dict(call.kwargs)
    return [given.get(name) for name in names]


class _Packing:
    """A packed sequence laid out with time in front of the batch, in the samples' own order, zeros behind the ends."""

    def __init__(self, packed: PackedSequence) -> None:
        data, sizes = packed.data, packed.batch_sizes.to(packed.data.device)
        places = torch.arange(data.shape[0], device=data.device)
        self.time = torch.arange(len(sizes), device=data.device).repeat_interleave(sizes)
        rank = places - (sizes.cumsum(0) - sizes)[self.time]
        self.sequence = rank if packed.sorted_indices is None else packed.sorted_indices[rank]
        batch = int(packed.batch_sizes[0])
        self.padded = data.new_zeros(len(sizes), batch, data.shape[1])
        self.padded[self.time, self.sequence] = data
        self.valid = torch.zeros(len(sizes), batch, 1, dtype=torch.bool, device=data.device)
        self.valid[self.time, self.sequence] = True
