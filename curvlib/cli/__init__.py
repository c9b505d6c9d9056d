"""The command line: ``curvlib race``, ``train``, ``explain`` and ``reproduce``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from curvlib.cli import explain, race_command, reproduce, train
from curvlib.errors import CurvatureError

__all__ = ["main"]

# A subcommand is a module with `add_parser(subparsers)` and `run(args) -> int`.
COMMANDS = (race_command, train, explain, reproduce)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(prog="curvlib", description="Curvature for PyTorch: compare, train, explain.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv
        The arguments without the program's name; those of the process by default.

    Returns
    -------
    int
        0 on success, 2 if the request or its data cannot be served, 130 after Ctrl-C.
    """
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except CurvatureError as error:
        sys.stderr.write(f"curvlib {args.command}: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"curvlib {args.command}: interrupted\n")
        return 130
