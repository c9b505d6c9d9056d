"""The composed optimizer as a torch.optim.Optimizer: the loop unchanged, nothing lost, refusals that change nothing."""

import copy
import io
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import curvlib
from curvlib import (
    Categorical,
    Empirical,
    Every,
    Exact,
    Gaussian,
    KLClip,
    Momentum,
    Sampled,
    TENGraD,
    WeightDecay,
    Woodbury,
    compose,
)
from curvlib.errors import (
    CaptureError,
    ConfigurationError,
    CurvatureError,
    CurvatureWarning,
    NotPositiveDefiniteError,
    UncoveredParameterError,
)
from curvlib.solvers import Dense, Solver

X = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 3


def network(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7, **options), nn.ReLU(inplace=True), nn.Linear(7, 3)).double()


def built(model, **options):
    given = {"fisher": Exact(), "solver": Woodbury(), "damping": 0.1, "lr": 0.5, **options}
    return compose(model, **given)


def backward(model, x=X, y=Y):
    loss = functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


def steps(model, optimizer, count):
    for _ in range(count):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(5, dtype=torch.float64))
        self.body = network()

    def forward(self, x):
        return self.body(x + self.shift)


# -- the loop ---------------------------------------------------------------------------------------------------------


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


def test_nesterov_looks_ahead():
    parameter = torch.ones(2)
    context = curvlib.precond.Context([parameter], [parameter], [1.0], 0)
    buffers = {"momentum": [torch.full((2,), 2.0)]}
    (move,) = Momentum(0.5, nesterov=True).apply([torch.ones(2)], context, buffers)
    assert torch.equal(buffers["momentum"][0], torch.full((2,), 2.0))
    assert torch.equal(move, torch.full((2,), 2.0))


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


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_parameters_outside_every_block_are_an_error_unless_said_otherwise():
    with pytest.raises(UncoveredParameterError, match=r"'shift'.*rest='sgd'"):
        built(Bare())
    with pytest.raises(ConfigurationError, match="'sgd', 'adamw', 'freeze'"):
        built(Bare(), rest="lion")


def test_rest_sgd_sends_the_plain_gradient_through_the_transforms():
    model = Bare()
    optimizer = built(model, rest="sgd", transforms=[WeightDecay(0.1)])
    backward(model)
    gradient = model.shift.grad.clone()
    optimizer.step()
    torch.testing.assert_close(model.shift.detach(), -0.5 * gradient)
    assert not torch.equal(gradient, torch.zeros_like(gradient))
    assert torch.equal(model.shift.grad, gradient)


def test_rest_freeze_leaves_them():
    model = Bare()
    optimizer = built(model, rest="freeze")
    backward(model)
    optimizer.step()
    assert torch.equal(model.shift, torch.zeros_like(model.shift))


def test_rest_adamw_is_adamw_and_survives_a_checkpoint():
    model, twin = Bare(), Bare()
    optimizer = built(model, rest="adamw")
    adamw = torch.optim.AdamW([twin.shift])
    for _ in range(3):
        twin.body.load_state_dict(model.body.state_dict())
        twin.zero_grad()
        steps(model, optimizer, 1)
        backward(twin)
        adamw.step()
        torch.testing.assert_close(model.shift.detach(), twin.shift.detach())
    state = copy.deepcopy(optimizer.state_dict())
    assert optimizer.param_groups[1]["lr"] == 1e-3
    fresh = Bare()
    fresh.load_state_dict(model.state_dict())
    resumed = built(fresh, rest="adamw")
    resumed.load_state_dict(state)
    steps(model, optimizer, 2)
    steps(fresh, resumed, 2)
    assert same(values(model), values(fresh))


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


# -- refusals that change nothing -------------------------------------------------------------------------------------


def unchanged_by(model, optimizer, message, error=CaptureError):
    before, curvature, taken = values(model), optimizer.curvature, optimizer.steps
    with pytest.raises(error, match=message):
        optimizer.step()
    assert same(values(model), before)
    assert optimizer.curvature is curvature
    assert optimizer.steps == taken


def test_a_step_before_any_backward():
    model = network()
    unchanged_by(model, built(model), r"call loss.backward\(\) before")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_name_their_parameters(bad):
    model = network()
    optimizer = built(model, fisher=Empirical(), transforms=[Momentum()])
    steps(model, optimizer, 2)
    optimizer.zero_grad()
    backward(model)
    model[2].weight.grad[0, 0] = bad
    momentum = optimizer.state[model[0].weight]["Momentum.momentum"].clone()
    unchanged_by(model, optimizer, r"step 2: the gradient is not finite in 2.weight")
    assert torch.equal(optimizer.state[model[0].weight]["Momentum.momentum"], momentum)
    steps(model, optimizer, 1)


def test_a_loss_that_is_not_finite():
    model = network()
    optimizer = built(model)
    before = values(model)

    def closure():
        backward(model)
        return torch.tensor(math.nan)

    with pytest.raises(CaptureError, match="the loss is nan"):
        optimizer.step(closure)
    assert same(values(model), before)


def test_outputs_that_are_not_finite():
    model = network()
    optimizer = built(model, verify=False)
    with pytest.raises(CaptureError, match="outputs are not finite"):
        model(X * math.inf)
    steps(model, optimizer, 1)


def test_an_empty_batch():
    model = network()
    optimizer = built(model)
    with pytest.raises(CaptureError, match="at least one; skip empty batches"):
        model(X[:0])
    steps(model, optimizer, 1)


