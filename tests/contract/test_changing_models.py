"""Parameters that come, are frozen and are unfrozen while training goes on."""

import pytest
import torch
from parts import X, Y, assert_same, backward, composed, moved, network, train, values
from torch import nn

import curvlib
from curvlib import Empirical, Exact, Momentum, Sampled, Woodbury
from curvlib.errors import CaptureError, ConfigurationError, UncoveredParameterError
from curvlib.solvers import KFAC

FISHERS = [Exact(), Empirical(), Sampled()]


def estimates(optimizer):
    return {name: (state.estimate, state.refreshed) for name, state in optimizer.curvature.items()}


@pytest.mark.parametrize("fisher", FISHERS, ids=str)
def test_a_frozen_layer_stays_and_comes_back(fisher):
    model = network()
    optimizer = composed(model, fisher=fisher, refresh=100)
    train(model, optimizer, 2)
    kept = estimates(optimizer)
    model[2].requires_grad_(False)
    before = values(model)
    train(model, optimizer, 2)
    assert moved(model, before) == {"0.weight", "0.bias", "4.weight", "4.bias"}
    assert estimates(optimizer) == {name: kept[name] for name in ("0", "4")}
    model[2].requires_grad_(True)
    before = values(model)
    train(model, optimizer)
    assert moved(model, before) == set(before)
    assert {name: state.refreshed for name, state in optimizer.curvature.items()} == {"0": 0, "2": 4, "4": 0}
    assert estimates(optimizer)["0"] == kept["0"]
    train(model, optimizer)
    assert optimizer.curvature["2"].refreshed == 4


@pytest.mark.parametrize("fisher", FISHERS[:2], ids=str)
def test_steps_are_those_of_an_optimizer_composed_of_what_is_trainable(fisher):
    """Freezing, unfreezing, half of a block: with curvature taken anew each step the past leaves no trace."""
    model, twin = network(), network()
    optimizer = composed(model, fisher=fisher)
    for frozen in ([], ["0.weight", "0.bias"], ["2.bias"], ["0.weight", "4.bias"], []):
        for one in (model, twin):
            for name, p in one.named_parameters():
                p.requires_grad_(name not in frozen)
        train(model, optimizer)
        with composed(twin, fisher=fisher) as fresh:
            train(twin, fresh)
        assert_same(model, twin, rtol=1e-12, atol=1e-14)


def test_frozen_at_first_and_unfrozen_later():
    model = network()
    model[0].requires_grad_(False)
    optimizer = composed(model, refresh=100, solver=KFAC(), transforms=[Momentum(0.9)])
    assert list(optimizer.curvature) == ["2", "4"]
    train(model, optimizer, 2)
    model[0].requires_grad_(True)
    before = values(model)
    train(model, optimizer)
    assert moved(model, before) == set(before)
    assert {name: state.refreshed for name, state in optimizer.curvature.items()} == {"0": 2, "2": 0, "4": 0}


def test_everything_frozen_is_no_error_until_something_shall_move():
    model = network()
    optimizer = composed(model)
    train(model, optimizer)
    model.requires_grad_(False)
    model(X)
    model.requires_grad_(True)
    before = values(model)
    train(model, optimizer)
    assert moved(model, before) == set(before)


def test_one_network_block_of_what_is_trainable():
    model, twin = network(), network()
    optimizer = composed(model, blocks="network")
    train(model, optimizer)
    train(twin, composed(twin, blocks="network"))
    for one in (model, twin):
        one[2].requires_grad_(False)
    train(model, optimizer)
    with composed(twin, blocks="network") as fresh:
        train(twin, fresh)
    assert_same(model, twin, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("fisher", FISHERS[:2], ids=str)
def test_freezing_between_micro_batches(fisher):
    """A layer that was frozen for a micro-batch has no rows and no gradient in it."""
    model = network()
    optimizer = composed(model, fisher=fisher)
    model[2].requires_grad_(False)
    backward(model, X[:6], Y[:6], 0.5)
    model[2].requires_grad_(True)
    backward(model, X[6:], Y[6:], 0.5)
    optimizer.step()
    estimate = optimizer.curvature["2"].estimate
    whole = optimizer.curvature["0"].estimate
    alone = network()
    other = composed(alone, fisher=fisher)
    backward(alone, X[6:], Y[6:])
    other.step()
    expected = other.curvature["2"].estimate
    rows = (estimate.kernel, expected.kernel) if hasattr(estimate, "kernel") else (estimate.matrix, expected.matrix)
    torch.testing.assert_close(rows[0], 0.5 * rows[1])
    assert whole is not None


def test_freezing_half_of_a_block_between_micro_batches_is_refused_and_changes_nothing():
    model = network()
    optimizer = composed(model)
    train(model, optimizer)
    before, curvature = values(model), estimates(optimizer)
    optimizer.zero_grad()
    backward(model, X[:6], Y[:6], 0.5)
    model[2].bias.requires_grad_(False)
    backward(model, X[6:], Y[6:], 0.5)
    with pytest.raises(CaptureError, match=r"block '2' was frozen or unfrozen in part between .*\.zero_grad\(\)"):
        optimizer.step()
    assert moved(model, before) == set()
    assert {name: curvature[name] for name in ("0", "4")} == {name: estimates(optimizer)[name] for name in ("0", "4")}
    train(model, optimizer)
    assert moved(model, before) == set(before) - {"2.bias"}


# -- new parameters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", FISHERS, ids=str)
def test_a_new_module_joins(fisher):
    model = network()
    optimizer = composed(model, fisher=fisher, refresh=100, solver={"4": KFAC(), "*": Woodbury()})
    train(model, optimizer, 2)
    kept = estimates(optimizer)
    model.append(nn.Linear(3, 3).double())
    before = values(model)
    train(model, optimizer)
    assert moved(model, before) == set(before) - {"5.weight", "5.bias"}
    optimizer.add_param_group({"params": model[5].parameters(), "lr": 0.1, "damping": 2.0})
    before = values(model)
    train(model, optimizer)
    assert moved(model, before) == set(before)
    assert {name: estimates(optimizer)[name] for name in kept} == kept
    assert (optimizer.curvature["5"].refreshed, optimizer.curvature["5"].damping) == (3, 2.0)
    # A checkpoint of the larger optimizer fits one that was composed of the larger model.
    twin = network().append(nn.Linear(3, 3).double())
    twin.load_state_dict(model.state_dict())
    other = composed(twin, fisher=fisher, refresh=100, only=["0", "2", "4"], solver={"4": KFAC(), "*": Woodbury()})
    other.add_param_group({"blocks": "5"})
    other.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 2)
    train(twin, other, 2)
    assert_same(model, twin)


