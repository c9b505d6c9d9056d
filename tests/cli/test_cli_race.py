import csv
import io
import itertools
import json
import sys

import pytest
import torch
from rich.console import Console

from curvlib.cli import contestants as table
from curvlib.cli import main, race_command
from curvlib.cli import race as race_module
from curvlib.cli.contestants import Contestant, hyperparameters
from curvlib.cli.data import load_dataset
from curvlib.cli.progress import RaceProgress
from curvlib.cli.race import RaceRules, enter, race
from curvlib.cli.tasks import make_task
from curvlib.errors import CurvatureError

CPU = torch.device("cpu")


class Silent:
    def warming_up(self, name):
        pass

    def turn_over(self, entrants, current):
        pass

    def evaluated(self, entrant):
        pass


@pytest.fixture(scope="module")
def task():
    return make_task(load_dataset("digits"), "mlp", CPU)


def run_race(task, names, rules, overrides=None, tick=0.125):
    """Race on a clock that advances by ``tick`` each time it is read, so that every step takes that long.

    The default is a power of two, whose multiples add up without rounding.
    """
    ticks = itertools.count()
    chosen = {name: hyperparameters(name, "mlp", (overrides or {}).get(name, {})) for name in names}
    entrants = []
    race(task, list(chosen.items()), 0, rules, Silent(), entrants, clock=lambda: next(ticks) * tick)
    return entrants


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_contestants_start_alike_and_see_the_same_batches(task):
    rules = RaceRules(1.0, batch_size=32)
    first, second = (enter(task, name, hyperparameters(name, "mlp", {}), 3, rules) for name in ("sgd", "adam"))
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a is not b
    assert torch.equal(first.random["cpu"], second.random["cpu"])
    for _ in range(60):
        assert torch.equal(first.batches.draw()[1], second.batches.draw()[1])


def test_equal_budgets_and_regular_evaluations(task):
    entrants = run_race(task, ["sgd", "adam"], RaceRules(3.0, turn=0.5, evaluate_every=1.0, evaluation_samples=50))
    for entrant in entrants:
        assert entrant.status == "finished"
        assert entrant.steps == 24
        assert entrant.seconds == 3.0
        assert [point.step for point in entrant.curve] == [0, 8, 16, 24]
    assert entrants[0].curve[0].train_loss == entrants[1].curve[0].train_loss


