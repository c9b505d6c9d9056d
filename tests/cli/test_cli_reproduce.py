"""``curvlib reproduce``: runs, their continuation, and a report whose numbers come from the runs."""

import csv
import json
import signal
import statistics
from pathlib import Path

import pytest
import torch

from curvlib.cli import main, trainer
from curvlib.cli.checkpoint import load_checkpoint
from curvlib.cli.reproduction import cost, results, runs
from curvlib.cli.reproduction.report import cost_table, outcome_table, report_text, target_tables

EXPERIMENT = """
title = "Tiny"
data = "digits"
model = "mlp"
batch_size = 32
epochs = 6
augment = false
seeds = 2
batch_norm = "gradient"
evaluate_every = 3
evaluation_samples = 60
targets = ["accuracy=0.3", "loss=0.01"]
milestones = [2, 4]
decay = 0.5
narrowest = 0.02
[optimizers.sgd]
lr = 0.2
[optimizers.tengrad]
lr = 0.05
damping = 0.1
refresh = 8
[optimizers.kbfgs]
lr = 0.05
damping = 0.1
refresh = 8
[choices]
targets = "there is no paper"
"""


class Killed(BaseException):
    """The process dies: nothing is caught, nothing is saved."""


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(EXPERIMENT)
    return path


def command(tiny, folder, *options, costs=False):
    # A tenth of the digits: 144 images, 4 batches.
    own = ["reproduce", str(tiny), "--scale", "0.1", "--epochs", "3", "--threads", "1", "--out", str(folder)]
    return main([*own, *options, *([] if costs else ["--no-costs"])])


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def parameters(folder):
    return {
        (run["identity"]["optimizer"], run["identity"]["seed"]): (run["parameters"], run["steps"])
        for run in results_of(folder)["runs"]
    }


def dying(monkeypatch, at):
    step, calls = trainer.training_step, []

    def training_step(*args):
        calls.append(None)
        if len(calls) == at:
            raise Killed
        return step(*args)

    monkeypatch.setattr(trainer, "training_step", training_step)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.toml").write_text(EXPERIMENT)
    threads = torch.get_num_threads()
    assert command(folder / "tiny.toml", folder / "out", costs=True) == 0
    torch.set_num_threads(threads)
    return folder / "out"


def test_everything_is_written(finished):
    names = {path.name for path in finished.iterdir()}
    plots = {f"{y}_{x}.png" for y in ("train_loss", "test_accuracy") for x in ("seconds", "epoch")}
    assert names == {"results.json", "curves.csv", "summary.csv", "report.md", "runs", *plots}
    found = results_of(finished)
    assert found["complete"]
    assert len(found["runs"]) == 6
    assert not list(finished.rglob("checkpoint*"))
    report = (finished / "report.md").read_text()
    for part in ("At reduced size", "144 training and 36 test images of digits", "there is no paper", "Time to target"):
        assert part in report


def test_curves_and_summary_come_from_the_runs(finished):
    with (finished / "curves.csv").open() as file:
        curves = list(csv.DictReader(file))
    with (finished / "summary.csv").open() as file:
        summary = list(csv.DictReader(file))
    assert len(summary) == 6
    for line in summary:
        name, seed = line["optimizer"], line["seed"]
        run = json.loads((finished / "runs" / f"{name}-{seed}" / "run.json").read_text())
        points = run["curve"]
        # 12 steps: evaluated at the start, after each epoch of 4, and every 3.
        assert [point["step"] for point in points] == [0, 3, 4, 6, 8, 9, 12]
        assert float(line["train_loss"]) == pytest.approx(points[-1]["train_loss"], rel=1e-5)
        assert float(line["best"]) == pytest.approx(max(point["test_accuracy"] for point in points), rel=1e-5)
        assert float(line["milliseconds"]) == pytest.approx(1e3 * run["seconds"] / 12, rel=1e-5)
        hit = next((point for point in points if point["test_accuracy"] >= 0.3), None)
        assert line["epochs to accuracy ≥ 0.3"] == ("" if hit is None else f"{hit['step'] / 4:.6g}")
        assert line["epochs to loss ≤ 0.01"] == ""
        own = [row for row in curves if (row["optimizer"], row["seed"]) == (name, seed)]
        assert [float(row["epoch"]) for row in own] == [0, 0.75, 1, 1.5, 2, 2.25, 3]


