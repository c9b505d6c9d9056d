"""What is told about steps as they happen: functions called after each, and ready ones that write files."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from curvlib.errors import ConfigurationError, CurvatureError, DataError

if TYPE_CHECKING:
    from curvlib.precond.optimizer import NaturalGradient

__all__ = ["CSVWriter", "Callback", "TensorBoardWriter", "check_callback", "guarded"]


class Callback(Protocol):
    """A function called after every step, those that ``on_failure="skip"`` skipped too."""

    def __call__(self, optimizer: NaturalGradient, loss: Any) -> None:
        """Look at a step.

        What it raises leaves `step`, whose work is done by then.

        Parameters
        ----------
        optimizer
            After the step; ``optimizer.health`` has the numbers.
        loss
            What the closure returned; None without a closure.
        """


def check_callback(callback: Callback) -> Callback:
    """Refuse what cannot be called.

    Raises
    ------
    ConfigurationError
        With what a callback is.
    """
    if not callable(callback) or isinstance(callback, type):
        raise ConfigurationError(
            f"a callback is a function of the optimizer and the loss, such as CSVWriter('run.csv'), got {callback!r}"
        )
    return callback


def guarded(step: Callable[..., Any]) -> Callable[..., Any]:
    """Count the steps that fail, skip them where the policy says so, and call the callbacks after the others."""

    @functools.wraps(step)
    def guarded_step(self: NaturalGradient, closure: Callable[[], Any] | None = None) -> Any:
        losses: list[Any] = []

        def kept() -> Any:
            losses.append(closure() if closure is not None else None)
            return losses[-1]

        try:
            loss = step(self, None if closure is None else kept)
        except CurvatureError as error:
            if not self.failures.refuse(error, self.steps):
                raise
            loss = losses[0] if losses else None
        for callback in self.callbacks:
            callback(self, loss)
        return loss

    return guarded_step


_COLUMNS = (
    "step", "block", "loss", "lr", "kl", "skipped", "damping", "staleness", "failures", "retries", "condition",
    "effective_dimension",
)  # fmt: skip


class CSVWriter:
    """Writes the health of every block as lines of a CSV file, and one line a step for the whole, whose block is empty.

    Parameters
    ----------
    path
        The file; lines are added to one that is there.
    every
        Steps between lines. Condition and effective dimension take an eigendecomposition of each block.

    Raises
    ------
    ConfigurationError
        If `every` is no integer ≥ 1.
    DataError
        If the file cannot be written.
    """

    def __init__(self, path: str | Path, every: int = 100) -> None:
        self.every = _interval(self, every)
        if not isinstance(path, str | Path):
            raise ConfigurationError(f"CSVWriter needs the path of a file, got {path!r}")
        self.path = Path(path)
        self._append("" if self._begun() else ",".join(_COLUMNS) + "\n")

    def __call__(self, optimizer: NaturalGradient, loss: Any) -> None:
        """Add the lines of a step that is due."""
        if optimizer.steps % self.every:
            return
        health = optimizer.health
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        whole = {
            "step": optimizer.steps, "block": "", "loss": _number(loss), "lr": rates[0], "kl": health.kl,
            "skipped": health.skipped,
        }  # fmt: skip
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, _COLUMNS, lineterminator="\n")
        writer.writerow(whole)
        for name, block in health.items():
            writer.writerow({"step": optimizer.steps, "block": name, **block.numbers()})
        self._append(buffer.getvalue())

    def _begun(self) -> bool:
        try:
            return self.path.stat().st_size > 0
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as error:
            raise DataError(f"{str(self.path)!r} cannot be written ({error}): give another path") from error

    def _append(self, text: str) -> None:
        # Opened for each step: nothing is held open or buffered, so copies, forks and crashes lose nothing.
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(text)
        except (OSError, ValueError) as error:
            raise DataError(f"{str(self.path)!r} cannot be written ({error}): give another path") from error


class TensorBoardWriter:
    """Writes the health of every block as scalars of TensorBoard.

    Parameters
    ----------
    target
        A folder, or a `torch.utils.tensorboard.SummaryWriter` that is there already.
    every
        Steps between points. Condition and effective dimension take an eigendecomposition of each block.

    Raises
    ------
    ConfigurationError
        If TensorBoard is not installed, or `every` is no integer ≥ 1.
    """

    def __init__(self, target: Any, every: int = 100) -> None:
        self.every = _interval(self, every)
        if hasattr(target, "add_scalar"):
            self.writer = target
            return
        if not isinstance(target, str | Path):
            raise ConfigurationError(f"TensorBoardWriter needs a folder or a SummaryWriter, got {target!r}")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigurationError(
                f"TensorBoardWriter needs TensorBoard: pip install tensorboard, or use CSVWriter ({error})"
            ) from error
        self.writer = SummaryWriter(str(target))

    def __call__(self, optimizer: NaturalGradient, loss: Any) -> None:
        """Add the points of a step that is due."""
        if optimizer.steps % self.every:
            return
        health = optimizer.health
        points = {"loss": _number(loss), "kl": health.kl, "skipped": health.skipped}
        points |= {f"lr/{place}": float(group["lr"]) for place, group in enumerate(optimizer.param_groups)}
        for name, block in health.items():
            points |= {f"{quantity}/{name}": value for quantity, value in block.numbers().items()}
        for tag, value in points.items():
            if value is not None:
                self.writer.add_scalar(f"curvlib/{tag}", value, optimizer.steps)


def _interval(writer: object, every: int) -> int:
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ConfigurationError(f"{type(writer).__name__} needs every as an integer ≥ 1, got {every!r}")
    return every


def _number(loss: Any) -> float | None:
    try:
        return None if loss is None else float(loss)
    except (TypeError, ValueError, RuntimeError):
        return None  # a closure may return anything
