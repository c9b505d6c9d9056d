"""Recurrent layers and cells against autograd on each sample alone: exact through time, padding without influence."""

import pytest
import torch
from per_sample import assert_exact, generator, numbers, randomized
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import curvlib
from curvlib.errors import CaptureError, ConfigurationError
from curvlib.factors import SharedOuter, Sum

N, STEPS, WIDTH = 4, 5, 3


class Reader(nn.Module):
    """Uses every output of a recurrent layer: all hidden states, the last ones, the last cell states."""

    def __init__(self, layer, state=False):
        super().__init__()
        self.enter, self.layer, self.state = nn.Linear(2, WIDTH), layer, state
        hidden = (layer.proj_size or layer.hidden_size) * (1 + layer.bidirectional)
        self.head = nn.Linear(hidden, 2)

    def forward(self, x):
        x = self.enter(x)
        first = x if self.layer.batch_first else x.transpose(0, 1)
        out, last = self.layer(first, self.start(x)) if self.state else self.layer(first)
        out = out if self.layer.batch_first else out.transpose(0, 1)
        last = last if isinstance(last, tuple) else (last,)
        ends = sum(part.square().sum((0, 2)) for part in last)
        return self.head((out * torch.arange(1.0, out.shape[1] + 1)[:, None]).sum(1).tanh()) * (1 + ends[:, None])

    def start(self, x):
        depth = self.layer.num_layers * (1 + self.layer.bidirectional)
        seed = x.mean((1, 2)).tanh()[:, None]  # of the sample, in the graph
        widths = [self.layer.proj_size or self.layer.hidden_size, self.layer.hidden_size]
        hidden, cell = ((seed + torch.arange(1.0, w + 1)).expand(depth, -1, -1) / w for w in widths)
        return (hidden, cell) if isinstance(self.layer, nn.LSTM) else hidden


