"""Experiments as TOML files: what the authors chose, and what is a choice of ours because they do not say."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from curvlib.cli.contestants import CONTESTANTS, Value
from curvlib.cli.data import DATASETS
from curvlib.cli.models import MODELS
from curvlib.cli.targets import Target, parse_targets
from curvlib.errors import ConfigurationError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Experiment", "experiment_names", "load_experiment", "parse_experiment"]

_OF_TRANSFORMS = frozenset({"momentum", "weight_decay", "kl_clip"})
_BATCH_NORM = ("gradient", "curvature")
_KINDS: Mapping[str, tuple[type, ...]] = {
    "title": (str,),
    "data": (str,),
    "model": (str,),
    "batch_size": (int,),
    "epochs": (int,),
    "augment": (bool,),
    "seeds": (int,),
    "batch_norm": (str,),
    "evaluate_every": (int,),
    "evaluation_samples": (int,),
    "targets": (list,),
    "milestones": (list,),
    "decay": (int, float),
    "narrowest": (int, float),
    "optimizers": (dict,),
    "choices": (dict,),
}


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Parameters
    ----------
    name
        Name on the command line.
    title
        Heading of the report.
    data, model
        Names of `curvlib.cli.data.DATASETS` and `curvlib.cli.models.MODELS`.
    batch_size, epochs
        Samples in a mini-batch, passes over the training set.
    augment
        Whether training images are shifted and mirrored at random.
    seeds
        Runs of each optimizer, with the seeds 0, 1, and so on.
    batch_norm
        ``"gradient"``: the parameters of batch norms move along the gradient, as the authors have it; ``"curvature"``:
        along their natural gradient (where the method has one for them).
    evaluate_every
        Steps between evaluations within an epoch; there is one after each epoch in any case.
    evaluation_samples
        Training and test samples in an evaluation.
    targets
        Losses and accuracies whose time is reported.
    milestones, decay
        Epochs after which the learning rate is multiplied by `decay`.
    narrowest
        Smallest factor on the widths of hidden layers that ``--scale`` may ask for; 1 keeps the network whole.
    optimizers
        Hyperparameters of each optimizer.
    choices
        What the paper and its code do not say, by the key that it is written under, with the reason.
    """

    name: str
    title: str
    data: str
    model: str
    batch_size: int
    epochs: int
    augment: bool
    seeds: int
    batch_norm: str
    evaluate_every: int
    evaluation_samples: int
    targets: tuple[Target, ...]
    milestones: tuple[int, ...]
    decay: float
    narrowest: float
    optimizers: Mapping[str, Mapping[str, Value]]
    choices: Mapping[str, str]


def experiment_names() -> list[str]:
    """Return the names of the experiments that come with curvlib."""
    return sorted(entry.name.removesuffix(".toml") for entry in _folder().iterdir() if entry.name.endswith(".toml"))


def load_experiment(name: str) -> Experiment:
    """Read an experiment.

    Parameters
    ----------
    name
        One of `experiment_names`, or the path of a file that ends in ``.toml``.

    Raises
    ------
    ConfigurationError
        If there is no such experiment, or its file says something that is not understood.
    """
    if name.endswith(".toml"):
        path = Path(name)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"the experiment {name} cannot be read ({error})") from error
        return parse_experiment(path.stem, text)
    if name not in experiment_names():
        raise ConfigurationError(
            f"unknown experiment {name!r}: choose from {', '.join(experiment_names())}, or give a .toml file"
        )
    return parse_experiment(name, (_folder() / f"{name}.toml").read_text(encoding="utf-8"))


def parse_experiment(name: str, text: str) -> Experiment:
    """Read an experiment from the text of its file.

    Raises
    ------
    ConfigurationError
        If a key is missing, unknown or of another kind, or a value is out of its range.
    """
    try:
        values: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"experiment {name}: not valid TOML ({error})") from error
    _check_keys(name, values)
    values["targets"] = tuple(parse_targets(",".join(map(str, values["targets"]))))
    values["milestones"] = tuple(values["milestones"])
    experiment = Experiment(name, **values)
    _check_ranges(experiment)
    for optimizer, given in experiment.optimizers.items():
        _check_optimizer(name, optimizer, given)
    for path, reason in experiment.choices.items():
        if not isinstance(reason, str) or not _exists(values, path):
            raise ConfigurationError(f"experiment {name}: choices.{path!r} must give the reason for a key of the file")
    return experiment


def _folder() -> Any:
    return resources.files("curvlib.cli") / "experiments"


def _check_keys(name: str, values: Mapping[str, Any]) -> None:
    unknown, missing = sorted(values.keys() - _KINDS.keys()), sorted(_KINDS.keys() - values.keys())
    if unknown or missing:
        parts = [f"unknown keys {unknown}"] * bool(unknown) + [f"missing keys {missing}"] * bool(missing)
        raise ConfigurationError(f"experiment {name}: {', '.join(parts)}; an experiment has {', '.join(_KINDS)}")
    for key, kinds in _KINDS.items():
        # A bool is an int to Python, and nobody means it so.
        if not isinstance(values[key], kinds) or (isinstance(values[key], bool) and bool not in kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ConfigurationError(f"experiment {name}: {key} must be of type {expected}, got {values[key]!r}")


def _check_ranges(experiment: Experiment) -> None:
    one_of = (("data", DATASETS[1:]), ("model", tuple(MODELS)), ("batch_norm", _BATCH_NORM))
    for key, choices in one_of:
        if getattr(experiment, key) not in choices:
            raise ConfigurationError(
                f"experiment {experiment.name}: {key} must be one of {', '.join(choices)}, "
                f"got {getattr(experiment, key)!r}"
            )
    for key in ("batch_size", "epochs", "seeds", "evaluate_every", "evaluation_samples"):
        if getattr(experiment, key) < 1:
            raise ConfigurationError(f"experiment {experiment.name}: {key} must be at least 1")
    milestones = experiment.milestones
    if not all(type(epoch) is int and epoch > 0 for epoch in milestones) or list(milestones) != sorted(set(milestones)):
        raise ConfigurationError(f"experiment {experiment.name}: milestones must be ascending numbers of epochs")
    if not (0 < experiment.decay <= 1 and 0 < experiment.narrowest <= 1 and experiment.optimizers):
        raise ConfigurationError(
            f"experiment {experiment.name}: decay and narrowest must lie in (0, 1], and there must be an optimizer"
        )


def _check_optimizer(name: str, optimizer: str, given: Any) -> None:
    if optimizer not in CONTESTANTS:
        raise ConfigurationError(
            f"experiment {name}: unknown optimizer {optimizer!r}: choose from {', '.join(CONTESTANTS)}"
        )
    known = set(CONTESTANTS[optimizer].defaults)
    if not known.issuperset({"beta1"}) and optimizer != "sgd":
        known |= _OF_TRANSFORMS
    if optimizer == "tengrad":
        known.add("low_rank")
    if not isinstance(given, dict) or not given.keys() <= known:
        raise ConfigurationError(
            f"experiment {name}: optimizers.{optimizer} has keys that it does not know; it has "
            f"{', '.join(sorted(known))}"
        )
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigurationError(f"experiment {name}: optimizers.{optimizer}.{key} must be a number, got {value!r}")
    if "lr" not in given:
        raise ConfigurationError(f"experiment {name}: optimizers.{optimizer} has no lr")


def _exists(values: Mapping[str, Any], path: str) -> bool:
    inner: Any = values
    for part in path.split("."):
        if not isinstance(inner, dict) or part not in inner:
            return False
        inner = inner[part]
    return True
