r"""
A new layer: radial basis functions
===================================

A layer that is in no library, with closed-form curvature in one line: bumps :math:`\phi_j(x) = \exp(-\|x - c_j\|^2 /
2 s_j^2)` with learned centres and widths. An adapter is a function from a layer's input x and the cotangent g of its
output to rows, one a sample.
"""

import time

import matplotlib.pyplot as plt
import torch

import curvlib


class Bumps(torch.nn.Module):
    """``(n, 2)`` to ``(n, count)``."""

    def __init__(self, count):
        super().__init__()
        self.centres = torch.nn.Parameter(torch.rand(count, 2) * 2 - 1)
        self.log_widths = torch.nn.Parameter(torch.full((count,), -0.7))

    def forward(self, x):
        squared = (x[:, None] - self.centres).square().sum(-1)
        return torch.exp(-squared / (2 * torch.exp(2 * self.log_widths)))


# %%
# Without an adapter
# ------------------
# The engine refuses nothing: a layer that it does not know is handled by ``torch.func``, exactly.

torch.manual_seed(0)
bumps, x = Bumps(12).double(), torch.rand(256, 2, dtype=torch.float64) * 2 - 1
net = torch.nn.Sequential(bumps, torch.nn.Linear(12, 1).double())
fisher = curvlib.Exact(curvlib.Gaussian())


def collect():
    """The Factors of the layer, and the shortest of some times."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        factors = curvlib.collect(net, fisher, x)["0"]
        seconds.append(time.perf_counter() - start)
    return factors, min(seconds)


fallback, fallback_seconds = collect()

# %%
# The adapter
# -----------
# The derivatives are :math:`\partial\phi / \partial c = \phi\, (x - c) / s^2` and :math:`\partial\phi / \partial \log
# s = \phi\, \|x - c\|^2 / s^2`. Frozen parameters have no rows, and ``check_adapter`` tries that as well.


@curvlib.layers.register(Bumps)
def bump_rows(layer, x, g):
    offset = (x[:, None] - layer.centres) / layer.log_widths.exp()[:, None]
    weighted = g * torch.exp(-offset.square().sum(-1) / 2)
    rows = {
        "centres": weighted[..., None] * offset / layer.log_widths.exp()[:, None],
        "log_widths": weighted * offset.square().sum(-1),
    }
    return curvlib.factors.Dense({name: rows[name] for name, p in layer.named_parameters() if p.requires_grad})


report = curvlib.testing.check_adapter(Bumps(4), torch.randn(5, 2))
closed, closed_seconds = collect()
difference = (closed.dense().matrix() - fallback.dense().matrix()).abs().max().item()
print(f"the rows differ from those of torch.func by {difference:.1e}")
print(f"collecting them takes {closed_seconds * 1e3:.1f} ms, by torch.func {fallback_seconds * 1e3:.1f} ms")

# %%
# Train with it
# -------------
# The network learns a spiral; every exact solver works with the layer.

points = torch.rand(600, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
angle, radius = torch.atan2(points[:, 1], points[:, 0]), points.norm(dim=1)
target = torch.sin(5 * radius + angle)[:, None]


def train(make_optimizer, steps=150):
    torch.manual_seed(0)
    model = torch.nn.Sequential(Bumps(24), torch.nn.Linear(24, 1))
    before = model[0].centres.detach().clone()
    optimizer, losses = make_optimizer(model), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(points), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, before, losses


def natural(model):
    return curvlib.compose(
        model, fisher=curvlib.Exact(curvlib.Gaussian()), solver=curvlib.Woodbury(), damping=1e-3, lr=0.3
    )


model, before, losses = train(natural)
adam_losses = min(
    (train(lambda model, rate=rate: torch.optim.Adam(model.parameters(), lr=rate))[2] for rate in (0.01, 0.03, 0.1)),
    key=lambda curve: curve[-1],
)
print(f"mean squared error after {len(losses)} steps: natural gradient {losses[-1]:.4f}, Adam {adam_losses[-1]:.4f}")

line = torch.linspace(-1, 1, 60)
grid = torch.cartesian_prod(line, line)
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
spiral = torch.sin(5 * grid.norm(dim=1) + torch.atan2(grid[:, 1], grid[:, 0]))
shown = {"target": spiral, "network, centres and their way": model(grid).detach()}
for axis, (title, values) in zip(axes, shown.items(), strict=False):
    axis.imshow(values.reshape(60, 60).T, origin="lower", extent=(-1, 1, -1, 1), cmap="coolwarm", vmin=-1.2, vmax=1.2)
    axis.set(title=title, xticks=[], yticks=[])
after = model[0].centres.detach()
for old, new in zip(before, after, strict=True):
    axes[1].plot([old[0], new[0]], [old[1], new[1]], color="black", lw=0.8)
axes[1].plot(after[:, 0], after[:, 1], "k.")
axes[1].set(xlim=(-1, 1), ylim=(-1, 1))
axes[2].semilogy(losses, label="natural gradient")
axes[2].semilogy(adam_losses, label="Adam, best of three rates")
axes[2].set(xlabel="step", ylabel="mean squared error")
axes[2].legend()
plt.show()

# %%
# Next: :doc:`/write-an-adapter`.
