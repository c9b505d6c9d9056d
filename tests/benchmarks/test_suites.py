"""Every asv benchmark runs, with the first of its parameters that exist here."""

import importlib
import inspect
import itertools
import json
import pkgutil
import re
import shutil

import pytest

from benchmarks import suites
from benchmarks.record import ROOT
from benchmarks.suites import accuracy, compiled, inversion, steps

TIMED = re.compile("time_|track_|peakmem_")
# What asv takes for a benchmark: every class of every module with such a method, unless it is abstract.
CLASSES = {
    f"{module.name}.{name}": kind
    for module in pkgutil.iter_modules(suites.__path__)
    for name, kind in vars(importlib.import_module(f"benchmarks.suites.{module.name}")).items()
    if inspect.isclass(kind) and not inspect.isabstract(kind) and any(map(TIMED.match, dir(kind)))
}


def prepared(kind):
    """An instance after the first setup that is not skipped, and its parameters."""
    for parameters in itertools.product(*kind.params):
        instance = kind()
        try:
            instance.setup(*parameters)
        except NotImplementedError:
            continue
        return instance, parameters
    raise AssertionError("every combination is skipped")


@pytest.mark.parametrize("name", CLASSES)
def test_benchmarks_run_and_their_parameters_have_names(name):
    kind = CLASSES[name]
    assert len(kind.params) == len(kind.param_names)
    instance, parameters = prepared(kind)
    methods = [method for method in dir(kind) if TIMED.match(method)]
    assert methods
    for method in methods:
        result = getattr(instance, method)(*parameters)
        assert not method.startswith("track_") or result >= 0


@pytest.mark.parametrize("solver", inversion.Solvers.params[0])
def test_every_solver_has_its_inversion_timed(solver):
    solvers = inversion.Solvers()
    if solver == "dense":
        with pytest.raises(NotImplementedError):
            solvers.setup(solver, "linear", 96, 64, 1, "float32")
        return
    solvers.setup(solver, "linear", 96, 64, 1, "float32")
    for method in (solvers.time_update, solvers.time_factorize, solvers.time_solve):
        method()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile's C++ compiler is missing")
def test_the_compiled_step_runs_compiled():
    step = compiled.Compiled()
    step.setup("W1-b128", "compiled")
    step.time_step()


@pytest.mark.parametrize("layer", ["linear", "sequence", "convolution"])
@pytest.mark.parametrize("solver", ["woodbury", "dense"])
def test_exact_solvers_are_tracked_at_rounding(solver, layer):
    error = accuracy.Error()
    error.setup(solver, layer, "float64", 0.1)
    assert error.track_error(solver, layer, "float64", 0.1) < 1e-9


def test_what_a_commit_lacks_is_skipped(monkeypatch):
    monkeypatch.delattr("curvlib.solvers.SKFAC")
    with pytest.raises(NotImplementedError, match="SKFAC"):
        inversion.Linear().setup("skfac", 64, 32, "float32")
    with pytest.raises(NotImplementedError, match="no such_option"):
        steps.composed(steps.sampled, "woodbury", such_option=1)(steps.problem("W1-b128")[0])


def test_results_of_runs_at_hand_stay_out_of_the_committed_ones():
    config = json.loads((ROOT / "benchmarks" / "asv.conf.json").read_text(encoding="utf-8"))
    assert config["results_dir"].startswith("../.asv/")
