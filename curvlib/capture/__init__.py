"""From a forward and a backward pass to the Factors of every block."""

from curvlib.capture.collect import collect
from curvlib.capture.handover import GradientRows, Taken
from curvlib.capture.hooks import Capture, Output

__all__ = ["Capture", "GradientRows", "Output", "Taken", "collect"]
