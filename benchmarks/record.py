"""What goes with every committed measurement: where, when and on which commit it was taken; and how it is written."""

import json
import os
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from curvlib.cli.environment import describe_environment

ROOT = Path(__file__).parent.parent
PROVISIONAL = "**Provisional: a quick run on a busy machine.**"


def circumstances(provisional):
    """Versions, machine, date, commit and load. `provisional` marks quick runs, and runs on a busy machine."""
    return {
        **describe_environment(torch.device("cpu")),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "load_before": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "provisional": provisional,
    }


def commit():
    """Short hash of the checkout, "+" behind it if files differ from it; None where there is none."""
    try:
        name = _git("rev-parse", "--short", "HEAD")
        return name + ("+" if _git("status", "--porcelain", "--untracked-files=no", "curvlib") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments):
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def write(path, measured):
    """Write a measurement as JSON, lists of numbers in one line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_encode(_rounded(measured)) + "\n", encoding="utf-8")


def table(header, rows):
    """Markdown table; the first column is text, the others numbers."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]) + "\n"


def where(environment):
    """One sentence about the machine and the versions of a measurement."""
    commit = f", commit {environment['commit']}" if environment["commit"] else ""
    warning = f" {PROVISIONAL}" if environment["provisional"] else ""
    return (
        f"Measured on {environment['date']}{commit}: {environment['threads']} threads of {environment['cpu']}, "
        f"torch {environment['torch']}, Python {environment['python']}, float32.{warning}"
    )


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


def _encode(value, indent=""):
    if not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False)
    inner = indent + "  "
    lines = [f"{inner}{json.dumps(key, ensure_ascii=False)}: {_encode(entry, inner)}" for key, entry in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
