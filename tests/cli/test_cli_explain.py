"""``curvlib explain`` imports the user's model and prints its table, or one clean line."""

import json

import pytest

from curvlib.cli import main

SOURCE = """
import torch
from torch import nn

network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
number = 3

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(3))
    def forward(self, x):
        return self.head(self.words(x).mean(1)) * self.scale

class Holder:
    build = staticmethod(lambda: network)

def nothing():
    return 1

def broken():
    raise KeyError("lost")
"""


@pytest.fixture(autouse=True)
def own_module(tmp_path, monkeypatch):
    (tmp_path / "my_network.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "my_mistake.py").write_text("import not_a_module_of_anyone", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("attribute", ["network", "Holder.build"])
def test_a_table_of_every_parameter(attribute, capsys):
    assert main(["explain", f"my_network:{attribute}", "--input", "3x4", "--batch", "5"]) == 0
    text = capsys.readouterr().out
    assert "1.weight" in text
    assert "5 × 36" in text


def test_json_for_indices_and_uncovered_parameters(capsys):
    options = ["--input", "6:7", "--solver", "dense", "--fisher", "exact", "--likelihood", "gaussian", "--eval"]
    assert main(["explain", "my_network:Words", *options, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    by_name = {one["name"]: one for one in data["parameters"]}
    assert by_name["scale"]["adapter"] == "uncovered"
    assert by_name["words.weight"]["rows"] == 32 * 3
    assert by_name["head.weight"]["solver"] == "Dense()"
    assert main(["explain", "my_network:Words", *options, "--rest", "sgd", "--json"]) == 0
    assert '"rest"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["my_network", "--input", "12"], "'my_network' is not MODULE:ATTR"),
        (["not_here_at_all:x", "--input", "12"], "importing not_here_at_all raises ModuleNotFoundError"),
        (["my_mistake:x", "--input", "12"], "importing my_mistake raises ModuleNotFoundError"),
        (["my_network:lost", "--input", "12"], "my_network has no attribute 'lost'"),
        (["my_network:number", "--input", "12"], "is a int, neither a torch.nn.Module nor a function"),
        (["my_network:nothing", "--input", "12"], "returned int, not a torch.nn.Module"),
        (["my_network:broken", "--input", "12"], "calling my_network:broken() raises KeyError"),
        (["my_network:network", "--input", "13"], "on inputs of shapes [(32, 13)] raises RuntimeError"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert main(["explain", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("curvlib explain: error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("shape", ["1xa", "0", "4:0", "x"])
def test_a_shape_that_is_none_is_refused(shape, capsys):
    with pytest.raises(SystemExit):
        main(["explain", "my_network:network", "--input", shape])
    assert "--input" in capsys.readouterr().err
