"""The committed page of performance is what the committed measurements say; and the pieces that measure growth."""

import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks import growth
from benchmarks.history import RESULTS, commits

DOCS = Path(__file__).parent.parent.parent / "docs"


def test_the_committed_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location("generate_performance", DOCS / "generate_performance.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    committed = (DOCS / "performance.md").read_text(encoding="utf-8")
    assert committed == script.text(), "run python docs/generate_performance.py"


def test_the_committed_history_names_no_machine_but_a_neutral_one():
    paths = sorted(RESULTS.glob("*/*.json"))
    assert len(paths) > 2
    for path in paths:
        assert path.parent.name == "cpu-2core"
        assert path.stat().st_size < 20_000
        assert "/" not in json.dumps(json.loads(path.read_text(encoding="utf-8")).get("params", {}))


def test_commits_are_spread_over_the_history():
    found = commits("3")
    assert 1 <= len(found) <= 3
    assert commits("HEAD") == found[-1:]


def test_a_power_law_has_its_exponent():
    values = (8, 16, 64)
    assert growth.slope(values, [3.0 * value**1.5 for value in values]) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("axis", "theory", "exponent"),
    [
        ("batch", growth.factorize_work, 3.0),
        ("batch", growth.gram_work, 2.0),
        ("width", growth.sgd_work, 2.0),
        ("depth", growth.tengrad_work, 1.0),
        ("blocks", growth.tengrad_work, 1.0),
    ],
)
def test_theory_has_the_exponents_of_the_literature(axis, theory, exponent):
    measured = growth.entry(axis, "", "", [theory(size) for size in growth.sizes(axis)], theory)
    assert measured["theory"] == measured["slope"] == pytest.approx(exponent)


@pytest.mark.parametrize("size", [growth.Size(4, 8, depth=2, blocks=3), growth.Size(4, 8, positions=3, depth=1)])
def test_sizes_are_those_of_the_network_and_every_quantity_is_timed(size):
    model, x, _ = growth.problem(size)
    weights = [p for p in model.parameters() if p.ndim == 2]
    assert len(weights) == size.depth * size.blocks + 1
    assert model(x).shape == (4, 10)
    assert growth.times(size, rounds=1).keys() == growth.TIMES.keys()
