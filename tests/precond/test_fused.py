"""Gradients as rows: the same steps as with autograd's gradients, without a weight gradient in backward."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import curvlib
from curvlib import Categorical, Empirical, KLClip, Momentum, Sampled, WeightDecay, Woodbury
from curvlib.errors import ConfigurationError, NonFiniteError
from curvlib.precond import Every, GradientClip, Graft, Intervals

SOLVERS = curvlib.solvers


def perceptron():
    return nn.Sequential(
        nn.Linear(20, 18), nn.ReLU(inplace=True), nn.Linear(18, 16, bias=False), nn.Tanh(), nn.Linear(16, 4)
    )


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, stride=2, groups=2),
        nn.GroupNorm(2, 16),
        nn.Flatten(),
        nn.Linear(64, 4),
    )


def sequences():
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.LayerNorm(12), nn.Linear(12, 4), Mean())


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


NETWORKS = {
    "perceptron": (perceptron, (5, 20)),
    "convolutions": (convolutions, (6, 2, 6, 6)),
    "sequences": (sequences, (5, 3, 6)),
}
FISHERS = {"empirical": Empirical, "sum": lambda: Empirical("sum"), "sampled": lambda: Sampled(Categorical())}


def problem(network, seed=0):
    torch.manual_seed(seed)
    build, shape = NETWORKS[network]
    model = build().double()
    return model, torch.randn(4, *shape, dtype=torch.float64), torch.randint(0, 4, (4, shape[0]))


def train(model, xs, ys, reduction="mean", micro=1, **composition):
    optimizer = curvlib.compose(model, lr=0.05, **composition)
    for x, y in zip(xs, ys, strict=True):
        optimizer.zero_grad()
        for part, labels in zip(x.chunk(micro), y.chunk(micro), strict=True):
            share = len(part) / len(x) if reduction == "mean" else 1.0
            (functional.cross_entropy(model(part), labels, reduction=reduction) * share).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("refresh", [1, 2])
@pytest.mark.parametrize(
    "solver", [Woodbury(), SOLVERS.KFAC(), SOLVERS.EKFAC(), SOLVERS.SKFAC()], ids=lambda s: type(s).__name__
)
def test_the_same_steps_as_with_explicit_gradients(network, fisher, refresh, solver):
    patterns = {"*": solver}
    if not isinstance(solver, Woodbury):
        norms = {"convolutions": ("1", "4"), "sequences": ("2",), "perceptron": ()}[network]
        patterns = {**{name: Woodbury() for name in norms}, "*": solver}
    results = []
    for fused in (False, True):
        model, xs, ys = problem(network)
        train(
            model, xs, ys, "sum" if fisher == "sum" else "mean",
            fisher=FISHERS[fisher](), solver=patterns, damping=0.1, refresh=refresh,
            transforms=[KLClip(1e-2), Graft(), Momentum(0.9, nesterov=True), WeightDecay(1e-3)], fused=fused,
        )  # fmt: skip
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-8, atol=1e-10, msg=name)


TRANSFORMS = {
    "none": [],
    "momentum": [Momentum(0.9)],
    "momentum of Nesterov": [Momentum(0.9, nesterov=True)],
    "momentum, decay": [Momentum(0.9), WeightDecay(1e-3)],
    "decay, momentum": [WeightDecay(1e-3), Momentum(0.9)],
    "momentum twice": [Momentum(0.5), Momentum(0.9)],
}


@pytest.mark.parametrize("transforms", TRANSFORMS)
@pytest.mark.parametrize("network", NETWORKS)
def test_directions_that_are_products_are_what_every_transform_expects(network, transforms):
    results = []
    for fused in (False, True):
        model, xs, ys = problem(network)
        optimizer = train(
            model, xs, ys, fisher=Empirical(), solver=Woodbury(), damping=0.1,
            transforms=TRANSFORMS[transforms], fused=fused,
        )  # fmt: skip
        results.append(model.state_dict() | {str(i): s for i, s in enumerate(optimizer.state_dict()["state"].values())})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-8, atol=1e-10, msg=name)


def test_a_step_that_fails_after_its_solve_leaves_momentum_as_it_was(monkeypatch):
    model, xs, ys = problem("perceptron")
    optimizer = train(model, xs, ys, fisher=Empirical(), solver=Woodbury(), damping=0.1, fused=True,
                      transforms=[Momentum(0.9)])  # fmt: skip
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    optimizer.zero_grad()
    functional.cross_entropy(model(xs[0]), ys[0]).backward()

    def fails(*_, **__):
        raise NonFiniteError("as a direction that is looked at may be")

    monkeypatch.setattr("curvlib.precond.optimizer.check_directions", fails)
    with pytest.raises(NonFiniteError):
        optimizer.step()
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_micro_batches_give_the_step_of_the_whole_batch(fisher):
    finals = []
    for micro, fused in ((1, False), (2, True)):
        model, xs, ys = problem("perceptron")
        xs, ys = xs[:, :4], ys[:, :4]
        train(model, xs, ys, micro=micro, fisher=FISHERS[fisher](), solver=Woodbury(), damping=0.1, fused=fused)
        finals.append(model.state_dict())
    for name, value in finals[0].items():
        torch.testing.assert_close(finals[1][name], value, rtol=1e-9, atol=1e-11, msg=name)


def test_backward_makes_no_weight_gradient_and_leaves_the_model_as_it_was():
    model, xs, ys = problem("perceptron")
    optimizer = train(model, xs, ys, fisher=Empirical(), solver=Woodbury(), damping=0.1, fused=True)
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    optimizer.zero_grad()
    functional.cross_entropy(model(xs[0]), ys[0]).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    optimizer.detach()
    assert hooks
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    functional.cross_entropy(model(xs[0]), ys[0]).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("refresh", [1, 3])
@pytest.mark.parametrize("solver", [SOLVERS.KFAC(), SOLVERS.EKFAC(), SOLVERS.SKFAC()], ids=lambda s: type(s).__name__)
def test_kronecker_solvers_take_gradients_as_rows_where_a_batch_is_smaller_than_layers(solver, refresh):
    """K-FAC of a factored gradient: (G⁻¹ Gᵀ)(A A⁻¹) instead of G⁻¹ (Gᵀ A) A⁻¹, in stale steps as well."""
    model, xs, ys = problem("perceptron")
    optimizer = train(
        model, xs, ys, fisher=FISHERS["sampled"](), solver=solver, damping=0.1, refresh=refresh, fused=True
    )
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(model(xs[0]), ys[0]).backward()
        # Five samples are fewer than the columns of these layers.
        assert model[0].weight.grad is None
        assert model[2].weight.grad is None
        optimizer.step()


def test_between_refreshes_gradients_are_explicit_and_at_a_refresh_they_are_rows():
    model, xs, ys = problem("convolutions")
    optimizer = curvlib.compose(
        model, fisher=Empirical(), solver=Woodbury(), damping=0.1, refresh=2, lr=0.05, fused=True
    )
    withheld = []
    for step in range(5):
        optimizer.zero_grad()
        functional.cross_entropy(model(xs[0]), ys[0]).backward()
        withheld.append(model[0].weight.grad is None)
        if step == 2:  # a resumed run goes on in the same way
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.zero_grad()
            functional.cross_entropy(model(xs[0]), ys[0]).backward()
        optimizer.step()
    # The first pass is checked against autograd's gradient.
    assert withheld == [False, False, True, False, True]


def test_blocks_hand_over_in_every_step_again_when_the_refresh_does_so():
    model, xs, ys = problem("convolutions")
    optimizer = curvlib.compose(
        model, fisher=Empirical(), solver=Woodbury(), damping=0.1, refresh=3, lr=0.05, fused=True
    )
    withheld = []
    for step in range(5):
        if step == 3:
            optimizer.refresh = Every(1)
        optimizer.zero_grad()
        functional.cross_entropy(model(xs[0]), ys[0]).backward()
        withheld.append(model[0].weight.grad is None)
        optimizer.step()
    assert withheld == [False, False, False, True, True]


@pytest.mark.parametrize(
    ("refresh", "expected"),
    [
        (Every(3), [False, True, True, True, False, False]),
        (Intervals(1, 2), [False, True, True, False, False, False]),
    ],
)
def test_blocks_stop_handing_over_when_the_refresh_asks_for_less(refresh, expected):
    model, xs, ys = problem("convolutions")
    optimizer = curvlib.compose(model, fisher=Empirical(), solver=Woodbury(), damping=0.1, lr=0.05, fused=True)
    withheld = []
    for step in range(6):
        if step == 3:
            optimizer.refresh = refresh
        optimizer.zero_grad()
        functional.cross_entropy(model(xs[0]), ys[0]).backward()
        withheld.append(model[0].weight.grad is None)
        optimizer.step()
    assert withheld == expected


def test_a_forward_pass_that_fails_leaves_parameters_trainable():
    model, xs, ys = problem("perceptron")
    train(model, xs, ys, fisher=Empirical(), solver=Woodbury(), damping=0.1, fused=True)
    with pytest.raises(RuntimeError):
        model(xs[0][:, :7])
    assert all(p.requires_grad for p in model.parameters())


class Retrying(nn.Module):
    """Tries its layer on what does not fit before it gives it what does."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(20, 6), nn.Linear(6, 4)

    def forward(self, x):
        try:
            self.first(x[:, :-1])
        except RuntimeError:
            hidden = self.first(x)
        return self.second(hidden.relu())