def test_outputs_that_do_not_fit_the_likelihood():
    model = nn.Linear(5, 1).double()
    built(model)
    with pytest.raises(ConfigurationError, match=r"at least two classes, got outputs of shape \(12, 1\)"):
        model(X)


def test_curvature_that_was_never_seen():
    model = network()
    with torch.enable_grad():
        outputs = model(X)
    optimizer = built(model)
    functional.cross_entropy(outputs, Y).backward()
    unchanged_by(model, optimizer, "step 0: block '0' has a gradient, but no call of its module was seen")


def test_sparse_gradients():
    model = nn.Sequential(nn.Embedding(10, 3, sparse=True), nn.Flatten(), nn.Linear(6, 3)).double()
    optimizer = built(model, verify=False, refresh=5)
    optimizer.detach()
    functional.cross_entropy(model(torch.arange(8).reshape(4, 2)), Y[:4]).backward()
    unchanged_by(model, optimizer, "sparse=False")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0}, "damping must be a positive"),
        ({"damping": -1.0}, "damping must be a positive"),
        ({"damping": math.nan}, "damping must be a positive"),
        ({"damping": "auto"}, "number > 0, a Damping or"),
        ({"damping": True}, "number > 0, a Damping or"),
        ({"refresh": 0}, "refresh interval must be an integer ≥ 1"),
        ({"refresh": 2.5}, "refresh interval"),
        ({"lr": -0.1}, "lr must be"),
        ({"lr": math.inf}, "lr must be"),
        ({"lr": "fast"}, "lr must be"),
        ({"fisher": Categorical()}, "fisher must be Sampled"),
        ({"solver": Woodbury}, "must be a Solver"),
        ({"transforms": [0.9]}, "transforms must be"),
    ],
    ids=str,
)
def test_bad_parts_are_refused_at_construction_and_leave_no_hooks(options, message):
    model = network()
    with pytest.raises(ConfigurationError, match=message):
        built(model, **options)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda: KLClip(0), "bound > 0"),
        (lambda: Momentum(1.0), r"decay in \[0, 1\)"),
        (lambda: WeightDecay(-1), "rate ≥ 0"),
        (lambda: WeightDecay(math.nan), "rate ≥ 0"),
        (lambda: compose("model", fisher=Exact(), solver=Woodbury(), damping=1.0, lr=1.0), "torch.nn.Module"),
        (lambda: built(nn.ReLU()), "no trainable parameters"),
    ],
)
def test_parts_check_themselves(part, message):
    with pytest.raises(ConfigurationError, match=message):
        part()


# -- the ladder -------------------------------------------------------------------------------------------------------


class Fragile(Woodbury):
    """Woodbury that fails to factorise as long as told to."""

    def __init__(self, fails):
        object.__setattr__(self, "fails", fails)

    def factorize(self, estimate, damping):
        if self.fails(estimate, damping):
            raise NotPositiveDefiniteError("told to fail")
        return super().factorize(estimate, damping)


def test_a_factorisation_that_fails_is_retried_in_float64():
    model = network().float()
    solver = Fragile(
        lambda estimate, damping: (
            getattr(estimate, "kernel", None) is not None and estimate.kernel.dtype != torch.float64
        )
    )
    optimizer = built(model, solver=solver, fisher=Sampled())
    backward(model, X.float())
    with pytest.warns(CurvatureWarning, match="block '[02]' was factorised in float64"):
        optimizer.step()
    assert optimizer.curvature["0"].failures == 1
    assert optimizer.curvature["0"].inverse.factor.dtype == torch.float32


def test_then_with_more_damping():
    model = network()
    optimizer = built(model, solver=Fragile(lambda estimate, damping: damping < 5))
    with pytest.warns(CurvatureWarning, match="failed in float64; failed with damping 1; with damping 10"):
        steps(model, optimizer, 1)
    assert optimizer.curvature["0"].failures == 1


def test_then_the_last_good_inverse_is_used_and_counted():
    model = network()
    failing = [False]
    optimizer = built(model, solver=Fragile(lambda estimate, damping: failing[0]))
    steps(model, optimizer, 1)
    inverse = optimizer.curvature["0"].inverse
    failing[0] = True
    for count in (1, 2):
        with pytest.warns(CurvatureWarning, match=rf"the inverse of step 0 is used on \({count} failures so far\)"):
            steps(model, optimizer, 1)
    assert optimizer.curvature["0"].inverse is inverse
    failing[0] = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(model, optimizer, 1)
    assert optimizer.curvature["0"].refreshed == 3


def test_then_an_error_names_block_step_and_remedy():
    model = network()
    optimizer = built(model, solver=Fragile(lambda estimate, damping: True))
    backward(model)
    unchanged_by(model, optimizer, "step 0: block '0'.*raise the damping", CurvatureError)


def test_a_users_solver_needs_three_verbs():
    class Identity(Solver):
        def update(self, estimate, factors):
            return (estimate or 0) + len(factors)

        def factorize(self, estimate, damping):
            return damping

        def solve(self, inverse, gradient):
            return {name: value / inverse for name, value in gradient.items()}

    model = network()
    optimizer = built(model, solver=Identity(), fisher=Exact(Gaussian()))
    backward(model)
    before, gradients = values(model), [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    for p, old, gradient in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.5 * gradient / 0.1)