def test_report_is_of_means_and_deviations(finished):
    found = results_of(finished)
    rows = {row[0]: dict(zip(outcome_table(found)[0], row, strict=True)) for row in outcome_table(found)[1]}
    for name, row in rows.items():
        ends = [run["curve"][-1] for run in found["runs"] if run["identity"]["optimizer"] == name]
        for column, key in (("final train loss", "train_loss"), ("final test accuracy", "test_accuracy")):
            values = [end[key] for end in ends]
            assert row[column] == f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"
        assert row["end"] == "finished"
    ends = [run["curve"][-1] for run in found["runs"] if run["identity"]["optimizer"] == "sgd"]
    goal = found["targets"][-1]
    assert goal["value"] == statistics.fmean(end["test_accuracy"] for end in ends)
    assert goal["label"] == "SGD's final accuracy"
    assert report_text(found).count("not reached") >= 6


def test_costs_are_measured_for_each_method(finished):
    costs = results_of(finished)["costs"]
    assert costs["sgd"]["inversion"] is None
    for name in ("tengrad", "kbfgs"):
        inversion = costs[name]["inversion"]
        assert inversion["blocks"] == 3
        assert all(inversion[part] > 0 for part in ("update", "factorize", "solve"))
    header, rows = cost_table(results_of(finished))
    first = dict(zip(header, rows[1], strict=True))
    inversion = costs["tengrad"]["inversion"]
    assert first["factorise + solve"] == f"{inversion['factorize'] + inversion['solve']:.2f}"
    if Path("/proc/self/clear_refs").exists():
        assert all(own["memory"] > 0 for own in costs.values())
        assert first["MB above SGD"] == f"{costs['tengrad']['memory'] - costs['sgd']['memory']:.0f}"


@pytest.mark.parametrize("at", [1, 6, 17, 29, 36])
def test_killed_and_resumed_equals_undisturbed(finished, tiny, tmp_path, monkeypatch, at):
    # 6 runs of 12 steps, one third of them each of SGD, TENGraD and K-BFGS; killed in the middle of any.
    with monkeypatch.context() as patch:
        dying(patch, at)
        with pytest.raises(Killed):
            command(tiny, tmp_path / "out")
    assert command(tiny, tmp_path / "out", "--resume") == 0
    assert parameters(tmp_path / "out") == parameters(finished)
    whole, parts = (results_of(folder)["runs"] for folder in (finished, tmp_path / "out"))
    for one, other in zip(whole, parts, strict=True):
        for a, b in zip(one["curve"], other["curve"], strict=True):
            assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_ctrl_c_leaves_a_checkpoint_and_a_report(finished, tiny, tmp_path, monkeypatch, capsys):
    step, calls = trainer.training_step, []

    def training_step(*args):
        calls.append(None)
        if len(calls) == 18:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(trainer, "training_step", training_step)
    assert command(tiny, tmp_path / "out") == 130
    assert "go on with --resume" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "out" / "runs" / "tengrad-0")[0]["steps"] == 6
    assert "Interrupted: some runs are missing" in (tmp_path / "out" / "report.md").read_text()
    assert command(tiny, tmp_path / "out", "--resume") == 0
    assert parameters(tmp_path / "out") == parameters(finished)


def test_learning_rates_follow_the_schedule(tiny, tmp_path, monkeypatch):
    rates = []
    step = trainer.training_step

    def training_step(task, model, optimizer, batch):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(task, model, optimizer, batch)

    monkeypatch.setattr(trainer, "training_step", training_step)
    assert command(tiny, tmp_path / "out", "--optimizers", "sgd", "--seeds", "1") == 0
    assert rates == [0.2] * 4 + [0.1] * 4 + [0.05] * 4


def test_more_seeds_and_optimizers_join_those_that_are_done(finished, tiny, tmp_path):
    assert command(tiny, tmp_path / "out", "--optimizers", "tengrad", "--seeds", "1") == 0
    first = (tmp_path / "out" / "runs" / "tengrad-0" / "run.json").stat().st_mtime_ns
    assert command(tiny, tmp_path / "out", "--resume") == 0
    assert parameters(tmp_path / "out") == parameters(finished)
    assert (tmp_path / "out" / "runs" / "tengrad-0" / "run.json").stat().st_mtime_ns == first