def test_a_module_that_fails_inside_the_model_and_is_called_again():
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        model, (_, xs, ys) = Retrying().double(), problem("perceptron")
        train(model, xs, ys, fisher=Empirical(), solver=Woodbury(), damping=0.1, fused=fused)
        assert all(p.requires_grad for p in model.parameters())
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("first", [False, True], ids=["hook after", "hook first"])
def test_what_a_hook_of_the_user_makes_of_an_output_is_part_of_the_graph(first, fused):
    (model, xs, ys), damping = problem("perceptron"), 0.1

    def hook(module, args, output):
        return 2 * output + args[0].mean(1, keepdim=True)

    if first:
        model[2].register_forward_hook(hook)
    optimizer = curvlib.compose(model, fisher=Empirical(), solver=Woodbury(), damping=damping, lr=1.0, fused=fused)
    if not first:
        model[2].register_forward_hook(hook)
    weight = model[2].weight
    losses = functional.cross_entropy(model(xs[0]), ys[0], reduction="none")
    J = torch.stack([torch.autograd.grad(loss, weight, retain_graph=True)[0].reshape(-1) for loss in losses])
    before, eye = weight.detach().clone(), torch.eye(J.shape[1], dtype=J.dtype)
    truth = torch.linalg.solve(J.T @ J / len(J) + damping * eye, J.mean(0)).view_as(weight)
    optimizer.zero_grad()
    functional.cross_entropy(model(xs[0]), ys[0]).backward()
    optimizer.step()
    torch.testing.assert_close(before - weight.detach(), truth, rtol=1e-9, atol=1e-12)


