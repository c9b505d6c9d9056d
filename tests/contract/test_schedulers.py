"""Every scheduler of torch drives the optimizer as it drives SGD."""

import inspect

import pytest
import torch
from parts import backward, composed, network, train
from torch.optim import lr_scheduler, swa_utils

from curvlib import Momentum


def _sequential(optimizer):
    first, second = lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)
    return lr_scheduler.SequentialLR(optimizer, [first, second], milestones=[2])


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.25, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": _sequential,
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=3),
}


def test_the_table_has_every_scheduler():
    theirs = {
        name for name in lr_scheduler.__all__ if inspect.isclass(getattr(lr_scheduler, name)) and name != "LRScheduler"
    }
    assert theirs <= SCHEDULERS.keys()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_rates_and_momenta_are_those_that_sgd_gets(name):
    model, twin = network(), network()
    optimizer = composed(model, transforms=[Momentum(0.9)], groups=[{"blocks": "0", "lr": 0.25}])
    groups = [{"params": twin[0].parameters(), "lr": 0.25}, {"params": twin[2:].parameters()}]
    sgd = torch.optim.SGD(groups, lr=0.5, momentum=0.9)
    pairs = [(one, SCHEDULERS[name](one), whose) for one, whose in ((optimizer, model), (sgd, twin))]
    history = {id(optimizer): [], id(sgd): []}
    for _ in range(6):
        for one, scheduler, whose in pairs:
            history[id(one)].append([(group["lr"], group["momentum"]) for group in one.param_groups])
            train(whose, one)
            scheduler.step(*[1.0] * (name == "ReduceLROnPlateau"))
    assert history[id(optimizer)] == history[id(sgd)]
    assert len({step[0] for step in history[id(sgd)]}) > 1


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_momentum_is_cycled_where_there_is_one_and_refused_where_there_is_none(name):
    model = network()
    optimizer = composed(model, transforms=[Momentum(0.9)])
    SCHEDULERS[name](optimizer)
    start = optimizer.param_groups[0]["momentum"]
    optimizer.zero_grad()
    backward(model)
    optimizer.step()
    first = optimizer.state[model[0].weight]["Momentum.momentum"].clone()
    optimizer.param_groups[0]["lr"] = 0.0  # the parameters stay, so the direction stays
    optimizer.step()
    second = optimizer.state[model[0].weight]["Momentum.momentum"]
    torch.testing.assert_close(second, first * (1 + start))
    with pytest.raises(ValueError, match="must support momentum"):
        SCHEDULERS[name](composed(network()))


def test_a_warm_up_of_the_damping_is_a_scheduler_of_the_users():
    model = network()
    optimizer = composed(model, refresh=100)
    for damping in (1.0, 0.5, 0.25):
        optimizer.param_groups[0]["damping"] = damping
        train(model, optimizer)
        assert {state.damping for state in optimizer.curvature.values()} == {damping}
    assert {state.refreshed for state in optimizer.curvature.values()} == {0}


def test_averaged_models_are_copies_without_hooks():
    model = network()
    optimizer = composed(model)
    average = swa_utils.AveragedModel(model)
    train(model, optimizer, 2)
    average.update_parameters(model)
    before = optimizer._capture._used
    backward(average)  # curvature is of the model, not of its copy
    assert optimizer._capture._used == before == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in average.modules())
    loader = [torch.randn(4, 5, dtype=torch.float64)]
    swa_utils.update_bn(loader, average)
