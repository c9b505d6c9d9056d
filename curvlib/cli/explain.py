"""``curvlib explain``: what curvature does with every parameter of the user's own model."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from curvlib import solvers
from curvlib.cli.options import count
from curvlib.errors import ConfigurationError, CurvatureError
from curvlib.explanation import explain
from curvlib.fisher import Bernoulli, Categorical, Empirical, Exact, Fisher, Gaussian, Likelihood, Sampled
from curvlib.precond.rest import REST
from curvlib.solvers import Solver

__all__ = ["add_parser", "run"]

LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    "categorical": Categorical,
    "gaussian": Gaussian,
    "bernoulli": Bernoulli,
}
FISHERS: dict[str, Callable[[Likelihood], Fisher]] = {
    "sampled": Sampled,
    "exact": Exact,
    "empirical": lambda likelihood: Empirical(),
}
SOLVERS: dict[str, Callable[[], Solver]] = {
    name.lower(): kind
    for name, kind in vars(solvers).items()
    if isinstance(kind, type) and issubclass(kind, Solver) and not inspect.isabstract(kind)
    # A solver made of others has no name of its own here.
    if all(parameter.default is not parameter.empty for parameter in inspect.signature(kind).parameters.values())
}


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the command line."""
    parser = subparsers.add_parser(
        "explain",
        help="show every parameter of your model: block, adapter, solver, exactness, cost",
        description="Show what curvature does with every parameter of a model, and what it costs.",
    )
    parser.add_argument(
        "model", metavar="MODULE:ATTR", help="a torch.nn.Module, or a function that returns one, such as mynet:build"
    )
    parser.add_argument(
        "--input",
        dest="inputs",
        action="append",
        type=_shape,
        required=True,
        metavar="SHAPE",
        help="shape of an input without its sample axis, such as 1x28x28; 16:7 for 16 indices below 7; repeatable",
    )
    parser.add_argument("--batch", type=count(1), default=32, metavar="N", help="samples (default: 32)")
    parser.add_argument("--fisher", choices=FISHERS, default="sampled", help="which curvature (default: sampled)")
    parser.add_argument("--likelihood", choices=LIKELIHOODS, default="categorical", help="default: categorical")
    parser.add_argument("--solver", choices=SOLVERS, default="woodbury", help="default: woodbury")
    parser.add_argument("--rest", choices=REST, help="what becomes of parameters that no block covers")
    parser.add_argument("--eval", action="store_true", help="put the model in eval mode first")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.set_defaults(run=run)


def _shape(text: str) -> tuple[tuple[int, ...], int | None]:
    """Read ``1x28x28``, or ``16:7`` for indices, into a shape and the number of different indices."""
    sizes, colon, indices = text.partition(":")
    shape = tuple(int(size) for size in sizes.split("x")) if sizes else ()
    if any(size < 1 for size in shape) or (colon and int(indices) < 1):
        raise argparse.ArgumentTypeError(f"{text} has a size below 1")
    return shape, int(indices) if colon else None


_shape.__name__ = "shape such as 1x28x28"  # argparse names the type in its own messages


def run(args: argparse.Namespace, console: Console | None = None) -> int:
    """Import the model and print its table.

    Parameters
    ----------
    args
        The parsed command line.
    console
        Where to print; standard output by default.

    Returns
    -------
    int
        0.
    """
    model = _load(args.model)
    if args.eval:
        model.eval()
    inputs = [_input(args.batch, shape, indices, model) for shape, indices in args.inputs]
    fisher = FISHERS[args.fisher](LIKELIHOODS[args.likelihood]())
    explanation = _guarded(
        f"{args.model} on inputs of shapes {[tuple(x.shape) for x in inputs]}",
        lambda: explain(model, *inputs, fisher=fisher, solver=SOLVERS[args.solver](), rest=args.rest),
    )
    console = console or Console()
    if args.json:
        console.print_json(json.dumps(explanation.to_dict()))
    elif console.is_terminal:
        console.print(explanation)
    else:
        console.file.write(str(explanation))
    return 0


def _input(batch: int, shape: tuple[int, ...], indices: int | None, model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    like = next(model.parameters(), torch.zeros(()))
    if indices is not None:
        return torch.randint(indices, (batch, *shape), generator=generator).to(like.device)
    return torch.randn(batch, *shape, generator=generator).to(like)


def _load(where: str) -> nn.Module:
    name, colon, attribute = where.partition(":")
    if not (name and colon and attribute):
        raise ConfigurationError(f"{where!r} is not MODULE:ATTR, such as mynet:build")
    # As for `python -m`: the user's own modules lie in the folder that the command is run in.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found: Any = _guarded(f"importing {name}", lambda: importlib.import_module(name))
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigurationError(f"{name} has no attribute {attribute!r}")
        found = getattr(found, part)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise ConfigurationError(f"{where} is a {type(found).__name__}, neither a torch.nn.Module nor a function")
        found = _guarded(f"calling {where}()", found)
    if not isinstance(found, nn.Module):
        raise ConfigurationError(f"{where}() returned {type(found).__name__}, not a torch.nn.Module")
    return found


def _guarded(what: str, function: Callable[[], Any]) -> Any:
    """Turn whatever the user's code raises into one clean line."""
    try:
        return function()
    except CurvatureError:
        raise
    except Exception as error:  # the user's code may raise anything
        message = str(error).strip().splitlines()
        raise ConfigurationError(f"{what} raises {type(error).__name__}: {message[0] if message else ''}") from error
