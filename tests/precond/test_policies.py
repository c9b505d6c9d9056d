"""Damping, refresh, transforms and the whole-network block, each against its formula."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional

import curvlib
from curvlib import Empirical, Every, Exact, Gaussian, KLClip, Momentum, Sampled, WeightDecay, Woodbury, compose
from curvlib.errors import ConfigurationError
from curvlib.precond import (
    Constant,
    Context,
    GradientClip,
    Graft,
    Intervals,
    LevenbergMarquardt,
    NormConstraint,
    OnEvidence,
    PerBlock,
    Schedule,
    TraceRelative,
    TrustRatio,
    When,
)
from curvlib.precond.curvature import residual
from curvlib.solvers import KFAC, Dense

X = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def built(model, **options):
    return compose(model, **{"fisher": Exact(), "solver": Woodbury(), "damping": 0.1, "lr": 0.5, **options})


def loss_of(model, x=X, y=Y):
    return functional.cross_entropy(model(x), y)


def steps(model, optimizer, count=1, x=X, y=Y):
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()


def values(model):
    return [p.detach().clone() for p in model.parameters()]


# -- damping ----------------------------------------------------------------------------------------------------------


def test_a_schedule_gives_each_step_its_damping():
    optimizer = built(network(), damping=Schedule(lambda step: 1.0 / (step + 1)), refresh=100)
    seen = []
    for _ in range(3):
        steps(optimizer_model := network(), built(optimizer_model))  # another optimizer must not disturb it
        seen.append(optimizer.damping.at(len(seen), "", 0.0))
    assert seen == [1.0, 0.5, 1 / 3]


def test_damping_changes_factorise_the_same_estimate_again():
    model = network()
    optimizer = built(model, damping=Schedule(lambda step: 1.0 / (step + 1)), refresh=100)
    steps(model, optimizer, 3)
    state = optimizer.curvature["0"]
    assert (state.damping, state.refreshed, state.factorized) == (1 / 3, 0, 2)


def test_trace_relative_damping_follows_the_mean_eigenvalue():
    model = network()
    optimizer = built(model, damping=TraceRelative(0.5), solver=Dense())
    steps(model, optimizer)
    for state in optimizer.curvature.values():
        mean = torch.linalg.eigvalsh(state.estimate.matrix).mean()
        assert state.damping == pytest.approx(0.5 * float(mean), rel=1e-12)
    assert TraceRelative(0.5, floor=0.01).at(0, "", 0.0) == 0.01


def test_each_block_has_its_own_damping():
    model = network()
    optimizer = built(model, damping={"0": 0.3, "*": TraceRelative(1.0)})
    assert isinstance(optimizer.damping, PerBlock)
    steps(model, optimizer)
    assert optimizer.curvature["0"].damping == 0.3
    assert optimizer.curvature["2"].damping != 0.3
    with pytest.raises(ConfigurationError, match="no damping pattern matches block '2'"):
        PerBlock({"0": 0.1}).at(0, "2", 0.0)


def closure_of(model, optimizer, x=X, y=Y):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    return closure


def test_levenberg_marquardt_takes_the_reduction_ratio_of_the_whole_network():
    model = network()
    damping = LevenbergMarquardt(1.0, every=2)
    ratios = []
    damping.adapt = lambda step, ratio: ratios.append((step, ratio))
    optimizer = built(model, damping=damping, transforms=[Momentum(0.5)], refresh=3)
    for step in range(4):
        before, gradients = values(model), torch.autograd.grad(loss_of(model), list(model.parameters()))
        old = float(loss_of(model))
        rows = [f.dense().matrix() for f in curvlib.collect(copy.deepcopy(model).requires_grad_(), Exact(), X).values()]
        optimizer.step(closure_of(model, optimizer))
        if step % 2:
            change = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
            flat = torch.cat([c.flatten() for c in change])
            J = torch.cat(rows, dim=1)
            predicted = sum(float((g * c).sum()) for g, c in zip(gradients, change, strict=True))
            predicted += float((J @ flat).square().sum()) / (2 * 12)
            at, ratio = ratios[-1]
            assert at == step
            assert ratio == pytest.approx((float(loss_of(model)) - old) / predicted, rel=1e-9)
    assert len(ratios) == 2


def test_levenberg_marquardt_moves_by_the_rule_and_survives_a_checkpoint():
    damping = LevenbergMarquardt(1.0, decay=0.9, every=2, least=0.7, most=1.3)
    for ratio, expected in [
        (0.9, 0.81),
        (0.5, 0.81),
        (0.9, 0.7),
        (0.1, 0.7 / 0.81),
        (math.nan, 0.7 / 0.81**2),
        (-3, 1.3),
    ]:
        damping.adapt(0, ratio)
        assert damping.current == pytest.approx(expected)
    model = network()
    optimizer = built(model, damping=LevenbergMarquardt(1.0, every=1))
    optimizer.step(closure_of(model, optimizer))
    assert optimizer.damping.current != 1.0
    other = built(network(), damping=LevenbergMarquardt(1.0, every=1))
    other.load_state_dict(optimizer.state_dict())
    assert other.damping.current == optimizer.damping.current
    damping.restore(None)
    assert damping.current == 1.0


def test_levenberg_marquardt_needs_a_closure():
    model = network()
    optimizer = built(model, damping=LevenbergMarquardt(1.0))
    loss_of(model).backward()
    before = values(model)
    with pytest.raises(ConfigurationError, match=r"call optimizer.step\(closure\)"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))


# -- refresh ----------------------------------------------------------------------------------------------------------


def test_estimates_and_inverses_have_their_own_intervals():
    model = network()
    optimizer = built(model, solver=KFAC(), refresh=Intervals(estimate=2, inverse=4))
    seen = []
    for _ in range(7):
        steps(model, optimizer)
        state = optimizer.curvature["0"]
        seen.append((state.refreshed, state.factorized, state.estimate.count))
    assert seen == [(0, 0, 1), (0, 0, 1), (2, 0, 2), (2, 0, 2), (4, 4, 3), (4, 4, 3), (6, 4, 4)]


def test_a_rule_decides_when():
    model = network()
    optimizer = built(model, refresh=When(lambda step: step in (0, 1, 4)))
    seen = []
    for _ in range(6):
        steps(model, optimizer)
        seen.append(optimizer.curvature["0"].refreshed)
    assert seen == [0, 1, 1, 1, 4, 4]


def test_evidence_renews_stale_blocks_only():
    model = network()
    optimizer = built(model, refresh=OnEvidence(look_every=2, tolerance=0.05), lr=0.0)
    steps(model, optimizer, 5)
    assert {state.refreshed for state in optimizer.curvature.values()} == {0}  # the same rows: nothing is stale
    steps(model, optimizer, 2, x=3 * X)
    assert {state.refreshed for state in optimizer.curvature.values()} == {6}


def test_the_residual_is_that_of_the_damped_equations():
    model = network()
    optimizer = built(model, solver=Dense())
    steps(model, optimizer)
    optimizer.detach()
    rows = curvlib.collect(model, Exact(), 2 * X)["2"]
    state = optimizer.curvature["2"]
    gradient = {name: torch.randn_like(p) for name, p in model[2].named_parameters()}
    flat = torch.cat([g.flatten() for g in gradient.values()])
    J = rows.dense().matrix()
    eye = torch.eye(J.shape[1], dtype=torch.float64)
    natural = torch.linalg.solve(state.estimate.matrix + 0.1 * eye, flat)
    expected = ((J.T @ J / 12 + 0.1 * eye) @ natural - flat).norm() / flat.norm()
    assert residual(Dense(), state, rows, gradient) == pytest.approx(float(expected), rel=1e-10)


# -- transforms -------------------------------------------------------------------------------------------------------


def tensors(*seeds):
    return [torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


def context(parameters, gradients, rates=None, step=0, blocks=()):
    return Context(parameters, gradients, rates or [1.0] * len(parameters), step, blocks)


def norm(parts):
    return torch.cat([part.flatten() for part in parts]).norm()


def clones(parts):
    return [part.clone() for part in parts]


def test_norm_constraint_bounds_the_step_with_its_learning_rates():
    d, rates = tensors(1, 2), [0.5, 2.0]
    bounded = NormConstraint(0.1).apply(clones(d), context(d, d, rates), {})
    assert norm([r * b for r, b in zip(rates, bounded, strict=True)]) == pytest.approx(0.1)
    free = NormConstraint(1e9).apply(clones(d), context(d, d, rates), {})
    assert all(torch.equal(a, b) for a, b in zip(free, d, strict=True))


def test_gradient_clip_comes_before_the_curvature():
    model, twin = network(), network()
    optimizer = built(model, transforms=[GradientClip(1e-3)])
    plain = built(twin)
    before = values(model)
    steps(model, optimizer)
    steps(twin, plain)
    total = norm([p.grad for p in twin.parameters()])
    for a, b, old in zip(model.parameters(), twin.parameters(), before, strict=True):
        torch.testing.assert_close((a - old).detach(), ((b - old) * 1e-3 / total).detach())
    loss_of(model).backward()
    kept = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), kept, strict=True))


def test_coupled_weight_decay_is_preconditioned():
    model, twin = network(), network()
    optimizer = built(model, transforms=[WeightDecay(0.1, coupled=True)])
    plain = built(twin)
    optimizer.zero_grad()
    loss_of(model).backward()
    loss_of(twin).backward()
    for p in twin.parameters():
        p.grad += 0.1 * p.detach()
    optimizer.step()
    plain.step()
    assert all(torch.allclose(a, b, atol=1e-14) for a, b in zip(values(model), values(twin), strict=True))


def test_graft_takes_the_length_of_the_gradient_block_by_block():
    d, g = tensors(1, 2, 3), tensors(4, 5, 6)
    moved = Graft().apply(clones(d), context(d, g, blocks=("a", "a", "")), {"first": [], "second": []})
    assert norm(moved[:2]) == pytest.approx(norm(g[:2]))
    assert norm(moved[2:]) == pytest.approx(norm(g[2:]))
    assert torch.allclose(moved[0] / moved[0].norm(), d[0] / d[0].norm())
    still = Graft().apply([torch.zeros(4)], context(d[:1], g[:1]), {"first": [], "second": []})
    assert torch.equal(still[0], torch.zeros(4))


def test_graft_takes_the_length_of_adams_update():
    parameter = torch.nn.Parameter(tensors(1)[0])
    adam = torch.optim.Adam([parameter], lr=1.0)
    buffers = {"first": [torch.zeros(4)], "second": [torch.zeros(4)]}
    for step, gradient in enumerate(tensors(2, 3, 4)):
        before = parameter.detach().clone()
        parameter.grad = gradient
        adam.step()
        moved = Graft("adam").apply(tensors(9), context([before], [gradient], step=step), buffers)
        assert float(norm(moved)) == pytest.approx(float((parameter.detach() - before).norm()), rel=1e-5)


def test_trust_ratio_scales_with_the_parameters():
    p, d = [*tensors(1), torch.zeros(4)], tensors(2, 3)
    moved = TrustRatio(0.01).apply(clones(d), context(p, d), {})
    assert norm(moved[:1]) == pytest.approx(0.01 * norm(p[:1]))
    assert torch.equal(moved[1], d[1])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda: Schedule(lambda step: -1.0).at(0, "", 0.0), "damping must be a positive"),
        (lambda: TraceRelative(0.0), "damping must be a positive"),
        (lambda: Constant(True), "damping must be a positive"),
        (lambda: LevenbergMarquardt(1.0, decay=1.5), r"decay in \(0, 1\)"),
        (lambda: LevenbergMarquardt(1.0, every=0), "every ≥ 1"),
        (lambda: Intervals(20, 30), "multiple"),
        (lambda: Intervals(0, 30), "interval of estimates"),
        (lambda: OnEvidence(0), "interval of looks"),
        (lambda: OnEvidence(5, math.nan), "tolerance"),
        (lambda: GradientClip(0.0), "norm > 0"),
        (lambda: NormConstraint(-1.0), "norm > 0"),
        (lambda: TrustRatio(0.0), "share > 0"),
        (lambda: Graft("lion"), "'sgd' or 'adam'"),
        (lambda: built(network(), transforms=[KLClip(), GradientClip(1.0)]), "put it first"),
        (lambda: built(network(), blocks="row"), "'layer' or 'network'"),
    ],
)
def test_parts_that_cannot_work_are_refused(part, message):
    with pytest.raises(ConfigurationError, match=message):
        part()


# -- one block for the whole network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", [Sampled(), Exact(), Empirical()], ids=str)
@pytest.mark.parametrize("solver", [Woodbury(), Dense()], ids=str)
def test_the_network_block_inverts_the_whole_curvature(fisher, solver):
    model = network()
    x, y = X[:4], Y[:4]
    loss = lambda out: functional.cross_entropy(out, y)  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    rows = curvlib.collect(model, fisher, x, loss=loss, generator=generator)
    J = torch.cat([f.dense().matrix() for f in rows.values()], dim=1)
    optimizer = built(model, fisher=fisher, solver=solver, blocks="network", lr=1.0)
    before = torch.cat([p.flatten() for p in values(model)])
    optimizer.zero_grad()
    loss_of(model, x, y).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    optimizer.step()
    F = J.T @ J / 4 + 0.1 * torch.eye(J.shape[1], dtype=torch.float64)
    moved = before - torch.cat([p.flatten() for p in values(model)])
    torch.testing.assert_close(moved, torch.linalg.solve(F, gradient), rtol=1e-10, atol=1e-12)
    assert list(optimizer.curvature) == ["network"]


def test_whole_network_steps_contract_the_residual_by_one_minus_the_rate():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 512), nn.Tanh(), nn.Linear(512, 1)).double()
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.randn(16, 1, dtype=torch.float64)
    rate = 0.1
    optimizer = compose(
        model, fisher=Exact(Gaussian()), solver=Woodbury(), damping=1e-9, lr=rate, blocks="network", refresh=Every(1)
    )
    sizes = []
    for _ in range(15):
        optimizer.zero_grad()
        out = model(x)
        sizes.append(float((out - y).detach().norm()))
        Gaussian().loss(out, y).backward()
        optimizer.step()
    ratios = [after / before for before, after in pairwise(sizes)]
    assert all(ratio == pytest.approx(1 - rate, rel=0.01) for ratio in ratios)
