"""What becomes of parameters outside every block."""

import copy

import pytest
import torch
from loop import backward, built, network, same, steps, values
from torch import nn

from curvlib import WeightDecay
from curvlib.errors import ConfigurationError, CurvatureError, UncoveredParameterError


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(5, dtype=torch.float64))
        self.body = network()

    def forward(self, x):
        return self.body(x + self.shift)


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


@pytest.mark.parametrize("rest", ["sgd", "adamw", "freeze"])
def test_a_gradient_that_is_not_finite_is_refused_between_refreshes_too(rest):
    model = Bare()
    optimizer = built(model, rest=rest, refresh=5)
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    backward(model)
    # Frozen parameters may have one as well, of a loss that was not the optimizer's.
    target = model.body[0].weight if rest == "freeze" else model.shift
    target.grad.view(-1)[0] = float("nan")
    before = values(model)
    with pytest.raises(CurvatureError, match="not finite"):
        optimizer.step()
    assert same(values(model), before)
