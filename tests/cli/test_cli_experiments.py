"""The experiments' files: valid, complete, as the paper has them; and what is refused."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from curvlib.cli.data import Dataset
from curvlib.cli.reproduction.experiments import experiment_names, load_experiment, parse_experiment
from curvlib.cli.reproduction.plan import make_plan
from curvlib.cli.training import training_step
from curvlib.errors import ConfigurationError
from curvlib.solvers import Identity, Woodbury

NAMES = experiment_names()
PATHS = {name: Path(__file__).parents[2] / "curvlib" / "cli" / "experiments" / f"{name}.toml" for name in NAMES}

# Learning rate, damping (not of SGD) and weight decay of SGD, TENGraD, KFAC, EKFAC and K-BFGS.
PAPER = """
cifar10-vgg16bn        .01/.003  .1/.2/.003   .01/.03/.003  .01/.03/.003  .03/.03/.003
cifar10-wrn-28-4       .01/.003  .03/.1/.003  .03/.03/.003  .01/.03/.003  .03/.01/.003
cifar10-densenet       .03/.003  .1/.2/.003   .01/.03/.003  .01/.01/.003  .01/.01/.003
cifar10-mobilenetv2    .01/.003  .01/.2/.01   .01/.1/.003   .01/.1/.003   .01/.1/.003
cifar100-vgg16bn       .01/.003  .01/.3/.03   .003/.03/.01  .003/.03/.01  .003/.01/.01
cifar100-wrn-28-4      .01/.003  .01/.3/.03   .003/.03/.01  .003/.03/.01  .003/.01/.01
cifar100-densenet      .01/.003  .1/.1/.003   .01/.03/.003  .01/.03/.003  .01/.03/.003
cifar100-mobilenetv2   .01/.003  .01/.3/.01   .01/.03/.003  .01/.03/.003  .01/.01/.003
fashion-mnist-convnet  .03/.001  .003/.1/.001 .003/.1/.001  .001/.03/.003 .01/.03/.001
mnist-autoencoder      .003/0    .1/3/0       .1/.3/0       .001/.3/0     .1/.3/0
"""
PAPER = {
    name: [tuple(map(float, cell.split("/"))) for cell in cells]
    for name, *cells in map(str.split, PAPER.strip().splitlines())
}


def blank(name, samples=12):
    """Noise of the shape of an experiment's data."""
    experiment = load_experiment(name)
    shape = (3, 32, 32) if experiment.data.startswith("cifar") else (1, 28, 28)
    classes = 100 if experiment.data == "cifar100" else 10
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (samples, *shape), dtype=np.uint8)
    labels = random.integers(0, classes, samples).astype(np.uint8)
    return Dataset(experiment.data, "noise", images, labels, images, labels, classes)


def test_all_experiments_are_there():
    assert set(NAMES) == set(PAPER)


@pytest.mark.parametrize("name", NAMES)
def test_hyperparameters_are_the_papers(name):
    experiment = load_experiment(name)
    assert list(experiment.optimizers) == ["sgd", "tengrad", "kfac", "ekfac", "kbfgs"]
    for own, expected in zip(experiment.optimizers.values(), PAPER[name], strict=True):
        keys = ("lr", "weight_decay") if len(expected) == 2 else ("lr", "damping", "weight_decay")
        assert tuple(own[key] for key in keys) == expected
        assert own["momentum"] == 0.9
    assert experiment.optimizers["tengrad"]["refresh"] == 100
    assert experiment.optimizers["tengrad"].get("low_rank") == (0.9 if "vgg" in name else None)
    lengths = {"cifar10": (128, 60, (10, 20, 30, 40, 50), 0.5), "cifar100": (128, 60, (30, 45), 0.1),
               "fashion-mnist": (128, 10, (), 1), "mnist": (100, 100, (), 1)}  # fmt: skip
    own = (experiment.batch_size, experiment.epochs, experiment.milestones, experiment.decay)
    assert own == lengths[experiment.data]
    assert experiment.augment == experiment.data.startswith("cifar")


@pytest.mark.parametrize("name", NAMES)
def test_choices_are_marked_where_they_are_made(name):
    marked = set()
    section = ""
    for line in PATHS[name].read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]") + "."
        if line.endswith("# choice"):
            marked.add(section + line.partition(" =")[0])
    choices = set(load_experiment(name).choices)
    assert marked == choices - {"optimizers.kbfgs"}  # which is a choice as a whole


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_fits_the_model(name):
    dataset = blank(name)
    plan = make_plan(load_experiment(name), dataset, 1e-3)
    task = plan.task(dataset, torch.device("cpu"))
    for optimizer in plan.optimizers:
        model = task.model(0)
        built = plan.optimizer(optimizer, model, task.likelihood, 0)
        if optimizer == "sgd":
            continue
        kinds = {name: type(module) for name, module in model.named_modules()}
        for block, solver in built.solvers.items():
            assert isinstance(solver, Identity) == issubclass(kinds[block], nn.BatchNorm2d)
            if optimizer == "tengrad" and kinds[block] is nn.Conv2d:
                assert solver == Woodbury(low_rank=0.9 if "vgg" in name else None)


