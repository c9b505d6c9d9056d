"""Floors are sums of the parts of a step, which do what the parts of a real step do."""

import pytest
import torch
from torch import nn

from benchmarks import floors
from benchmarks.peers import workloads
from curvlib.solvers import KFAC, Woodbury


def tiny():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))


@pytest.fixture(autouse=True)
def workload(monkeypatch):
    monkeypatch.setitem(workloads.WORKLOADS, "tiny", (tiny, (6, 3, 6, 6)))


def test_every_method_has_a_floor():
    found = floors.floors("tiny", rounds=1)
    ms, ratios = found["milliseconds"], found["ratios"]
    assert ratios.keys() == {
        "TENGraD, fresh",
        "TENGraD, refresh 10",
        "TENGraD, sampled, fresh",
        "KFAC, refresh 10",
        "EKFAC, refresh 10",
    }
    fresh = ms["passes"] + ms["TENGraD refresh"] + ms["TENGraD solve, own rows"]
    assert ratios["TENGraD, fresh"] == pytest.approx(fresh / ms["SGD step"])
    gradient = ms["SGD step"] - ms["update"]
    stale = (gradient + ms["TENGraD solve"]) / ms["SGD step"]
    # Rows of the batch norm and of the convolution are explicit, so that the loss's gradient is too.
    sampled = gradient + ms["second backward"] + ms["TENGraD refresh and solve, sampled"]
    assert ratios["TENGraD, sampled, fresh"] == pytest.approx(sampled / ms["SGD step"])
    assert ratios["TENGraD, refresh 10"] == pytest.approx(0.9 * stale + 0.1 * ratios["TENGraD, fresh"])


def test_passes_make_no_weight_gradient_and_send_cotangents_through_every_layer():
    one = floors.Passes("tiny")
    outputs = []
    for module in one.model:
        module.register_forward_hook(lambda module, args, output: outputs.append(output) or output.retain_grad())
    one.passes()
    assert all(output.grad is not None for output in outputs)
    assert all((p.grad == 0).all() for p in one.parameters)


@pytest.mark.parametrize("solver", [Woodbury(), KFAC()], ids=str)
def test_blocks_solve_for_the_gradient_of_the_workload(solver):
    blocks = floors.Blocks("tiny", solver)
    model, x, y = workloads.problem("tiny")
    nn.functional.cross_entropy(model(x), y).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    explicit = [g for part in blocks.parts for g in part.gradients if isinstance(g, dict)]
    assert sum(len(gradient) for gradient in explicit) == (6 if solver.exact else 4)
    for gradient in explicit:
        assert all(any(torch.equal(value, other) for other in expected.values()) for value in gradient.values())
    with torch.no_grad():
        (norm,) = [rows() for rows in blocks.explicit]
    for name in ("weight", "bias"):
        torch.testing.assert_close(norm.values[name].sum(0), expected[f"1.{name}"])
    before = {place: p.clone() for place, p in zip(blocks.places, blocks.parameters, strict=True)}
    assert before.keys() == {tuple(name.rsplit(".", 1)) for name in expected}
    blocks.solve()
    naturals = {
        (name, inner): value
        for part in blocks.parts
        for name, natural in zip(part.names, part.solver.solve_all(part.inverses, part.gradients), strict=True)
        for inner, value in natural.items()
    }
    for place, p in zip(blocks.places, blocks.parameters, strict=True):
        torch.testing.assert_close(p, before[place] - floors.LR * naturals[place])
    blocks.solve_own()
    blocks.refresh()
