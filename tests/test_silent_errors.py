"""What other libraries get wrong without a word: curvlib's answer, the truth by autograd, and the wrong formula."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from truth import Preset, assert_close, network

import curvlib
from curvlib import Categorical, Empirical, Exact, Gaussian

TOLERANCE = 1e-9


class Last(nn.Module):
    """All outputs as one axis."""

    def forward(self, x):
        return torch.sin(x).flatten(1)


class Twice(nn.Module):
    """One layer applied twice."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


def numbers(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def collected(model, x):
    return curvlib.collect(model, Exact(Gaussian()), x)


def jacobian(model, x, parameters=None):
    """Rows (sample, output) of the named parameters, each sample through the model and autograd alone."""
    parameters = list(model.parameters()) if parameters is None else list(parameters)
    rows = []
    for i in range(len(x)):
        for output in model(x[i : i + 1])[0]:
            found = torch.autograd.grad(output, parameters, retain_graph=True)
            rows.append(torch.cat([gradient.flatten() for gradient in found]))
    return torch.stack(rows)


def loss_gradients_alone(model, x, y):
    """Rows of the cross-entropy of each sample alone."""
    losses = [functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]) for i in range(len(x))]
    found = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    return torch.stack([torch.cat([gradient.flatten() for gradient in gradients]) for gradients in found])


def inputs_and_cotangents(model, layer, x):
    """The layer's inputs by call, and the cotangents of its outputs for every output: ``(n, outputs, *output)``."""
    calls = []
    handle = layer.register_forward_hook(lambda module, args, output: calls.append((args[0].detach(), output)))
    outputs = model(x)
    handle.remove()
    by_call = [
        torch.stack(
            [torch.autograd.grad(outputs[:, o].sum(), result, retain_graph=True)[0] for o in range(outputs.shape[1])],
            dim=1,
        )
        for _, result in calls
    ]
    return [given for given, _ in calls], by_call


def off(given, truth):
    """Relative error."""
    return float((given - truth).norm() / truth.norm())


# -- convolutions -----------------------------------------------------------------------------------------------------


def test_groups_have_factors_of_their_own_where_others_average_over_them():
    conv = network(nn.Conv2d(4, 6, 2, groups=2, bias=False))
    model, x = nn.Sequential(conv, nn.Flatten()), numbers(1, 4, 2, 2)
    J = jacobian(model, x)
    truth = J.T @ J
    (factors,) = collected(model, x).values()
    assert_close(factors.covariance() / factors.normalizer, truth, tolerance=TOLERANCE)
    assert factors.size == sum(p.numel() for p in model.parameters()) == truth.shape[0]

    apart = factors.kronecker_rows()
    blocks = [torch.kron(g.T @ g, a.T @ a / len(a)) for a, g in zip(apart.inputs, apart.cotangents, strict=True)]
    assert_close(torch.block_diag(*blocks), truth, tolerance=TOLERANCE)

    averaged = x.reshape(1, 2, -1).mean(1)
    theirs = torch.kron(torch.eye(6, dtype=x.dtype), averaged.T @ averaged)
    assert theirs.shape == truth.shape
    assert off(theirs, truth) > 0.5


def test_dilation_is_read():
    model = nn.Sequential(network(nn.Conv2d(2, 3, 2, dilation=2, bias=False)), Last())
    x = numbers(3, 2, 5, 5)
    (factors,) = collected(model, x).values()
    J = jacobian(model, x)
    assert_close(factors.gram(), J @ J.T, tolerance=TOLERANCE)

    def second_moment(dilation):
        patches = functional.unfold(x, 2, dilation=dilation).transpose(1, 2).flatten(0, 1)
        return patches.T @ patches / len(patches)

    ours = factors.kronecker_rows().inputs[0]
    assert_close(ours.T @ ours / len(ours), second_moment(dilation=2), tolerance=TOLERANCE)
    assert off(second_moment(dilation=1), second_moment(dilation=2)) > 0.3


