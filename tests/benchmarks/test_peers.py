"""Rows of the peers' table: every method takes steps; timing, memory and the table say what was measured."""

import pytest
import torch
from torch import nn

from benchmarks.memory import peak_increase
from benchmarks.peers import libraries, report  # noqa: F401  # libraries registers its rows
from benchmarks.peers.methods import METHODS
from benchmarks.peers.run import REFERENCE, chosen, packages
from benchmarks.peers.timing import FEWEST, interleaved
from benchmarks.peers.workloads import WORKLOADS, problem

HERE = [name for name, method in METHODS.items() if method.installed]
PEERS = [name for name in METHODS if METHODS[name].package]


def small(seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)
    return nn.Sequential(*layers), torch.randn(8, 2, 4, 4), torch.randint(0, 10, (8,))


def test_every_method_of_the_issue_has_a_row():
    for name in ("kfac-pytorch, eigen", "singd, dense", "curvlinops, EKFAC", "BackPACK", "heavyball", "asdl", "Adam"):
        assert any(row.startswith(name) for row in METHODS), name
    assert {METHODS[name].period for name in METHODS} == {1, 10}


@pytest.mark.filterwarnings("ignore")  # peers warn of hooks, scripts, and layers that they leave out
@pytest.mark.parametrize("name", HERE)
def test_steps_move_parameters_and_give_the_loss(name):
    model, x, y = small()
    before = [p.detach().clone() for p in model.parameters()]
    step = METHODS[name].build(model, x, y)
    losses = [float(step()) for _ in range(4)]
    assert len(set(losses)) >= 3  # SOAP's first step only looks
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert sum(moved) == len(moved) or (name in PEERS and moved[0])
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_rows_take_the_same_direction_as_the_recipe_they_stand_for():
    """Fused and not, the fresh empirical natural gradient is one and the same."""
    import curvlib
    from benchmarks.peers.methods import DAMPING, LR, MOMENTUM, ordinary

    models = [small() for _ in range(2)]
    plain = curvlib.compose(
        models[1][0], fisher=curvlib.Empirical(), solver=curvlib.Woodbury(), damping=DAMPING, lr=LR,
        transforms=[curvlib.Momentum(MOMENTUM)],
    )  # fmt: skip
    steps = METHODS["curvlib TENGraD, empirical"].build(*models[0]), ordinary(*models[1], plain)
    for _ in range(3):
        for step in steps:
            step()
    for given, expected in zip(models[0][0].parameters(), models[1][0].parameters(), strict=True):
        torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_have_the_shapes_they_are_named_after(name):
    model, x, y = problem(name)
    assert len(x) == len(y) == int(name.split("-b")[1])
    with torch.no_grad():
        assert model(x[:2]).shape == (2, 10)


# -- timing ---------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only when a step says so."""

    def __init__(self):
        self.now, self.speed = 0.0, 1.0

    def __call__(self):
        return self.now

    def step(self, seconds):
        def run():
            self.now += seconds * self.speed

        return run

    def periodic(self, cheap, dear, period):
        """A step that is dear once in a period, the machine slower with every one of them."""
        count = 0

        def run():
            nonlocal count
            self.now += self.speed * (dear if count % period == 0 else cheap)
            count += 1
            self.speed *= 1.001

        return run


def test_ratios_are_those_of_neighbouring_windows_on_a_machine_that_slows_down():
    clock = Clock()
    methods = {
        "twice": (1, lambda: clock.step(0.02)),
        "refresh": (10, lambda: clock.periodic(0.01, 0.11, 10)),
    }
    results = interleaved(clock.step(0.01), methods, rounds=5, clock=clock)
    assert results["twice"].summary()["ratio"] == pytest.approx(2.0, rel=1e-6)
    assert results["refresh"].summary()["ratio"] == pytest.approx(2.0, rel=0.02)
    assert results["refresh"].steps == 10
    assert results["twice"].summary()["rounds"] == 5


def test_slow_methods_get_fewer_rounds_and_failing_ones_keep_their_error():
    clock = Clock()

    def refuse():
        raise RuntimeError("shapes\ndo not fit")

    methods = {"slow": (1, lambda: clock.step(3.0)), "failing": (1, refuse)}
    results = interleaved(clock.step(0.01), methods, rounds=9, budget=4.0, clock=clock)
    assert results["slow"].summary()["rounds"] == FEWEST
    assert results["failing"].summary() == {"error": "RuntimeError: shapes"}


# -- memory -----------------------------------------------------------------------------------------------------------


def fill(megabytes):
    bytearray(megabytes * 2**20)[:: 2**10] = b"1" * (megabytes * 2**10)


def test_memory_is_the_peak_of_the_work_alone():
    small, large = peak_increase(lambda: fill(8)), peak_increase(lambda: fill(72))
    if small is None:
        pytest.skip("this system does not tell a process's peak")
    assert large - small == pytest.approx(64, abs=16)  # a loaded system pages in other things too


def test_work_that_fails_or_hangs_is_an_error():
    if peak_increase(lambda: None) is None:
        pytest.skip("this system does not tell a process's peak")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        peak_increase(lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="no result within"):
        peak_increase(lambda: __import__("time").sleep(60), timeout=0.1)


# -- the table --------------------------------------------------------------------------------------------------------


def test_choice_of_rows_keeps_the_reference():
    assert chosen("curvlib EKFAC*, Adam", METHODS) == [REFERENCE, "Adam", "curvlib EKFAC, refresh 10"]


def test_packages_that_are_not_there_are_named(monkeypatch):
    monkeypatch.setattr("benchmarks.peers.methods.find_spec", lambda package: None)
    found, missing = packages(list(METHODS))
    assert not found
    assert missing["kfac"] == [name for name in METHODS if name.startswith("kfac-pytorch")]


def test_the_report_shows_errors_notes_and_what_is_missing():
    results = report.load()
    first = next(iter(results["workloads"].values()))
    first["Adam"] = {"error": "RuntimeError: no"}
    first["SGD, momentum"] = {**first["SGD, momentum"], "ratio": 1.234, "note": "loss not finite"}
    text = report.report({**results, "missing": {"asdl": ["asdl, KFAC"]}})
    assert "| Adam | error |" in text
    assert "| SGD, momentum | 1.23* |" in text
    assert "Not installed: asdl." in text
    assert "Adam: RuntimeError: no" in text


def test_the_readme_shows_the_committed_measurement():
    readme = (report.ROOT / "README.md").read_text(encoding="utf-8")
    assert report.with_section(readme, report.readme_section(report.load())) == readme, (
        "run python -m benchmarks.peers.report"
    )
