r"""
A physics-informed network: Gauss–Newton and SPRING against Adam
================================================================

A network N that solves Poisson's equation :math:`-\Delta u = f` on the unit square, with :math:`u = 0` at its edge:
it is made zero there by a factor, :math:`u = x (1 - x) y (1 - y) N(x, y)`, and learns by making the residual small at
points inside. Gradient descent is slow here, for the Laplacian makes the problem badly conditioned. The residuals are
few, their Jacobian J is exact and cheap by ``torch.func``, and so is a whole Gauss–Newton step :math:`(J^\top J / n +
\lambda I)^{-1} J^\top r / n`, in sample space.

Every method gets the time, on one core, that Gauss–Newton takes for a fixed number of steps. All is float64: second
derivatives and a small λ leave little of float32.
"""

import math
import time

import matplotlib.pyplot as plt
import torch
from torch.func import functional_call, jvp, vmap

import curvlib

torch.manual_seed(0)
torch.set_num_threads(1)  # nothing here is large enough for two
network = torch.nn.Sequential(
    torch.nn.Linear(2, 12), torch.nn.Tanh(), torch.nn.Linear(12, 12), torch.nn.Tanh(), torch.nn.Linear(12, 1)
).double()
AXES = torch.eye(2, dtype=torch.float64)
start_from = {name: p.detach().clone() for name, p in network.named_parameters()}


def u(params, point):
    x, y = point.unbind(-1)
    return x * (1 - x) * y * (1 - y) * functional_call(network, params, (point,)).squeeze(-1)


def solution(points):
    return torch.sin(math.pi * points[..., 0]) * torch.sin(math.pi * points[..., 1])


def second(function, point, direction):
    """Second derivative in one direction, by forward mode twice."""
    return jvp(lambda p: jvp(function, (p,), (direction,))[1], (point,), (direction,))[1]


def residual(params, point):
    """``Δu + f`` at one point."""
    laplacian = sum(second(lambda p: u(params, p), point, direction) for direction in AXES)
    return laplacian + 2 * math.pi**2 * solution(point)


# %%
# Points, and the error that counts
# ---------------------------------
# The loss knows nothing of the solution; the error is measured against it on a grid of its own.

generator = torch.Generator().manual_seed(0)


middles = (torch.arange(12, dtype=torch.float64) + 0.5) / 12
regular = torch.cartesian_prod(middles, middles)


def draw(number):
    return torch.rand(number, 2, generator=generator, dtype=torch.float64)


axis_points = torch.linspace(0, 1, 41, dtype=torch.float64)
grid = torch.cartesian_prod(axis_points, axis_points)
truth = solution(grid)


def error(params):
    return ((u(params, grid) - truth).norm() / truth.norm()).item()


def loss(params, points):
    return vmap(residual, (None, 0))(params, points).square().mean() / 2


def minus(params, step, rate=1.0):
    return {name: p - rate * step[name] for name, p in params.items()}


# %%
# Three methods
# -------------
# Gauss–Newton and Adam always take the same regular points; Gauss–Newton adapts λ as Levenberg and Marquardt do: less
# after a step that lowered the loss, more after one that did not. SPRING (`arXiv 2401.10190
# <https://arxiv.org/abs/2401.10190>`_) sees new points at every step and draws each step to the last, so that what
# small batches say adds up. Adam gets the best of three learning rates, each with all the time.

STEPS, POINTS = 36, 100


def timed(step, params, steps=math.inf, seconds=math.inf):
    """Parameters, times, errors and steps of a method: ``step(params, number) -> params``."""
    params, times, errors, spent, number = dict(params), [], [], 0.0, 0
    while spent < seconds and number < steps:
        start = time.process_time()
        params = step(params, number)
        spent += time.process_time() - start
        number += 1
        if number % 5 == 0 or number < 5:
            times.append(spent)
            errors.append(error(params))
    return params, times, errors, number


def gauss_newton():
    state = {"damping": 1.0}

    def step(params, number):
        line = curvlib.func.linearize(residual, params, regular)
        trial = minus(params, curvlib.func.gauss_newton(line, state["damping"]))
        better = loss(trial, regular) < line.loss
        state["damping"] = max(state["damping"] / 6, 1e-14) if better else min(state["damping"] * 4, 1e4)
        return trial if better else params

    return step


def spring():
    state = {"previous": None}

    def step(params, number):
        line = curvlib.func.linearize(residual, params, draw(POINTS))
        damping = 1e-3 * min(1.0, line.loss.item())
        state["previous"] = curvlib.func.spring(line, damping, state["previous"], 0.8)
        return minus(params, state["previous"], 0.5)

    return step


def adam(rate):
    moving = {name: p.clone().requires_grad_() for name, p in start_from.items()}
    optimizer = torch.optim.Adam(moving.values(), lr=rate)

    def step(params, number):
        optimizer.zero_grad()
        loss(moving, regular).backward()
        optimizer.step()
        return {name: p.detach() for name, p in moving.items()}

    return step


for step in (gauss_newton(), spring(), adam(1e-3)):
    step(start_from, 0)  # the first calls of a process take seconds of their own

runs = {"Gauss–Newton": timed(gauss_newton(), start_from, steps=STEPS)}
seconds = runs["Gauss–Newton"][1][-1]
runs["SPRING"] = timed(spring(), start_from, seconds=seconds)
rates = {rate: timed(adam(rate), start_from, seconds=seconds) for rate in (3e-2, 1e-1, 3e-1)}
best_rate = min(rates, key=lambda rate: rates[rate][2][-1])
runs[f"Adam, rate {best_rate:g}"] = rates[best_rate]

# %%
# The result
# ----------

final = {name.split(",")[0]: errors[-1] for name, (_, _, errors, _) in runs.items()}
for name, (_, times, errors, number) in runs.items():
    print(f"{name:16}: relative error {errors[-1]:.1e} after {number} steps in {times[-1]:.1f} s")
for name in ("Gauss–Newton", "SPRING"):
    print(f"{name}'s error is {final['Adam'] / final[name]:.0f} times smaller than Adam's")

figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained", width_ratios=(1.5, 1, 1))
for name, (_, times, errors, _) in runs.items():
    axes[0].semilogy(times, errors, label=name)
axes[0].set(xlabel="seconds", ylabel="relative error of u", title="equal time")
axes[0].legend()
for axis, name in zip(axes[1:], ("Gauss–Newton", f"Adam, rate {best_rate:g}"), strict=True):
    difference = (u(runs[name][0], grid) - truth).reshape(41, 41).abs()
    image = axis.imshow(difference.T, origin="lower", extent=(0, 1, 0, 1), cmap="magma")
    figure.colorbar(image, ax=axis, shrink=0.8)
    axis.set(title=f"|error|, {name.split(',')[0]}", xticks=[], yticks=[])
plt.show()
