"""The optimizers that can race: one table of builders, default hyperparameters and the grids that those came from."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from curvlib.errors import ConfigurationError
from curvlib.fisher import Bernoulli, Categorical
from curvlib.precond import recipes

__all__ = ["CONTESTANTS", "RACED", "Contestant", "build_optimizer", "choose", "hyperparameters", "parse_value"]

Value = float | int | bool | str | None
Hyperparameters = Mapping[str, Value]
Builder = Callable[[nn.Module, str, Hyperparameters, int], Optimizer]


@dataclass(frozen=True)
class Contestant:
    """One optimizer of the table.

    Parameters
    ----------
    build
        From the network, the likelihood's name, the hyperparameters and the seed to the optimizer.
    description
        One line for the help and the report.
    defaults
        Every hyperparameter and its value.
    for_model
        Values that differ for a network of `curvlib.cli.models.MODELS`.
    grid
        The values that were tried for each tuned hyperparameter; empty if the defaults are not tuned.
    grid_note
        On what the grid was run, or where the defaults come from.
    """

    build: Builder
    description: str
    defaults: Hyperparameters
    for_model: Mapping[str, Hyperparameters] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Value]] = field(default_factory=dict)
    grid_note: str = ""


def _sgd(model: nn.Module, likelihood: str, values: Hyperparameters, seed: int) -> Optimizer:
    return torch.optim.SGD(model.parameters(), **_arguments(values))


def _adam(model: nn.Module, likelihood: str, values: Hyperparameters, seed: int) -> Optimizer:
    return torch.optim.Adam(model.parameters(), **_arguments(values, betas=("beta1", "beta2")))


def _adamw(model: nn.Module, likelihood: str, values: Hyperparameters, seed: int) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), **_arguments(values, betas=("beta1", "beta2")))


def _curvature(recipe: Callable[..., Optimizer]) -> Builder:
    def build(model: nn.Module, likelihood: str, values: Hyperparameters, seed: int) -> Optimizer:
        distribution = {"categorical": Categorical, "bernoulli": Bernoulli}[likelihood]()
        return recipe(model, likelihood=distribution, seed=seed, **_arguments(values))

    return build


def _recipe(name: str, **changes: Value) -> Contestant:
    """Return a recipe of the library as a contestant, with the recipe's own defaults save for `changes`."""
    recipe = getattr(recipes, name)
    parameters = inspect.signature(recipe).parameters.values()
    defaults: dict[str, Value] = {p.name: p.default for p in parameters if isinstance(p.default, int | float)}
    description = (inspect.getdoc(recipe) or "").splitlines()[0]
    note = "not tuned: the recipe's defaults"
    if changes:
        note = f"not tuned: the recipe's defaults but for {', '.join(changes)}, the steadiest of three in 50 steps"
    return Contestant(_curvature(recipe), description, {**defaults, **changes}, grid_note=note)


_TUNED = "tuned for small-convnet on Fashion-MNIST: benchmarks/tuning/results holds every run"

