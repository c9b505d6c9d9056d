"""A bare step is the computation of a whole one, so that its time is a floor of the other's."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import curvlib
from benchmarks import bare, floors
from benchmarks.counting import Operations
from benchmarks.peers import workloads
from benchmarks.peers.methods import METHODS, composed
from curvlib.solvers import EKFAC, KFAC, Woodbury


class Shortcut(nn.Module):
    """Norm layers of both kinds, sequences, an unused bias and a shortcut."""

    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(2))
        self.mix, self.norm, self.head = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(64, 10)

    def forward(self, x):
        x = self.image(x)
        return self.head(nn.functional.relu(x + self.mix(self.norm(x))).flatten(1))


@dataclass(frozen=True)
class Fixed(curvlib.Sampled):
    """Draws the same labels whoever asks."""

    def cotangents(self, outputs, generator):
        return super().cotangents(outputs, torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def workload(monkeypatch):
    monkeypatch.setitem(workloads.WORKLOADS, "tiny", (Shortcut, (6, 3, 6, 6)))


@pytest.mark.parametrize("period", [1, 2])
@pytest.mark.parametrize("solver", [Woodbury(), KFAC(), EKFAC()], ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("fisher", [curvlib.Empirical(), Fixed()], ids=lambda fisher: type(fisher).__name__)
def test_bare_steps_do_what_whole_ones_do(fisher, solver, period):
    bare_model, x, y = workloads.problem("tiny")
    whole_model = workloads.problem("tiny")[0]
    step = bare.BareStep(bare_model, x, y, fisher, solver, period)
    other = composed(whole_model, x, y, fisher, solver, period, fused=True)
    for _ in range(5):
        torch.testing.assert_close(step(), other())
    for (name, p), q, start in zip(
        bare_model.named_parameters(), whole_model.parameters(), workloads.problem("tiny")[0].parameters(), strict=True
    ):
        assert not torch.equal(p, start), name
        torch.testing.assert_close(p - start, q - start, rtol=1e-3, atol=1e-8, msg=name)


def test_bare_steps_leave_out_the_weight_gradients_that_whole_ones_do():
    step = bare.BareStep(*workloads.problem("tiny"), curvlib.Empirical(), Woodbury(), 2)
    given = []
    for _ in range(4):
        step()
        given.append(sum(p.grad is not None for p in step.model.parameters()))
    # The first step does not know yet what its solver gains from; stale ones gain where a layer is wide.
    assert given == [9, 7, 0, 7]


def test_every_method_has_a_floor():
    found = floors.floors("tiny", rounds=1, window=0)
    assert found.keys() == floors.BARE.keys() <= METHODS.keys()
    for kinds in found.values():
        assert kinds.keys() == {"bare", "whole"}
        assert all(one["ratio"] > 0 for one in kinds.values())


def counted(model, x):
    with Operations() as count:
        model(x).sum().backward()
    return count.products


def test_operations_are_those_of_the_shapes():
    forward = 2 * 8 * 12 * 5
    assert counted(torch.nn.Linear(12, 5), torch.randn(8, 12)) == 2 * forward
    assert counted(torch.nn.Linear(12, 5), torch.randn(8, 12, requires_grad=True)) == 3 * forward
    convolution = torch.nn.Conv2d(6, 4, 3, groups=2)
    assert counted(convolution, torch.randn(8, 6, 5, 5, requires_grad=True)) == 3 * 2 * 8 * 4 * 9 * 3 * 9
    matrix = 3.0 * torch.eye(6)
    with Operations() as count:
        factor = torch.linalg.cholesky(matrix)
        torch.cholesky_inverse(factor)
        torch.linalg.eigh(torch.stack([matrix, matrix]))
        torch.linalg.solve_triangular(factor, torch.ones(6, 2), upper=False)
    assert count.decompositions == pytest.approx((1 / 3 + 2 / 3 + 2 * 9) * 6**3 + 2 * 36)
    assert count.products == 0


def test_operations_of_every_method_are_counted():
    threads = torch.get_num_threads()
    found = floors.operations("tiny")
    assert torch.get_num_threads() == threads
    assert found.keys() == floors.BARE.keys()
    assert all(one["products"] > 0.5 and one["decompositions"] > 0 for one in found.values())


def test_a_step_that_fails_is_named(monkeypatch):
    def refuse(*arguments):
        raise ValueError("too small")

    monkeypatch.setattr(floors, "BareStep", refuse)
    with pytest.raises(RuntimeError, match="tiny, curvlib TENGraD, empirical, bare: ValueError: too small"):
        floors.floors("tiny", rounds=1, window=0)
