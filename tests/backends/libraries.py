"""Array libraries that tests run on, each with how to make its arrays; those that need a GPU carry the marker."""

import importlib.util

import numpy as np
import pytest
import torch

CUDA = torch.cuda.is_available()
CUPY = CUDA and importlib.util.find_spec("cupy") is not None
needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
needs_cupy = [pytest.mark.gpu, pytest.mark.skipif(not CUPY, reason="needs a CUDA device and CuPy")]


def cupy_array(values):
    import cupy

    return cupy.asarray(values)


def cupy_numbers(array):
    import cupy

    return cupy.asnumpy(array)


MAKE = {
    "torch": torch.from_numpy,
    "numpy": np.asarray,
    "cuda": lambda values: torch.from_numpy(values).cuda(),
    "cupy": cupy_array,
}
READ = {
    "torch": np.asarray,
    "numpy": np.asarray,
    "cuda": lambda array: array.cpu().numpy(),
    "cupy": cupy_numbers,
}
EVERY = [
    "torch",
    "numpy",
    pytest.param("cuda", marks=needs_cuda),
    pytest.param("cupy", marks=needs_cupy),
]