def test_other_runs_are_not_taken_for_these(tiny, tmp_path, capsys):
    options = ["--optimizers", "sgd", "--seeds", "1"]
    assert command(tiny, tmp_path / "out", *options) == 0
    assert command(tiny, tmp_path / "out", *options) == 2
    assert "go on with them by --resume" in capsys.readouterr().err
    assert command(tiny, tmp_path / "out", *options, "--epochs", "4", "--resume") == 2
    assert "steps was 12, is 16" in capsys.readouterr().err
    (tmp_path / "out" / "runs" / "sgd-0" / "run.json").write_text("{")
    assert command(tiny, tmp_path / "out", *options, "--resume") == 2
    assert "remove it to do this run again" in capsys.readouterr().err


def test_divergence_ends_one_run_and_is_reported(tiny, tmp_path, capsys):
    tiny.write_text(EXPERIMENT.replace("lr = 0.2", "lr = 1e30"))
    assert command(tiny, tmp_path / "out", "--optimizers", "sgd,tengrad", "--seeds", "1") == 0
    found = results_of(tmp_path / "out")
    assert [run["status"].partition(" ")[0] for run in found["runs"]] == ["diverged", "finished"]
    row = dict(zip(*(outcome_table(found)[0], outcome_table(found)[1][0]), strict=True))
    assert (row["final train loss"], row["end"]) == ("-", "diverged")
    assert [target["label"] for target in found["targets"]] == ["accuracy ≥ 0.3", "loss ≤ 0.01"]
    assert "- sgd (seed 0) diverged at step" in (tmp_path / "out" / "report.md").read_text()


def test_autoencoder_is_judged_by_its_test_loss(tiny, tmp_path):
    text = (
        EXPERIMENT.replace('"mlp"', '"autoencoder"')
        .replace("lr = 0.2", "lr = 0.0001")
        .replace("lr = 0.05", "lr = 0.001")
    )
    tiny.write_text(text.replace('"accuracy=0.3", ', '"loss=100", '))
    assert command(tiny, tmp_path / "out", "--seeds", "1", costs=False) == 0
    found = results_of(tmp_path / "out")
    assert found["runs"][0]["curve"][-1]["test_accuracy"] is None
    header, rows = outcome_table(found)
    assert "best test loss" in header
    best = min(point["test_loss"] for point in found["runs"][0]["curve"])
    assert rows[0][header.index("best test loss")] == f"{best:.2f}"
    assert [row[0] for row in target_tables(found)[0][1]] == ["sgd", "tengrad", "kbfgs"]
    assert found["targets"][-1]["label"] == "SGD's final loss"


def test_the_papers_experiment_end_to_end(tmp_path, tiny_fashion, capsys):
    own = ["reproduce", "fashion-mnist-convnet", "--data-dir", str(tiny_fashion), "--threads", "1", "--seeds", "1"]
    assert main([*own, "--scale", "0.001", "--no-costs", "--out", str(tmp_path / "out")]) == 0
    found = results_of(tmp_path / "out")
    assert found["plan"]["width"] == 0.125
    assert {run["identity"]["optimizer"] for run in found["runs"]} == {"sgd", "tengrad", "kfac", "ekfac", "kbfgs"}
    assert all(run["status"] == "finished" for run in found["runs"])
    assert "report in" in capsys.readouterr().out


def test_missing_data_is_said_to_come_from_somewhere(tmp_path, capsys):
    assert main(["reproduce", "cifar10-vgg16bn", "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert "OpenML (CIFAR_10)" in shown
    assert "data_batch_1.bin" in shown
    assert main(["reproduce", "all", "--scale", "0.001", "--out", str(tmp_path / "all")]) == 2
    captured = capsys.readouterr()
    assert captured.out.count("left out: ") == 10
    assert "mnist-autoencoder were left out" in captured.err


def test_memory_that_the_system_does_not_tell_is_none(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "Path", lambda path: Path("/nowhere"))
    assert command(tiny, tmp_path / "out", "--optimizers", "sgd", "--seeds", "1", costs=True) == 0
    assert results_of(tmp_path / "out")["costs"]["sgd"]["memory"] is None


def test_checksum_sees_every_bit():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    before = runs.checksum(model)
    assert runs.checksum(model) == before
    model[1].running_mean[0] += 1e-7
    assert runs.checksum(model) != before


def test_numbers_that_json_lacks_become_none():
    value = runs.plain({"a": [float("nan"), 1.5], "b": (float("inf"),)})
    assert json.loads(json.dumps(value)) == {"a": [None, 1.5], "b": [None]}
    assert results.default_target([], False) is None
