"""One adapter per layer type: how an input and an output cotangent make the per-sample Jacobian of a block."""

from curvlib.layers import attention as _attention
from curvlib.layers import batchnorm as _batchnorm
from curvlib.layers import bilinear as _bilinear
from curvlib.layers import convolution as _convolution
from curvlib.layers import embedding as _embedding
from curvlib.layers import linear as _linear
from curvlib.layers import normalization as _normalization
from curvlib.layers import prelu as _prelu
from curvlib.layers import recurrent as _recurrent
from curvlib.layers import softmax as _softmax
from curvlib.layers import transposed as _transposed
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

del (
    _attention,
    _batchnorm,
    _bilinear,
    _convolution,
    _embedding,
    _linear,
    _normalization,
    _prelu,
    _recurrent,
    _softmax,
    _transposed,
)  # imported for what they register
