"""Explicit rows are made while backward goes, which lets what they are made of go, and change nothing else."""

import gc
import warnings
from weakref import ref

import pytest
import torch
from torch import nn
from torch.nn import functional

import curvlib
from curvlib import CaptureError, Empirical, Sampled, Woodbury
from curvlib.capture.records import Record
from curvlib.factors import Plan, Route


def build():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 36, 3)).double()


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 2, 8, 8, generator=generator, dtype=torch.float64), torch.arange(6) % 3


def composed(model, fisher=None, **options):
    options = {"fused": True} | options
    return curvlib.compose(
        model, fisher=Empirical() if fisher is None else fisher, solver=Woodbury(), damping=0.1, lr=0.05, **options
    )


def step(model, optimizer, **backward):
    x, y = batch()
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward(**backward)
    optimizer.step()


def recorded():
    """Calls that are recorded and not yet let go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at some objects is deprecated
        return [one for one in gc.get_objects() if isinstance(one, Record) and (one.inputs or one.made is not None)]


def test_inputs_and_cotangents_of_explicit_rows_are_gone_after_backward():
    model = build()
    optimizer = composed(model)
    step(model, optimizer)
    x, y = batch()
    optimizer.zero_grad()
    loss = functional.cross_entropy(model(x), y)
    assert all(one.inputs for one in recorded())
    loss.backward()
    held = recorded()
    explicit = [one for one in held if one.made is not None]
    assert {shape for one in explicit for shape in one.made.shapes.values()} == {(4, 2, 3, 3), (4, 4, 3, 3), (4,)}
    assert all(not one.inputs and one.cotangents == [None] for one in explicit)
    # Rows of a Linear are its input and its cotangent, and stay so.
    assert [one.places[0].shape for one in held if one.inputs] == [(6, 3)]
    rows = ref(next(iter(explicit[0].made.values.values())))
    del explicit, held
    optimizer.step()
    assert not recorded()  # though the loss, and with it the graph, is still there
    optimizer.curvature.clear()
    assert rows() is None


FISHERS = {"empirical": Empirical, "sampled": lambda: Sampled(curvlib.Categorical())}


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_kept_graph_gives_the_same_steps(fisher):
    finals = []
    for kept in (False, True):
        model = build()
        optimizer = composed(model, FISHERS[fisher]())
        for _ in range(3):
            step(model, optimizer, retain_graph=kept)
        finals.append(model.state_dict())
    for name, value in finals[0].items():
        torch.testing.assert_close(finals[1][name], value, rtol=1e-10, atol=1e-12)


def test_two_backward_passes_through_a_kept_graph_add_up():
    model = build()
    optimizer = composed(model)
    step(model, optimizer)
    x, y = batch()
    gradients = []
    for twice in (False, True):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        if twice:
            (loss / 3).backward(retain_graph=True)
        (loss * (2 / 3 if twice else 1)).backward()
        handed = optimizer._capture.taken().gradients
        gradients.append({name: rows.factors.rmatvec(rows.factors.row_weights(1.0)) for name, rows in handed.items()})
    assert gradients[0].keys() == gradients[1].keys() == {"0", "3", "6"}
    for name, one in gradients[0].items():
        for inner, value in one.items():
            torch.testing.assert_close(gradients[1][name][inner], value, rtol=1e-10, atol=1e-12)


def test_a_second_backward_through_a_graph_that_was_not_kept_is_refused():
    """Autograd itself notices only where the graph kept something for its gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten()).double()
    optimizer = composed(model)
    x, _ = batch()
    for _ in range(2):
        optimizer.zero_grad()
        outputs = model(x)
        outputs.sum().backward()
    with pytest.raises(CaptureError, match=r"retain_graph=True"):
        outputs.sum().backward()


def test_what_is_wrong_with_rows_is_said_by_the_step_and_not_by_backward():
    model = build()
    optimizer = composed(model)
    step(model, optimizer)
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer.zero_grad()
    x, y = batch()
    loss = functional.cross_entropy(model(x), y)
    x.add_(1)  # no saved tensor of autograd's: nothing before the first layer needs a gradient
    loss.backward()
    with pytest.raises(CaptureError, match="changed in place"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_inputs_may_be_overwritten_once_rows_are_made_of_them():
    finals = []
    for overwritten in (False, True):
        model = build()
        optimizer = composed(model)
        step(model, optimizer)
        x, y = batch()
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        if overwritten:
            x.zero_()
        optimizer.step()
        finals.append(model.state_dict())
    for name, value in finals[0].items():
        torch.testing.assert_close(finals[1][name], value, rtol=0, atol=0)


def test_modules_that_are_called_twice_wait_for_both_cotangents():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2 * 64, 3)

        def forward(self, x):
            return self.head(self.body(self.body(x).relu()).relu().flatten(1))

    finals = []
    factored = {"fused": False, "plan": Plan(routes={"*": Route(keep="factored")})}
    for options in ({"fused": True}, factored):
        torch.manual_seed(0)
        model = Twice().double()
        optimizer = composed(model, **options)
        for _ in range(3):
            step(model, optimizer)
        finals.append(model.state_dict())
    for name, value in finals[0].items():
        torch.testing.assert_close(finals[1][name], value, rtol=1e-9, atol=1e-11)
