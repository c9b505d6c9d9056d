"""The comparison of time to a target: search, trials, records that go on where they stopped, tables, the page."""

import json
import math

import pytest
import torch
from torch import nn
from torch.func import hessian

from benchmarks.quality import conduct, report
from benchmarks.quality.compositions import solvers_for
from benchmarks.quality.methods import COMPOSITION, FIRST_ORDER, METHODS, RECIPE, Method
from benchmarks.quality.networks import CharacterTransformer, PoissonResidual
from benchmarks.quality.search import NEAR, SPREAD, Choice, Log, near, place_of, spread, values_at
from benchmarks.quality.tasks import TASKS, Poisson
from benchmarks.quality.trial import Run, hopeless, train
from curvlib import Gaussian
from curvlib.solvers import KFAC, Diagonal


class Line(Poisson):
    """A straight line to learn: no data, a step is microseconds."""

    name, title, metric, target, budget, sizes = "poisson", "a line", "squared error", 1e-2, 0.05, (4, 8)
    likelihood = Gaussian()

    def network(self):
        return nn.Linear(2, 1)

    def batch(self, size, generator):
        points = torch.rand(size, 2, generator=generator, dtype=self.dtype)
        return points, points.sum(1)

    def loss(self, outputs, targets):
        return (outputs[:, 0] - targets).square().mean() / 2

    def evaluate(self, model):
        return float(self.loss(model(torch.eye(2, dtype=self.dtype)), torch.ones(2, dtype=self.dtype)))


def sgd(task, model, values, seed):
    return torch.optim.SGD(model.parameters(), lr=values["lr"])


def seconds_clock():
    """Every step takes one second."""
    ticks = iter(range(10**9))
    return lambda: float(next(ticks))


# -- search -----------------------------------------------------------------------------------------------------------


def test_spread_points_are_one_in_each_slice_and_near_points_are_near():
    space = {"lr": Log(1e-3, 1e-1), "batch": Choice((32, 128))}
    places = spread(space, SPREAD, "seed")
    assert places == spread(space, SPREAD, "seed") != spread(space, SPREAD, "other")
    for name in space:
        assert sorted(int(place[name] * SPREAD) for place in places) == list(range(SPREAD))
    assert all(abs(near(places[0], k)[name] - places[0][name]) <= 0.15 for k in range(20) for name in space)
    assert values_at(space, {"lr": 0.5, "batch": 1.0}) == {"lr": 0.01, "batch": 128}


def test_later_trials_are_near_the_best():
    space = {"lr": Log(1e-3, 1e-1)}
    places = [place_of(k, space, [], [], "s") for k in range(SPREAD)]
    ranks = [(1, 3.0), (1, 2.0), (0, 9.0), (1, math.inf), (0, 9.5)]
    for trial in range(SPREAD, SPREAD + NEAR):
        assert abs(place_of(trial, space, places, ranks, "s")["lr"] - places[2]["lr"]) <= 0.15


# -- a trial ----------------------------------------------------------------------------------------------------------


def test_the_target_is_reached_at_the_first_of_two_evaluations_in_a_row(monkeypatch):
    task = Line()
    metrics = iter([9.0, 5.0, 0.001, 5.0, 0.01, 0.009, 1.0])
    monkeypatch.setattr(task, "evaluate", lambda model: next(metrics))
    run = train(task, sgd, {"lr": 0.0, "batch": 4}, 0, 100.0, clock=seconds_clock())
    assert run.status == "reached"
    assert run.reached == 4.0
    assert [point[2] for point in run.curve] == [9.0, 5.0, 0.001, 5.0, 0.01, 0.009]
    assert run.rank == (0, 4.0)


@pytest.mark.parametrize(("metrics", "status"), [([1.0, math.nan], "diverged"), ([1.0, 21.0], "diverged")])
def test_divergence_ends_a_trial(monkeypatch, metrics, status):
    task, left = Line(), iter(metrics)
    monkeypatch.setattr(task, "evaluate", lambda model: next(left))
    run = train(task, sgd, {"lr": 0.0, "batch": 4}, 0, 100.0, clock=seconds_clock())
    assert (run.status, run.reached) == (status, None)
    assert run.rank == (1, 1.0)


def test_an_error_of_a_method_is_its_status_and_not_the_end():
    def failing(task, model, values, seed):
        optimizer = sgd(task, model, values, seed)

        def step(closure):
            raise RuntimeError("no inverse\nat all")

        optimizer.step = step
        return optimizer

    run = train(Line(), failing, {"lr": 0.1, "batch": 4}, 0, 1.0)
    assert run.status == "RuntimeError: no inverse"


def test_trials_far_behind_the_best_end_early():
    rival = Run({}, 0, [(float(k), k, 10.0 - k) for k in range(11)])
    behind = Run({}, 0, [(float(k), k, 10.0 - k / 3) for k in range(9)])
    close = Run({}, 0, [(float(k), k, 10.0 - k / 1.5) for k in range(9)])
    assert hopeless(behind, rival)
    assert not hopeless(close, rival)
    assert not hopeless(behind, None)
    rival.reached = 7.5
    assert hopeless(close, rival)


