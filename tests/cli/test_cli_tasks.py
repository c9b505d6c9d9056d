import itertools

import pytest
import torch

import curvlib
from curvlib.cli.batches import Batches, BatchOrder
from curvlib.cli.contestants import (
    CONTESTANTS,
    build_optimizer,
    choose,
    hyperparameters,
    parse_value,
)
from curvlib.cli.data import load_dataset
from curvlib.cli.environment import choose_device, describe_environment
from curvlib.cli.evaluation import Evaluation, evaluate
from curvlib.cli.models import MODELS
from curvlib.cli.targets import Target, default_targets, parse_targets, seconds_to
from curvlib.cli.tasks import make_task
from curvlib.errors import ConfigurationError

CPU = torch.device("cpu")


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("shape", "classes"), [((1, 28, 28), 10), ((3, 32, 32), 100), ((1, 8, 8), 10)])
def test_models_fit_the_data(name, shape, classes):
    model = MODELS[name](shape, classes)
    outputs = model(torch.zeros(2, *shape))
    assert outputs.shape == (2, torch.Size(shape).numel() if MODELS[name].reconstructs else classes)


def test_convnet_is_the_papers():
    model = MODELS["convnet"]((1, 28, 28), 10)
    linear = [layer for layer in model if isinstance(layer, torch.nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(10368, 500), (500, 10)]
    convolutions = 128 * 9 + 128 + 2 * (128 * 128 * 9 + 128)
    assert parameters(model) == convolutions + 10368 * 500 + 500 + 500 * 10 + 10


def test_autoencoder_is_the_papers():
    widths = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    model = MODELS["autoencoder"]((1, 28, 28), 10)
    assert parameters(model) == sum(a * b + b for a, b in itertools.pairwise(widths))
    code = next(i for i, layer in enumerate(model) if getattr(layer, "out_features", 0) == 30)
    assert isinstance(model[code + 1], torch.nn.Linear)
    assert parameters(MODELS["mlp"]((1, 28, 28), 10)) == 785 * 1000 + 1001 * 500 + 501 * 10


def test_images_too_small_for_a_model():
    with pytest.raises(ConfigurationError, match="too small"):
        MODELS["small-convnet"]((1, 2, 28), 10)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def test_initial_parameters_depend_on_the_seed_alone(digits):
    task = make_task(digits, "small-convnet", CPU)
    first = task.model(3)
    before = torch.get_rng_state()
    torch.rand(7)
    second, other = task.model(3), task.model(4)
    torch.set_rng_state(before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_building_leaves_the_global_generator(digits):
    before = torch.get_rng_state()
    make_task(digits, "mlp", CPU).model(0)
    assert torch.equal(before, torch.get_rng_state())


def test_inputs_are_normalised_by_the_training_set(digits):
    task = make_task(digits, "mlp", CPU)
    deviation, mean = torch.std_mean(task.train_inputs)
    assert float(mean) == pytest.approx(0, abs=1e-5)
    assert float(deviation) == pytest.approx(1, abs=1e-5)
    assert task.likelihood == "categorical"
    assert not task.augment


def test_autoencoder_reconstructs_pixels(digits):
    task = make_task(digits, "autoencoder", CPU)
    assert task.likelihood == "bernoulli"
    assert task.train_targets.shape == (1437, 64)
    assert float(task.train_targets.max()) == 1
    logits = torch.zeros(5, 64)
    assert float(task.loss(logits, task.train_targets[:5])) == pytest.approx(64 * 0.6931472)
    with pytest.raises(ConfigurationError, match="--augment"):
        make_task(digits, "autoencoder", CPU, augment=True)


def test_unknown_model(digits):
    with pytest.raises(ConfigurationError, match="unknown model 'vgg'"):
        make_task(digits, "vgg", CPU)


def test_evaluation_is_a_mean_over_samples_and_leaves_the_mode(digits):
    task = make_task(digits, "mlp", CPU)
    model = task.model(0)
    point = evaluate(task, model, 3, 1.5, 700)
    expected = task.loss(model(task.train_inputs[:700]), task.train_targets[:700])
    assert point.train_loss == pytest.approx(expected.item(), rel=1e-5)
    assert (point.step, point.seconds) == (3, 1.5)
    assert 0 <= point.test_accuracy <= 1
    assert model.training


def test_batch_order_covers_each_epoch_once_and_drops_the_rest():
    order = BatchOrder(10, 3, seed=1)
    assert order.batches_per_epoch == 3
    epochs = [torch.cat([next(order) for _ in range(3)]).tolist() for _ in range(2)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert order.epoch == 1
    assert iter(order) is order


@pytest.mark.parametrize("drawn", [0, 2, 3, 5])
@pytest.mark.parametrize("augment", [False, True])
def test_batches_resume(drawn, augment):
    images, labels = torch.rand(10, 3, 8, 8), torch.arange(10)
    batches = Batches(images, labels, 3, 5, augment=augment)
    for _ in range(drawn):
        batches.draw()
    state = batches.state_dict()
    expected = [batches.draw() for _ in range(7)]
    resumed = Batches(images, labels, 3, 99, augment=augment)
    resumed.load_state_dict(state)
    for x, y in expected:
        same_x, same_y = resumed.draw()
        assert torch.equal(x, same_x)
        assert torch.equal(y, same_y)


@pytest.mark.parametrize("size", [0, 11])
def test_impossible_batch_size(size):
    with pytest.raises(ConfigurationError, match="--batch-size between 1 and 10"):
        BatchOrder(10, size, 0)


def test_augmentation_shifts_and_mirrors_without_changing_the_order():
    images = torch.arange(6 * 2 * 9 * 9, dtype=torch.float32).reshape(6, 2, 9, 9) + 1
    labels = torch.arange(6)
    plain, changed = (Batches(images, labels, 6, 2, augment=augment) for augment in (False, True))
    (x, y), (moved, same_y) = plain.draw(), changed.draw()
    assert torch.equal(y, same_y)
    assert moved.shape == x.shape
    for original, image in zip(x, moved, strict=True):
        padded = torch.nn.functional.pad(original, (4,) * 4)
        candidates = [
            window
            for i in range(9)
            for j in range(9)
            for window in (padded[:, i : i + 9, j : j + 9], padded[:, i : i + 9, j : j + 9].flip(2))
        ]
        assert any(torch.equal(candidate, image) for candidate in candidates)


def test_choose():
    assert choose("all") == list(CONTESTANTS)
    assert choose("adam, sgd") == ["adam", "sgd"]
    with pytest.raises(ConfigurationError, match="unknown optimizer 'lion'"):
        choose("sgd,lion")
    with pytest.raises(ConfigurationError, match="named twice"):
        choose("sgd,sgd")


def test_hyperparameters_by_model_and_override():
    assert hyperparameters("sgd", "autoencoder", {})["weight_decay"] == 0
    values = hyperparameters("tengrad", "mlp", {"refresh": "10", "kl_clip": "none", "lr": "0.5"})
    assert (values["refresh"], values["kl_clip"], values["lr"]) == (10, None, 0.5)
    with pytest.raises(ConfigurationError, match="sgd has no hyperparameter 'damping'"):
        hyperparameters("sgd", "mlp", {"damping": "1"})


@pytest.mark.parametrize(
    ("text", "default", "value"), [("true", False, True), ("reduce", "expand", "reduce"), ("1e-3", None, 1e-3)]
)
def test_values_take_the_kind_of_their_default(text, default, value):
    assert parse_value("x", text, default) == value


@pytest.mark.parametrize(
    ("text", "default", "message"),
    [("1.5", 3, "whole number"), ("maybe", True, "true nor false"), ("fast", 0.1, "finite"), ("inf", 0.1, "finite")],
)
def test_values_that_cannot_be(text, default, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_value("sgd.x", text, default)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_builders_pass_every_hyperparameter(name):
    model = torch.nn.Linear(2, 2)
    values = hyperparameters(name, "mlp", {"lr": "0.25", "weight_decay": "0.125"})
    group = build_optimizer(name, model, "categorical", values, 0).param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.125)


def test_refused_hyperparameters_are_a_sentence():
    with pytest.raises(ConfigurationError, match=r"sgd refuses its hyperparameters \(lr=-1"):
        build_optimizer("sgd", torch.nn.Linear(2, 2), "categorical", {"lr": -1.0}, 0)
    with pytest.raises(ConfigurationError, match="refuses"):
        build_optimizer("sgd", torch.nn.Linear(2, 2), "categorical", {"speed": 1.0}, 0)


@pytest.mark.parametrize(
    ("likelihood", "distribution"), [("categorical", curvlib.Categorical()), ("bernoulli", curvlib.Bernoulli())]
)
def test_tengrad_is_given_likelihood_seed_and_hyperparameters(likelihood, distribution):
    values = {**CONTESTANTS["tengrad"].defaults, "refresh": 7, "samples": 3, "kl_clip": None}
    optimizer = build_optimizer("tengrad", torch.nn.Linear(2, 2), likelihood, values, 7)
    assert optimizer.fisher == curvlib.Sampled(distribution, 3)
    assert optimizer.refresh == curvlib.Every(7)
    assert optimizer.damping == curvlib.Constant(values["damping"])
    assert not any(isinstance(transform, curvlib.KLClip) for transform in optimizer.transforms)


@pytest.mark.parametrize("name", [name for name in CONTESTANTS if name not in ("sgd", "adam", "adamw")])
def test_every_recipe_can_race_with_its_defaults(name):
    values = hyperparameters(name, "mlp", {})
    assert isinstance(build_optimizer(name, torch.nn.Linear(2, 2), "categorical", values, 0), curvlib.NaturalGradient)
    assert CONTESTANTS[name].description


def test_configuration_errors_of_a_recipe_pass_unchanged():
    values = hyperparameters("tengrad", "mlp", {"damping": "-1"})
    with pytest.raises(ConfigurationError, match=r"^damping must be a positive"):
        build_optimizer("tengrad", torch.nn.Linear(2, 2), "categorical", values, 0)


def test_targets():
    loss, accuracy = parse_targets("loss=0.5, accuracy=0.9,")
    assert (str(loss), str(accuracy)) == ("loss ≤ 0.5", "accuracy ≥ 0.9")
    curve = [Evaluation(i, i * 2.0, 1 - 0.2 * i, 0.0, 0.3 * i) for i in range(4)]
    assert seconds_to(loss, curve) == 6.0
    assert seconds_to(accuracy, curve) == 6.0 or curve[-1].test_accuracy < 0.9
    assert seconds_to(Target("loss", 0.1), curve) is None
    assert default_targets("digits", False)
    assert all(target.quantity == "loss" for target in default_targets("mnist", True))
    assert default_targets("cifar10", True) == []


@pytest.mark.parametrize("text", ["speed=1", "loss", "loss=low", "accuracy=90", "loss=nan"])
def test_targets_that_are_not_understood(text):
    with pytest.raises(ConfigurationError, match="--targets"):
        parse_targets(text)


def test_environment(monkeypatch):
    assert choose_device("auto").type in ("cpu", "cuda")
    described = describe_environment(CPU)
    assert described["torch"] == torch.__version__
    assert {"python", "numpy", "curvlib", "cpu", "threads", "device"} <= set(described)
    for name in ("abacus", "cuda:99"):
        with pytest.raises(ConfigurationError, match="--device"):
            choose_device(name)


def test_environment_on_systems_without_proc(monkeypatch):
    from pathlib import Path

    def absent(self, **options):
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", absent)
    assert describe_environment(CPU)["cpu"]
