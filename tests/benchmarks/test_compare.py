"""Regressions count when they are found twice."""

import pytest

from benchmarks.compare import ROUNDS, compare, slower

TABLE = """
| Change   | Before [1007c944] <main>  | After [40185903] <main>   |   Ratio | Benchmark (Parameter)                  |
|----------|---------------------------|---------------------------|---------|----------------------------------------|
| +        | 87.3±2μs                  | 181±20μs                  |    2.07 | inversion.Shared.time_solve('kfac', 3) |
| -        | 6.62±0.8ms                | 4.74±0.2ms                |    0.72 | inversion.Linear.time_solve('skfac')   |
"""
NAME = "inversion.Shared.time_solve('kfac', 3)"


def test_what_became_slower_is_read_from_the_table():
    assert slower(TABLE) == [NAME]
    assert slower("no table") == []


@pytest.mark.parametrize(
    ("answers", "status"),
    [
        ([(0, TABLE)], 0),
        ([(1, TABLE), (0, "")], 0),
        ([(1, TABLE), (1, TABLE)], 1),
        ([(2, "a benchmark failed")], 2),
    ],
)
def test_only_what_is_slower_twice_fails(answers, status):
    calls = []

    def run(base, head, factor, benches, options):
        calls.append((base, head, factor, benches, options))
        return answers[len(calls) - 1]

    assert compare("old", "new", 1.3, "^inversion", ["--quick"], run) == status
    assert len(calls) == len(answers)
    assert calls[0] == ("old", "new", 1.3, ["^inversion"], ["--quick"])
    if len(calls) == 2:
        (bench,) = calls[1][3]
        assert bench == r"^inversion\.Shared\.time_solve\('kfac',\ 3\)$"
        assert calls[1][4] == ["--quick", "--attribute", f"rounds={ROUNDS}"]
