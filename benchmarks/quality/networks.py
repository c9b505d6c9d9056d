"""Networks of the tasks that `curvlib.cli.models` has not."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional


class ConvNet(nn.Sequential):
    """Two convolutions and two linear layers."""

    def __init__(self, channels=16, hidden=64):
        super().__init__(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(channels * 49, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 10),
        )


class Attention(nn.Module):
    """Causal attention of linear layers."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        n, positions, width = x.shape
        parts = [
            layer(x).reshape(n, positions, self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        mixed = functional.scaled_dot_product_attention(*parts, is_causal=True)
        return self.output(mixed.transpose(1, 2).reshape(n, positions, width))


class Layer(nn.Module):
    """Attention and two linear layers, each on normalized inputs and added to them."""

    def __init__(self, width, heads):
        super().__init__()
        # Without scales of their own every parameter is in a layer that all methods serve.
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.narrow(functional.gelu(self.wide(self.norm(x))))


class CharacterTransformer(nn.Module):
    """Decoder that predicts every next character; positions are part of its input."""

    def __init__(self, characters, context, width=64, heads=4, layers=2):
        super().__init__()
        self.characters, self.positions = nn.Embedding(characters, width), nn.Embedding(context, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.head = nn.Linear(width, characters)
        for embedding in (self.characters, self.positions):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, codes):
        places = torch.arange(codes.shape[1]).expand_as(codes)
        return self.head(self.norm(self.layers(self.characters(codes) + self.positions(places))))


class PoissonResidual(nn.Module):
    """Δu at points of the square, for ``u = x (1 − x) y (1 − y) N(x, y)``.

    Derivatives go forward with the values: every layer sees N, N_x, N_y, N_xx and N_yy as five positions of one
    sample. The constant that a bias belongs to is one of its inputs, 1 for the value and 0 for the derivatives. So all
    layers are linear, every method serves them, and a step is one forward and one backward pass.
    """

    def __init__(self, width=24):
        super().__init__()
        sizes = (2, width, width, 1)
        self.layers = nn.ModuleList(nn.Linear(size + 1, following, bias=False) for size, following in pairwise(sizes))

    def jet(self, points):
        """Value and derivatives of N, shape ``(n, 5)``."""
        jet = points.new_zeros(len(points), 5, 2)
        jet[:, 0] = points
        jet[:, 1, 0] = jet[:, 2, 1] = 1
        for layer in self.layers:
            if layer is not self.layers[0]:
                jet = _tanh(jet)
            one = jet.new_zeros(len(jet), 5, 1)
            one[:, 0] = 1
            jet = layer(torch.cat([jet, one], dim=-1))
        return jet[..., 0]

    def solution(self, points):
        return _bubble(points)[0] * self.jet(points)[:, 0]

    def forward(self, points):
        value, x, y, xx, yy = self.jet(points).unbind(1)
        edge, edge_x, edge_y, edge_xx, edge_yy = _bubble(points)
        second_x = edge_xx * value + 2 * edge_x * x + edge * xx
        return second_x + edge_yy * value + 2 * edge_y * y + edge * yy


def _tanh(jet):
    value = torch.tanh(jet[:, 0])
    slope = 1 - value.square()
    first, second = jet[:, 1:3], jet[:, 3:]
    bent = slope[:, None] * (second - 2 * value[:, None] * first.square())
    return torch.cat([value[:, None], slope[:, None] * first, bent], dim=1)


def _bubble(points):
    """``x (1 − x) y (1 − y)`` and its derivatives in x, y, xx, yy."""
    x, y = points.unbind(1)
    a, b = x * (1 - x), y * (1 - y)
    return a * b, (1 - 2 * x) * b, a * (1 - 2 * y), -2 * b, -2 * a
