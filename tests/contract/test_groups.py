"""Parameter groups: learning rate, damping, weight decay, momentum and solver of their own, read at every step."""

import pytest
import torch
from parts import assert_same, backward, composed, moved, network, train, values

import curvlib
from curvlib import Momentum, WeightDecay, Woodbury
from curvlib.errors import ConfigurationError
from curvlib.precond import LevenbergMarquardt, TraceRelative
from curvlib.solvers import KFAC, Dense, Diagonal


def test_parameters_without_a_group_make_the_last_one():
    model = network()
    optimizer = composed(model, groups=[{"blocks": "4", "lr": 0.1}, {"params": model[0].parameters(), "damping": 2.0}])
    assert [group["params"] for group in optimizer.param_groups] == [
        list(model[4].parameters()), list(model[0].parameters()), list(model[2].parameters())
    ]  # fmt: skip
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5, 0.5]
    assert [group["damping"] for group in optimizer.param_groups] == [0.1, 2.0, 0.1]


def test_each_group_has_its_own_numbers():
    """Every block steps as it does in an optimizer that has its group's numbers for all blocks."""
    options = {"transforms": [Momentum(0.5), WeightDecay(0.0)]}
    own = {"0": {"lr": 0.1}, "2": {"damping": 3.0, "momentum": 0.9}, "4": {"weight_decay": 0.2}}
    model = network()
    optimizer = composed(model, **options, groups=[{"blocks": block, **given} for block, given in own.items()])
    start = network()
    for step in range(3):
        before = values(model)
        train(model, optimizer)
        if step:
            continue  # networks differ from the second step on
        for block, given in own.items():
            alone = network()
            alone.load_state_dict(start.state_dict())
            given = {**given}
            transforms = [Momentum(given.pop("momentum", 0.5)), WeightDecay(given.pop("weight_decay", 0.0))]
            train(alone, composed(alone, transforms=transforms, **given))
            for name, p in alone[int(block)].named_parameters():
                torch.testing.assert_close(p, model[int(block)].get_parameter(name), rtol=1e-12, atol=1e-14)
    # The momentum of the second step is the group's.
    buffers = {name: optimizer.state[p]["Momentum.momentum"] for name, p in model.named_parameters()}
    assert all(bool(buffer.any()) for buffer in buffers.values())
    assert moved(model, before) == set(before)


def test_momentum_and_decay_of_a_group_act_at_every_step():
    model, twin = network(), network()
    optimizer = composed(model, transforms=[Momentum(0.0), WeightDecay(0.0)])
    other = composed(twin, transforms=[Momentum(0.9, nesterov=False), WeightDecay(0.1)])
    for group in optimizer.param_groups:
        group["momentum"], group["weight_decay"] = 0.9, 0.1
    train(model, optimizer, 4)
    train(twin, other, 4)
    assert_same(model, twin)


@pytest.mark.parametrize("nesterov", [False, True])
def test_groups_of_different_momentum_are_independent(nesterov):
    gradient, parameters = [torch.ones(2), torch.ones(3)], [torch.ones(2), torch.ones(3)]
    groups = ({"momentum": 0.5, "weight_decay": 0.1}, {"momentum": None, "weight_decay": 0.0})
    context = curvlib.precond.Context(parameters, gradient, [1.0, 1.0], 0, groups=groups)
    buffers = {"momentum": [torch.full((2,), 2.0), torch.full((3,), 2.0)]}
    moves = Momentum(0.25, nesterov=nesterov).apply(gradient, context, buffers)
    expected = [1 + 0.5 * 2.0 if nesterov else 2.0, 1 + 0.25 * 1.5 if nesterov else 1.5]
    assert [move.tolist() for move in moves] == [[expected[0]] * 2, [expected[1]] * 3]
    decayed = WeightDecay(7.0).apply(gradient, context, {})
    assert [move.unique().tolist() for move in decayed] == [pytest.approx([1.1]), [1.0]]


def test_a_changed_damping_factorises_the_same_estimate_again():
    model, twin = network(), network()
    optimizer = composed(model, refresh=100, groups=[{"blocks": "2"}])
    train(model, optimizer)
    estimates = {name: state.estimate for name, state in optimizer.curvature.items()}
    optimizer.param_groups[0]["damping"] = 0.7
    model.load_state_dict(network().state_dict())
    train(model, optimizer)
    assert all(state.estimate is estimates[name] for name, state in optimizer.curvature.items())
    assert {name: state.damping for name, state in optimizer.curvature.items()} == {"0": 0.1, "2": 0.7, "4": 0.1}
    train(twin, composed(twin, refresh=100, damping={"2": 0.7, "*": 0.1}))
    assert_same(model, twin, rtol=1e-12, atol=1e-14)


def test_a_damping_for_all_reaches_all_groups():
    model = network()
    optimizer = composed(model, groups=[{"blocks": "2", "damping": 5.0}])
    optimizer.damping = 0.3
    assert [group["damping"] for group in optimizer.param_groups] == [0.3, 0.3]
    optimizer.damping = TraceRelative(0.1)
    assert [group["damping"] for group in optimizer.param_groups] == [None, None]
    optimizer.param_groups[0]["damping"] = 0.4
    train(model, optimizer)
    assert optimizer.curvature["2"].damping == 0.4
    assert optimizer.curvature["0"].damping != optimizer.curvature["4"].damping


