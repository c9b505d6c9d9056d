"""How precisely float32 matrices are multiplied: torch's settings, for the time of one piece of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch

from curvlib.errors import ConfigurationError

__all__ = ["Precision", "check_precision", "multiplied"]

Precision = Literal["highest", "high", "medium"]
"""float32 itself; TensorFloat-32 where there is; on CPUs also bfloat16. The words of torch."""

# Since torch 2.9 every backend has a setting of its own, and reading the older global ones beside them is an error.
_NEWER: tuple[tuple[str, dict[str, str]], ...] = (
    ("cuda.matmul", {"highest": "ieee", "high": "tf32", "medium": "tf32"}),
    ("cudnn.conv", {"highest": "ieee", "high": "tf32", "medium": "tf32"}),
    ("mkldnn.matmul", {"highest": "ieee", "high": "tf32", "medium": "bf16"}),
    ("mkldnn.conv", {"highest": "ieee", "high": "tf32", "medium": "bf16"}),
)


def check_precision(precision: str) -> None:
    """Refuse a word that is none of torch's.

    Raises
    ------
    ConfigurationError
        With the words.
    """
    if precision not in get_args(Precision):
        raise ConfigurationError(
            f"matmul_precision must be one of {', '.join(map(repr, get_args(Precision)))}, got {precision!r}"
        )


@contextmanager
def multiplied(precision: str) -> Iterator[None]:
    """Multiply and convolve float32 with this precision inside, and as before afterwards.

    torch's settings are the process's: other threads see them meanwhile.

    Parameters
    ----------
    precision
        "highest", "high" or "medium".
    """
    changed: list[tuple[Callable[[Any], Any], Any]] = []
    for now, then, change in _settings(precision):
        if now != then:
            change(then)
            changed.append((change, now))
    try:
        yield
    finally:
        for change, before in changed:
            change(before)


def _settings(precision: str) -> Iterator[tuple[Any, Any, Callable[[Any], Any]]]:
    """Every setting as it is, as it shall be, and what sets it."""
    if not hasattr(torch.backends.cudnn, "conv"):
        cudnn = torch.backends.cudnn
        yield torch.get_float32_matmul_precision(), precision, torch.set_float32_matmul_precision
        yield cudnn.allow_tf32, precision != "highest", lambda allowed: setattr(cudnn, "allow_tf32", allowed)
        return
    for path, words in _NEWER:
        backend, operation = path.split(".")
        place = getattr(getattr(torch.backends, backend), operation)
        yield place.fp32_precision, words[precision], lambda word, place=place: setattr(place, "fp32_precision", word)  # type: ignore[misc]  # mypy cannot type a default
