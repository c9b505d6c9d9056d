import csv
import json
import os
import signal
import threading

import pytest
import torch

from curvlib.cli import contestants, main, trainer
from curvlib.cli.checkpoint import load_checkpoint
from curvlib.cli.interruption import StopOnInterrupt

NAMES = list(contestants.CONTESTANTS)
SHORTER = {"tengrad": "refresh=5", "fngd": "first_epoch=14"}


def command(folder, *options):
    return main(["train", "--data", "digits", "--model", "mlp", "--threads", "1", "--out", str(folder), *options])


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


USUAL = ("tengrad", "kfac", "spring", "sgd")
"""Resumed in every run of the tests; the others, which take a minute together, in nightly ones."""


@pytest.mark.parametrize(
    "name", [name if name in USUAL else pytest.param(name, marks=pytest.mark.nightly) for name in NAMES]
)
def test_resume_is_bit_for_bit(tmp_path, name, capsys):
    options = ["--optimizer", name, "--batch-size", "100", "--eval-every", "7", "--eval-samples", "50"]
    if name in SHORTER:
        options += ["--set", SHORTER[name]]
    assert command(tmp_path / "whole", *options, "--steps", "33") == 0
    # 17 steps are in the middle of an epoch of 14 and between two refreshes.
    assert command(tmp_path / "parts", *options, "--steps", "17") == 0
    assert command(tmp_path / "parts", *options, "--steps", "33", "--resume") == 0
    whole, parts = (load_checkpoint(tmp_path / folder)[0] for folder in ("whole", "parts"))
    assert whole["steps"] == parts["steps"] == 33
    for key in ("model", "optimizer", "batches", "random"):
        assert equal(whole[key], parts[key]), key
    assert "from step 17" in capsys.readouterr().out


def test_files_and_defaults(tmp_path, capsys):
    options = ["--optimizer", "sgd", "--epochs", "2", "--batch-size", "479", "--lr", "0.1"]
    assert command(tmp_path, *options) == 0
    with (tmp_path / "history.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["3", "6"]
    configuration = json.loads((tmp_path / "config.json").read_text())
    assert configuration["identity"]["hyperparameters"]["lr"] == 0.1
    assert (tmp_path / "checkpoint.previous.pt").exists()
    shown = capsys.readouterr().out
    assert "best test accuracy" in shown
    assert "epoch 2.00" in shown


def test_ten_epochs_unless_told_otherwise(tmp_path, capsys):
    assert command(tmp_path, "--optimizer", "sgd", "--batch-size", "1000", "--eval-every", "100") == 0
    assert load_checkpoint(tmp_path)[0]["steps"] == 10


def test_seconds_and_autoencoder(tmp_path, capsys):
    assert command(tmp_path, "--optimizer", "adam", "--seconds", "0.2", "--model", "autoencoder") == 0
    assert "best test loss" in capsys.readouterr().out
    assert load_checkpoint(tmp_path)[0]["seconds"] >= 0.2


def test_existing_checkpoint_is_not_overwritten(tmp_path, capsys):
    assert command(tmp_path, "--optimizer", "sgd", "--steps", "2") == 0
    assert command(tmp_path, "--optimizer", "sgd", "--steps", "4") == 2
    assert "--resume" in capsys.readouterr().err


def test_resume_of_another_run_is_refused(tmp_path, capsys):
    assert command(tmp_path, "--optimizer", "sgd", "--steps", "2") == 0
    assert command(tmp_path, "--optimizer", "sgd", "--steps", "4", "--resume", "--lr", "0.5", "--seed", "3") == 2
    shown = capsys.readouterr().err
    assert "seed was 0, is 3" in shown
    assert "hyperparameters was" in shown


def test_nothing_to_resume(tmp_path, capsys):
    assert command(tmp_path, "--resume") == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_corrupt_checkpoint_falls_back_to_the_backup(tmp_path, capsys):
    options = ["--optimizer", "sgd", "--checkpoint-every", "2", "--eval-samples", "20"]
    assert command(tmp_path / "whole", *options, "--steps", "8") == 0
    assert command(tmp_path / "parts", *options, "--steps", "6") == 0
    path = tmp_path / "parts" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-100])
    assert command(tmp_path / "parts", *options, "--steps", "8", "--resume") == 0
    assert "backup" in capsys.readouterr().out
    whole, parts = (load_checkpoint(tmp_path / folder)[0] for folder in ("whole", "parts"))
    assert equal(whole["model"], parts["model"])


def test_ctrl_c_ends_after_the_step_and_resumes_bit_for_bit(tmp_path, monkeypatch, capsys):
    step = trainer.training_step
    calls = []

    def interrupted(*args):
        calls.append(None)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    options = ["--optimizer", "adam", "--steps", "9", "--eval-samples", "20"]
    assert command(tmp_path / "whole", *options) == 0
    monkeypatch.setattr(trainer, "training_step", interrupted)
    assert command(tmp_path / "parts", *options) == 130
    assert "interrupted at step 5" in capsys.readouterr().out
    assert command(tmp_path / "parts", *options, "--resume") == 0
    whole, parts = (load_checkpoint(tmp_path / folder)[0] for folder in ("whole", "parts"))
    assert equal(whole["model"], parts["model"])


def test_interruption_inside_a_step_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    step = trainer.training_step
    calls = []

    def interrupted(*args):
        calls.append(None)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(trainer, "training_step", interrupted)
    options = ["--optimizer", "sgd", "--steps", "9", "--checkpoint-every", "2"]
    assert command(tmp_path, *options) == 130
    assert "interrupted" in capsys.readouterr().err
    assert load_checkpoint(tmp_path)[0]["steps"] == 4


def test_second_ctrl_c_interrupts_at_once():
    before = signal.getsignal(signal.SIGINT)  # ignored in jobs that a shell started in the background
    with StopOnInterrupt() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_interruption_outside_the_main_thread():
    seen = []

    def work():
        with StopOnInterrupt() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


@pytest.mark.parametrize("name", ["sgd", "kbfgs"])
def test_divergence_is_an_error(tmp_path, capsys, name):
    assert command(tmp_path, "--optimizer", name, "--lr", "1e30", "--steps", "20") == 2
    assert "training loss became" in capsys.readouterr().err


def test_digits_standing_in(tmp_path, capsys):
    assert command(tmp_path, "--data", "auto", "--optimizer", "sgd", "--steps", "1") == 0
    assert "stands in for fashion-mnist" in capsys.readouterr().out


def test_module_entry_point(monkeypatch, capsys):
    import runpy

    monkeypatch.setattr("sys.argv", ["curvlib", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("curvlib.cli", run_name="__main__")
    assert caught.value.code == 0
    assert "race" in capsys.readouterr().out