def test_turns_do_not_change_a_contestants_training(task):
    rules = RaceRules(2.0, turn=0.3, evaluate_every=0.7, evaluation_samples=50)
    together = run_race(task, ["sgd", "adam"], rules)[1]
    alone = run_race(task, ["adam"], RaceRules(2.0, turn=9.0, evaluate_every=9.0, evaluation_samples=50))[0]
    for a, b in zip(together.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_contestants_have_random_streams_of_their_own(task, monkeypatch):
    drawn = {}
    step = race_module._timed_step

    def record(entrant, *rest):
        drawn.setdefault(entrant.name, []).append(torch.rand(()).item())
        step(entrant, *rest)

    monkeypatch.setattr(race_module, "_timed_step", record)
    before = torch.get_rng_state()
    run_race(task, ["sgd", "adam"], RaceRules(2.0, turn=0.3, evaluation_samples=10))
    assert drawn["sgd"] == drawn["adam"]
    assert torch.equal(before, torch.get_rng_state())


def test_diverging_contestant_does_not_stop_the_others(task):
    entrants = run_race(task, ["sgd", "adam"], RaceRules(2.0, evaluation_samples=10), overrides={"sgd": {"lr": "1e30"}})
    assert entrants[0].diverged
    assert "learning rate" in entrants[0].status
    assert entrants[1].status == "finished"


class Failing(torch.optim.SGD):
    """Raises in its fifth step."""

    error = CurvatureError("block fc2 is not positive definite")
    calls = 0

    def step(self, closure=None):
        self.calls += 1
        if self.calls == 5:
            raise self.error
        return super().step(closure)


@pytest.fixture
def failing(monkeypatch):
    def build(model, likelihood, values, seed):
        return Failing(model.parameters(), lr=values["lr"])

    monkeypatch.setitem(
        table.CONTESTANTS, "failing", Contestant(build, "fails", {"lr": 0.01}, grid={"lr": (0.01, 0.1)})
    )


@pytest.mark.parametrize("error", [CurvatureError("singular"), torch.linalg.LinAlgError("singular")])
def test_contestant_whose_optimizer_gives_up(task, failing, monkeypatch, error):
    monkeypatch.setattr(Failing, "error", error)
    entrants = run_race(task, ["failing", "sgd"], RaceRules(2.0, evaluation_samples=10))
    assert entrants[0].status == "stopped at step 5: singular"
    assert entrants[0].curve[-1].step == 4
    assert entrants[1].status == "finished"


def command(tmp_path, *options):
    return main(
        ["race", "--data", "digits", "--model", "mlp", "--out", str(tmp_path / "out"), "--threads", "1", *options]
    )


def test_race_end_to_end(tmp_path, capsys):
    options = ["--optimizers", "sgd,adam", "--seconds", "1", "--turn", "0.25", "--lr", "sgd=0.1", "--seed", "5"]
    assert command(tmp_path, *options, "--targets", "loss=2,accuracy=0.99999") == 0
    folder = tmp_path / "out"
    report = (folder / "report.md").read_text()
    for part in (
        "scikit-learn's bundled digits",
        "| sgd |",
        "| adam |",
        "lr 0.1, momentum 0.9",
        "benchmarks/tuning",
        "loss ≤ 2",
        "not reached",
        "(train_loss_seconds.png)",
        "normalised by the training set",
        f"torch: {torch.__version__}",
    ):
        assert part in report
    assert "Interrupted" not in report
    configuration = json.loads((folder / "config.json").read_text())
    assert configuration["hyperparameters"]["sgd"]["lr"] == 0.1
    assert configuration["seeds"] == [5]
    assert {"python", "torch", "numpy", "curvlib", "cpu", "threads", "device"} <= set(configuration["environment"])
    curves = rows(folder / "curves.csv")
    assert {row["optimizer"] for row in curves} == {"sgd", "adam"}
    assert list(curves[0]) == ["optimizer", "seed", "step", "seconds", "train_loss", "test_loss", "test_accuracy"]
    starts = [row["train_loss"] for row in curves if row["step"] == "0"]
    assert starts[0] == starts[1]
    for row in rows(folder / "summary.csv"):
        assert float(row["seconds"]) == pytest.approx(1, abs=0.2)
        assert float(row["milliseconds"]) > 0
        assert row["seconds_to_loss_2"]
        assert row["seconds_to_accuracy_0.99999"] == ""
    for name in ("train_loss_seconds", "train_loss_step", "test_accuracy_seconds"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "mlp on digits" in shown
    assert "report.md" in shown
    assert "finished" in shown


def test_several_seeds_and_an_autoencoder(tmp_path, capsys):
    options = ["--optimizers", "sgd,adam", "--seconds", "0.2", "--seeds", "2", "--model", "autoencoder"]
    assert command(tmp_path, *options, "--set", "adam.beta1=0.8", "--targets", "") == 0
    folder = tmp_path / "out"
    assert [row["seed"] for row in rows(folder / "summary.csv")] == ["0", "0", "1", "1"]
    report = (folder / "report.md").read_text()
    assert "±" in report
    assert "summed over pixels" in report
    assert "beta1 0.8" in report
    assert (folder / "test_loss_seconds.png").exists()
    assert rows(folder / "curves.csv")[0]["test_accuracy"] == ""


def test_failures_are_reported(tmp_path, capsys, failing):
    options = ["--optimizers", "failing,sgd,adam", "--lr", "sgd=1e30", "--seconds", "0.3"]
    assert command(tmp_path, *options) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "failing (seed 0) stopped at step 5: block fc2 is not positive definite" in report
    assert "sgd (seed 0) diverged at step" in report
    assert "grid: lr in 0.01, 0.1" in report
    by_name = {row["optimizer"]: row for row in rows(tmp_path / "out" / "summary.csv")}
    assert by_name["sgd"]["train_loss"] == ""
    assert by_name["adam"]["status"] == "finished"
    assert "stopped at step 5" in capsys.readouterr().out


def test_digits_standing_in_is_said_aloud(tmp_path, capsys):
    assert command(tmp_path, "--data", "auto", "--optimizers", "sgd", "--seconds", "0.1") == 0
    assert capsys.readouterr().out.count("stands in for fashion-mnist") == 2
    assert "Other data than usual" in (tmp_path / "out" / "report.md").read_text()


def test_fashion_files_and_a_network_that_shifts_images(tmp_path, tiny_fashion, capsys):
    options = ["--data", "fashion-mnist", "--data-dir", str(tiny_fashion), "--model", "small-convnet", "--augment"]
    assert command(tmp_path, *options, "--batch-size", "32", "--optimizers", "adamw", "--seconds", "0.2") == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert str(tiny_fashion) in report
    assert "mirrored at random" in report
    assert "Batches of 32" in report or "batches of 32" in report


@pytest.mark.parametrize("steps", [0, 40])
def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch, capsys, steps):
    step = race_module.training_step
    counter = itertools.count()

    def interrupted(*args):
        if next(counter) >= steps:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(race_module, "training_step", interrupted)
    options = ["--optimizers", "sgd,adam", "--seconds", "30", "--turn", "0.01", "--eval-every", "0.01"]
    assert command(tmp_path, *options) == 130
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Interrupted" in report
    assert json.loads((tmp_path / "out" / "config.json").read_text())["interrupted"]
    summary = rows(tmp_path / "out" / "summary.csv")
    if steps:
        assert {row["status"] for row in summary} == {"interrupted"}
        assert sum(int(row["steps"]) for row in summary) == steps - 6
    else:
        assert summary == []
        assert "Nothing was measured" in report


def test_unwritable_folder_is_found_before_training(tmp_path, monkeypatch, capsys):
    (tmp_path / "out").write_text("a file in the way")
    monkeypatch.setattr(race_command, "race", lambda *args: pytest.fail("trained"))
    assert command(tmp_path, "--optimizers", "sgd") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("curvlib race: error: the output folder")
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizers", "lion"], "unknown optimizer 'lion'"),
        (["--optimizers", "sgd,adam", "--lr", "0.1"], "'' is no optimizer"),
        (["--optimizers", "sgd", "--lr", "adam=0.1"], "'adam' does not take part"),
        (["--optimizers", "sgd", "--lr", "sgd="], "is not understood"),
        (["--optimizers", "sgd", "--set", "sgd.lr"], "is not understood"),
        (["--optimizers", "sgd", "--damping", "sgd=1"], "no hyperparameter 'damping'"),
        (["--optimizers", "sgd", "--lr", "sgd=-1"], "refuses its hyperparameters"),
        (["--optimizers", "sgd", "--batch-size", "5000"], "--batch-size between 1 and 1437"),
        (["--optimizers", "sgd", "--targets", "speed=1"], "--targets speed=1"),
        (["--optimizers", "sgd", "--device", "abacus"], "--device abacus"),
        (["--data", "fashion-mnist", "--optimizers", "sgd"], "dataset-fashion-mnist"),
    ],
)
def test_wrong_requests_are_one_clean_message(tmp_path, capsys, options, message):
    assert command(tmp_path, *options) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("option", [["--seconds", "0"], ["--seconds", "nan"], ["--seeds", "0"], ["--data", "svhn"]])
