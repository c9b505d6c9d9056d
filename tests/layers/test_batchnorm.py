"""BatchNorm: exact in eval mode; in training mode shares of the gradient at the activations, checked as such."""

from contextlib import nullcontext

import pytest
import torch
from one_layer import assert_same, check_algebra, check_layer, numbers, prepared
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import curvlib
from curvlib.errors import CaptureError
from curvlib.layers import channels, fallback, register
from curvlib.layers.batchnorm import saved_statistics
from curvlib.layers.channels import batch_rows
from curvlib.solvers import Diagonal

INPUTS = {
    "vectors": (nn.BatchNorm1d, numbers(5, 3)),
    "sequences": (nn.BatchNorm1d, numbers(5, 3, 4)),
    "images": (nn.BatchNorm2d, numbers(5, 3, 2, 4)),
    "images, channels_last": (nn.BatchNorm2d, numbers(5, 3, 2, 4).to(memory_format=torch.channels_last)),
    "volumes": (nn.BatchNorm3d, numbers(5, 3, 2, 2, 1)),
    "larger images": (nn.BatchNorm2d, numbers(5, 3, 4, 5)),
    "larger images, channels_last": (nn.BatchNorm2d, numbers(5, 3, 4, 5).to(memory_format=torch.channels_last)),
    "larger volumes": (nn.BatchNorm3d, numbers(5, 3, 2, 3, 4)),
}
FISHERS = (curvlib.Exact(), curvlib.Sampled(samples=2), curvlib.Empirical())


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("frozen", [[], ["weight"], ["bias"]])
def test_running_statistics(name, frozen):
    kind, x = INPUTS[name]
    check_layer(prepared(kind(3, eps=0.1).eval(), frozen), x)


def test_synchronised_batch_norm_in_eval_mode():
    check_layer(prepared(nn.SyncBatchNorm(3).eval()), numbers(5, 3, 4))


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}, {"momentum": None, "eps": 0.1}])
@pytest.mark.parametrize("training", [True, False])
def test_batch_statistics(name, options, training):
    kind, x = INPUTS[name]
    if not training and "track_running_stats" not in options:
        return
    layer = prepared(kind(3, **options).train(training))
    model = nn.Sequential(layer, nn.Flatten(), nn.Sigmoid())
    fisher = curvlib.Sampled(curvlib.Gaussian(), samples=2)
    cotangents = fisher.cotangents(model(x).detach(), torch.Generator().manual_seed(3))
    factors = curvlib.collect(model, fisher, x, generator=torch.Generator().manual_seed(3))["0"]
    # Written out: x̂ of the whole batch, the cotangent of each activation times it, summed over positions.
    flat = x.reshape(5, 3, -1)
    centred = flat - flat.mean((0, 2), keepdim=True)
    normalized = centred / (centred.square().mean((0, 2), keepdim=True) + layer.eps).sqrt()
    outputs = layer.weight[:, None] * normalized + layer.bias[:, None]
    slope = (outputs.sigmoid() * (1 - outputs.sigmoid())).detach()
    g = cotangents.reshape(2, 5, 3, -1) * slope
    rows = torch.cat([(g * normalized).sum(3), g.sum(3)], dim=2).transpose(0, 1).flatten(0, 1)
    check_algebra(factors, rows)


@pytest.mark.parametrize("offset", [0.0, 10.0, 1e3, 1e5])
def test_sums_around_a_mean_far_from_zero_are_as_exact_as_batch_norm_itself(offset):
    x, g = offset + numbers(8, 3, 5, 7), numbers(8, 2, 3, 5, 7)

    def normalized(x):
        return functional.batch_norm(x, None, None, training=True, eps=1e-5)

    truth = torch.einsum("nkcij,ncij->nkc", g, normalized(x)).flatten(0, 1)
    torch.testing.assert_close(batch_rows(x, g, 1e-5, "weight", None).values["weight"], truth, rtol=1e-8, atol=1e-8)
    x, g = x.float(), g.float()
    truth = torch.einsum("nkcij,ncij->nkc", g.double(), normalized(x.double())).flatten(0, 1)
    theirs = torch.einsum("nkcij,ncij->nkc", g, normalized(x)).flatten(0, 1)
    rows = batch_rows(x, g, 1e-5, "weight", None).values["weight"]
    assert rows.dtype == torch.float32
    assert torch.linalg.norm(rows - truth) <= 2 * torch.linalg.norm(theirs - truth) + 1e-6 * torch.linalg.norm(truth)


def test_a_channel_without_variance_has_finite_rows():
    x = torch.full((4, 2, 3, 6), 7.0)
    x[:, 1] = numbers(4, 3, 6).float()
    rows = batch_rows(x, numbers(4, 1, 2, 3, 6).float(), 1e-5, "weight", "bias").values["weight"]
    assert rows.isfinite().all()
    assert rows[:, 0].abs().max() < 1e-2


class Block(nn.Module):
    """A residual block: convolutions, batch norms, an in-place activation."""

    def __init__(self, width, affine=True):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm, self.last = (nn.BatchNorm2d(width, affine=affine) for _ in range(2))

    def forward(self, x):
        h = torch.relu_(self.norm(self.first(x)))
        return torch.relu(x + self.last(self.second(h)))


