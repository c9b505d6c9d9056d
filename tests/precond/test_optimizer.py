"""The composed optimizer as a torch.optim.Optimizer: the loop unchanged, nothing lost, refusals that change nothing."""

import copy
import io
import math

import pytest
import torch
from loop import X, Y, backward, built, network, same, steps, values
from torch import nn
from torch.nn import functional

import curvlib
from curvlib import (
    Empirical,
    Every,
    Exact,
    KLClip,
    Momentum,
    Sampled,
    TENGraD,
    WeightDecay,
    Woodbury,
)
from curvlib.arrays import Product
from curvlib.errors import (
    ConfigurationError,
    CurvatureError,
)
from curvlib.solvers import Dense


@pytest.mark.parametrize("fisher", [Sampled(), Sampled(samples=3), Exact(), Empirical()], ids=str)
@pytest.mark.parametrize("solver", [Woodbury(), Dense()], ids=str)
def test_training_lowers_the_loss_whatever_is_combined(fisher, solver):
    model = network()
    optimizer = built(model, fisher=fisher, solver=solver, transforms=[KLClip(), Momentum(0.5)], refresh=3)
    assert isinstance(optimizer, torch.optim.Optimizer)
    before = float(functional.cross_entropy(model(X), Y))
    steps(model, optimizer, 15)
    assert float(functional.cross_entropy(model(X), Y)) < 0.5 * before


def test_a_closure_is_evaluated_once_and_its_loss_returned():
    model, twin = network(), network()
    optimizer, other = built(model), built(twin)
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        return backward(model)

    loss = optimizer.step(closure)
    assert len(calls) == 1
    assert torch.equal(loss, backward(twin))
    other.step()
    assert same(values(model), values(twin))


