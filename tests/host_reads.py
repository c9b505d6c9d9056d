"""Sees on a CPU what would make it wait for a GPU: values read by the host, shapes made of values, copies."""

import traceback
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import curvlib

_HOME = str(Path(curvlib.__file__).parent)

# By the sources of torch 2.13: what reads a value in itself, or makes a shape of values.
_READING = {
    "_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "nonzero_numpy", "masked_select", "unique_dim",
    "_unique", "_unique2", "unique_consecutive", "unique_dim_consecutive", "multinomial", "bincount", "histc",
    "repeat_interleave", "_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "linalg_eig", "linalg_lstsq",
    "linalg_pinv", "linalg_matrix_rank", "geqrf", "allclose",
}  # fmt: skip

# Where numbers of the host become a tensor: on a GPU a copy from memory that is not pinned, which waits.
_COPYING = {"lift_fresh"}

# No operation at all on a CPU, and a copy on a GPU.
_METHODS = ("tolist", "numpy", "cpu", "__array__")


class HostReads(TorchDispatchMode):
    """Collects host reads, each with the line of the library, or of the test, that made it."""

    def __init__(self):
        super().__init__()
        self.found = []
        self.allowed = False

    def note(self, what):
        if not self.allowed:
            frames = traceback.extract_stack()[:-2]
            ours = [frame for frame in frames if frame.filename.startswith(_HOME)] or frames[-6:]
            self.found.append(f"{what} at {ours[-1].filename.removeprefix(_HOME)}:{ours[-1].lineno}: {ours[-1].line}")

    def allowing(self, function):
        """Return the function, whose own reads are no news."""

        def unseen(*args, **kwargs):
            before, self.allowed = self.allowed, True
            try:
                return function(*args, **kwargs)
            finally:
                self.allowed = before

        return unseen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = (
            name in ("index", "index_put", "index_put_", "_index_put_impl_")
            and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        )  # fmt: skip
        to_host = (kwargs or {}).get("device") is not None and name == "_to_copy"
        if name in _READING or name in _COPYING or masks or to_host:
            self.note(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def host_reads():
    """Collect the host reads inside."""
    mode = HostReads()
    kept = {name: getattr(torch.Tensor, name) for name in _METHODS}

    def watched(name):
        def method(self, *args, **kwargs):
            mode.note(name)
            return kept[name](self, *args, **kwargs)

        return method

    try:
        for name in _METHODS:
            setattr(torch.Tensor, name, watched(name))
        with mode:
            yield mode
    finally:
        for name in _METHODS:
            setattr(torch.Tensor, name, kept[name])
