"""What a block says of its Kronecker form beforehand is what its rows turn out to have."""

import pytest
import torch
from test_every_module import CASES, CLASSES, PARAMETRISED
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

import curvlib
from curvlib.errors import ConfigurationError
from curvlib.layers import partition
from curvlib.testing.truth import Probe
from curvlib.testing.variants import Inputs


def has_form(factors):
    try:
        factors.kronecker_rows()
    except ConfigurationError:
        return False
    return True


def told_and_found(module, args, output=None, sample_axis=0, kwargs=(), frozen=()):
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in frozen)
    inputs = Inputs.of(args, dict(kwargs), sample_axis)
    probe = Probe(module, inputs.samples, sample_axis, output)
    told = {block.name: block.kronecker for block in partition(probe).blocks}
    rows = curvlib.collect(
        probe, curvlib.Empirical("sum"), *inputs.args, kwargs=inputs.kwargs, loss=torch.sum, verify=False
    )
    return told, {name: has_form(factors) for name, factors in rows.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "number"), [case for case in PARAMETRISED if case[0] in CLASSES])
def test_every_module_of_torch(name, number):
    case = CASES[name][number]
    torch.manual_seed(number)
    options = {key: value for key, value in case.options.items() if key in ("output", "sample_axis", "kwargs")}
    told, found = told_and_found(case.build(), case.inputs(), **options)
    assert told == found


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4, 4))

    def forward(self, x):
        return x @ self.gain


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("build", "frozen", "expected"),
    [
        (Gain, (), False),
        (lambda: weight_norm(nn.Linear(4, 4)), (), False),
        (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), (), False),
        (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), (), False),
        (lambda: nn.Linear(4, 4), ("weight",), True),
        (lambda: nn.Linear(4, 4), ("bias",), True),
        (lambda: nn.RNNCell(4, 4), ("weight_hh", "bias_hh"), True),
    ],
)
def test_other_modules(build, frozen, expected):
    told, found = told_and_found(build(), (torch.randn(5, 4),), frozen=frozen)
    assert list(told.values()) == list(found.values()) == [expected]
