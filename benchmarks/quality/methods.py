"""Who takes part: torch's first-order optimizers, curvlib's recipes, and the compositions that its documents recommend.

Every method has one space for tuning. Weight decay is AdamW's alone, momentum is each method's default.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.quality import compositions
from benchmarks.quality.search import Choice, Log
from curvlib.precond import recipes

FIRST_ORDER, RECIPE, COMPOSITION = "first order", "recipe", "composition"


@dataclass(frozen=True, eq=False)
class Method:
    """One row of the table.

    Parameters
    ----------
    build
        ``build(task, model, values, seed)``: the optimizer.
    space
        ``space(task)``: name of a hyperparameter to its range; the batch size comes on top.
    leaves_out
        Task to the reason why the method has no meaning there.
    """

    kind: str
    build: Callable
    space: Callable
    leaves_out: dict


METHODS: dict[str, Method] = {}

_SCALES = {
    # What one sample's squared gradients are, by order of magnitude: damping, bounds on the step and SGD's rate go
    # with it. The loss of the autoencoder sums over 784 pixels, the residual of Poisson's equation begins at 40.
    "convnet": {"damping": (1e-3, 1.0), "kl": (1e-3, 1e-1), "sgd": (1e-2, 3e-1)},
    "autoencoder": {"damping": (1e-1, 1e2), "kl": (1e-1, 1e1), "sgd": (1e-4, 5e-3)},
    "transformer": {"damping": (1e-5, 1e-1), "kl": (1e-3, 1e-1), "sgd": (3e-2, 2.0)},
    "poisson": {"damping": (1e-2, 1e2), "kl": (1.0, 1e3), "sgd": (1e-6, 1e-3)},
}


def _add(name, kind, build, space, leaves_out=None):
    METHODS[name] = Method(kind, build, lambda task: {**space(task), "batch": Choice(task.sizes)}, leaves_out or {})


# -- torch --------------------------------------------------------------------------------------------------------


def _torch(kind, keys):
    def build(task, model, values, seed):
        given = {key: values[key] for key in keys if key in values}
        if "beta2" in values:
            given["betas"] = (0.9, values["beta2"])
        return kind(model.parameters(), **given)

    return build


def _sgd(task):
    return {"lr": Log(*_SCALES[task.name]["sgd"]), "momentum": Choice((0.9, 0.97))}


def _adam(task):
    return {"lr": Log(1e-3, 1.5e-2), "beta2": Choice((0.99, 0.999))}


_add("SGD", FIRST_ORDER, _torch(torch.optim.SGD, ("lr", "momentum")), _sgd)
_add("Adam", FIRST_ORDER, _torch(torch.optim.Adam, ("lr",)), _adam)
_add(
    "AdamW",
    FIRST_ORDER,
    _torch(torch.optim.AdamW, ("lr", "weight_decay")),
    lambda task: {**_adam(task), "weight_decay": Log(1e-4, 1e-1)},
)

# -- compositions ---------------------------------------------------------------------------------------------------


def _composition(name, **leaves_out):
    chosen = compositions.COMPOSITIONS[name]

    def build(task, model, values, seed):
        own = {key: value for key, value in values.items() if key != "batch"}
        return chosen.build(task.name, model, seed=seed, **own)

    _add(name, COMPOSITION, build, lambda task: chosen.space(task.name), leaves_out)


for _name, _chosen in compositions.COMPOSITIONS.items():
    _composition(_name, **_chosen.leaves_out)

# -- recipes --------------------------------------------------------------------------------------------------------

_RATE = Log(3e-3, 3e-1)


def _recipe(name, rate=_RATE, damping=True, most=math.inf, clip=True, decay_free=(), leaves_out=None, **more):
    recipe = getattr(recipes, name)

    def build(task, model, values, seed):
        own = {key: value for key, value in values.items() if key != "batch"}
        none = dict.fromkeys(decay_free, 0.0)
        return recipe(model, likelihood=task.likelihood, seed=seed, **none, **own)

    def space(task):
        scales = _SCALES[task.name]
        found = {"lr": rate}
        if damping:
            low, high = scales["damping"]
            found["damping"] = Log(low, min(high, most)) if damping is True else damping
        if clip:
            found["kl_clip"] = Log(*scales["kl"])
        return {**found, **more}

    _add(name, RECIPE, build, space, leaves_out)


_REFRESH = Choice((10, 50))
_recipe("SOAP", Log(1e-3, 1.5e-2), Log(1e-9, 1e-6), clip=False)
_recipe("Shampoo", Log(3e-4, 3e-2), Log(1e-8, 1e-3), clip=False, refresh=_REFRESH)
_recipe("TENGraD", refresh=_REFRESH, decay_free=("weight_decay",))
_recipe(
    "ExactNGD",
    refresh=_REFRESH,
    leaves_out={
        "autoencoder": "784 columns a sample, one for each pixel: no kernel of so many rows",
        "transformer": "a column for each character at each position: no kernel of so many rows",
    },
)
_recipe("KFAC", refresh=Choice((20, 100)), decay_free=("weight_decay",))
_recipe("EKFAC", refresh=Choice((20, 100)), decay_free=("weight_decay",))
_recipe("SKFAC", refresh=_REFRESH, decay_free=("weight_decay",))
_recipe("HyLo", refresh=_REFRESH)
_recipe("SENG", refresh=_REFRESH)
_recipe("Eva")
_recipe("MKOR", damping=False, clip=False, refresh=_REFRESH)
_recipe("SINGD", clip=False, damping=Log(1e-4, 1e-1), refresh=_REFRESH)
_recipe("SPRING", decay=Choice((0.5, 0.9)))
_recipe("FNGD")
_recipe(
    "KBFGS",
    most=0.99,  # Powell's damping asks for less than 1
    refresh=Choice((1, 10)),
    leaves_out={"transformer": "an embedding is looked up in, it has no pre-activations that K-BFGS could follow"},
)