@pytest.mark.parametrize(("space", "exact_elsewhere"), [(2, True), (3, False)])
def test_sums_of_positions_are_not_the_gram(space, exact_elsewhere):
    model, x = nn.Sequential(network(nn.Conv2d(2, 3, 2, bias=False)), Last()), numbers(4, 2, space, space)
    J = jacobian(model, x)
    truth = J @ J.T
    (factors,) = collected(model, x).values()
    assert_close(factors.gram(), truth, tolerance=TOLERANCE)

    _, (g,) = inputs_and_cotangents(model, model[0], x)
    patches = functional.unfold(x, 2).transpose(1, 2)
    columns = g.shape[1]
    inputs = torch.einsum("npi,mpi->nm", patches, patches).repeat_interleave(columns, 0).repeat_interleave(columns, 1)
    rows = g.flatten(0, 1).flatten(2)
    theirs = inputs * torch.einsum("rop,sop->rs", rows, rows)
    assert (off(theirs, truth) < TOLERANCE) == exact_elsewhere
    if not exact_elsewhere:
        assert off(theirs, truth) > 0.1


# -- weights that are shared ------------------------------------------------------------------------------------------


def test_tied_uses_are_added_before_they_are_multiplied():
    model, x = nn.Sequential(network(Twice(nn.Linear(4, 4, bias=False))), Last()), numbers(5, 4)
    J = jacobian(model, x)
    (factors,) = collected(model, x).values()
    assert_close(factors.gram(), J @ J.T, tolerance=TOLERANCE)

    inputs, cotangents = inputs_and_cotangents(model, model[0].layer, x)
    uses = [
        torch.einsum("nco,ni->ncoi", g, a).flatten(0, 1).flatten(1) for a, g in zip(inputs, cotangents, strict=True)
    ]
    assert_close(sum(uses), J, tolerance=TOLERANCE)
    theirs = sum(rows @ rows.T for rows in uses)
    assert off(theirs, J @ J.T) > 0.05


def test_positions_of_a_sequence_are_no_samples():
    model, x = nn.Sequential(network(nn.Linear(4, 3, bias=False)), Last()), numbers(5, 6, 4)
    model = nn.Sequential(model, network(nn.Linear(18, 2))).requires_grad_(False)
    model[0][0].requires_grad_(True)
    J = jacobian(model, x, model[0][0].parameters())
    (factors,) = collected(model, x).values()
    assert_close(factors.covariance(), J.T @ J, tolerance=TOLERANCE)

    _, (g,) = inputs_and_cotangents(model, model[0][0], x)
    flattened = torch.einsum("ncpo,npi->ncpoi", g, x).flatten(0, 2).flatten(1)
    assert off(flattened.T @ flattened, J.T @ J) > 0.1


# -- layers that are skipped ------------------------------------------------------------------------------------------

SKIPPED = {
    "LayerNorm": (lambda: network(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)), numbers(5, 4)),
    "BatchNorm2d": (
        lambda: network(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3)).eval(),
        numbers(5, 2, 3, 3),
    ),
    "Embedding": (
        lambda: network(nn.Embedding(6, 3), nn.Flatten(), nn.Tanh(), nn.Linear(6, 3)),
        torch.arange(10).reshape(5, 2) % 6,
    ),
    "Conv1d": (lambda: network(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Tanh(), nn.Linear(9, 3)), numbers(5, 2, 4)),
}


@pytest.mark.parametrize("layer", SKIPPED)
def test_no_layer_is_skipped(layer):
    build, x = SKIPPED[layer]
    model = build()
    J = jacobian(model, x)
    truth = J @ J.T
    taken = collected(model, x)
    assert_close(sum(factors.gram() for factors in taken.values()), truth, tolerance=TOLERANCE)

    known = [name for name in taken if isinstance(model.get_submodule(name), nn.Linear | nn.Conv2d)]
    assert layer in {type(model.get_submodule(name)).__name__ for name in set(taken) - {*known}}
    assert off(sum(taken[name].gram() for name in known), truth) > 0.01


# -- scale ------------------------------------------------------------------------------------------------------------


