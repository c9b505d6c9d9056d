"""Folders and files that a command writes: checked before the work, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from curvlib.errors import DataError

__all__ = [
    "prepare_folder",
    "remove_leftovers",
    "sync_folder",
    "temporary_beside",
    "write_atomically",
    "write_durably",
    "write_text",
]


def prepare_folder(path: Path) -> Path:
    """Create a folder and check that files can be written there.

    Raises
    ------
    DataError
        If the folder cannot be created or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"probe")
    except OSError as error:
        raise DataError(
            f"the output folder {path} cannot be written ({error.strerror}): give another one with --out"
        ) from error
    return path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old file or the new one, never a part.

    Raises
    ------
    DataError
        If the file cannot be written.
    """
    temporary = temporary_beside(path)
    try:
        write_durably(temporary, content)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path} cannot be written ({error.strerror}): free space or give another --out") from error


def temporary_beside(path: Path) -> Path:
    """Return the name under which a file is written before it gets its own."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing in a folder that is this process's alone."""
    for left in folder.glob(".*.*.tmp"):
        left.unlink(missing_ok=True)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until its content is on the disk; its name may not be yet (`sync_folder`)."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, content: str) -> None:
    """Write a text file as UTF-8, whole or not at all."""
    write_atomically(path, content.encode())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk; systems without folder handles do that on their own."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