def residual(affine=True):
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(inplace=True))
    tail = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))
    return nn.Sequential(stem, Block(3, affine), tail).double()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("fisher", FISHERS, ids=lambda fisher: type(fisher).__name__)
def test_rows_of_a_residual_network_add_up_to_the_gradient(affine, fisher):
    model, x, y = residual(affine), numbers(6, 1, 6, 6), torch.arange(6) % 4
    loss = lambda outputs: functional.cross_entropy(outputs, y)  # noqa: E731
    generator = torch.Generator().manual_seed(1)
    blocks = curvlib.collect(model, fisher, x, loss=loss, generator=generator)
    outputs = model(x)
    if isinstance(fisher, curvlib.Empirical):
        columns, scale = torch.autograd.grad(loss(outputs), outputs, retain_graph=True)[0][None], 1 / 6
    else:
        columns, scale = fisher.cotangents(outputs.detach(), torch.Generator().manual_seed(1)), 1.0
    expected_blocks = {
        name for name, module in model.named_modules() if module._parameters and list(module.parameters())
    }
    assert set(blocks) == expected_blocks
    for name, factors in blocks.items():
        parameters = dict(model.get_submodule(name).named_parameters())
        for column, cotangent in enumerate(columns):
            truth = torch.autograd.grad(outputs, list(parameters.values()), cotangent, retain_graph=True)
            chosen = factors.row_weights(0.0).reshape(6, -1)
            chosen[:, column] = scale
            sums = factors.rmatvec(chosen.reshape(-1))
            for parameter, gradient in zip(parameters, truth, strict=True):
                assert_same(sums[parameter], gradient)


@pytest.mark.parametrize("fisher", FISHERS, ids=lambda fisher: type(fisher).__name__)
def test_a_residual_network_trains(fisher):
    model, x = residual(), numbers(24, 1, 6, 6)
    y = (4 * (x.mean((1, 2, 3)).argsort().argsort()) / 24).long()
    optimizer = curvlib.compose(model, fisher=fisher, solver=curvlib.Woodbury(), damping=0.1, lr=0.3)
    losses = []
    for _ in range(12):
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