def test_a_group_that_cannot_join_leaves_everything():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()

        def forward(self, x):
            return self.body(x + getattr(self, "shift", 0.0))

    model = Bare()
    optimizer = composed(model)
    train(model, optimizer)
    curvature = estimates(optimizer)
    model.shift = nn.Parameter(torch.zeros(5).double())
    for group, error, message in [
        ({"params": model.body[0].weight}, ConfigurationError, "in another group"),
        ({"params": nn.Parameter(torch.ones(2))}, ConfigurationError, "which the model does not have"),
        ({"params": [model.shift]}, UncoveredParameterError, "no block covers the parameters 'shift'"),
    ]:
        with pytest.raises(error, match=message):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
        assert estimates(optimizer) == curvature
    train(model, optimizer)


def test_half_of_a_block_cannot_join():
    model = network()
    with pytest.raises(ConfigurationError, match=r"\['bias'\] of them are not this optimizer's"):
        composed(model, only=["0.weight"])
    optimizer = composed(model, only="4")
    with pytest.raises(ConfigurationError, match=r"block '2' have one curvature"):
        optimizer.add_param_group({"params": ["2.weight"]})
    assert list(optimizer.curvature) == ["4"]


@pytest.mark.parametrize("rest", ["sgd", "fallback", "freeze", "adamw"])
def test_bare_parameters_that_are_unfrozen(rest):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(5).double(), requires_grad=False)
            self.body = network()

        def forward(self, x):
            return self.body(x + self.shift)

    model = Bare()
    optimizer = composed(model, rest=rest)
    train(model, optimizer)
    model.shift.requires_grad_(True)
    before = values(model)
    if rest == "adamw":
        with pytest.raises(ConfigurationError, match=r"\['shift'\] lie outside every block; rest='adamw'"):
            train(model, optimizer)
        return
    train(model, optimizer)
    assert ("shift" in moved(model, before)) == (rest != "freeze")


def test_unfreezing_a_bare_parameter_of_an_unknown_fate_is_an_error():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(5).double(), requires_grad=False)
            self.body = network()

        def forward(self, x):
            return self.body(x + self.shift)

    model = Bare()
    optimizer = composed(model)
    train(model, optimizer)
    model.shift.requires_grad_(True)
    with pytest.raises(UncoveredParameterError, match="'shift'"):
        model(X)
    model.shift.requires_grad_(False)
    train(model, optimizer)


@pytest.mark.parametrize("fisher", [Empirical(), Sampled()], ids=str)
def test_freezing_under_fused(fisher):
    finals = []
    for fused in (False, True):
        model = nn.Sequential(nn.Linear(20, 18), nn.ReLU(), nn.Linear(18, 16), nn.Tanh(), nn.Linear(16, 4)).double()
        torch.manual_seed(0)
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
        x, y = torch.randn(5, 20).double(), torch.arange(5) % 4
        optimizer = curvlib.compose(model, fisher=fisher, solver=Woodbury(), damping=0.1, lr=0.1, fused=fused)
        train(model, optimizer, 2, x, y)
        model[0].requires_grad_(False)
        before = values(model)
        train(model, optimizer, 2, x, y)
        assert moved(model, before) == set(before) - {"0.weight", "0.bias"}
        model[0].requires_grad_(True)
        train(model, optimizer, 2, x, y)
        finals.append(values(model))
    assert_same(*finals, rtol=1e-9, atol=1e-11)
