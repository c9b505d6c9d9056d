"""Where a measurement was taken: versions, device, threads."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np
import torch

import curvlib
from curvlib.errors import ConfigurationError

__all__ = ["choose_device", "describe_environment"]


def choose_device(name: str) -> torch.device:
    """Return the device of a name; ``"auto"`` is the GPU where there is one.

    Raises
    ------
    ConfigurationError
        If torch does not know the name or this machine lacks the device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"--device {name} cannot be used here ({reason}): try --device cpu") from error
    return device


def describe_environment(device: torch.device) -> dict[str, object]:
    """Return the versions and the hardware that a measurement depends on."""
    return {
        "curvlib": getattr(curvlib, "__version__", "unknown"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or "unknown"
