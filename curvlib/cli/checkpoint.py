"""Checkpoints that survive a crash: written whole, checksummed, the previous one kept."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from curvlib.cli.outputs import sync_folder, temporary_beside, write_durably
from curvlib.errors import DataError

__all__ = ["checkpoint_exists", "load_checkpoint", "remove_checkpoints", "save_checkpoint"]

# The checksum is in the file, so that one rename publishes both.
_MAGIC = b"curvlib checkpoint 1\n"
_DIGEST = 65
_NAME = "checkpoint.pt"
_PREVIOUS = "checkpoint.previous.pt"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; the last good one becomes the backup.

    The new one is whole and on the disk before the last one is touched, so that whenever the process is killed, one of
    the two is there under its own name or the backup's.

    Parameters
    ----------
    folder
        The run's folder.
    state
        Tensors, numbers, strings and containers of them.

    Raises
    ------
    DataError
        If the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    current = folder / _NAME
    temporary = temporary_beside(current)
    try:
        write_durably(temporary, _MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)
        # A corrupt file must not push out the good one behind it.
        if current.exists() and _intact(current):
            os.replace(current, folder / _PREVIOUS)
        os.replace(temporary, current)
        sync_folder(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{current} cannot be written ({error.strerror}): free space or give another --out") from error


def checkpoint_exists(folder: Path) -> bool:
    """Return whether a folder holds a checkpoint or a backup of one."""
    return (folder / _NAME).exists() or (folder / _PREVIOUS).exists()


def remove_checkpoints(folder: Path) -> None:
    """Remove a folder's checkpoint and its backup, of a run that is over."""
    for name in (_NAME, _PREVIOUS):
        (folder / name).unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], str]:
    """Read a folder's checkpoint, or its backup if the last one is corrupt or missing.

    Parameters
    ----------
    folder
        The run's folder.

    Returns
    -------
    tuple of dict and str
        The state, its tensors on the CPU, and a warning to show if the backup was used (else empty).

    Raises
    ------
    DataError
        If there is no checkpoint, or none that is intact.
    """
    problems = []
    for name in (_NAME, _PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            state = _read(path)
        except DataError as error:
            problems.append(str(error))
            continue
        backup = name == _PREVIOUS
        reason = problems[0] if problems else f"{folder / _NAME} is missing"
        return state, f"{reason}; going on from the backup {path}" if backup else ""
    if not problems:
        raise DataError(f"{folder} holds no checkpoint to resume from: leave out --resume, or give the run's --out")
    raise DataError(f"{'; '.join(problems)}. Start anew with another --out, or remove these files")


def _intact(path: Path) -> bool:
    try:
        _payload(path)
    except DataError:
        return False
    return True


def _payload(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    if not raw.startswith(_MAGIC):
        raise DataError(f"{path} is not a checkpoint of curvlib")
    start = len(_MAGIC) + _DIGEST
    payload = raw[start:]
    if hashlib.sha256(payload).hexdigest().encode() + b"\n" != raw[len(_MAGIC) : start]:
        raise DataError(f"{path} is corrupt: its checksum does not match its content")
    return payload


def _read(path: Path) -> dict[str, Any]:
    payload = _payload(path)
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # a crafted payload makes the unpickler fail in any way, but runs nothing
        raise DataError(f"{path} cannot be read as a checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise DataError(f"{path} does not hold a training state")
    return state