def test_options_out_of_range(tmp_path, capsys, option):
    with pytest.raises(SystemExit) as caught:
        command(tmp_path, *option)
    assert caught.value.code == 2
    capsys.readouterr()


def test_single_contestant_needs_no_name(tmp_path, capsys):
    options = ["--optimizers", "sgd", "--lr", "0.2", "--set", "momentum=0.5", "--seconds", "0.1"]
    assert command(tmp_path, *options, "--weight-decay", "0") == 0
    values = json.loads((tmp_path / "out" / "config.json").read_text())["hyperparameters"]["sgd"]
    assert values == {"lr": 0.2, "momentum": 0.5, "weight_decay": 0.0}


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command(tmp_path, "--optimizers", "sgd") == 2
    assert "curvlib[race]" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(task, monkeypatch, terminal):
    monkeypatch.setattr("curvlib.cli.progress._LINE_EVERY", 0.0)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    entrants = []
    chosen = {name: hyperparameters(name, "mlp", {}) for name in ("sgd", "adam")}
    ticks = itertools.count()
    with RaceProgress(console, 1.0) as progress:
        rules = RaceRules(1.0, turn=0.5, evaluation_samples=10)
        race(task, list(chosen.items()), 0, rules, progress, entrants, clock=lambda: next(ticks) * 0.1)
    shown = console.file.getvalue()
    assert "sgd: finished" in shown
    assert "steps/s" in shown
    assert ("\x1b[" in shown) == terminal
