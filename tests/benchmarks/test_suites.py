"""Every asv benchmark runs, with the first of its parameters that exist here."""

import inspect
import itertools
import json
import re

import pytest

from benchmarks.record import ROOT
from benchmarks.suites import accuracy, capture, inversion, layers, steps

TIMED = re.compile("time_|track_|peakmem_")
CLASSES = {
    f"{module.__name__.split('.')[-1]}.{name}": kind
    for module in (accuracy, capture, inversion, layers, steps)
    for name, kind in vars(module).items()
    if inspect.isclass(kind) and kind.__module__ == module.__name__ and hasattr(kind, "params")
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
