"""Networks and batches where a curvature engine may go wrong, each with a name."""

import torch
from torch import nn
from torch.nn import functional
from truth import network

import curvlib

MODES = ("zeros", "reflect", "replicate", "circular")
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Twice(nn.Module):
    """One module called twice, at different depths."""

    def __init__(self, shared, head):
        super().__init__()
        self.shared, self.head = shared, head

    def forward(self, x):
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))).flatten(1))


class SharedParameter(nn.Module):
    """Two Linear modules that hold the same weight, each with its own bias."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Pairs(nn.Module):
    """A module with two inputs inside."""

    def __init__(self):
        super().__init__()
        self.bilinear, self.head = nn.Bilinear(2, 3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.bilinear(x[:, :2], x[:, 2:])))


class Custom(nn.Module):
    """Parameters of its own that no adapter knows."""

    def __init__(self, width):
        super().__init__()
        self.slope, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return torch.tanh(self.slope * x) + functional.softplus(self.shift * x)


class Branches(nn.Module):
    """A residual connection, and one branch whose output nothing uses."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        self.b(x)
        return self.head(x + torch.tanh(self.a(x)) + torch.sin(self.b(x)))


def freeze(model, *names):
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def conv_net(dims, *, channels=2, out=2, space=4, act=None, **options):
    """Builder of a convolution, an activation, and a head that fits; fresh modules each time."""

    def build():
        conv = CONVOLUTIONS[dims](channels, out, **options)
        features = conv(torch.zeros(1, channels, *[space] * dims)).numel()
        return network(conv, act or nn.ReLU(), nn.Flatten(), nn.Linear(features, 3))

    return build


def batch(n, *shape):
    torch.manual_seed(3)
    return torch.randn(n, *shape, dtype=torch.float64)


