"""Tables, plots and the page of the documentation, from the committed records of the runs."""

from __future__ import annotations

import json
import math
from statistics import median

from benchmarks.quality.conduct import FINAL_BUDGET, FINAL_SEEDS, path_of, seconds_to_target
from benchmarks.quality.methods import COMPOSITION, FIRST_ORDER, METHODS
from benchmarks.quality.page import TEXT
from benchmarks.quality.search import NEAR, SPREAD
from benchmarks.quality.tasks import TASKS
from benchmarks.record import ROOT, table, where

RESULTS = ROOT / "benchmarks" / "results" / "quality"
AMBITION = 1.3


def load(folder=RESULTS):
    """Finished records by task and method, in the order of the tables."""
    records = {task: {} for task in TASKS}
    for task in TASKS:
        for method in METHODS:
            path = path_of(folder, task, method)
            if path.exists():
                record = json.loads(path.read_text(encoding="utf-8"))
                if record["done"]:
                    records[task][method] = record
    return records


def soonest(records, kind):
    """Name and seconds of the best method of a kind on one task; None where no one reached the target."""
    times = {name: seconds_to_target(record) for name, record in records.items() if record["kind"] == kind}
    reached = {name: seconds for name, seconds in times.items() if seconds is not None}
    return min(reached.items(), key=lambda item: item[1]) if reached else None


def _cell(record):
    if record is None:
        return "not run"
    if "left_out" in record:
        return "—"
    finals = record["finals"]
    if not finals:
        return "no trial survived"
    parts = ["·" if run["reached"] is None else f"{run['reached']:.1f}" for run in finals]
    middle = seconds_to_target(record)
    if middle is None:
        lowest = median(
            min((metric for _, _, metric in run["curve"] if math.isfinite(metric)), default=math.inf) for run in finals
        )
        return f"not reached ({lowest:.3g})"
    return f"**{middle:.1f}** ({', '.join(parts)})"


def times_table(records):
    """Every method's median seconds to the target, and those of all seeds."""
    rows = [[name, *(_cell(records[task].get(name)) for task in TASKS)] for name in METHODS]
    return table(["method", *TASKS], rows)


def verdicts(records):
    """For each task: best first-order method, best composition, best recipe, and their ratios."""
    rows = []
    for task in TASKS:
        first, ours, recipe = (soonest(records[task], kind) for kind in (FIRST_ORDER, COMPOSITION, "recipe"))
        row = [task]
        row += [
            f"{name}, {seconds:.1f} s" if name else "none"
            for name, seconds in (item or ("", 0) for item in (first, ours))
        ]
        row.append(f"{first[1] / ours[1]:.2f}" if first and ours else "")
        row.append(f"{recipe[0]}, {recipe[1]:.1f} s" if recipe else "none")
        row.append(f"{first[1] / recipe[1]:.2f}" if first and recipe else "")
        rows.append(row)
    return table(["task", "best of SGD, Adam, AdamW", "best composition", "ratio", "best recipe", "ratio"], rows)


def ambition(records):
    """One sentence on how many tasks have a composition that is sooner by the ambition's factor."""
    won = []
    for task in TASKS:
        first, ours = soonest(records[task], FIRST_ORDER), soonest(records[task], COMPOSITION)
        if ours and (first is None or first[1] / ours[1] >= AMBITION):
            won.append(task)
    share = f"On {len(won)} of {len(TASKS)} tasks"
    names = f" ({', '.join(won)})" if won else ""
    return (
        f"{share}{names} a recommended composition reaches the target at least {AMBITION} times sooner than the best "
        "of SGD, Adam and AdamW."
    )


def chosen(records):
    """Hyperparameters that tuning chose."""
    rows = []
    for name in METHODS:
        for task in TASKS:
            record = records[task].get(name)
            if record and record["finals"]:
                values = record["finals"][0]["values"]
                told = ", ".join(f"{key} {value:g}" for key, value in values.items())
                steps = [1e3 * run["curve"][-1][0] / max(1, run["curve"][-1][1]) for run in record["finals"]]
                rows.append([name, task, told, f"{median(steps):.1f}"])
    return table(["method", "task", "chosen", "ms a step"], rows)


