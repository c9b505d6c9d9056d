"""Where solvers work: torch itself, NumPy on the same memory, CuPy on the same memory, stream and allocator."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor

from curvlib.arrays import Array
from curvlib.errors import ConfigurationError
from curvlib.precond.precision import check_precision, multiplied

__all__ = ["Backend", "CupyPlace", "NumpyPlace", "Place", "TorchPlace", "place_for"]

Backend = Literal["torch", "cupy", "numpy"]


class Place(ABC):
    """Where the arrays of a solver live, on the memory of the tensors that they stand for."""

    native: ClassVar[bool] = False
    """Whether its arrays are tensors."""

    @abstractmethod
    def working(self) -> AbstractContextManager[None]:
        """Return what must surround all work here."""

    def enter(self, tensor: Tensor) -> Array:
        """Return the array on the memory of `tensor`.

        Raises
        ------
        ConfigurationError
            If it lies on another device.
        """
        return tensor

    def leave(self, array: Array) -> Tensor:
        """Return the tensor on the memory of `array`; one that runs backwards, which torch cannot, is copied."""
        return array  # type: ignore[no-any-return]  # a tensor here


@dataclass(frozen=True)
class TorchPlace(Place):
    """torch, on the parameters' device.

    Parameters
    ----------
    precision
        Of products in float32.
    """

    native: ClassVar[bool] = True
    precision: str = "highest"

    def working(self) -> AbstractContextManager[None]:
        return multiplied(self.precision)


@dataclass(frozen=True)
class NumpyPlace(Place):
    """NumPy, on the memory of CPU tensors."""

    def working(self) -> AbstractContextManager[None]:
        return nullcontext()

    def enter(self, tensor: Tensor) -> Array:
        _require_device(tensor, torch.device("cpu"), "numpy")
        # torch's own view of the memory: from_dlpack of older NumPy is for reading alone.
        return tensor.detach().numpy()

    def leave(self, array: Array) -> Tensor:
        array = np.asarray(array)  # a number of NumPy's becomes an array without axes
        forwards = array.flags.writeable and all(step >= 0 for step in array.strides)
        return torch.from_numpy(array if forwards else array.copy())


@dataclass(frozen=True)
class CupyPlace(Place):
    """CuPy, on the memory, the current stream and the allocator of torch. Not yet run on a GPU.

    Parameters
    ----------
    device
        Number of the CUDA device.
    """

    device: int

    @contextmanager
    def working(self) -> Iterator[None]:
        """Return what must surround all work here.

        Raises
        ------
        ConfigurationError
            While torch captures a CUDA graph.
        """
        import cupy

        with torch.cuda.device(self.device):
            if torch.cuda.is_current_stream_capturing():
                raise ConfigurationError(
                    "backend='cupy' cannot be captured in a CUDA graph, as CuPy waits for the result of every "
                    "factorisation: step outside the capture, or use backend='torch'"
                )
            stream = cupy.cuda.Stream.from_external(_Stream(torch.cuda.current_stream(self.device)))
            # "highest" for what torch still does: the patches of convolutions.
            with (
                multiplied("highest"),
                cupy.cuda.Device(self.device),
                stream,
                cupy.cuda.using_allocator(_allocator().malloc),
            ):
                yield

    def enter(self, tensor: Tensor) -> Array:
        import cupy

        _require_device(tensor, torch.device("cuda", self.device), "cupy")
        return cupy.from_dlpack(tensor.detach())

    def leave(self, array: Array) -> Tensor:
        import cupy

        forwards = all(step >= 0 for step in array.strides)
        tensor: Tensor = torch.utils.dlpack.from_dlpack(array if forwards else cupy.ascontiguousarray(array))
        return tensor


class _Stream:
    """A stream of torch's under the CUDA stream protocol, which its own class has from some version on."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, int(self._stream.cuda_stream)


@lru_cache(maxsize=1)
def _allocator() -> Any:
    import cupy

    return cupy.cuda.PythonFunctionAllocator(_allocate, _release)


def _allocate(size: int, device: int) -> int:
    import cupy

    # Memory belongs to the stream it is used on: freed, it may be given away in that stream's order at once.
    return int(torch.cuda.caching_allocator_alloc(size, device, cupy.cuda.get_current_stream().ptr))