CORNERS = {
    **{
        f"{mode} padding, {dims}d": (
            conv_net(dims, kernel_size=3, padding=1, padding_mode=mode),
            batch(3, 2, *[4] * dims),
        )
        for mode in MODES
        for dims in (1, 2, 3)
    },
    **{
        f"same {mode} padding of an even kernel, {dims}d": (
            conv_net(dims, kernel_size=2, padding="same", padding_mode=mode, dilation=3 if mode == "zeros" else 1),
            batch(3, 2, *[4] * dims),
        )
        for mode in MODES
        for dims in (1, 2, 3)
    },
    "uneven circular padding": (conv_net(2, kernel_size=2, padding=(2, 0), padding_mode="circular"), batch(4, 2, 4, 4)),
    "depthwise": (conv_net(2, channels=4, out=4, kernel_size=3, groups=4), batch(5, 4, 4, 4)),
    "depthwise with multiplier": (conv_net(1, channels=3, out=6, kernel_size=2, groups=3), batch(5, 3, 4)),
    "grouped, even kernel": (conv_net(2, channels=4, out=6, kernel_size=2, groups=2), batch(5, 4, 4, 4)),
    "dilation 2, stride 2": (conv_net(2, space=6, kernel_size=2, stride=2, dilation=2), batch(5, 2, 6, 6)),
    "stride leaves a remainder": (conv_net(2, space=6, kernel_size=3, stride=2, padding=1), batch(5, 2, 6, 6)),
    "stride jumps over pixels": (conv_net(2, space=6, kernel_size=2, stride=(3, 4)), batch(5, 2, 6, 6)),
    "kernel as large as the padded image": (conv_net(2, kernel_size=6, padding=1), batch(5, 2, 4, 4)),
    "kernel larger than the image": (conv_net(1, kernel_size=7, padding=3), batch(5, 2, 4)),
    "1x1 convolution": (conv_net(2, kernel_size=1), batch(5, 2, 4, 4)),
    "in-place after a convolution": (conv_net(2, kernel_size=3, act=nn.ReLU(inplace=True)), batch(5, 2, 4, 4)),
    "channels_last": (conv_net(2, kernel_size=3), batch(5, 2, 4, 4).to(memory_format=torch.channels_last)),
    "channels_last 3d": (conv_net(3, kernel_size=2), batch(5, 2, 4, 4, 4).to(memory_format=torch.channels_last_3d)),
    "non-contiguous image": (conv_net(2, kernel_size=3), batch(4, 2, 5, 8).transpose(0, 2)[..., ::2]),
    "frozen conv weight": (
        lambda: freeze(conv_net(2, kernel_size=3, padding=1)(), "0.weight"),
        batch(5, 2, 4, 4),
    ),
    "frozen conv bias": (lambda: freeze(conv_net(2, kernel_size=3)(), "0.bias"), batch(5, 2, 4, 4)),
    "root module": (lambda: network(nn.Linear(4, 3)), batch(7, 4)),
    "root module without bias": (lambda: network(nn.Linear(4, 3, bias=False)), batch(7, 4)),
    "one sample": (lambda: network(nn.Linear(4, 3)), batch(1, 4)),
    "in-place after linear": (
        lambda: network(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)),
        batch(7, 4),
    ),
    "in-place after linear on sequences": (
        lambda: network(nn.Linear(4, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(6, 3)),
        batch(7, 3, 4),
    ),
    "frozen weight": (lambda: freeze(network(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), "0.weight"), batch(7, 4)),
    "frozen bias": (lambda: freeze(network(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), "2.bias"), batch(7, 4)),
    "frozen module": (
        lambda: freeze(network(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), "0.weight", "0.bias"),
        batch(7, 4),
    ),
    "frozen weight, sequence": (
        lambda: freeze(network(nn.Linear(4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)), "0.weight"),
        batch(7, 3, 4),
    ),
    "sequence without bias": (
        lambda: network(nn.Linear(4, 2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)),
        batch(7, 3, 4),
    ),
    "two position axes": (
        lambda: network(nn.Linear(4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
        batch(7, 2, 3, 4),
    ),
    "non-contiguous features": (lambda: network(nn.Linear(4, 3)), batch(4, 7).T),
    "expanded features": (lambda: network(nn.Linear(4, 3)), batch(7, 1).expand(7, 4)),
    "module used twice": (lambda: network(Twice(nn.Linear(4, 4), nn.Linear(4, 3))), batch(7, 4)),
    "module used twice on sequences": (lambda: network(Twice(nn.Linear(4, 4), nn.Linear(12, 3))), batch(7, 3, 4)),
    "convolution used twice": (
        lambda: network(Twice(nn.Conv1d(2, 2, 3, padding="same", padding_mode="circular"), nn.Linear(10, 3))),
        batch(7, 2, 5),
    ),
    "same module in two places": (
        lambda: (lambda tied: network(tied, nn.Tanh(), tied, nn.Tanh(), nn.Linear(4, 3)))(nn.Linear(4, 4)),
        batch(7, 4),
    ),
    "same parameter in two modules": (lambda: network(SharedParameter()), batch(7, 4)),
    "same frozen parameter in two modules": (lambda: freeze(network(SharedParameter()), "first.weight"), batch(7, 4)),
    "fallback module used twice": (lambda: network(Twice(nn.PReLU(4), nn.Linear(4, 3))), batch(7, 4)),
    "branches": (lambda: network(Branches()), batch(7, 4)),
    "LayerNorm": (lambda: network(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)), batch(7, 4)),
    "LayerNorm on sequences": (lambda: network(nn.LayerNorm(4), nn.Flatten(), nn.Linear(12, 3)), batch(7, 3, 4)),
    "GroupNorm": (lambda: network(nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(12, 3)), batch(7, 4, 3)),
    "BatchNorm in eval mode": (
        lambda: network(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).eval(),
        batch(7, 4),
    ),
    "PReLU": (lambda: network(nn.Linear(4, 5), nn.PReLU(5), nn.Linear(5, 3)), batch(7, 4)),
    "ConvTranspose": (lambda: network(nn.ConvTranspose1d(2, 3, 2), nn.Flatten(), nn.Linear(15, 3)), batch(7, 2, 4)),
    "Embedding": (
        lambda: network(nn.Embedding(6, 2), nn.Flatten(), nn.Linear(8, 3)),
        torch.arange(28).reshape(7, 4) % 6,
    ),
    "Bilinear": (lambda: network(Pairs()), batch(7, 5)),
    "custom module": (lambda: network(nn.Linear(4, 5), Custom(5), nn.Linear(5, 3)), batch(7, 4)),
    "custom module with a frozen parameter": (
        lambda: freeze(network(nn.Linear(4, 5), Custom(5), nn.Linear(5, 3)), "1.slope"),
        batch(7, 4),
    ),
}


# -- networks that must be refused, or served exactly -----------------------------------------------------------------


class TiedAutoencoder(nn.Module):
    """The encoder's weight serves the decoder too, outside any call of its module."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 3)

    def forward(self, x):
        return functional.linear(torch.tanh(self.encoder(x)), self.encoder.weight.T)


class Doubled(nn.Linear):
    """Looks like Linear and computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


class Centred(nn.Module):
    """Mixes samples."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.gain * (x - x.mean(0))


class Shift(nn.Module):
    """A second argument without a sample axis."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x, offset):
        return self.gain * (x + offset)


class Shifted(nn.Module):
    """Gives `Shift` an argument whose only axis is as long as the batch of four."""

    def __init__(self):
        super().__init__()
        self.shift, self.head = Shift(), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.shift(x, torch.arange(4, dtype=x.dtype)))


class Overwritten(nn.Module):
    """Changes a layer's input in place after the call."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = x.clone()
        first = self.first(hidden)
        hidden.zero_()
        return self.second(torch.tanh(first))


class PositionsFirst(nn.Module):
    """Runs a layer on (positions, samples, features), with as many positions as samples."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x.transpose(0, 1))).transpose(0, 1).flatten(1))


class Tower(nn.Module):
    """One module under two names, all of it served by the fallback."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


curvlib.layers.register(Tower)(curvlib.layers.fallback)

HARD = {
    "weight used outside its module": (lambda: network(TiedAutoencoder()), batch(4, 4)),
    "subclass of Linear with another forward": (lambda: network(Doubled(4, 3)), batch(4, 4)),
    "module that mixes samples": (lambda: network(Centred(), nn.Linear(4, 3)), batch(4, 4)),
    "module that mixes samples after a batch norm": (
        lambda: network(nn.Linear(4, 4), nn.BatchNorm1d(4), Centred(), nn.Linear(4, 3)),
        batch(4, 4),
    ),
    "argument as long as the batch": (lambda: network(Shifted()), batch(4, 4)),
    "weight norm": (
        lambda: network(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))),
        batch(4, 4),
    ),
    "input changed in place": (lambda: freeze(network(Overwritten()), "first.weight"), batch(4, 4)),
    "samples on the second axis": (lambda: network(PositionsFirst()), batch(4, 4, 4)),
    "one module under two names": (lambda: network(Tower(), nn.Linear(4, 3)), batch(4, 4)),
}