def test_repeating_the_batch_leaves_the_curvature_where_a_mean_loss_shrinks_it():
    model = network(nn.Linear(4, 3))
    x, y = numbers(2, 4), torch.tensor([0, 2])

    def curvature(times):
        loss = lambda out: functional.cross_entropy(out, y.repeat(times))  # noqa: E731
        (factors,) = curvlib.collect(model, Empirical(), x.repeat(times, 1), loss=loss).values()
        return factors.covariance() / factors.normalizer

    def trace_of_cotangents(times):
        outputs = model(x.repeat(times, 1))
        (g,) = torch.autograd.grad(functional.cross_entropy(outputs, y.repeat(times)), outputs)
        return float((g.T @ g / len(g)).trace())

    alone = loss_gradients_alone(model, x, y)
    for times in (1, 4, 16):
        assert_close(curvature(times), alone.T @ alone / 2, tolerance=TOLERANCE)
        assert trace_of_cotangents(times) == pytest.approx(trace_of_cotangents(1) / times**2)


# -- what is recorded -------------------------------------------------------------------------------------------------


def test_eval_mode_has_curvature_where_recording_stops_with_training():
    model, x = network(nn.Linear(4, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3)).eval(), numbers(5, 4)
    recorded = []
    handles = [m.register_forward_hook(lambda m, *_: recorded.append(m) if m.training else None) for m in model]
    taken = collected(model, x)
    for handle in handles:
        handle.remove()
    assert not recorded
    for name, factors in taken.items():
        J = jacobian(model, x, model.get_submodule(name).parameters())
        assert_close(factors.gram(), J @ J.T, tolerance=TOLERANCE)


class Attention(nn.Module):
    """Self-attention and a head."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("training", [True, False])
def test_attention_has_curvature_though_its_inner_layer_is_never_called(training):
    model, x = network(Attention()).train(training), numbers(3, 5, 4)
    called = []
    handle = model.attention.out_proj.register_forward_hook(lambda *_: called.append(1))
    taken = collected(model, x)
    handle.remove()
    assert not called
    parameters = dict(model.attention.named_parameters())
    assert sorted(taken["attention"].shapes) == sorted(parameters)
    J = jacobian(model, x, [parameters[name] for name in taken["attention"].shapes])
    assert_close(taken["attention"].gram(), J @ J.T, tolerance=TOLERANCE)


def test_a_bare_layer_is_a_model_where_names_are_taken_from_children():
    model, x = network(nn.Linear(4, 3)), numbers(5, 4)
    assert not [name for name, _ in model.named_modules() if name]
    J = jacobian(model, x)
    taken = collected(model, x)
    assert list(taken) == ["Linear"]
    assert_close(taken["Linear"].gram(), J @ J.T, tolerance=TOLERANCE)


def test_in_place_activations_leave_the_rows_where_module_hooks_fail():
    model, x = network(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)), numbers(5, 4)
    for name, factors in collected(model, x).items():
        J = jacobian(model, x, model.get_submodule(name).parameters())
        assert_close(factors.gram(), J @ J.T, tolerance=TOLERANCE)

    hooked = copy.deepcopy(model)
    hooked[0].register_full_backward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="view was created inside a custom Function"):
        hooked(x).sum().backward()


@pytest.mark.parametrize("kl_clip", [None, 1e-4])
def test_no_kl_clip_is_a_natural_gradient_step(kl_clip):
    model, x, y = network(nn.Linear(4, 3)), numbers(5, 4), torch.arange(5) % 3
    rows = loss_gradients_alone(model, x, y)
    damped = rows.T @ rows / len(x) + 0.1 * torch.eye(15, dtype=x.dtype)
    natural = torch.linalg.solve(damped, rows.mean(0))
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    constant = {"lr": 0.5, "damping": 0.1, "momentum": 0.0, "weight_decay": 0.0}
    optimizer = curvlib.TENGraD(model, **constant, kl_clip=kl_clip, likelihood=Preset(Categorical(), [y]))
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.detach()
    step = start - torch.cat([p.detach().flatten() for p in model.parameters()])
    if kl_clip is None:
        assert_close(step, 0.5 * natural, tolerance=TOLERANCE)
        with pytest.raises(TypeError):
            min(1.0, (kl_clip / float(natural @ rows.mean(0))) ** 0.5)
    else:
        factor = float(step @ natural / (natural @ natural))
        assert_close(step, factor * natural, tolerance=TOLERANCE)
        assert 0 < factor < 0.4