CONTESTANTS: dict[str, Contestant] = {
    "sgd": Contestant(
        _sgd,
        "SGD with heavy-ball momentum; weight decay coupled",
        {"lr": 0.06, "momentum": 0.9, "weight_decay": 0.0},
        for_model={"autoencoder": {"lr": 3e-4}},
        grid={"lr": (0.01, 0.03, 0.06, 0.1)},
        grid_note=_TUNED,
    ),
    "adam": Contestant(
        _adam,
        "Adam; no weight decay, as is usual",
        {"lr": 8e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
        for_model={"autoencoder": {"lr": 1e-3}},
        grid={"lr": (2e-3, 3e-3, 5e-3, 8e-3)},
        grid_note=_TUNED,
    ),
    "adamw": Contestant(
        _adamw,
        "Adam with decoupled weight decay",
        {"lr": 8e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-2},
        for_model={"autoencoder": {"lr": 1e-3, "weight_decay": 0.0}},
        grid={"lr": (2e-3, 3e-3, 5e-3, 8e-3)},
        grid_note=_TUNED,
    ),
    "tengrad": Contestant(
        _curvature(recipes.TENGraD),
        "exact block-wise natural gradient by Woodbury, labels sampled from the model; weight decay coupled",
        {
            "lr": 0.01,
            "damping": 0.1,
            "refresh": 100,
            "momentum": 0.9,
            "weight_decay": 0.0,
            "kl_clip": 1e-2,
            "samples": 1,
        },
        grid={"lr": (0.003, 0.01, 0.03), "damping": (0.03, 0.1, 0.3)},
        grid_note=_TUNED,
    ),
    "kfac": _recipe("KFAC", weight_decay=0.0),
    "ekfac": _recipe("EKFAC"),
    "skfac": _recipe("SKFAC"),
    "exactngd": _recipe("ExactNGD", refresh=100),
    "hylo": _recipe("HyLo"),
    "seng": _recipe("SENG"),
    "eva": _recipe("Eva", lr=1e-3),
    "mkor": _recipe("MKOR", lr=0.03),
    "singd": _recipe("SINGD", lr=0.03),
    "ikfac": _recipe("IKFAC", lr=0.03),
    "spring": _recipe("SPRING"),
    "fngd": _recipe("FNGD", lr=3e-3),
    "kbfgs": _recipe("KBFGS"),
    "shampoo": _recipe("Shampoo", lr=1e-3),
    "soap": _recipe("SOAP"),
}

RACED = "sgd,adam,adamw,tengrad"
"""Who races unless others are asked for."""


def choose(names: str) -> list[str]:
    """Return the contestants of a comma-separated list, ``"all"`` for the whole table."""
    chosen = list(CONTESTANTS) if names.strip() == "all" else [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in CONTESTANTS:
            raise ConfigurationError(f"unknown optimizer {name!r}: choose from {', '.join(CONTESTANTS)}, or all")
    if len(set(chosen)) < len(chosen):
        raise ConfigurationError(f"an optimizer is named twice in {names!r}: name each once")
    return chosen


def hyperparameters(name: str, model_name: str, overrides: Mapping[str, str]) -> dict[str, Value]:
    """Return a contestant's hyperparameters for a model, with the command line's values in place of the defaults.

    Raises
    ------
    ConfigurationError
        If the contestant has no hyperparameter of that name or cannot take the value.
    """
    contestant = CONTESTANTS[name]
    values = {**contestant.defaults, **contestant.for_model.get(model_name, {})}
    for key, text in overrides.items():
        if key not in values:
            raise ConfigurationError(f"{name} has no hyperparameter {key!r}: it has {', '.join(values)}")
        values[key] = parse_value(f"{name}.{key}", text, values[key])
    return values


def parse_value(label: str, text: str, default: Value) -> Value:
    """Read a hyperparameter's value in the kind of its default; ``none`` switches a part off."""
    if text.lower() == "none":
        return None
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ConfigurationError(f"{label}={text} is neither true nor false")
        return text.lower() == "true"
    if isinstance(default, str):
        return text
    if isinstance(default, int):
        try:
            return int(text)
        except ValueError:
            raise ConfigurationError(f"{label}={text} is not a whole number") from None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigurationError(f"{label}={text} is not a finite number")
    return number


def build_optimizer(name: str, model: nn.Module, likelihood: str, values: Hyperparameters, seed: int) -> Optimizer:
    """Build a contestant's optimizer for a network.

    Raises
    ------
    ConfigurationError
        If the optimizer refuses its hyperparameters.
    """
    try:
        return CONTESTANTS[name].build(model, likelihood, values, seed)
    except ConfigurationError:
        raise
    except (TypeError, ValueError) as error:
        shown = ", ".join(f"{key}={value}" for key, value in values.items())
        raise ConfigurationError(f"{name} refuses its hyperparameters ({shown}): {error}") from error


def _arguments(values: Hyperparameters, betas: tuple[str, str] | None = None) -> dict[str, Any]:
    arguments: dict[str, Any] = dict(values)
    if betas is not None:
        arguments["betas"] = tuple(arguments.pop(beta) for beta in betas)
    return arguments
