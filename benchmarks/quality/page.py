"""The text of docs/quality.md; every number in it comes from the records."""

TEXT = """# Time to a target

<!-- Written by `python -m benchmarks.quality report`; edit benchmarks/quality/page.py, not this. -->

What is a step worth? Every recipe of curvlib, three compositions that this page recommends, and SGD, Adam and AdamW
train the same four models until a metric on held-out data is at a target. Every number below is generated from
committed JSON files; `make quality` measures what is missing and writes this page.

{ambition}

{verdicts}
![Curves of all methods on the four tasks](../benchmarks/results/quality/quality.png)

Median seed of every method: recipes grey, first-order methods dashed, compositions in full colour, targets dotted.

## Recommended compositions

**A network of convolutions, attention and linear layers**: K-FAC's direction with the length of Adam's step. The
empirical Fisher costs no further pass; curvature is renewed and inverted every tenth step, for in the first hundred
steps it changes fast; explicit inverses cost more to make and less to apply. `Graft` keeps each block's step as long
as Adam's, so the learning rate is about Adam's and no KL clip is needed; damping in proportion to each block's mean
eigenvalue needs no search over magnitudes.

```python
import torch
import curvlib
from curvlib.precond import Graft, TraceRelative
from curvlib.solvers import KFAC, Diagonal


def grafted_kfac(model, solver, lr=5e-3):
    return curvlib.compose(
        model,
        fisher=curvlib.Empirical(),
        solver=solver,
        damping=TraceRelative(0.1),
        refresh=10,
        transforms=[Graft("adam"), curvlib.Momentum(0.8)],
        lr=lr,
    )


model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(512, 10)
)
optimizer = grafted_kfac(model, KFAC(form="inverse"))
loss = torch.nn.functional.cross_entropy(model(torch.randn(16, 1, 8, 8)), torch.arange(16) % 10)
loss.backward()
optimizer.step()
```

**An autoencoder**, and other networks with a few very wide layers: the same, but the layers at the pixels keep the
diagonals of their curvature. Their Kronecker factors would cost more than all other layers together.

```python
autoencoder = torch.nn.Sequential(
    torch.nn.Linear(784, 64),
    torch.nn.ReLU(),
    torch.nn.Linear(64, 8),
    torch.nn.Linear(8, 64),
    torch.nn.ReLU(),
    torch.nn.Linear(64, 784),
)
optimizer = grafted_kfac(autoencoder, {{"0": Diagonal(), "5": Diagonal(), "*": KFAC(form="inverse")}})
pixels = torch.rand(16, 784)
loss = torch.nn.functional.binary_cross_entropy_with_logits(autoencoder(pixels), pixels, reduction="sum") / 16
loss.backward()
optimizer.step()
```

**Few outputs, few parameters, high accuracy** (residuals of differential equations, regression): the exact
Gauss–Newton matrix of the whole network with its cross terms, in sample space, with damping that follows how well the
quadratic model predicts the loss. It takes float64 and a closure.

```python
regression = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()
optimizer = curvlib.compose(
    regression,
    fisher=curvlib.Exact(curvlib.Gaussian()),
    solver=curvlib.Woodbury(),
    blocks="network",
    damping=curvlib.precond.LevenbergMarquardt(1.0, decay=0.5, every=1, least=1e-10),
    lr=0.5,
)
points = torch.rand(64, 2, dtype=torch.float64)


def closure():
    optimizer.zero_grad()
    loss = (regression(points)[:, 0] - points.prod(1)).square().mean() / 2
    if torch.is_grad_enabled():
        loss.backward()
    return loss


losses = [optimizer.step(closure).item() for _ in range(20)]
assert losses[-1] < 1e-3 * losses[0]
```

## The tasks

{tasks}
Targets and budgets follow trial runs of Adam, about where its curve bends, and were fixed before any run that counts.
Held-out data are fixed; batches are drawn from the seed. The target counts as reached at the first of two evaluations
in a row that are at or below it: one alone may be noise. There are no learning-rate schedules, for nobody.

The transformer's norms have no scales of their own, and Poisson's network takes the derivatives of its layers' inputs
as further positions, so that every method serves every layer.

## What is timed

CPU time of the process (`time.process_time`) in the training loop: drawing the batch, forward, backward, curvature,
update, with the optimizer's first check of its rows; evaluations are outside. The process is pinned to one core and
runs in one thread, so this is the wall-clock time of an undisturbed core, and other work on the machine changes it
little. {conditions}

## Tuning

Every method has the same budget on every task: {spread} trials spread over its space (a Latin hypercube on logarithmic
scales, batch size included), then {near} near the best of them, one seed, each for the seconds above. A trial ends
early when it reaches the target, diverges, takes longer than the best trial took, or is behind where the best was in
half the time. The soonest at the target wins, otherwise the lowest metric. Methods with fewer hyperparameters are
better tuned by this rule, first-order methods most of all.

Spaces are in `benchmarks/quality/methods.py` and `compositions.py`. Those of SGD, Adam and the compositions were
narrowed by hand in trials on other seeds than the final ones, in which the compositions' parts were chosen too; the
recipes have their authors' parts and wide spaces. Weight decay is AdamW's alone. Final runs use {seeds} other
seeds and {final:g} times the seconds; where two of them have not reached the target there is no third.

## Every method

CPU seconds to the target: median, then all seeds, · where one did not reach it. In parentheses behind "not reached":
the median of the lowest metric.

{times}
Left out (—):

{reasons}

What tuning chose is in `benchmarks/results/quality/quality.md`.

## How to read this

- Recipes have their authors' form: sampled labels or empirical, KL clip, momentum, curvature that is renewed every
  10 to 100 steps. They were made for long runs at large batches; a target after seconds on one core, with batches of
  8 to 256, rewards cheap steps and steps that are safe from the first on.
- One core makes curvature dear: on a GPU the same products are a smaller share of a step.
- One machine and three seeds: differences below 10 % mean nothing.
- Four small tasks: use them as a starting point, and tune on yours.
"""
