"""Every public constructor given rubbish: an error of curvlib's that says what is wrong, and no hook left behind."""

import copy
import dataclasses
import inspect
import itertools
import math
import random

import numpy as np
import pytest
import torch
from small_net import X, small_net, train
from torch import nn

import curvlib
from curvlib import CSVWriter, TensorBoardWriter, compose, precond, recipes, solvers
from curvlib.errors import CurvatureError


@pytest.fixture(autouse=True)
def _writers_write_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Strange:
    """Equal to nothing, true to nobody."""

    def __bool__(self):
        raise ValueError("neither true nor false")

    def __eq__(self, other):
        raise TypeError("not comparable")

    __hash__ = None


RUBBISH = [
    None, True, False, 0, -1, 1, 2**80, -(10**400), 0.0, -0.5, 1.5, 1e400, -math.inf, math.nan, 1e-320, 3 + 2j, "", "x",
    "0.1", b"raw", [], [1], ["x", None], (), (None,), {}, {"*": None}, {"x": 1}, {1: 2}, {"*": "x"}, set(), object(),
    object, int, nn.Linear, Strange(), len, (lambda: None), (lambda *args: "x"), torch.tensor(0.5), torch.zeros(2, 2),
    torch.tensor(math.nan), np.float32(0.5), np.array([1, 2]), np.array("x"), slice(3), Ellipsis, NotImplemented,
    range(3), iter([1]), Exception("x"), solvers.Woodbury(), curvlib.Exact(), precond.Momentum(),
    [precond.Momentum(), 3],
    {"0": solvers.Woodbury()}, {"nowhere": 0.1}, [{"params": []}], [{"blocks": "nowhere"}],
    [{"params": "0.weight", "q": 1}],
    [{"blocks": "0", "lr": "x"}], [{"blocks": "0", "damping": -1}], [{}], float, "\0", "é" * 5000,
]  # fmt: skip


def small():
    return small_net()


MADE = {
    **{
        name: (getattr(room, name), {})
        for room, names in (
            (solvers, [name for name in solvers.__all__ if name != "Solver"]),
            (curvlib.fisher, ["Sampled", "Exact", "Empirical", "Categorical", "Gaussian", "Bernoulli"]),
            (precond, ["Constant", "Schedule", "TraceRelative", "PerBlock", "LevenbergMarquardt", "Every", "Intervals",
                       "When", "OnEvidence", "GradientClip", "Graft", "KLClip", "Momentum", "NormConstraint",
                       "TrustRatio", "WeightDecay"]),
        )
        for name in names
    },
    "CSVWriter": (CSVWriter, {"path": "/nowhere/at/all.csv"}),
    "TensorBoardWriter": (TensorBoardWriter, {"target": 3}),
    "Failures": (precond.Failures, {}),
    "compose": (compose, {"model": small, "fisher": curvlib.Exact(), "solver": solvers.Woodbury(), "damping": 0.1,
                          "lr": 0.1}),
    **{name: (getattr(recipes, name), {"model": small}) for name in recipes.__all__},
}  # fmt: skip
GOOD = {
    "value": 0.1, "rule": len, "factor": 0.1, "choices": {"*": 0.1}, "initial": 0.1, "steps": 2, "estimate": 1,
    "inverse": 2,
    "look_every": 2, "norm": 1.0, "first": 1, "solvers": (solvers.Woodbury(), solvers.Dense()), "after": (1,),
    "method": "sgd", "until": (1,), "first_epoch": 2, "updates": (1,), "boundaries": (1,), "switches": (1,),
}  # fmt: skip


def parameters(make):
    signature = inspect.signature(make).parameters.values()
    return [one for one in signature if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]


def filled(make, given):
    """Arguments that are good, for those that have no default."""
    good = {one.name: GOOD[one.name] for one in parameters(make) if one.default is one.empty and one.name not in given}
    return {**good, **given}


def called(make, arguments):
    """What is made of the arguments, or None if they are refused as they should be."""
    models = [value() if value is small else value for value in arguments.values()]
    before, refusal, made = torch.get_rng_state(), None, None
    try:
        made = make(**dict(zip(arguments, models, strict=True)))
    except CurvatureError as error:
        refusal = str(error)
    if refusal is not None:
        assert len(refusal) > 20
        for model in [one for one in models if isinstance(one, nn.Module)]:
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
            assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    return made


