"""The binary formats of image data sets: IDX (MNIST's) and CIFAR's ``.bin`` batches."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from curvlib.cli.outputs import write_atomically
from curvlib.errors import DataError

__all__ = ["read_cifar", "read_idx", "write_idx"]

_UNSIGNED_BYTE = 0x08
_CIFAR_PIXELS = 3 * 32 * 32


def read_idx(path: Path, remedy: str) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, gzip-compressed or not.

    Parameters
    ----------
    path
        The file; compressed if its name ends in ``.gz``.
    remedy
        What to do if the file is unusable: the end of the error message.

    Returns
    -------
    numpy.ndarray
        The array with the shape that the header states.

    Raises
    ------
    DataError
        If the file is unreadable, not an IDX file of bytes, or of another length than its header says.
    """
    raw = _read(path, remedy)
    if len(raw) < 4 or raw[0] != 0 or raw[1] != 0 or raw[2] != _UNSIGNED_BYTE or not 1 <= raw[3] <= 4:
        raise DataError(f"{path} is not an IDX file of unsigned bytes (it starts with {raw[:4].hex(' ')}). {remedy}")
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise DataError(f"{path} is truncated: its header has {len(raw)} of {start} bytes. {remedy}")
    shape = struct.unpack(f">{raw[3]}I", raw[4:start])
    expected = math.prod(shape)
    if len(raw) - start != expected:
        state = "truncated" if len(raw) - start < expected else "corrupt"
        held = len(raw) - start
        raise DataError(f"{path} is {state}: it holds {held} bytes, its header {shape} says {expected}. {remedy}")
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape)


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    """Write an array of unsigned bytes as an IDX file, gzip-compressed if the name ends in ``.gz``."""
    header = bytes([0, 0, _UNSIGNED_BYTE, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    raw = header + np.ascontiguousarray(array, dtype=np.uint8).tobytes()
    write_atomically(path, gzip.compress(raw, compresslevel=1) if path.suffix == ".gz" else raw)


def read_cifar(
    path: Path, remedy: str, *, label_bytes: int, records: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read one file of CIFAR's binary version.

    Parameters
    ----------
    path
        The file, such as ``data_batch_1.bin``.
    remedy
        What to do if the file is unusable: the end of the error message.
    label_bytes
        1 for CIFAR-10; 2 for CIFAR-100, whose last label byte is the fine class.
    records
        How many images the file must hold.

    Returns
    -------
    tuple of numpy.ndarray
        Images ``(records, 3, 32, 32)`` and labels ``(records,)``.

    Raises
    ------
    DataError
        If the file is unreadable or of another length than its records need.
    """
    raw = _read(path, remedy)
    expected = records * (label_bytes + _CIFAR_PIXELS)
    if len(raw) != expected:
        state = "truncated" if len(raw) < expected else "corrupt"
        raise DataError(f"{path} is {state}: it holds {len(raw)} bytes, {records} images need {expected}. {remedy}")
    table = np.frombuffer(raw, dtype=np.uint8).reshape(records, label_bytes + _CIFAR_PIXELS)
    return table[:, label_bytes:].reshape(-1, 3, 32, 32), table[:, label_bytes - 1]


def _read(path: Path, remedy: str) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is corrupt or truncated ({error}). {remedy}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). {remedy}") from error
