"""Ctrl-C that waits for the end of a training step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopOnInterrupt"]


class StopOnInterrupt:
    """While entered, the first Ctrl-C sets `requested`; the second one interrupts as usual.

    An interruption in the middle of an optimizer's step leaves some parameters new and others old: no state to
    continue from.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None
        # Only the main thread may set handlers; elsewhere Ctrl-C never arrives.
        self._active = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> StopOnInterrupt:
        if self._active:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
