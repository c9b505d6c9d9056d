"""Run the comparison or write its report.

python -m benchmarks.quality run [--task convnet] [--method Adam] [--out DIR]    goes on where it stopped
python -m benchmarks.quality report [--out DIR]    tables, plot and page, as after each method of `run`

Pin it to one core (`taskset -c 1`) and set OMP_WAIT_POLICY=PASSIVE; it works in one thread.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from benchmarks.quality import report
from benchmarks.quality.conduct import conduct
from benchmarks.quality.methods import METHODS, RECIPE
from benchmarks.quality.tasks import TASKS
from benchmarks.record import ROOT


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "report"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, default=report.RESULTS)
        command.add_argument("--page", type=Path, default=ROOT / "docs" / "quality.md")
        if name == "run":
            command.add_argument("--task", choices=TASKS, action="append", help="this one alone (may be repeated)")
            command.add_argument("--method", choices=METHODS, action="append", help="this one alone (may be repeated)")
            command.add_argument(
                "--provisional", action="store_true", help="mark the results as those of a busy machine"
            )
    chosen = parser.parse_args(arguments)
    if chosen.command == "report":
        report.write_all(chosen.out, chosen.page)
        return
    torch.set_num_threads(1)
    tasks = [TASKS[name] for name in chosen.task or TASKS]
    methods = {name: METHODS[name] for name in chosen.method or METHODS}
    # First those that are compared with one another, then the recipes one by one.
    together = {name: method for name, method in methods.items() if method.kind != RECIPE}
    for group in (together, *({name: method} for name, method in methods.items() if method.kind == RECIPE)):
        conduct(tasks, group, chosen.out, chosen.provisional, done=partial(report.write_text, chosen.out, chosen.page))
        report.write_all(chosen.out, chosen.page)


if __name__ == "__main__":
    main()