class Centred(nn.Module):
    """Mixes samples by hand."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(1, 2, 4))

    def forward(self, x):
        return self.gain * (x - x.mean(0))


@pytest.mark.parametrize(
    "layers",
    [
        lambda: (nn.Linear(4, 4), Centred(), nn.Linear(4, 3)),
        lambda: (nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), Centred(), nn.Linear(4, 3)),
        lambda: (nn.Linear(4, 4), nn.BatchNorm1d(4).eval(), Centred(), nn.Linear(4, 3)),
        lambda: (nn.BatchNorm1d(4), nn.Linear(4, 4), Centred(), nn.Linear(4, 3)),
    ],
)
def test_samples_mixed_by_hand_are_refused_where_no_batch_norm_follows(layers):
    torch.manual_seed(0)
    with pytest.raises(CaptureError, match="mixes samples outside any module known to do so"):
        curvlib.collect(nn.Sequential(*layers()).double(), curvlib.Exact(), numbers(6, 4))


def test_a_batch_norm_on_the_data_couples_nothing():
    """Its own rows and those of all layers after it are per-sample gradients with the statistics held fixed."""
    norm = prepared(nn.BatchNorm1d(4, track_running_stats=False))
    model = nn.Sequential(norm, nn.Linear(4, 3)).double()
    x = numbers(6, 4)
    still = nn.Sequential(prepared(nn.BatchNorm1d(4)), model[1]).eval()
    still[0].running_mean.copy_(x.mean(0))
    still[0].running_var.copy_(x.var(0, unbiased=False))
    for mine, theirs in zip(
        *(curvlib.collect(net, curvlib.Exact(), x).values() for net in (model, still)), strict=True
    ):
        assert_same(mine.dense().matrix(), theirs.dense().matrix())


def test_a_wrong_adapter_before_a_batch_norm_is_found_out(monkeypatch):
    from curvlib.layers import registry

    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))
    right = registry._ADAPTERS[nn.Linear].function
    register(nn.Linear, columns=True, replace=True)(lambda layer, x, g: right(layer, 2 * x, g))
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    with pytest.raises(CaptureError, match="block '0'.*do not add up"):
        curvlib.collect(model, curvlib.Exact(), numbers(6, 4))


def test_a_user_declares_what_couples_samples(monkeypatch):
    from curvlib.layers import registry

    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))
    register(Centred, couples_samples=True)(lambda layer, x, g: curvlib.factors.Dense(gain=g * (x - x.mean(0))))
    model = nn.Sequential(nn.Linear(4, 4), Centred(), nn.Linear(4, 3)).double()
    x = numbers(6, 4)
    blocks = curvlib.collect(model, curvlib.Sampled(), x, generator=torch.Generator().manual_seed(0))
    outputs = model(x)
    cotangent = curvlib.Sampled().cotangents(outputs.detach(), torch.Generator().manual_seed(0))[0]
    for name, factors in blocks.items():
        parameters = dict(model.get_submodule(name).named_parameters())
        truth = torch.autograd.grad(outputs, list(parameters.values()), cotangent, retain_graph=True)
        for gradient, total in zip(truth, factors.rmatvec(factors.row_weights(1.0)).values(), strict=True):
            assert_same(total, gradient)


def test_rows_of_a_batch_can_be_differentiated():
    x, g = numbers(4, 3, 5, 5).requires_grad_(), (numbers(4, 1, 3, 5, 5) + 1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, g: tuple(batch_rows(x, g, 1e-5, "weight", "bias").values.values()), (x, g)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_saved_statistics_are_those_of_the_batch(dtype, eps):
    layer, x = nn.BatchNorm2d(3, eps=eps).to(dtype), (3 + 2 * numbers(4, 3, 5, 7)).to(dtype)
    mean, inverse = saved_statistics(layer, layer(x))
    assert (mean.dtype, inverse.dtype, mean.requires_grad, inverse.requires_grad) == (dtype, dtype, False, False)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(inverse, (x.var((0, 2, 3), correction=0) + eps).rsqrt())
    g = numbers(4, 2, 3, 5, 7).to(dtype)
    ours = batch_rows(x, g, eps, "weight", "bias", (mean, inverse)).values
    for name, rows in batch_rows(x, g, eps, "weight", "bias").values.items():
        torch.testing.assert_close(ours[name], rows)


def test_a_step_takes_the_statistics_that_were_saved(monkeypatch):
    monkeypatch.setattr(channels, "_statistics", lambda x, eps: pytest.fail("computed again"))
    model, x, y = residual(), numbers(6, 1, 6, 6), torch.arange(6) % 4
    optimizer = curvlib.compose(model, fisher=curvlib.Empirical(), solver=curvlib.Woodbury(), damping=1.0, lr=0.1)
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("kind", [nn.BatchNorm2d(3).eval(), nn.BatchNorm2d(3, affine=False), nn.Identity()])
def test_no_statistics_where_autograd_saved_none(kind):
    x = numbers(4, 3, 5, 7).float()
    assert saved_statistics(kind if isinstance(kind, nn.BatchNorm2d) else nn.BatchNorm2d(3), kind(x)) is None


@pytest.mark.parametrize("hooks", ["checkpoint", "saved on the cpu"])
def test_hooks_for_saved_tensors_are_left_in_peace(hooks):
    """Tensors that a checkpoint would compute again, or that lie elsewhere, are not looked at."""
    rows = []
    for hooked in (False, True):
        model, x, y = residual(), numbers(6, 1, 6, 6), torch.arange(6) % 4
        calls = []
        model[1].register_forward_pre_hook(lambda module, args, calls=calls: calls.append(1))

        def forward(x, model=model):
            return model[2](checkpoint(model[1], model[0](x), use_reentrant=False))

        optimizer = curvlib.compose(
            model, fisher=curvlib.Empirical(), solver=curvlib.Woodbury(), damping=1.0, lr=0.1, verify=False
        )
        if hooked and hooks == "checkpoint":
            model.forward = forward
        with save_on_cpu() if hooked and hooks != "checkpoint" else nullcontext():
            loss = functional.cross_entropy(model(x), y)
        assert len(calls) == 1
        loss.backward()
        optimizer.step()
        rows.append(dict(model.named_parameters()))
    for name, value in rows[0].items():
        torch.testing.assert_close(rows[1][name], value, msg=name)


@pytest.mark.parametrize("solver", [curvlib.Woodbury(), Diagonal()])
def test_a_change_of_mode_before_rows_are_made_is_refused(solver):
    """Rows of a solver that keeps them explicitly are made inside backward, those of others in the step."""
    moved = []
    for when in ("never", "after backward", "before backward"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
        optimizer = curvlib.compose(model, fisher=curvlib.Empirical(), solver=solver, damping=1.0, lr=0.1)
        loss = functional.cross_entropy(model(numbers(6, 4)), torch.arange(6) % 3)
        model.train(when != "before backward")
        loss.backward()
        model.train(when == "never")
        if when == "before backward" or (when == "after backward" and not solver.keeps_rows):
            with pytest.raises(CaptureError, match="block '1'.*between training and eval mode"):
                optimizer.step()
            continue
        optimizer.step()
        moved.append(model.state_dict())
    for name, value in moved[0].items():
        assert torch.equal(value, moved[-1][name])


def test_batch_statistics_inside_the_fallback_are_refused(monkeypatch):
    from curvlib.layers import registry

    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))

    class Tower(nn.Sequential):
        pass

    register(Tower)(fallback)
    for options in ({}, {"track_running_stats": False}):
        tower = Tower(nn.Linear(4, 4), nn.BatchNorm1d(4, **options))
        with pytest.raises(CaptureError, match="Tower"):
            curvlib.collect(nn.Sequential(tower, nn.Linear(4, 3)).double(), curvlib.Exact(), numbers(6, 4))
