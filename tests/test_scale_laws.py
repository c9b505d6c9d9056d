"""Law 2: what a batch says about curvature does not depend on how the batch is presented."""

import pytest
import torch
from corners import batch, conv_net
from torch import nn
from truth import CATEGORICAL, Lowest, assert_close, assert_steps_close, network, step_taken

import curvlib

DAMPING = 0.2
X = {"dense": batch(12, 4), "convolution": batch(12, 2, 4, 4)}
Y = torch.arange(12) % 3
NETWORKS = {
    "dense": lambda: network(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "convolution": conv_net(2, kernel_size=3, padding=1, stride=2),
}
FISHERS = {
    "sampled": curvlib.Sampled(Lowest()),
    "exact": curvlib.Exact(),
    "empirical": curvlib.Empirical(),
}


def mean(model, x, y, share=1.0):
    return share * CATEGORICAL.nll(model(x), y) / len(y)


def plain(model, x):
    mean(model, x, Y).backward()


def repeated(model, x):
    mean(model, x.repeat(3, *[1] * (x.ndim - 1)), Y.repeat(3)).backward()


def even_micro_batches(model, x):
    for part in torch.arange(12).split(4):
        mean(model, x[part], Y[part], share=1 / 3).backward()


def uneven_micro_batches(model, x):
    for part in torch.arange(12).split((1, 8, 3)):
        mean(model, x[part], Y[part], share=len(part) / 12).backward()


def summed_by_forward_passes(model, x):
    (mean(model, x[:6], Y[:6], 0.5) + mean(model, x[6:], Y[6:], 0.5)).backward()


def summed(model, x):
    (12 * mean(model, x, Y)).backward()


def scaled(model, x):
    (1000 * mean(model, x, Y)).backward()


def summed_micro_batches(model, x):
    for part in torch.arange(12).split((1, 8, 3)):
        (12 * mean(model, x[part], Y[part], share=len(part) / 12)).backward()


WAYS = {  # how the loop looks, and how many times the mean loss's gradient it gives
    plain: 1,
    repeated: 1,
    even_micro_batches: 1,
    uneven_micro_batches: 1,
    summed_by_forward_passes: 1,
    summed: 12,
    summed_micro_batches: 12,
    scaled: 1000,
}


def after(kind, network_name, way, solver):
    """The curvature estimates and the natural gradient of one step."""
    model = NETWORKS[network_name]()
    fisher = FISHERS[kind]
    if kind == "empirical" and way in (summed, summed_micro_batches):
        fisher = curvlib.Empirical(reduction="sum")
    optimizer = curvlib.compose(model, fisher=fisher, solver=solver, damping=DAMPING, lr=1.0)
    way(model, X[network_name])
    return optimizer, step_taken(model, optimizer)


CASES = [(kind, way) for way in WAYS for kind in FISHERS if not (kind == "empirical" and way is scaled)]


@pytest.mark.parametrize("network_name", NETWORKS)
@pytest.mark.parametrize(("kind", "way"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_curvature_does_not_depend_on_how_the_batch_is_presented(kind, way, network_name):
    reference, expected = after(kind, network_name, plain, curvlib.solvers.Dense())
    dense, _ = after(kind, network_name, way, curvlib.solvers.Dense())
    for block, state in reference.curvature.items():
        assert_close(dense.curvature[block].estimate.matrix, state.estimate.matrix, block)
    for solver in (curvlib.solvers.Dense(), curvlib.Woodbury()):
        _, step = after(kind, network_name, way, solver)
        assert_steps_close({name: move / WAYS[way] for name, move in step.items()}, expected)


def test_the_empirical_fisher_sees_a_wrongly_declared_reduction():
    # The law has teeth: a summed loss declared as a mean gives another curvature.
    _, expected = after("empirical", "dense", plain, curvlib.Woodbury())
    model = NETWORKS["dense"]()
    optimizer = curvlib.compose(model, fisher=curvlib.Empirical(), solver=curvlib.Woodbury(), damping=DAMPING, lr=1.0)
    summed(model, X["dense"])
    step = step_taken(model, optimizer)
    assert all(float((step[name] / 12 - expected[name]).norm() / expected[name].norm()) > 0.1 for name in expected)


@pytest.mark.parametrize("kind", FISHERS)
def test_a_grad_scaler_changes_nothing(kind):
    _, expected = after(kind, "dense", plain, curvlib.Woodbury())
    model = NETWORKS["dense"]()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    # The empirical Fisher sees the scaled loss's own cotangents, so it has to be told the scale.
    fisher = curvlib.Empirical(loss_scale=scaler.get_scale) if kind == "empirical" else FISHERS[kind]
    optimizer = curvlib.compose(model, fisher=fisher, solver=curvlib.Woodbury(), damping=DAMPING, lr=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scaler.scale(mean(model, X["dense"], Y)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_steps_close({name: before[name] - p.detach() for name, p in model.named_parameters()}, expected)


@pytest.mark.parametrize("kind", FISHERS)
def test_another_batch_has_another_curvature(kind):
    # Guards the tests above against an estimate that ignores the batch.
    reference, _ = after(kind, "dense", plain, curvlib.solvers.Dense())
    model = NETWORKS["dense"]()
    optimizer = curvlib.compose(model, fisher=FISHERS[kind], solver=curvlib.solvers.Dense(), damping=DAMPING, lr=1.0)
    mean(model, X["dense"][:6], Y[:6]).backward()
    optimizer.step()
    for block, state in optimizer.curvature.items():
        other = reference.curvature[block].estimate.matrix
        assert float((state.estimate.matrix - other).norm() / other.norm()) > 0.01
