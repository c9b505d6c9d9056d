"""Two commits by asv: ``python -m benchmarks.compare BASE HEAD --factor 1.3 --bench REGEX [options of asv's]``.

What `asv continuous` calls slower is measured again, in more processes, and counts if it is slower then too: on a small
machine a process now and then runs at two thirds of its speed from beginning to end.
"""

import argparse
import re
import subprocess
import sys

from benchmarks.record import ROOT

__all__ = ["compare", "slower"]

ROUNDS = 4
"""Processes a commit in which doubtful benchmarks run again; asv takes two at first."""

_SLOWER = re.compile(r"^\|\s*\+\s*\|(?:[^|]*\|){3}\s*(.*?)\s*\|?$")


def slower(output):
    """Names, with parameters, of the benchmarks that a table of asv's marks with a plus."""
    return [found[1] for line in output.splitlines() if (found := _SLOWER.match(line))]


def continuous(base, head, factor, benches, options):
    """Run `asv continuous`, showing what it prints; return its exit status and its output."""
    command = [sys.executable, "-m", "asv", "continuous", "--config", str(ROOT / "benchmarks" / "asv.conf.json")]
    command += ["--launch-method", "forkserver", "--factor", str(factor), *options]
    for bench in benches:
        command += ["--bench", bench]
    process = subprocess.Popen([*command, base, head], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    lines = []
    for line in process.stdout:
        sys.stdout.write(line)
        sys.stdout.flush()
        lines.append(line)
    return process.wait(), "".join(lines)


def compare(base, head, factor, bench, options=(), run=continuous):
    """Exit status of the comparison: that of asv, or that of what it doubts when it is measured again."""
    status, output = run(base, head, factor, [bench], list(options))
    doubtful = slower(output)
    if status == 0 or not doubtful:
        return status
    print(f"\n{len(doubtful)} became slower, it seems; they are measured again.", flush=True)
    again = [f"^{re.escape(name)}$" for name in doubtful]
    return run(base, head, factor, again, [*options, "--attribute", f"rounds={ROUNDS}"])[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("head")
    parser.add_argument("--factor", type=float, default=1.3)
    parser.add_argument("--bench", default=".")
    args, options = parser.parse_known_args()
    sys.exit(compare(args.base, args.head, args.factor, args.bench, options))


if __name__ == "__main__":
    main()
