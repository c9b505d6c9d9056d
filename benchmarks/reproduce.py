"""Run the committed part of the paper's experiments and write the page about them.

    python -m benchmarks.reproduce --out benchmarks/results/reproduce-fashion-mnist [--provisional] [options]

The ConvNet on Fashion-MNIST at a size for two CPU cores: three seeds, the paper's ten epochs of 8 % of the images, an
eighth of the width. Options behind it go to `curvlib reproduce` in place of these (`--resume` after an interruption).
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.record import circumstances
from curvlib.cli import main as curvlib
from curvlib.cli.reproduction.report import write_report

SIZE = ["--scale", "0.08", "--epochs", "10", "--seeds", "3"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--provisional", action="store_true", help="mark the figures as those of a busy machine")
    args, options = parser.parse_known_args()
    before = circumstances(args.provisional)
    status = curvlib(["reproduce", "fashion-mnist-convnet", "--out", str(args.out), *SIZE, *options])
    if status:
        return status
    results = json.loads((args.out / "results.json").read_text(encoding="utf-8"))
    results["environment"] |= {**before, **results["environment"]}
    write_report(args.out, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
