"""One adapter per layer type: how an input and an output cotangent make the per-sample Jacobian of a block."""

from curvlib.layers import convolution as _convolution
from curvlib.layers import linear as _linear
from curvlib.layers.blocks import Block, Partition, Use, partition
from curvlib.layers.convolution import ConvolutionFactors
from curvlib.layers.fallback import Call, fallback
from curvlib.layers.registry import Adapter, adapter_for, register, registered

__all__ = [
    "Adapter",
    "Block",
    "Call",
    "ConvolutionFactors",
    "Partition",
    "Use",
    "adapter_for",
    "fallback",
    "partition",
    "register",
    "registered",
]

del _convolution, _linear  # imported for what they register
