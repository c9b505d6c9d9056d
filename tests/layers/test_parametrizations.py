"""Weights that are computed from other parameters: rows of these, never of the weight."""

import pytest
import torch
from per_sample import assert_exact, numbers, randomized
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import curvlib
from curvlib.errors import CaptureError
from curvlib.layers import partition

N = 4


class LowRank(nn.Module):
    """weight + b a, the weight frozen."""

    def __init__(self, weight):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(2, weight.shape[1])), nn.Parameter(torch.ones(weight.shape[0], 2))

    def forward(self, weight):
        return weight + (self.b @ self.a)


def low_rank(layer, name="weight"):
    parametrize.register_parametrization(layer, name, LowRank(getattr(layer, name)))
    layer.parametrizations[name].original.requires_grad_(False)
    return layer


COMPUTED = {
    "weight norm": (parametrizations.weight_norm, ["original0", "original1"]),
    "spectral norm": (parametrizations.spectral_norm, ["original"]),
    "orthogonal": (parametrizations.orthogonal, ["original"]),
    "cayley": (lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley"), ["original"]),
    "low rank": (low_rank, ["0.a", "0.b"]),
}


def lazily(build, training):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), build(nn.Linear(4, 4)), nn.LazyLinear(2))
    model(torch.zeros(1, 3))
    return randomized(model).train(training)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", COMPUTED)
def test_parametrized_linear_layers(name):
    build, originals = COMPUTED[name]
    model = lazily(build, training=False)
    taken = assert_exact(model, numbers(N, 3))["2"]
    assert sorted(taken.shapes) == sorted([f"parametrizations.weight.{one}" for one in originals] + ["bias"])
    model[2].bias.requires_grad_(False)
    assert_exact(model, numbers(N, 3))


def test_a_frozen_original_leaves_the_bias():
    model = lazily(parametrizations.weight_norm, training=False)
    model[2].parametrizations.requires_grad_(False)
    assert list(assert_exact(model, numbers(N, 3))["2"].shapes) == ["bias"]


def test_spectral_norm_in_training_mode_is_exact_and_iterates_once_a_forward_pass():
    model, twin = (lazily(parametrizations.spectral_norm, training=True) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    x = numbers(N, 3)
    factors = curvlib.collect(model, curvlib.Exact(curvlib.Gaussian()), x)["2"]
    twin(x)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)
    assert model[2].parametrizations.weight[0].training
    rows = assert_exact(model.eval(), x)["2"]  # eval mode uses the vectors that this forward pass left
    torch.testing.assert_close(
        curvlib.collect(model, curvlib.Exact(curvlib.Gaussian()), x)["2"].gram(), factors.gram(), rtol=1e-10, atol=1e-12
    )
    assert len(rows) == N


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_parametrized_convolution_recurrence_and_attention():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = parametrizations.weight_norm(nn.Conv1d(2, 4, 3))
            self.rnn = parametrizations.weight_norm(nn.GRU(4, 4, batch_first=True), "weight_hh_l0")
            self.attention = low_rank(nn.MultiheadAttention(4, 2, batch_first=True), "in_proj_weight")
            low_rank(self.attention.out_proj)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            h = self.rnn(self.conv(x).transpose(1, 2))[0]
            return self.head(self.attention(h, h, h)[0].sum(1))

    taken = assert_exact(randomized(Model()), numbers(N, 2, 6))
    assert "out_proj.parametrizations.weight.0.a" in taken["attention"].shapes


def test_one_parametrization_for_two_layers_is_one_block():
    shared = LowRank(torch.ones(4, 4))
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    for layer in (first, second):
        parametrize.register_parametrization(layer, "weight", shared)
    model = randomized(nn.Sequential(first, nn.Tanh(), second, nn.Linear(4, 2)))
    assert [*assert_exact(model, numbers(N, 4))] == ["0", "3"]


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize(
    ("build", "names"),
    [
        (nn.utils.weight_norm, ["bias", "weight_g", "weight_v"]),
        (nn.utils.spectral_norm, ["bias", "weight_orig"]),
        (lambda layer: prune.random_unstructured(layer, "weight", amount=0.5), ["bias", "weight_orig"]),
    ],
    ids=["weight norm", "spectral norm", "pruning"],
)
def test_weights_computed_by_hooks(build, names):
    model = lazily(build, training=False)
    model[2].hooked = True
    taken = assert_exact(model, numbers(N, 3))["2"]
    assert sorted(taken.shapes) == names
    assert model(numbers(N, 3)).isfinite().all()
    assert type(model[2].weight) is torch.Tensor
    copy = model[2].weight + 0  # no leftover of torch.func
    assert copy.shape == (4, 4)


def test_a_module_that_updates_its_buffers_in_every_call_is_refused_and_left_as_it_was():
    model = lazily(nn.utils.spectral_norm, training=True)
    twin = lazily(nn.utils.spectral_norm, training=True)
    twin.load_state_dict(model.state_dict())
    x = numbers(N, 3)
    with pytest.raises(CaptureError, match="changes its buffers .*weight_u.*eval mode"):
        curvlib.collect(model, curvlib.Exact(), x)
    twin(x)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_adapters_of_parametrized_layers_keep_their_options():
    adapters = [
        block.uses[0].adapter for block in partition(lazily(parametrizations.weight_norm, training=False)).blocks
    ]
    assert [adapter.name for adapter in adapters] == ["linear", "linear through parametrizations", "linear"]
    assert all(adapter.columns and adapter.positionwise and adapter.closed_form for adapter in adapters)