def _release(pointer: int, device: int) -> None:
    torch.cuda.caching_allocator_delete(pointer)  # type: ignore[no-untyped-call]


def _require_device(tensor: Tensor, device: torch.device, backend: str) -> None:
    if tensor.device != device:
        raise ConfigurationError(
            f"backend={backend!r} works on {device}, where the parameters were when the optimizer was made, but got a "
            f"tensor of shape {tuple(tensor.shape)} on {tensor.device}: move the model before making the optimizer, "
            "and keep its inputs on the same device"
        )


def place_for(backend: str, precision: str, devices: Iterable[torch.device]) -> Place | None:
    """Place of a backend for parameters on `devices`; None where solvers work as they are.

    Parameters
    ----------
    backend
        "torch", "cupy" or "numpy".
    precision
        Of products in float32; other than "highest" for torch alone.
    devices
        Of all parameters.

    Raises
    ------
    ConfigurationError
        If the backend cannot work there, with what to install or to change.
    """
    if backend not in get_args(Backend):
        raise ConfigurationError(f"backend must be one of {', '.join(map(repr, get_args(Backend)))}, got {backend!r}")
    check_precision(precision)
    present = sorted(set(devices), key=str)
    if backend == "torch":
        # A CPU multiplies float32 as it is unless told otherwise.
        plain = precision == "highest" and all(device.type == "cpu" for device in present)
        return None if plain else TorchPlace(precision)
    if precision != "highest":
        raise ConfigurationError(
            f"matmul_precision={precision!r} is torch's; backend={backend!r} multiplies float32 as it is"
            + (", unless the environment variable CUPY_TF32 says otherwise" if backend == "cupy" else "")
        )
    if len(present) != 1:
        raise ConfigurationError(
            f"backend={backend!r} needs all parameters on one device; they are on {', '.join(map(str, present))}"
        )
    if backend == "numpy":
        return _numpy_place(present[0])
    return _cupy_place(present[0])


def _numpy_place(device: torch.device) -> NumpyPlace:
    if device.type != "cpu":
        raise ConfigurationError(
            f"backend='numpy' works on the CPU, and the parameters are on {device}: use backend='torch', or 'cupy'"
        )
    return NumpyPlace()


def _cupy_place(device: torch.device) -> CupyPlace:
    if torch.version.cuda is None:
        raise ConfigurationError(
            "backend='cupy' shares a GPU with torch, and this torch is built without CUDA: install one that is, or use "
            "backend='torch' or 'numpy'"
        )
    if not torch.cuda.is_available():
        raise ConfigurationError("backend='cupy' needs an NVIDIA GPU and its driver, and torch finds none here")
    if device.type != "cuda":
        raise ConfigurationError(
            f"backend='cupy' works on the GPU that holds the parameters, and they are on {device}: move the model with "
            "model.cuda() before making the optimizer, or use backend='numpy'"
        )
    major = int(torch.version.cuda.split(".")[0])
    install = f"pip install 'curvlib[cupy-cuda{major}]'"
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise ConfigurationError(f"backend='cupy' needs CuPy for CUDA {major}: {install} ({error})") from error
    if int(cupy.__version__.split(".")[0]) < 14:
        raise ConfigurationError(f"backend='cupy' needs CuPy 14 or later, not {cupy.__version__}: {install}")
    built = int(cupy.cuda.runtime.runtimeGetVersion()) // 1000
    if built != major:
        raise ConfigurationError(
            f"this CuPy is built for CUDA {built}, this torch for CUDA {major}: pip uninstall cupy-cuda{built}x, then "
            f"{install}"
        )
    try:
        importlib.import_module("curvlib.arrays.cupy_kernels")
    except ImportError as error:
        raise ConfigurationError(
            f"CuPy does not find CUDA's libraries: pip install 'cupy-cuda{major}x[ctk]' ({error})"
        ) from error
    if not cupy.cuda.is_available():
        raise ConfigurationError(
            "torch finds a GPU and CuPy does not: the NVIDIA driver may be older than this CuPy needs; update it, or "
            f"install an earlier {install.split()[-1]}"
        )
    return CupyPlace(torch.cuda.current_device() if device.index is None else device.index)