def test_a_module_called_outside_the_model_adds_its_own_gradient():
    finals = []
    for fused in (False, True):
        model, xs, ys = problem("perceptron")
        optimizer = curvlib.compose(model, fisher=Sampled(), solver=Woodbury(), damping=0.1, lr=0.1, fused=fused)
        for x, y in zip(xs, ys, strict=True):
            optimizer.zero_grad()
            (functional.cross_entropy(model(x), y) + model[0](x).square().mean()).backward()
            optimizer.step()
        finals.append(model.state_dict())
    for name, value in finals[0].items():
        torch.testing.assert_close(finals[1][name], value, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("transform", [GradientClip(1.0), WeightDecay(0.1, coupled=True)])
def test_transforms_of_the_gradient_are_refused(transform):
    with pytest.raises(ConfigurationError, match="fused"):
        curvlib.compose(
            perceptron(), fisher=Empirical(), solver=Woodbury(), damping=0.1, lr=0.1, transforms=[transform], fused=True
        )


def test_rows_that_are_not_finite_leave_everything_as_it_was():
    model, xs, ys = problem("perceptron")
    optimizer = train(model, xs, ys, fisher=Sampled(), solver=SOLVERS.KFAC(), refresh=10, damping=0.1, fused=True)
    before = [p.clone() for p in model.parameters()]
    optimizer.zero_grad()
    (functional.cross_entropy(model(xs[0]), ys[0]) * float("nan")).backward()
    with pytest.raises(curvlib.errors.CaptureError, match="not finite"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