@pytest.mark.parametrize("name", ["cifar10-vgg16bn", "cifar100-wrn-28-4", "cifar10-densenet", "cifar10-mobilenetv2"])
def test_two_steps_on_each_network(name):
    dataset = blank(name, 4)
    plan = make_plan(load_experiment(name), dataset, 1e-3)
    task = plan.task(dataset, torch.device("cpu"))
    for optimizer in ("tengrad", "kbfgs"):
        model = task.model(0)
        built, batches = plan.optimizer(optimizer, model, task.likelihood, 0), task.batches(4, 0)
        before = [p.detach().clone() for p in model.parameters()]
        losses = [training_step(task, model, built, batches.draw()) for _ in range(2)]
        assert np.isfinite(losses).all()
        assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_scale_shrinks_data_epochs_widths_and_milestones():
    experiment = load_experiment("cifar10-vgg16bn")
    dataset = blank("cifar10-vgg16bn", 2560)
    plan = make_plan(experiment, dataset, 0.25)
    assert (plan.train_samples, plan.test_samples, plan.epochs, plan.width) == (640, 640, 15, 0.25)
    assert (plan.steps_per_epoch, plan.steps) == (5, 75)
    assert plan.milestones == (12, 25, 38, 50, 62)
    assert plan.evaluate_every is None  # 390 are more than the 5 of an epoch
    assert [plan.rate(step) for step in (0, 11, 12, 74)] == [1, 1, 0.5, 0.5**5]
    assert make_plan(experiment, dataset, 0.01).width == experiment.narrowest
    assert make_plan(experiment, dataset, 0.25, epochs=60).milestones == (50, 100, 150, 200, 250)
    whole = make_plan(experiment, dataset)
    assert make_plan(load_experiment("mnist-autoencoder"), blank("mnist-autoencoder", 61_000)).evaluate_every == 600
    assert (whole.epochs, whole.width, whole.seeds, len(whole.optimizers)) == (60, 1, 5, 5)
    assert make_plan(experiment, dataset, optimizers=["kfac", "sgd"], seeds=2).optimizers == ("sgd", "kfac")


def test_plans_that_are_refused():
    experiment, dataset = load_experiment("fashion-mnist-convnet"), blank("fashion-mnist-convnet")
    with pytest.raises(ConfigurationError, match="no settings for adam: it compares sgd, tengrad"):
        make_plan(experiment, dataset, optimizers=["adam"])
    with pytest.raises(ConfigurationError, match=r"\(0, 1\]"):
        make_plan(experiment, dataset, 1.5)


SMALL = """
title = "Small"
data = "digits"
model = "mlp"
batch_size = 32
epochs = 2
augment = false
seeds = 1
batch_norm = "gradient"
evaluate_every = 7
evaluation_samples = 50
targets = ["loss=1.0"]
milestones = [1]
decay = 0.5
narrowest = 0.1
[optimizers.sgd]
lr = 0.1
[choices]
"optimizers.sgd.lr" = "why not"
"""

REFUSED = [
    ('title = "Small"', 'name = "Small"', r"unknown keys \['name'\], missing keys \['title'\]"),
    ("epochs = 2", "epochs = 2\nspeed = 1", r"unknown keys \['speed'\]"),
    ("epochs = 2", 'epochs = "2"', "epochs must be of type int"),
    ("epochs = 2", "epochs = true", "epochs must be of type int"),
    ("epochs = 2", "epochs = 0", "epochs must be at least 1"),
    ("epochs = 2", "epochs = ", "not valid TOML"),
    ('"digits"', '"svhn"', "data must be one of fashion-mnist"),
    ('"mlp"', '"lenet"', "model must be one of"),
    ('"gradient"', '"none"', "batch_norm must be one of gradient, curvature"),
    ("[1]", "[2, 1]", "milestones must be ascending"),
    ("[1]", '["1"]', "milestones must be ascending"),
    ("decay = 0.5", "decay = 0", "decay and narrowest"),
    ('"loss=1.0"', '"loss"', "--targets loss"),
    ("[optimizers.sgd]", "[optimizers.newton]", "unknown optimizer 'newton'"),
    ("lr = 0.1", "lr = 0.1\ndamping = 1.0", "optimizers.sgd has keys that it does not know"),
    ("lr = 0.1", 'lr = "0.1"', "optimizers.sgd.lr must be a number"),
    ("lr = 0.1", "momentum = 0.1", "optimizers.sgd has no lr"),
    ('"optimizers.sgd.lr"', '"optimizers.sgd.momentum"', "must give the reason for a key of the file"),
]


def test_small_file_is_read():
    experiment = parse_experiment("small", SMALL)
    assert (experiment.title, experiment.optimizers, experiment.milestones) == ("Small", {"sgd": {"lr": 0.1}}, (1,))


@pytest.mark.parametrize(("old", "new", "message"), REFUSED)
def test_files_that_are_refused(old, new, message):
    assert old in SMALL
    with pytest.raises(ConfigurationError, match=message):
        parse_experiment("small", SMALL.replace(old, new, 1))


def test_names_that_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="choose from cifar10-densenet"):
        load_experiment("imagenet")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_experiment(str(tmp_path / "mine.toml"))


def test_files_are_package_data():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"cli/experiments/*.toml"' in text
    assert all(
        a != b for a, b in itertools.combinations([path.read_text(encoding="utf-8") for path in PATHS.values()], 2)
    )