def wrong_type(parameter, value):
    """Whether a parameter that is annotated as a number, a word or a flag was given something that is none."""
    hint = str(parameter.annotation)
    plain = {"float": (float, int, np.floating), "int": (int, np.integer), "bool": (bool,), "str": (str,)}
    if hint not in plain:
        return False
    if hint != "bool" and type(value) is bool:
        return True
    return not isinstance(value, plain[hint])


def try_one(name, parameter, value):
    make, given = MADE[name]
    made = called(make, {**filled(make, given), parameter.name: value})
    if name not in recipes.__all__ and name != "compose" and wrong_type(parameter, value):
        assert made is None, f"{name} took {parameter.name}={type(value)}"
    if made is not None and isinstance(made, torch.optim.Optimizer):
        made.detach()
    return made


def everything():
    return [
        (name, parameter, value)
        for name, (make, _) in MADE.items()
        for parameter in parameters(make)
        for value in RUBBISH
    ]


def complaint(name, parameter, value):
    """What goes wrong with a value, in words; empty if nothing."""
    try:
        try_one(name, parameter, copy.copy(value) if isinstance(value, list | dict) else value)
    except Exception as error:
        return f"{name}({parameter.name}={value!r}): {type(error).__name__}: {error}"[:300]
    return ""


def run_over(cases):
    failed = [words for case in cases if (words := complaint(*case))]
    assert not failed, f"{len(failed)} of {len(cases)}:\n" + "\n".join(failed[:40])


def test_good_arguments_make_every_part():
    for name, (make, given) in MADE.items():
        if name not in ("CSVWriter", "TensorBoardWriter"):
            assert called(make, filled(make, given)) is not None, name


def test_some_rubbish_for_everybody():
    cases = everything()
    run_over(random.Random(0).sample(cases, 600))


@pytest.mark.nightly
def test_all_rubbish_for_everybody_alone_and_in_pairs(capsys):
    cases = everything()
    run_over(cases)
    pairs, choose = 0, random.Random(1)
    for make, given in MADE.values():
        for first, second in itertools.combinations(parameters(make), 2):
            for _ in range(4):
                values = {first.name: choose.choice(RUBBISH), second.name: choose.choice(RUBBISH)}
                made = called(make, {**filled(make, given), **values})
                if isinstance(made, torch.optim.Optimizer):
                    made.detach()
                pairs += 1
    with capsys.disabled():
        print(f"\n{len(cases)} bad values and {pairs} pairs of them tried in {len(MADE)} constructors")  # noqa: T201
    assert len(cases) + pairs >= 10_000


@pytest.mark.parametrize("seed", range(4))
def test_rubbish_as_a_group_or_callback_changes_nothing(seed):
    model = small()
    optimizer = compose(model, fisher=curvlib.Exact(), solver=solvers.Woodbury(), damping=0.1, lr=0.1, only=["0"])
    choose, groups = random.Random(seed), len(optimizer.param_groups)
    options = ("params", "blocks", "lr", "damping", "weight_decay", "momentum", "solver", "maximize", "other")
    for _ in range(60):
        group = {option: choose.choice(RUBBISH) for option in choose.sample(options, choose.randint(0, 3))}
        with pytest.raises(CurvatureError):
            optimizer.add_param_group(choose.choice([group, choose.choice(RUBBISH[:30])]))
    for value in RUBBISH:
        if not callable(value):
            with pytest.raises(CurvatureError):
                optimizer.add_callback(value)
    assert (len(optimizer.param_groups), list(optimizer.curvature)) == (groups, ["0"])
    train(model, optimizer)


def test_a_part_whose_values_are_replaced_is_checked_again():
    with pytest.raises(CurvatureError, match="needs decay"):
        dataclasses.replace(precond.Momentum(0.5), decay="x")


def test_a_user_s_part_is_checked_by_its_annotations():
    @dataclasses.dataclass(frozen=True)
    class Mine(precond.Transform):
        size: int
        kinds: tuple[str, ...] = ("a",)

        def apply(self, directions, context, buffers):
            return directions

    Mine(3)
    for bad, message in [
        ({"size": 1.5}, "size as an integer, got 1.5"),
        ({"size": 1, "kinds": (2,)}, "several, each a string"),
    ]:
        with pytest.raises(CurvatureError, match=message):
            Mine(**bad)


def test_collect_and_the_functional_door_refuse_rubbish():
    model = small()
    for value in RUBBISH:
        for arguments in ((value, curvlib.Exact(), X), (model, value, X)):
            if isinstance(value, curvlib.Exact):
                continue
            with pytest.raises(CurvatureError):
                curvlib.collect(*arguments)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