def tasks_table():
    rows = [
        [name, task.title, f"{task.metric} ≤ {task.target:g}", f"{task.budget:g}", " or ".join(map(str, task.sizes))]
        for name, task in TASKS.items()
    ]
    return table(["task", "what", "target", "seconds a trial", "batch"], rows)


def reasons():
    """A line for each method that has no meaning on some task."""
    lines = []
    for name, method in METHODS.items():
        by_reason = {}
        for task, reason in method.leaves_out.items():
            by_reason.setdefault(reason, []).append(task)
        lines += [f"- {name}, {', '.join(tasks)}: {reason}." for reason, tasks in by_reason.items()]
    return "\n".join(lines)


def conditions(records):
    """Where it was measured, and how even the machine was."""
    found = [record for by_method in records.values() for record in by_method.values()]
    speeds = [speed for record in found for speed in record["reference_ms"]]
    if not speeds:
        return "Nothing measured yet."
    speeds.sort()
    typical, low, high = (speeds[int(share * (len(speeds) - 1))] for share in (0.5, 0.05, 0.95))
    place = (
        where(found[-1]["environment"]).replace("threads", "thread").replace("float32", "float32 (poisson: float64)")
    )
    missing = len(METHODS) * len(TASKS) - len(found)
    text = (
        f"{place} "
        f"A fixed matrix product, timed before every run, took between {low / typical:.2f} and "
        f"{high / typical:.2f} of its median time in nine of ten cases."
    )
    return text + (f" {missing} of {len(METHODS) * len(TASKS)} cells have not been run yet." if missing else "")


def text(records):
    """The page of the documentation."""
    return TEXT.format(
        tasks=tasks_table(),
        spread=SPREAD,
        near=NEAR,
        seeds=len(FINAL_SEEDS),
        final=FINAL_BUDGET,
        conditions=conditions(records),
        ambition=ambition(records),
        verdicts=verdicts(records),
        times=times_table(records),
        reasons=reasons(),
    )


def summary(records):
    """The report beside the records."""
    parts = [
        "# Time to the target",
        "Written by `python -m benchmarks.quality report`; docs/quality.md explains it.",
        conditions(records),
        ambition(records),
        verdicts(records),
        "## CPU seconds to the target: median (all seeds), · where not reached\n\n" + times_table(records),
        "## What tuning chose\n\n" + chosen(records),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def plot(records, path):
    """Median-seed curves of all methods; first-order methods and compositions in colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    colours = {name: f"C{k}" for k, name in enumerate(n for n, m in METHODS.items() if m.kind != "recipe")}
    for axis, (name, task) in zip(axes.flat, TASKS.items(), strict=True):
        shown = {method: record for method, record in records[name].items() if record["finals"]}
        for method, record in sorted(shown.items(), key=lambda item: item[1]["kind"] != "recipe"):
            points = [point for point in _middle_run(record)["curve"] if math.isfinite(point[2])]
            bright = method in colours
            style = "--" if record["kind"] == FIRST_ORDER else "-"
            axis.plot(
                [spent for spent, _, _ in points],
                [metric for _, _, metric in points],
                style if bright else "-",
                color=colours.get(method, "0.8"),
                linewidth=1.6 if bright else 0.8,
                label=method if bright else None,
            )
        axis.axhline(task.target, color="k", linewidth=0.8, linestyle=":")
        start = max((run["curve"][0][2] for record in shown.values() for run in record["finals"][:1]), default=1)
        axis.set(
            title=task.title,
            xlabel="CPU seconds",
            ylabel=task.metric,
            yscale="log",
            ylim=(task.target * 0.7, 1.3 * start),
        )
        if shown:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _middle_run(record):
    runs = sorted(record["finals"], key=lambda run: math.inf if run["reached"] is None else run["reached"])
    return runs[len(runs) // 2]


def write_text(folder, page):
    """Write report and page."""
    records = load(folder)
    (folder / "quality.md").write_text(summary(records), encoding="utf-8")
    page.write_text(text(records), encoding="utf-8")


def write_all(folder, page):
    """Write report, plot and page."""
    plot(load(folder), folder / "quality.png")
    write_text(folder, page)
