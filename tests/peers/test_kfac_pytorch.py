"""kfac-pytorch: the gradients it leaves on Linear layers, over several steps, against curvlib's K-FAC.

It is not on the index: `make peers` installs it from where the environment variable KFAC_PYTORCH says, a checkout of
its repository (0.4.2) as a rule, and without that these tests are skipped.

Known differences, each corrected below:

- Its cotangents are those of the mean loss and its G their mean outer product, not their sum times n. With n samples of
  P positions ``G_peer = G / (n² P)``, which falls as the batch grows and makes the meaning of a damping depend on it.
  So its damping λ is λ n² P on curvlib's scale and its direction n² P of curvlib's.
- Its averages start from the identity and are not bias-corrected. curvlib's estimate is explicit: one is made that says
  "identity, seen for ever".
- Its inverse method adds λ to each factor, so that it is λ² on their product: curvlib's "plain" adds √λ. The scale of G
  then cannot be undone by a damping alone: the factors that are compared are its own, G / (n² P).
- It always clips by the KL divergence (``kl_clip=None`` raises); a bound that is never met stands for no clip.
- It factorises in float32 whatever `inv_dtype` says; here in float64, by a `torch` override.
- Left out: convolutions, whose A and G are divided by the number of positions twice over and whose dilation is ignored.
"""

from copy import deepcopy

import pytest
import torch
from torch.nn import functional
from truth import step_taken
from twins import NETS, Float64, assert_same, batch

import curvlib
from curvlib.solvers import KFAC
from curvlib.solvers.kfac import KFACEstimate

peer = pytest.importorskip(
    "kfac.preconditioner",
    reason="make peers installs kfac-pytorch from a checkout that KFAC_PYTORCH names (it is not on the index)",
)

# Its module hooks meet inputs that need no gradient, and torch says so at every backward.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

STEPS, DECAY, DAMPING = 4, 0.7, 0.02
POSITIONS = {"mlp": {"0": 1, "2": 1}, "sequence": {"0": 3, "3": 1}}


def loss_of(y):
    return lambda outputs: functional.cross_entropy(outputs, y)


def theirs(model, batches, method, damping, kl_clip=1e30, decay=DECAY):
    """What it makes of the gradient of every batch, with a copy of the model: its hooks stay where they are."""
    model = deepcopy(model)
    kfac = peer.KFACPreconditioner(
        model, factor_decay=decay, damping=damping, kl_clip=kl_clip, lr=1.0, compute_method=method,
        inv_dtype=torch.float64, loglevel=0,
    )  # fmt: skip
    for x, y in batches:
        model.zero_grad()
        loss_of(y)(model(x)).backward()
        with Float64():
            kfac.step()
        yield {name: p.grad.clone() for name, p in model.named_parameters()}


def ours(model, batches, positions, direction):
    """``direction(estimate or None, rows, c, gradient) -> (estimate, direction)`` of every block and batch.

    c is n² P, what divides the peer's G.
    """
    estimates = {}
    for x, y in batches:
        gradients = torch.autograd.grad(loss_of(y)(model(x)), [*model.parameters()])
        gradient = dict(zip(dict(model.named_parameters()), gradients, strict=True))
        result = {}
        for block, rows in curvlib.collect(model, curvlib.Empirical(), x, loss=loss_of(y)).items():
            own = {name: gradient[f"{block}.{name}"] for name in rows.shapes}
            c = len(x) ** 2 * positions[block]
            estimates[block], found = direction(estimates.get(block), rows, c, own)
            result |= {f"{block}.{name}": value for name, value in found.items()}
        yield result


def from_identity(rows, scale):
    """Estimate of one that began with A = I and G = scale · I endlessly long ago, so that nothing is corrected."""
    apart = rows.kronecker_rows()
    pair = apart.pair()
    A, G = (torch.eye(side.shape[-1], dtype=side.dtype)[None] for side in (pair.inputs, pair.cotangents))
    return KFACEstimate(A, scale * G, apart.layout, 10**6)


def eigen(estimate, rows, c, gradient):
    solver = KFAC(decay=DECAY, damping="exact")
    estimate = solver.update(estimate or from_identity(rows, c), rows)
    natural = solver.solve(solver.factorize(estimate, DAMPING * c), gradient)
    return estimate, {name: c * value for name, value in natural.items()}


def inverse(estimate, rows, c, gradient):
    solver = KFAC(decay=DECAY, damping="plain")
    estimate = solver.update(estimate or from_identity(rows, 1.0), rows.scaled(c**-0.5))
    return estimate, solver.solve(solver.factorize(estimate, DAMPING**2), gradient)


@pytest.mark.parametrize("direction", [eigen, inverse])
@pytest.mark.parametrize("net", POSITIONS)
def test_directions_are_the_same(net, direction):
    model, batches = NETS[net][0](), [batch(net, samples=20, seed=s) for s in range(STEPS)]
    given = ours(model, batches, POSITIONS[net], direction)
    expected = theirs(model, batches, direction.__name__, DAMPING)
    for step in zip(given, expected, strict=True):
        assert_same(*step)


@pytest.mark.parametrize("samples", [4, 24])
def test_the_clip_is_the_same(samples):
    """Its direction is n² of curvlib's, so its divergence too: where both are clipped, κ there is n² κ here."""
    model, data = NETS["mlp"][0](), batch("mlp", samples)
    c, bound = samples**2, 1e-7
    optimizer = curvlib.compose(
        model, fisher=curvlib.Empirical(), solver=KFAC(decay=0.0, damping="exact"), damping=DAMPING * c,
        transforms=[curvlib.KLClip(c * bound)], lr=1.0,
    )  # fmt: skip
    loss_of(data[1])(model(data[0])).backward()
    given = step_taken(model, optimizer)
    optimizer.detach()
    model = NETS["mlp"][0]()
    (expected,) = theirs(model, [data], "eigen", DAMPING, bound, decay=1e-20)  # 0 is refused
    (unclipped,) = theirs(model, [data], "eigen", DAMPING, decay=1e-20)
    assert expected["0.weight"].norm() < 0.9 * unclipped["0.weight"].norm()
    assert_same(given, expected)
