"""The four workloads: networks of Linear and Conv2d modules that every peer can look into."""

import torch
from torch import nn
from torch.nn import functional


def mlp():
    """W1: 784-1000-500-10."""
    return nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 500), nn.ReLU(), nn.Linear(500, 10))


def convolutions():
    """W2: three convolutions with ReLU and pooling, global average pool, linear."""
    layers, channels = [], 3
    for width in (32, 64, 128):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


class Residual(nn.Module):
    """Two convolutions with BatchNorm and a shortcut without parameters."""

    def __init__(self, channels, width):
        super().__init__()
        self.stride, self.extra = width // channels, width - channels
        self.conv1 = nn.Conv2d(channels, width, 3, self.stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x):
        y = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        if self.extra:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.extra))
        return functional.relu(x + y)


def resnet20():
    """W3: ResNet-20 for CIFAR."""
    layers, channels = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()], 16
    for width in (16, 32, 64):
        for _ in range(3):
            layers.append(Residual(channels, width))
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer whose projections are Linear modules of their own."""

    def __init__(self, width, heads, hidden):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        y = self.norm1(x)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """W4: two encoder layers, mean over positions, linear."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(EncoderLayer(128, 4, 512), EncoderLayer(128, 4, 512))
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        return self.head(self.layers(x).mean(1))


WORKLOADS = {
    "W1-b128": (mlp, (128, 784)),
    "W1-b512": (mlp, (512, 784)),
    "W2-b64": (convolutions, (64, 3, 32, 32)),
    "W2-b128": (convolutions, (128, 3, 32, 32)),
    "W3-b64": (resnet20, (64, 3, 32, 32)),
    "W4-b32": (Encoder, (32, 64, 128)),
}


def problem(name, seed=0):
    """Model, inputs and labels of a workload, on random data."""
    build, shape = WORKLOADS[name]
    torch.manual_seed(seed)
    model = build()
    return model, torch.randn(shape), torch.randint(0, 10, shape[:1])
