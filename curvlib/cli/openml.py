"""Image tables from OpenML through scikit-learn."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from curvlib.errors import DataError

__all__ = ["fetch"]

_TIMEOUT = 30.0


def fetch(name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Fetch a table of pixels and its class numbers.

    Parameters
    ----------
    name
        The name on OpenML; version 1 is taken.

    Returns
    -------
    tuple of numpy.ndarray
        Pixels ``(samples, pixels)`` and labels ``(samples,)``.

    Raises
    ------
    DataError
        If scikit-learn is missing, OpenML cannot be reached, or what it sends cannot be read.
    """
    try:
        from sklearn.datasets import fetch_openml
    except ImportError as error:
        raise DataError(f"Fetching {name} from OpenML needs scikit-learn: pip install 'curvlib[race]'.") from error
    try:
        with _timeout(_TIMEOUT):
            bundle = fetch_openml(name, version=1, as_frame=False, parser="liac-arff", cache=False, n_retries=1)
        return np.asarray(bundle.data).astype(np.uint8), np.asarray(bundle.target).astype(np.uint8)
    except Exception as error:  # the network, gzip, the ARFF parser and scikit-learn each raise their own kinds
        raise DataError(f"OpenML did not deliver {name} ({type(error).__name__}: {error}).") from error


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    # scikit-learn passes no timeout to its requests; a dead network would hang the command.
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)
