"""The page about the experiments is the one that its script writes; and what it says of results is theirs."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch

from curvlib.cli.data import load_dataset
from curvlib.cli.reproduction.conduct import conduct
from curvlib.cli.reproduction.experiments import parse_experiment
from curvlib.cli.reproduction.plan import make_plan

ROOT = Path(__file__).parents[2]
EXPERIMENT = """
title = "Tiny"
data = "digits"
model = "mlp"
batch_size = 32
epochs = 1
augment = false
seeds = 2
batch_norm = "gradient"
evaluate_every = 100
evaluation_samples = 40
targets = ["loss=100"]
milestones = []
decay = 1.0
narrowest = 0.02
[optimizers.sgd]
lr = 0.1
[choices]
"""


def script(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date():
    page = ROOT / "docs" / "reproduce.md"
    generator = script("generate_reproduce", ROOT / "docs" / "generate_reproduce.py")
    assert page.read_text(encoding="utf-8") == generator.text(), "run python docs/generate_reproduce.py"


def test_committed_results_are_shown_with_where_they_come_from(tmp_path, monkeypatch):
    def small(argv):
        options.extend(argv)
        plan = make_plan(parse_experiment("tiny", EXPERIMENT), load_dataset("digits"), 0.05)
        return 0 if conduct(plan, load_dataset("digits"), torch.device("cpu"), tmp_path, str, costs=False) else 130

    options = []
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import reproduce

    monkeypatch.setattr(reproduce, "curvlib", small)
    monkeypatch.setattr(sys, "argv", ["reproduce", "--out", str(tmp_path), "--provisional", "--seeds", "1"])
    assert reproduce.main() == 0
    assert options == ["reproduce", "fashion-mnist-convnet", "--out", str(tmp_path), *reproduce.SIZE, "--seeds", "1"]
    results = json.loads((tmp_path / "results.json").read_text())
    generator = script("generate_reproduce", ROOT / "docs" / "generate_reproduce.py")
    page = generator.result_text(results)
    losses = [run["curve"][-1]["train_loss"] for run in results["runs"]]
    assert f"{np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f}" in page
    for part in ("Provisional", results["environment"]["date"], results["environment"]["commit"], "At reduced size"):
        assert part in page
    assert "provisional: True" in (tmp_path / "report.md").read_text()