LAYERS = {
    "tanh": (nn.RNN, {}),
    "relu, one step of state": (nn.RNN, {"nonlinearity": "relu", "state": True}),
    "lstm": (nn.LSTM, {"state": True}),
    "gru": (nn.GRU, {"state": True}),
    "rnn, deep, both ways": (nn.RNN, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "lstm, deep, both ways, projected": (
        nn.LSTM,
        {"num_layers": 2, "bidirectional": True, "proj_size": 2, "batch_first": True, "state": True},
    ),
    "gru, deep, both ways": (nn.GRU, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "lstm without biases": (nn.LSTM, {"bias": False}),
    "gru without biases": (nn.GRU, {"bias": False, "batch_first": True}),
    "lstm, dropout in eval mode": (nn.LSTM, {"num_layers": 2, "dropout": 0.5}),
}


def reader(name):
    cls, options = LAYERS[name]
    options = dict(options)
    state = options.pop("state", False)
    return randomized(Reader(cls(WIDTH, 4, **options), state)).eval()


@pytest.mark.parametrize("name", LAYERS)
def test_rows_of_recurrent_layers_are_exact_through_time(name):
    taken = assert_exact(reader(name), numbers(N, STEPS, 2))
    assert isinstance(taken["layer"], Sum)
    assert all(isinstance(term, SharedOuter) for term in taken["layer"].terms)


@pytest.mark.parametrize("cls", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("batch_first", [True, False])
def test_one_step_and_frozen_parameters(cls, batch_first):
    model = randomized(Reader(cls(WIDTH, 4, batch_first=batch_first)))
    assert_exact(model, numbers(N, 1, 2))
    for frozen in (["weight_ih_l0"], ["bias_hh_l0", "weight_hh_l0"], ["bias_ih_l0", "bias_hh_l0"]):
        for name, p in model.layer.named_parameters():
            p.requires_grad_(name not in frozen)
        assert_exact(model, numbers(N, STEPS, 2), blocks=["layer"])


class Packed(nn.Module):
    """Ragged sequences: pads, packs and reads both kinds of outputs."""

    def __init__(self, layer, lengths, sort, padded):
        super().__init__()
        self.enter, self.layer, self.head = nn.Linear(2, WIDTH), layer, nn.Linear(4 * (1 + layer.bidirectional), 2)
        self.lengths, self.sort, self.padded = lengths, sort, padded

    def forward(self, x, lengths=None):
        lengths = self.lengths if lengths is None else lengths
        packed = pack_padded_sequence(self.enter(x), lengths, batch_first=True, enforce_sorted=self.sort)
        out, last = self.layer(packed)
        last = last[0] + last[1].tanh() if isinstance(last, tuple) else last
        if self.padded:
            return self.head(pad_packed_sequence(out, batch_first=True)[0].square().sum(1) + last[-1].repeat(1, 2))
        return self.head(last.transpose(0, 1)[:, -2:].flatten(1))


@pytest.mark.parametrize("cls", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    ("lengths", "sort"), [((5, 3, 3, 1), True), ((2, 5, 1, 4), False)], ids=["sorted", "enforce_sorted=False"]
)
@pytest.mark.parametrize("padded", [True, False], ids=["outputs read", "last state read"])
def test_packed_sequences_are_exact(cls, lengths, sort, padded):
    layer = cls(WIDTH, 4, num_layers=2, bidirectional=True)
    model = randomized(Packed(layer, torch.tensor(lengths), sort, padded))
    x = numbers(N, STEPS, 2)

    def alone(sample):
        return x[sample : sample + 1, : lengths[sample]], torch.tensor([lengths[sample]])

    taken = assert_exact(model, x, alone=alone, blocks=["layer", "head"])
    changed = x.clone()
    for sample, length in enumerate(lengths):
        changed[sample, length:] = 1e3  # behind the end
    again = curvlib.collect(model, curvlib.Sampled(curvlib.Gaussian()), changed, generator=generator())
    torch.testing.assert_close(again["layer"].gram(), taken["layer"].gram(), rtol=1e-10, atol=1e-10)


def test_a_model_may_return_a_packed_sequence():
    layer = randomized(nn.GRU(2, 3))
    x = pack_padded_sequence(numbers(3, N, 2), torch.tensor([3, 3, 3, 3]))
    last = curvlib.collect(layer, curvlib.Exact(curvlib.Gaussian()), x, output=lambda result: result[1][0])
    assert isinstance(x, PackedSequence)
    assert len(last["GRU"]) == N * 3


class Unrolled(nn.Module):
    """A cell called once a step, by hand."""

    def __init__(self, cell, state):
        super().__init__()
        self.cell, self.head, self.state = cell, nn.Linear(4, 2), state

    def forward(self, x):
        state = None
        if self.state:
            state = x.new_ones(len(x), 4)
            state = (state, state) if isinstance(self.cell, nn.LSTMCell) else state
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(sum(state) if isinstance(state, tuple) else state)


@pytest.mark.parametrize(
    "build",
    [nn.RNNCell, lambda d, h, **k: nn.RNNCell(d, h, nonlinearity="relu", **k), nn.LSTMCell, nn.GRUCell],
    ids=["tanh", "relu", "lstm", "gru"],
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("state", [True, False])
def test_a_cell_unrolled_by_hand_is_exact_and_stays_factored(build, bias, state):
    model = randomized(Unrolled(build(WIDTH, 4, bias=bias), state))
    taken = assert_exact(model, numbers(N, STEPS, WIDTH))["cell"]
    assert [type(term) for term in taken.terms] == [SharedOuter] * 2  # not one a step
    assert all(term.inputs.shape[1] == STEPS for term in taken.terms)


def test_the_cells_of_a_batch_may_be_parts_of_samples():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.LSTM(WIDTH, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            words = self.layer(x.flatten(0, 1))[0][:, -1]
            return self.head(words.unflatten(0, x.shape[:2]).square().sum(1))

    assert_exact(randomized(Words()), numbers(N, 2, STEPS, WIDTH))


def test_weights_tied_inside_a_recurrence():
    layer = nn.GRU(WIDTH, 4, num_layers=2, batch_first=True)
    layer.weight_hh_l1 = layer.weight_hh_l0
    assert "weight_hh_l1" not in assert_exact(randomized(Reader(layer)), numbers(N, 3, 2))["layer"].shapes


def test_what_cannot_be_exact_is_refused():
    dropped = Reader(nn.LSTM(WIDTH, 4, num_layers=2, dropout=0.5)).double()
    with pytest.raises(CaptureError, match="LSTM: its dropout draws numbers.*eval mode"):
        curvlib.collect(dropped, curvlib.Exact(), numbers(N, STEPS, 2))

    class Alone(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer.double()

        def forward(self, x):
            out = self.layer(x[0])
            return (out[0] if isinstance(out, tuple) else out).reshape(1, -1)

    for layer, x in ((nn.GRU(WIDTH, 4), numbers(1, STEPS, WIDTH)), (nn.GRUCell(WIDTH, 4), numbers(1, WIDTH))):
        with pytest.raises(CaptureError, match="has no sample axis"):
            curvlib.collect(Alone(layer), curvlib.Exact(), x)
    rows = curvlib.collect(reader("lstm"), curvlib.Exact(), numbers(N, STEPS, 2))["layer"]
    with pytest.raises(ConfigurationError, match="Sum factors.*no Kronecker form"):
        rows.kronecker()


@pytest.mark.parametrize("build", [lambda: reader("lstm"), lambda: randomized(Unrolled(nn.LSTMCell(2, 4), True))])
def test_the_empirical_fisher_takes_its_cotangents_from_the_users_backward(build):
    model, x, y = build(), numbers(N, STEPS, 2), numbers(N, 2, seed=1)
    loss = nn.MSELoss()
    taken = curvlib.collect(model, curvlib.Empirical(), x, loss=lambda out: loss(out, y))
    for name, rows in taken.items():
        parameters = dict(model.get_submodule(name).named_parameters())
        for i in range(N):
            gradients = torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]), list(parameters.values()))
            for part, gradient in zip(parameters, gradients, strict=True):
                torch.testing.assert_close(rows.dense().values[part][i], gradient, rtol=1e-10, atol=1e-12)