def test_a_policy_serves_the_groups_without_a_number():
    model = network()
    optimizer = composed(model, damping=LevenbergMarquardt(0.5, every=1), groups=[{"blocks": "0", "damping": 2.0}])
    optimizer.step(lambda: (optimizer.zero_grad(), backward(model))[1])
    assert {name: state.damping for name, state in optimizer.curvature.items()} == {"0": 2.0, "2": 0.5, "4": 0.5}
    assert optimizer.damping.state() != 0.5


def test_a_group_has_a_solver_of_its_own():
    model, twin = network(), network()
    optimizer = composed(model, groups=[{"blocks": ["0", "2"], "solver": Diagonal()}])
    other = composed(twin, solver={"4": Woodbury(), "*": Diagonal()})
    train(model, optimizer, 3)
    train(twin, other, 3)
    assert_same(model, twin)
    assert optimizer.solvers == {"0": Diagonal(), "2": Diagonal(), "4": Woodbury()}


def test_a_new_solver_begins_with_the_next_rows_and_the_others_go_on():
    model = network()
    optimizer = composed(model, refresh=100, groups=[{"blocks": "2"}])
    train(model, optimizer, 2)
    kept = optimizer.curvature["0"]
    optimizer.param_groups[0]["solver"] = KFAC()
    train(model, optimizer)
    assert optimizer.solvers == {"0": Woodbury(), "2": KFAC(), "4": Woodbury()}
    assert optimizer.curvature["2"].refreshed == 2
    assert optimizer.curvature["0"].estimate is kept.estimate
    assert optimizer.curvature["0"].inverse is kept.inverse
    train(model, optimizer)
    assert optimizer.curvature["2"].refreshed == 2
    assert not optimizer._capture.armed


def test_a_solver_named_between_forward_and_step_waits_for_rows():
    model = network()
    optimizer = composed(model, refresh=100)
    train(model, optimizer)
    optimizer.zero_grad()
    backward(model)
    optimizer.param_groups[0]["solver"] = Dense()
    optimizer.step()
    assert optimizer.solvers["0"] == Woodbury()
    train(model, optimizer)
    assert optimizer.solvers["0"] == Dense()


def test_one_block_may_have_two_learning_rates_but_one_curvature():
    model, twin = network(), network()
    biases = [name for name, _ in model.named_parameters() if "bias" in name]
    optimizer = composed(model, groups=[{"params": biases, "lr": 0.0}])
    before = values(model)
    train(model, optimizer)
    assert moved(model, before) == set(before) - set(biases)
    train(twin, composed(twin))
    assert_same({n: p for n, p in values(model).items() if n not in biases},
                {n: p for n, p in values(twin).items() if n not in biases})  # fmt: skip
    optimizer.param_groups[0]["damping"] = 9.0
    before = values(model)
    optimizer.zero_grad()
    backward(model)
    with pytest.raises(ConfigurationError, match=r"block '0' are in groups with different values of 'damping'"):
        optimizer.step()
    assert moved(model, before) == set()


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({}, "either 'params' or 'blocks'"),
        ({"blocks": "9"}, r"nothing matches \['9'\]; the blocks are \['0', '2', '4'\]"),
        ({"params": []}, "has no parameters"),
        ({"params": ["0.wait"]}, "'0.wait', which the model does not have"),
        ({"params": torch.nn.Parameter(torch.ones(2))}, r"one of shape \(2,\), which the model does not have"),
        ({"blocks": "0", "wait_decay": 0.1}, r"unknown options \['wait_decay'\]"),
        ({"blocks": "0", "lr": -1.0}, "lr must be a finite number"),
        ({"blocks": "0", "damping": 0.0}, "damping must be a positive finite number"),
        ({"blocks": "0", "damping": TraceRelative(0.1)}, "for a policy write damping="),
        ({"blocks": "0", "weight_decay": 0.1}, "no WeightDecay is among the transforms"),
        ({"blocks": "0", "momentum": 1.5}, r"momentum must be a number in \[0, 1\)"),
        ({"blocks": "0", "solver": "kfac"}, "must be a Solver"),
        ({"blocks": "0", "maximize": 1}, "True or False"),
    ],
)
def test_groups_that_nobody_could_follow_are_refused(group, message):
    with pytest.raises(ConfigurationError, match=message):
        composed(network(), groups=[group])
    optimizer = composed(network(), only=["2", "4"])
    before = dict(optimizer.param_groups[0])
    if "blocks" not in message:
        with pytest.raises(ConfigurationError, match=message.split(";")[0]):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0].keys() == before.keys()


def test_an_option_written_later_is_checked_before_anything_moves():
    model = network()
    optimizer = composed(model)
    train(model, optimizer)
    for option, value, message in [
        ("weight_decay", 0.1, "no WeightDecay"),
        ("damping", -1, "damping"),
        ("lr", "x", "lr"),
    ]:
        before = optimizer.param_groups[0][option]
        optimizer.param_groups[0][option] = value
        at = values(model)
        optimizer.zero_grad()
        backward(model)
        with pytest.raises(ConfigurationError, match=message):
            optimizer.step()
        assert moved(model, at) == set()
        optimizer.param_groups[0][option] = before
