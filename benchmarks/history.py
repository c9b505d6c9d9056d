"""asv results over this repository's own commits, without an environment for each: this Python, that commit's curvlib.

    python -m benchmarks.history [--commits 8 | --commits abc1234,def5678] [--machine cpu-2core] [--bench REGEX]
    python -m benchmarks.history --publish docs/_build/html/asv

A commit's package is unpacked into a temporary folder that comes first on the path of the benchmarks, which are today's
and skip what a commit lacks. Results go to benchmarks/results/asv under a machine's name that says what matters of it.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.record import ROOT

FOLDER = ROOT / "benchmarks"
RESULTS = FOLDER / "results" / "asv"
BENCH = r"^(inversion\.Network\.(time_inversion|track)|steps\.AgainstSGD)"
ENVIRONMENT = f"existing-py{sys.version_info.major}.{sys.version_info.minor}"


def git(*arguments, **options):
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, **options).stdout


def commits(wanted):
    """Full hashes: those named, or so many spread evenly over the first-parent history, both ends included."""
    if not wanted.isdigit():
        return [git("rev-parse", name, text=True).strip() for name in wanted.split(",")]
    every = git("rev-list", "--first-parent", "--reverse", "HEAD", text=True).split()
    last, count = len(every) - 1, min(int(wanted), len(every))
    return list(dict.fromkeys(every[round(i * last / max(1, count - 1))] for i in range(count)))


FAILED = 2
"""What asv exits with when a benchmark failed; its other results are good."""


def asv(*arguments, package=None, html="../.asv/html", good=(0,)):
    """Run asv on the committed results; those of `make bench` are kept elsewhere."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    if package is not None:
        environment["ASV_PYTHONPATH"] = package
    config = json.loads((FOLDER / "asv.conf.json").read_text(encoding="utf-8"))
    config |= {"results_dir": str(RESULTS), "html_dir": str(html), "repo": str(ROOT), "branches": ["HEAD"]}
    config |= {"benchmark_dir": str(FOLDER / "suites"), "env_dir": str(ROOT / ".asv" / "env")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "asv.conf.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        command = [sys.executable, "-m", "asv", *arguments, "--config", str(path)]
        done = subprocess.run(command, check=False, env=environment, cwd=ROOT)
        if done.returncode not in good:
            done.check_returncode()


def measure(commit, machine, bench):
    """Run the benchmarks on a commit's package."""
    with tempfile.TemporaryDirectory() as folder:
        archive = git("archive", commit, "curvlib")
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        asv(
            "run", "--environment", f"existing:{sys.executable}", "--set-commit-hash", commit, "--machine", machine,
            "--bench", bench, "--launch-method", "forkserver", "-a", "rounds=1", "-a", "repeat=7", "-a",
            "warmup_time=0.05", package=folder, good=(0, FAILED),
        )  # fmt: skip


def publish(html):
    """Build asv's pages of the committed results; without results, or outside a clone, there is nothing to build."""
    if not any(RESULTS.glob("*/*-*.json")) or not (ROOT / ".git").exists():
        print("no asv results of this repository's commits: no pages")
        return
    asv("publish", html=Path(html).resolve())


def neutral(path, commit):
    """Rename a result after what matters: neither paths nor names of the machine at hand, nor samples."""
    result = json.loads(path.read_text(encoding="utf-8"))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    result |= {"env_name": ENVIRONMENT, "python": version, "env_vars": {}}
    result["params"] = {**result["params"], "python": version, "os": platform.system()}
    path.unlink()
    target = path.with_name(f"{commit[:8]}-{ENVIRONMENT}.json")
    target.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")


def only_measured(path, machine):
    """Drop from asv's list of benchmarks those without results: each holds its whole code."""
    measured = set()
    for result in (RESULTS / machine).glob("*-*.json"):
        measured |= json.loads(result.read_text(encoding="utf-8"))["results"].keys()
    known = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: entry for name, entry in known.items() if name in measured or name == "version"}
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commits", default="8")
    parser.add_argument("--machine", default="cpu-2core")
    parser.add_argument("--bench", default=BENCH)
    parser.add_argument("--keep", action="store_true", help="keep results of other commits, from earlier runs")
    parser.add_argument("--publish", metavar="DIR", help="measure nothing; build the pages of what is committed in DIR")
    args = parser.parse_args()
    if args.publish:
        return publish(args.publish)
    asv(
        "machine", "--yes", "--machine", args.machine, "--os", platform.system(), "--arch", platform.machine(),
        "--cpu", f"{os.cpu_count()} cores", "--num_cpu", str(os.cpu_count()), "--ram", "",
    )  # fmt: skip
    if not args.keep:
        for path in (RESULTS / args.machine).glob("*-*.json"):
            path.unlink()
    for commit in commits(args.commits):
        measure(commit, args.machine, args.bench)
        for path in (RESULTS / args.machine).glob(f"{commit[:8]}-*.json"):
            neutral(path, commit)
    only_measured(RESULTS / "benchmarks.json", args.machine)
    return None


if __name__ == "__main__":
    main()
