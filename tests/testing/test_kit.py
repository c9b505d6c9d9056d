"""The kit passes what is right, and says what is wrong where something is."""

import dataclasses

import pytest
import torch
from torch import nn

import curvlib
from curvlib.errors import ConfigurationError
from curvlib.factors import Dense, Factors, OuterProduct, Plan, SharedOuter
from curvlib.layers import ConvolutionFactors, register, registry
from curvlib.testing import VARIANTS, ConformanceError, check_adapter, check_factors


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))


class Scale(nn.Module):
    """y = gain · x + shift, a layer that is not in torch."""

    def __init__(self, width):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return self.gain * x + self.shift


class Project(nn.Module):
    """A linear map without a name that the registry knows."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in))

    def forward(self, x):
        return x @ self.weight.T


def scale(layer, x, g):
    rows = {"gain": g * x, "shift": g}
    return Dense({name: r for name, r in rows.items() if getattr(layer, name).requires_grad})


def images(*shape):
    torch.manual_seed(1)
    return torch.randn(*shape)


RIGHT = {
    "linear": (nn.Linear(4, 3), images(5, 4)),
    "linear without bias": (nn.Linear(4, 3, bias=False), images(5, 4)),
    "linear on sequences": (nn.Linear(4, 3), images(5, 6, 4)),
    "groups and dilation": (nn.Conv2d(4, 6, (2, 3), groups=2, dilation=(1, 2), stride=2), images(3, 4, 7, 8)),
    **{
        f"{mode} padding": (nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode), images(3, 2, 4, 5))
        for mode in ("zeros", "reflect", "replicate", "circular")
    },
    "three axes": (nn.Conv3d(2, 2, 2), images(3, 2, 3, 3, 3)),
    "layer norm": (nn.LayerNorm(4), images(5, 3, 4)),
    "fallback": (Scale(4), images(5, 4)),
    "several blocks": (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Scale(4)), images(5, 4)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes_every_variant(name):
    module, x = RIGHT[name]
    before = {key: value.clone() for key, value in module.state_dict().items()}
    report = check_adapter(module, x)
    assert not report.skipped
    assert len(report.checked) >= 10
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_custom_layer_passes_by_its_own_adapter():
    register(Scale)(scale)
    report = check_adapter(Scale(4), images(5, 4))
    assert report.adapters == {"module": "scale"}
    assert {"gain frozen", "shift frozen", "applied twice", "mean loss", "bfloat16"} <= set(report.checked)
    assert check_adapter(Scale(4), images(5, 4), variants=["sum"]).checked == ["summed loss"]


def test_rows_take_the_routes_of_a_plan():
    plan = Plan(timed=True)
    check_adapter(nn.Conv1d(2, 3, 2), images(5, 2, 4), variants=["float64"], plan=plan)
    assert {key.question for key in plan.measured} == {"rows", "gram"}


def test_samples_on_another_axis():
    check_adapter(nn.Linear(4, 3), images(6, 5, 4), sample_axis=1)
    with pytest.raises(ConfigurationError, match=r"2 entries for 1 input tensors.*\(6, 5, 4\)"):
        check_adapter(nn.Linear(4, 3), images(6, 5, 4), sample_axis=[1, None])
    with pytest.raises(ConfigurationError, match="without 5 samples on axis 0: pass output="):
        check_adapter(nn.Linear(4, 3), images(6, 5, 4), sample_axis=[1])
    with pytest.raises(ConfigurationError, match="variants .'float16'. are unknown"):
        check_adapter(nn.Linear(4, 3), images(5, 4), variants=["float16"])


def wrong_scale(layer, x, g):
    return Dense(gain=2 * g * x, shift=g)


def dropped_bias(layer, x, g):
    return Dense(gain=g * x)


def zeroed_bias(layer, x, g):
    return Dense(gain=g * x, shift=0 * g)


def permuted(layer, x, g):
    return Dense(gain=(g * x).flip(0), shift=g.flip(0))


def single(layer, x, g):
    return Dense(gain=(g * x).float(), shift=g)


def broken(layer, x, g):
    raise TypeError("what is this?")


def changes_the_module(layer, x, g):
    layer.gain.data.mul_(2)
    return scale(layer, x, g)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (wrong_scale, r"Scale \(variant 'float64, one column', block 'module', adapter 'wrong_scale', parameter 'gain'"
                      r"\): rows .*is off by .*worst at \[\d, \d\].*all of it is 2 times"),
        (dropped_bias, r"returned rows for parameters \{'gain'.*'shift'"),
        (zeroed_bias, r"parameter 'shift'\): rows .* is off by .*; all of it is zero"),
        (permuted, r"rows are the expected ones in another order, \[4, 3, 2, 1, 0\]"),
        (single, "rows of torch.float32 on cpu; its cotangents are torch.float64"),
        (broken, "capture raises CaptureError.*adapter broken.*TypeError: what is this"),
        (changes_the_module, "parameter 'module.gain' or its .grad was changed"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)  # fmt: skip
def test_wrong_adapters_are_found_out(adapter, message):
    register(Scale)(adapter)
    with pytest.raises(ConformanceError, match=message):
        check_adapter(Scale(4), images(5, 4))


def test_ignoring_what_is_frozen_is_found_out():
    register(Scale)(lambda layer, x, g: Dense(gain=g * x, shift=g))
    with pytest.raises(ConformanceError, match="variant 'gain frozen'.*returned rows for parameters"):
        check_adapter(Scale(4), images(5, 4))


def test_a_wrong_order_of_columns_is_found_out():
    def columns_first(layer, x, g):
        rows = (g * x[:, None]).transpose(0, 1).reshape(-1, x.shape[1])
        return Dense(gain=rows, shift=g.transpose(0, 1).reshape(-1, x.shape[1]))

    register(Scale, columns=True)(columns_first)
    with pytest.raises(ConformanceError, match="three columns.*in another order, .0, 3, 6, 9, 12, 1"):
        check_adapter(Scale(4), images(5, 4))


def test_positions_summed_separately_are_found_out():
    register(Project)(lambda layer, x, g: OuterProduct(x.sum(1), g.sum(1)))
    with pytest.raises(ConformanceError, match="parameter 'weight'.*rows"):
        check_adapter(Project(4, 3), images(5, 6, 4))


def test_a_wrong_gram_over_right_rows_is_found_out():
    class Separately(SharedOuter):
        def gram(self):
            a, g = self.inputs.sum(1).flatten(1), self.cotangents.sum(2).flatten(0, 1).flatten(1)
            return (a @ a.T).repeat_interleave(len(g) // len(a), 0).repeat_interleave(len(g) // len(a), 1) * (g @ g.T)

    register(Project)(lambda layer, x, g: Separately(x[:, :, None], g[:, :, None], weight_shape=(3, 4)))
    with pytest.raises(ConformanceError, match=r"Gram J Jᵀ is off by .* worst at \[\d, \d\]"):
        check_adapter(Project(4, 3), images(5, 6, 4))


def test_coupled_and_random_modules_are_refused_unless_announced():
    coupled = nn.BatchNorm1d(4, track_running_stats=False)
    with pytest.raises(ConformanceError, match="pass coupled=True.*output of sample 0, run alone"):
        check_adapter(coupled, images(5, 4))
    with pytest.raises(ConformanceError, match="differs from call to call: switch dropout off"):
        check_adapter(nn.Sequential(nn.Linear(4, 4), nn.Dropout()), images(5, 4))
    with pytest.raises(ConformanceError, match="itself cannot be run on these inputs"):
        check_adapter(nn.Linear(4, 3), images(5, 5))

    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.body = nn.Parameter(torch.zeros(4)), nn.Linear(4, 3)

        def forward(self, x):
            return self.body(x + self.token)

    with pytest.raises(ConformanceError, match="leaves the parameters .'module.token'. outside every block"):
        check_adapter(Token(), images(5, 4))


# -- Factors ----------------------------------------------------------------------------------------------------------


def rows_of(library="torch", *shape, phase=0.0):
    pattern = torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64)
    values = torch.cos(pattern * pattern + phase).reshape(shape)
    return values if library == "torch" else values.numpy()


KINDS = {
    "dense": lambda lib: Dense(weight=rows_of(lib, 6, 3, 2), bias=rows_of(lib, 6, 3, phase=1)),
    "outer": lambda lib: OuterProduct(rows_of(lib, 4, 3), rows_of(lib, 4, 2, 2), bias="bias"),
    "outer, bias alone": lambda lib: OuterProduct(rows_of(lib, 4, 3), rows_of(lib, 4, 2), weight=None, bias="bias"),
    "shared": lambda lib: SharedOuter(rows_of(lib, 4, 5, 2, 3), rows_of(lib, 4, 5, 2, 2), (4, 3), bias="bias"),
    "sum": lambda lib: OuterProduct(rows_of(lib, 4, 3), rows_of(lib, 4, 2), bias="b").add(
        Dense(weight=rows_of(lib, 4, 2, 3))
    ),
}


@pytest.mark.parametrize("library", ["torch", "numpy"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kinds_of_the_library_pass(kind, library):
    check_factors(KINDS[kind](library))


def test_convolution_factors_pass():
    check_factors(
        ConvolutionFactors(
            rows_of("torch", 3, 4, 5, 5), rows_of("torch", 3, 2, 6, 4, 4), (6, 2, 2, 2), (1, 1), (1, 1), 2, bias="bias"
        )
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Mine(Factors):
    """A kind with `dense` alone; the tests below break one operation each."""

    half: torch.Tensor

    def dense(self):
        return Dense(weight=2 * self.half, samples=self.samples)


class WrongDiagonal(Mine):
    def diagonal(self):
        return {"weight": self.dense().values["weight"].square().mean(0)}


class WrongTransposed(Mine):
    def rmatvec(self, weights):
        return {"weight": self.half.mul(2).flip(0).flatten(1).mT.mul(weights).sum(1).reshape(self.half.shape[1:])}


class ForgetsSamples(Mine):
    def scaled(self, scale):
        return Dense(weight=self.dense().scaled(scale).values["weight"]).with_samples(1)


class Raises(Mine):
    def cat(self, others):
        raise KeyError("lost")


class NoCompact(Mine):
    def compact(self):
        return self.dense().scaled(1.01)


class KeepsItsGram(Mine):
    def gram(self):
        if "kept" not in vars(self):
            object.__setattr__(self, "kept", super().gram())
        return self.kept


class GivesTheWeights(Mine):
    def rmatvec(self, weights):
        return {"weight": weights}


class GivesOneNumber(Mine):
    def rmatvec(self, weights):
        return {"weight": super().rmatvec(weights)["weight"][:1].expand(self.half.shape[1:])}


def test_a_kind_with_dense_alone_passes():
    check_factors(Mine(rows_of("torch", 5, 2, 3)))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (WrongDiagonal, r"WrongDiagonal factors: diagonal\(\) of JᵀJ is off by .*all of it is 0.2 times"),
        (WrongTransposed, r"rmatvec \(Jᵀ w\) is off by"),
        (ForgetsSamples, r"normalizer of scaled\(weights\) is 1, expected 5"),
        (Raises, "cat raises KeyError"),
        (NoCompact, r"rows of compact\(\) is off by .* 1.01 times"),
    ],
)
def test_a_wrong_operation_of_a_kind_is_named(kind, message):
    with pytest.raises(ConformanceError, match=message):
        check_factors(kind(rows_of("torch", 5, 2, 3)))


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (KeepsItsGram(torch.randn(4, 3).double()), r"gram\(\) after its last result was changed is off"),
        (GivesTheWeights(torch.eye(4).double() / 2), "rmatvec is no new array: who changes it changes the factors or"),
        (GivesOneNumber(torch.ones(4, 3).double()), "rmatvec is no new array that may be changed"),
    ],
)
def test_results_that_are_no_new_arrays_are_found_out(factors, message):
    with pytest.raises(ConformanceError, match=message):
        check_factors(factors)


def test_a_wrong_kronecker_pair_is_found_out():
    class Halved(OuterProduct):
        def kronecker(self, *options):
            pair = super().kronecker(*options)
            return dataclasses.replace(pair, inputs=pair.inputs / 2)

    register(Project)(lambda layer, x, g: Halved(x, g))
    with pytest.raises(ConformanceError, match=r"one sample, one column.*Kronecker product A ⊗ G.* 0.5 times"):
        check_adapter(Project(4, 3), images(5, 4))


def test_the_kit_is_public():
    assert curvlib.testing.VARIANTS == VARIANTS
