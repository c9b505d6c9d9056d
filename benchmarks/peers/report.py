"""The table of the peers' step times, in Markdown, from the JSON that `benchmarks.peers.run` wrote.

python -m benchmarks.peers.report rewrites the README's section.
"""

import json
from pathlib import Path
from statistics import median

from benchmarks.peers.timing import FEWEST
from benchmarks.record import ROOT, table, where

RESULTS = ROOT / "benchmarks" / "results" / "peers" / "peers.json"
BEGIN, END = "<!-- peers: begin (python -m benchmarks.peers.report writes this) -->", "<!-- peers: end -->"


def ratios(results):
    """Ratio to SGD of every method on every workload."""
    return _cells(results, lambda cell: f"{cell['ratio']:.2f}" + ("*" if "note" in cell else ""))


def milliseconds(results):
    return _cells(results, lambda cell: f"{cell['ms']:.3g}" if cell["ms"] < 100 else f"{cell['ms']:.0f}")


def megabytes(results):
    """Peak above SGD's."""
    return _cells(results, lambda cell: f"{cell['mb_above_sgd']:+.0f}" if "mb_above_sgd" in cell else "")


def _cells(results, text):
    workloads = results["workloads"]
    names = dict.fromkeys(name for summaries in workloads.values() for name in summaries)
    rows = []
    for name in names:
        cells = [workloads[workload].get(name, {}) for workload in workloads]
        rows.append([name, *("error" if "error" in cell else text(cell) if cell else "" for cell in cells)])
    return table(["method", *workloads], rows)


def spread(results):
    """Median and worst distance of the quartiles of a ratio, relative to it."""
    widths = [
        (cell["ratio_quartiles"][1] - cell["ratio_quartiles"][0]) / cell["ratio"]
        for summaries in results["workloads"].values()
        for cell in summaries.values()
        if "ratio" in cell
    ]
    return median(widths), max(widths)


def conditions(results):
    """Sentences about where and how the numbers were taken."""
    environment = results["environment"]
    typical, worst = spread(results)
    versions = ", ".join(f"{name} {number}" for name, number in environment["packages"].items())
    text = (
        f"{where(environment)} Median of {environment['rounds']} rounds ({FEWEST} of slow methods); the quartiles "
        f"of a ratio are {100 * typical:.0f} % of it apart in the middle case, {100 * worst:.0f} % in the worst."
    )
    if versions:
        text += f" Peers: {versions}."
    if results["missing"]:
        text += f" Not installed: {', '.join(results['missing'])}."
    return text


def notes(results):
    """What went wrong, a line each."""
    lines = []
    for workload, summaries in results["workloads"].items():
        for name, cell in summaries.items():
            if "error" in cell or "note" in cell:
                lines.append(f"- {workload}, {name}: {cell.get('error') or cell['note']}")
    return "\n".join(lines) + "\n" if lines else ""


def report(results):
    """The whole page."""
    parts = [
        "# Step times of curvlib and its peers",
        "Written by `benchmarks.peers.run`. A step is zero_grad, forward, backward, preconditioning and update, on "
        "random data, with nothing tuned: the cost of a step, no claim about convergence. With refresh 10 the cost of "
        "a refresh is shared by ten steps; all other methods renew their curvature at every step.",
        conditions(results),
        "## Time of a step against SGD in the same process\n\n" + ratios(results),
        "## Milliseconds a step\n\n" + milliseconds(results),
    ]
    if any("mb_above_sgd" in cell for cells in results["workloads"].values() for cell in cells.values()):
        parts.append("## Peak memory above SGD's, MB (a process each, three steps)\n\n" + megabytes(results))
    if notes(results):
        parts.append("## Remarks (* above)\n\n" + notes(results))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def readme_section(results):
    """What stands between the README's markers."""
    parts = [ratios(results), conditions(results) + "\n", *([notes(results)] if notes(results) else [])]
    return "\n" + "\n".join(parts)


def with_section(text, section):
    """The README with its section replaced."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + section + END + rest.split(END)[1]


def load(path=RESULTS):
    return json.loads(Path(path).read_text(encoding="utf-8"))


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_section(readme.read_text(encoding="utf-8"), readme_section(load())), encoding="utf-8")
