"""Callbacks: what is told about steps, and the ready writers."""

import csv
import sys
import types

import pytest
from small_net import INDEFINITE, Failing, backward, built, small_net, train

from curvlib import CSVWriter, TensorBoardWriter
from curvlib.errors import ConfigurationError, DataError, FailureWarning


def test_callbacks_are_called_in_order_after_each_step_with_the_closure_s_loss():
    model, seen, told = small_net(), [], [None]
    optimizer = built(
        model, solver=Failing(told), on_failure="skip", callbacks=[lambda opt, loss: seen.append((opt.steps, loss))]
    )
    optimizer.add_callback(lambda opt, loss: seen.append("second"))
    train(model, optimizer)

    def closure():
        optimizer.zero_grad()
        return float(backward(model))

    loss = optimizer.step(closure)
    told[0] = INDEFINITE
    with pytest.warns(FailureWarning):
        skipped = optimizer.step(closure)
    assert seen == [(1, None), "second", (2, loss), "second", (2, skipped), "second"]


def test_a_callback_that_raises_comes_after_the_step():
    def stop(optimizer, loss):
        raise StopIteration("enough")

    model = small_net()
    optimizer = built(model, callbacks=[stop])
    with pytest.raises(StopIteration):
        train(model, optimizer)
    assert optimizer.steps == 1


@pytest.mark.parametrize("callback", [None, "file.csv", CSVWriter])
def test_what_is_no_callback(callback):
    with pytest.raises(ConfigurationError, match="a callback is a function"):
        built(small_net(), callbacks=[callback])
    with pytest.raises(ConfigurationError, match="a callback is a function"):
        built(small_net()).add_callback(callback)


def test_csv_writer(tmp_path):
    path = tmp_path / "health.csv"
    model = small_net()
    optimizer = built(model, callbacks=[CSVWriter(path, every=2)], refresh=3)
    train(model, optimizer, 5)
    optimizer = built(model, callbacks=[CSVWriter(path, every=1)])  # a resumed run goes on in the same file
    train(model, optimizer)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["block"]) for row in rows] == [
        (step, block) for step in ("2", "4", "1") for block in ("", "0", "2")
    ]
    assert float(rows[0]["kl"]) > 0
    assert rows[0]["lr"] == "0.5"
    assert (rows[1]["staleness"], rows[1]["failures"], rows[1]["damping"]) == ("1", "0", "0.1")
    assert 0 < float(rows[1]["effective_dimension"]) < 36 < float(rows[1]["condition"]) * 36


def test_csv_writer_refuses_what_cannot_be_written(tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "x.csv", "nul\0l"):
        with pytest.raises(DataError, match="give another path"):
            CSVWriter(path)
    for bad in ({"every": 0}, {"every": True}, {"every": "1"}):
        with pytest.raises(ConfigurationError, match="every as an integer"):
            CSVWriter(tmp_path / "x.csv", **bad)
    with pytest.raises(ConfigurationError, match="path of a file"):
        CSVWriter(3)


class Recorder:
    def __init__(self, *args):
        self.args, self.points = args, []

    def add_scalar(self, tag, value, step):
        self.points.append((tag, value, step))


def test_tensorboard_writer(monkeypatch):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Recorder
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    writer = TensorBoardWriter("runs", every=2)
    assert writer.writer.args == ("runs",)
    model = small_net()
    train(model, built(model, callbacks=[writer]), 3)
    tags = {tag: value for tag, value, step in writer.writer.points if step == 2}
    assert {"curvlib/kl", "curvlib/lr/0", "curvlib/condition/0", "curvlib/staleness/2"} <= set(tags)
    assert "curvlib/loss" not in tags
    assert {step for _, _, step in writer.writer.points} == {2}


def test_tensorboard_writer_takes_a_writer_and_says_what_is_missing(monkeypatch):
    own = Recorder()
    assert TensorBoardWriter(own).writer is own
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigurationError, match="pip install tensorboard, or use CSVWriter"):
        TensorBoardWriter("runs")
    with pytest.raises(ConfigurationError, match="a folder or a SummaryWriter"):
        TensorBoardWriter(3)


def test_tensorboard_itself_where_it_is_installed(tmp_path):
    pytest.importorskip("tensorboard")
    model = small_net()
    writer = TensorBoardWriter(tmp_path, every=1)
    train(model, built(model, callbacks=[writer]))
    writer.writer.close()
    assert list(tmp_path.glob("events*"))