# -- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rates", "seeds"), [(Log(0.1, 0.5), [1, 2, 3]), (Log(1e-9, 1e-8), [1, 2])])
def test_a_run_goes_on_where_it_stopped_and_ends_when_the_median_is_known(tmp_path, monkeypatch, rates, seeds):
    task, told = Line(), []
    method = Method(FIRST_ORDER, sgd, lambda task: {"lr": rates, "batch": Choice(task.sizes)}, {})
    monkeypatch.setattr(conduct, "_READY", set())
    monkeypatch.setattr(conduct.gc, "collect", int)  # seconds in a process as large as this one

    class StopError(Exception):
        pass

    def say(text, flush):
        told.append(text)
        if len(told) == 3:
            raise StopError

    with pytest.raises(StopError):
        conduct.conduct([task], {"SGD": method}, tmp_path, say=say)
    before = json.loads(conduct.path_of(tmp_path, task.name, "SGD").read_text(encoding="utf-8"))
    assert len(before["trials"]) == len(before["places"]) == 3
    conduct.conduct([task], {"SGD": method}, tmp_path, say=say)
    record = json.loads(conduct.path_of(tmp_path, task.name, "SGD").read_text(encoding="utf-8"))
    assert record["done"]
    assert record["places"][:3] == before["places"]
    assert len(record["trials"]) == SPREAD + NEAR
    assert [run["seed"] for run in record["finals"]] == seeds
    assert (conduct.seconds_to_target(record) is None) == (len(seeds) == 2)
    number = len(told)
    conduct.conduct([task], {"SGD": method}, tmp_path, say=say)
    assert len(told) == number == SPREAD + NEAR + len(seeds)


# -- tasks and methods ------------------------------------------------------------------------------------------------


def test_the_residual_network_has_the_laplacian_of_its_solution():
    torch.manual_seed(0)
    model, points = PoissonResidual(6).double(), torch.rand(5, 2, dtype=torch.float64)
    for point, given in zip(points, model(points), strict=True):
        expected = hessian(lambda p: model.solution(p[None])[0])(point).diagonal().sum()
        torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)


def test_the_transformer_sees_no_future():
    torch.manual_seed(0)
    model, codes = CharacterTransformer(7, 6, width=8, heads=2), torch.randint(7, (2, 6))
    other = codes.clone()
    other[:, 4] = (other[:, 4] + 1) % 7
    torch.testing.assert_close(model(codes)[:, :4], model(other)[:, :4])
    assert not torch.allclose(model(codes)[:, 4:], model(other)[:, 4:])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_steps(name):
    method, task = METHODS[name], TASKS["poisson"]
    space = method.space(task)
    values = {**values_at(space, dict.fromkeys(space, 0.1)), "batch": 8}
    model, generator = task.model(0), torch.Generator().manual_seed(0)
    optimizer, before = method.build(task, model, values, 0), [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        x, y = task.batch(8, generator)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = task.loss(model(x), y)
            if torch.is_grad_enabled():
                loss.backward()
            return loss

        optimizer.step(closure)
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.isfinite(p).all()
        assert not torch.equal(p, old)


def test_the_autoencoder_keeps_diagonals_at_the_pixels():
    layers = TASKS["autoencoder"].model(0).named_modules()
    wide = {name for name, layer in layers if isinstance(layer, nn.Linear) and 784 in layer.weight.shape}
    solvers = solvers_for("autoencoder", KFAC())
    assert {name for name, solver in solvers.items() if isinstance(solver, Diagonal)} == wide
    assert solvers["*"] == solvers_for("convnet", KFAC()) == KFAC()


def test_every_recipe_takes_part_and_says_where_it_does_not():
    kinds = [method.kind for method in METHODS.values()]
    assert (kinds.count(FIRST_ORDER), kinds.count(RECIPE), kinds.count(COMPOSITION)) == (3, 15, 3)
    for method in METHODS.values():
        assert set(method.leaves_out) < set(TASKS)
        assert all("batch" in method.space(task) for task in TASKS.values())


# -- report -----------------------------------------------------------------------------------------------------------


def record(kind, *times, method="Adam"):
    finals = [
        {"values": {"lr": 0.1}, "seed": seed, "curve": [[0.0, 0, 2.0], [3.0, 9, 0.5]], "reached": time, "status": ""}
        for seed, time in enumerate(times)
    ]
    environment = {"date": "2026-01-01", "commit": None, "provisional": False, "threads": 1, "cpu": "c"}
    environment |= {"torch": "2", "python": "3"}
    return {"method": method, "kind": kind, "finals": finals, "environment": environment, "reference_ms": [1.0, 2.0]}


def test_tables_say_who_was_soonest_and_who_was_not():
    records = {task: {} for task in TASKS}
    records["convnet"] = {
        "Adam": record(FIRST_ORDER, 4.0, 5.0, None),
        "SGD": record(FIRST_ORDER, None, None, 1.0),
        "grafted KFAC": record(COMPOSITION, 2.0, 2.5, 3.0),
    }
    assert report.soonest(records["convnet"], FIRST_ORDER) == ("Adam", 5.0)
    text = report.summary(records)
    assert "| convnet | Adam, 5.0 s | grafted KFAC, 2.5 s | 2.00 | none |  |" in text
    assert "**5.0** (4.0, 5.0, ·)" in text
    assert "not reached (0.5)" in text
    assert "On 1 of 4 tasks (convnet) " in text
    assert f"{4 * len(METHODS) - 3} of {4 * len(METHODS)} cells have not been run yet." in text


def test_the_committed_page_is_what_the_records_say():
    page = (report.ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    assert page == report.text(report.load()), "run python -m benchmarks.quality report"