def test_schedulers_change_the_learning_rate():
    model = network()
    optimizer = built(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    steps(model, optimizer, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    before = values(model)
    optimizer.param_groups[0]["lr"] = 0.0
    steps(model, optimizer, 1)
    assert same(values(model), before)


def test_curvature_is_renewed_when_due_and_kept_between():
    model = network()
    optimizer = built(model, refresh=Every(3))
    seen = []
    for _ in range(7):
        steps(model, optimizer, 1)
        seen.append(optimizer.curvature["0"].refreshed)
    assert seen == [0, 0, 0, 3, 3, 3, 6]


def test_between_refreshes_the_old_inverse_meets_the_new_gradient():
    model = network()
    optimizer = built(model, refresh=10, lr=1.0)
    steps(model, optimizer, 1)
    inverse = optimizer.curvature["2"].inverse
    optimizer.zero_grad()
    backward(model)
    gradient = {name: p.grad.clone() for name, p in model[2].named_parameters()}
    before = values(model[2])
    optimizer.step()
    natural = Woodbury().solve(inverse, gradient)
    for old, p, name in zip(before, model[2].parameters(), natural, strict=True):
        torch.testing.assert_close(old - p.detach(), natural[name])


def test_a_new_damping_refactorises_without_new_curvature():
    model, twin = network(), network()
    optimizer, other = built(model, refresh=100), built(twin, refresh=100, damping=0.7)
    steps(model, optimizer, 1)
    estimate = optimizer.curvature["0"].estimate
    optimizer.damping = curvlib.Constant(0.7)
    model.load_state_dict(network().state_dict())
    steps(model, optimizer, 1)
    assert optimizer.curvature["0"].estimate is estimate
    assert optimizer.curvature["0"].refreshed == 0
    steps(twin, other, 1)
    assert all(torch.allclose(a, b, atol=1e-14) for a, b in zip(values(model), values(twin), strict=True))


def test_a_refresh_without_a_forward_pass_stays_due():
    model = network()
    optimizer = built(model, refresh=2)
    steps(model, optimizer, 2)
    optimizer.step()  # the gradient of the last pass once more
    assert optimizer.curvature["0"].refreshed == 0
    steps(model, optimizer, 1)
    assert optimizer.curvature["0"].refreshed == 3


def test_unused_and_frozen_blocks_stay():
    model = network()
    model[2].requires_grad_(False)
    optimizer = built(model)
    assert list(optimizer.curvature) == ["0"]
    model[0].bias.requires_grad_(True)
    before = values(model[2])
    steps(model, optimizer, 2)
    assert same(values(model[2]), before)


def test_one_solver_a_block_by_pattern():
    model = network()
    optimizer = built(model, solver={"0": Dense(), "*": Woodbury()})
    assert optimizer.solvers == {"0": Dense(), "2": Woodbury()}
    steps(model, optimizer, 1)
    for solver, message in [
        ({"body.*": Dense(), "*": Dense()}, r"'body.\*' matches no block; the blocks are \['0', '2'\]"),
        ({"0": Dense()}, r"no solver pattern matches the blocks \['2'\]"),
        ({"*": "dense"}, "must be a Solver"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            built(network(), solver=solver)


def test_detach_leaves_a_plain_model():
    model = network()
    optimizer = built(model)
    steps(model, optimizer, 1)
    optimizer.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    copy.deepcopy(model)


def test_bfloat16_parameters_train():
    model = network().to(torch.bfloat16)
    optimizer = built(model, transforms=[KLClip(), Momentum()])
    optimizer.zero_grad()
    backward(model, X.bfloat16())
    optimizer.step()
    assert all(p.dtype == torch.bfloat16 and torch.isfinite(p).all() for p in model.parameters())
    assert optimizer.curvature["0"].estimate.kernel.dtype == torch.float32


# -- transforms -------------------------------------------------------------------------------------------------------


def test_transforms_follow_their_formulas_in_the_given_order():
    model, twin = network(), network()
    lr, kappa, mu, decay = 0.5, 1e-4, 0.8, 0.1
    optimizer = built(model, lr=lr, transforms=[KLClip(kappa), Momentum(mu), WeightDecay(decay)])
    plain = built(twin, lr=1.0)
    momentum = [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(4):
        twin.load_state_dict(model.state_dict())
        before = values(twin)
        steps(twin, plain, 1)
        gradients = [p.grad for p in twin.parameters()]
        natural = [old - p.detach() for old, p in zip(before, twin.parameters(), strict=True)]
        product = sum(float((n * g).sum()) for n, g in zip(natural, gradients, strict=True))
        nu = min(1.0, math.sqrt(kappa / (lr**2 * product)))
        assert nu < 1
        momentum = [mu * m + nu * n for m, n in zip(momentum, natural, strict=True)]
        steps(model, optimizer, 1)
        for p, old, m in zip(model.parameters(), before, momentum, strict=True):
            torch.testing.assert_close(p.detach(), old - lr * (m + decay * old))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("layout", ["in a row", "transposed", "half precision"])
def test_momentum_takes_products_for_what_they_are(nesterov, layout):
    left, right = torch.randn(6, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    total = torch.randn(4, 6, dtype=torch.float64).T if layout == "transposed" else torch.randn(6, 4).double()
    total = total.half() if layout == "half precision" else total
    before, decay = total.double().clone(), 0.25
    context = curvlib.precond.Context([total], [total], [1.0], 0)
    (move,) = Momentum(decay, nesterov).apply([Product(left, right)], context, {"momentum": [total]})
    after = decay * before + left @ right
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if layout == "half precision" else {"rtol": 1e-13, "atol": 1e-13}
    torch.testing.assert_close(total.double(), after, **tolerance)
    torch.testing.assert_close(move.double(), left @ right + decay * after if nesterov else after, **tolerance)


def test_whoever_overrides_a_transform_that_takes_products_gets_tensors():
    class Own(Momentum):
        def apply(self, directions, context, buffers):
            assert all(isinstance(one, torch.Tensor) for one in directions)
            return super().apply(directions, context, buffers)

    assert Momentum.takes_products
    assert not Own.takes_products
    model = network()
    steps(model, built(model, fisher=Empirical(), refresh=1, transforms=[Own()], fused=True), 2)


def test_nesterov_looks_ahead():
    parameter = torch.ones(2)
    context = curvlib.precond.Context([parameter], [parameter], [1.0], 0)
    buffers = {"momentum": [torch.full((2,), 2.0)]}
    (move,) = Momentum(0.5, nesterov=True).apply([torch.ones(2)], context, buffers)
    assert torch.equal(buffers["momentum"][0], torch.full((2,), 2.0))
    assert torch.equal(move, torch.full((2,), 2.0))


@pytest.mark.parametrize("decays", ["one", "several"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_of_tensors_of_every_size_and_layout(decays, nesterov):
    shapes = [(), (3, 5), (300, 200), (600, 600)]
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    groups = tuple({"momentum": 0.9 if decays == "one" else 0.1 * place} for place in range(len(shapes)))
    buffers = {"momentum": [torch.zeros_like(p) for p in parameters]}
    buffers["momentum"][2] = torch.zeros(200, 300, dtype=torch.float64).T  # as a user's own checkpoint may have it
    own, expected = list(buffers["momentum"]), [torch.zeros_like(p) for p in parameters]
    for step in range(3):
        directions = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        if step == 1:
            directions[3] = directions[3].T.contiguous().T
        given = [one.clone() for one in directions]
        context = curvlib.precond.Context(parameters, directions, [0.1] * 4, step=step, groups=groups)
        moves = Momentum(nesterov=nesterov).apply(directions, context, buffers)
        for place, (group, direction) in enumerate(zip(groups, given, strict=True)):
            expected[place] = group["momentum"] * expected[place] + direction
            ahead = direction + group["momentum"] * expected[place] if nesterov else expected[place]
            torch.testing.assert_close(moves[place], ahead, rtol=1e-14, atol=1e-14)
            assert torch.equal(directions[place], direction)  # it belongs to someone else
            torch.testing.assert_close(own[place], expected[place], rtol=1e-14, atol=1e-14)


def test_a_zero_gradient_is_not_clipped_to_nan():
    parameter = torch.zeros(2)
    context = curvlib.precond.Context([parameter], [parameter], [1.0], 0)
    (move,) = KLClip().apply([torch.zeros(2)], context, {})
    assert torch.equal(move, torch.zeros(2))


def test_repeated_transforms_keep_separate_buffers():
    model = network()
    optimizer = built(model, transforms=[Momentum(0.5), Momentum(0.9)])
    steps(model, optimizer, 1)
    assert set(optimizer.state[model[0].weight]) == {"Momentum.momentum", "Momentum2.momentum"}


# -- state ------------------------------------------------------------------------------------------------------------


def test_resume_continues_bit_for_bit():
    def fresh():
        model = network()
        return model, TENGraD(model, lr=0.1, damping=0.2, refresh=4, seed=3)

    model, optimizer = fresh()
    steps(model, optimizer, 6)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    steps(model, optimizer, 7)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    again, resumed = fresh()
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.curvature["0"].refreshed == 4
    steps(again, resumed, 7)
    assert same(values(model), values(again))


def test_foreign_state_is_refused_and_changes_nothing():
    model = network()
    optimizer = built(model)
    steps(model, optimizer, 2)
    good = optimizer.state_dict()
    kept = optimizer.curvature
    sgd = torch.optim.SGD(model.parameters(), lr=0.1).state_dict()
    other = built(nn.Sequential(nn.Linear(5, 3)).double()).state_dict()
    old = {**good, "curvature": {**good["curvature"], "version": 0}}
    for state, message in [(sgd, "holds no curvature"), (other, r"blocks \['0'\]; the model has"), (old, "version 0")]:
        with pytest.raises(CurvatureError, match=message):
            optimizer.load_state_dict(state)
    assert optimizer.curvature is kept
    assert optimizer.steps == 2
