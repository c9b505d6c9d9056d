"""Floating-point operations of a step by the routines that do nearly all of them, from the shapes that they get."""

from math import prod

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Operations"]


class Operations(TorchDispatchMode):
    """Counts while it is entered, in this thread: have decompositions done here (``torch.set_num_threads(1)``).

    Attributes
    ----------
    products
        Of matrix products and convolutions, a multiply-add as two.
    decompositions
        Of Cholesky factors n³/3, of inverses from them 2n³/3, of eigenvectors 9n³ (Golub and Van Loan, 8.3: the
        symmetric QR algorithm with vectors), of triangular solves n² a right-hand side.
    """

    def __init__(self):
        super().__init__()
        self.products = self.decompositions = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__.strip("_")
        if name in ("mm", "bmm", "mv", "dot"):
            self.products += _product(*args[:2])
        elif name in ("addmm", "baddbmm", "addmv"):
            self.products += _product(*args[1:3])
        elif name in ("convolution", "mkldnn_convolution"):
            self.products += 2 * result.numel() * prod(args[1].shape[1:])
        elif name == "convolution_backward":
            gradients = sum(bool(wanted) for wanted in args[10][:2])
            self.products += 2 * gradients * args[0].numel() * prod(args[2].shape[1:])
        elif name in _CUBES:
            self.decompositions += _CUBES[name] * args[0].numel() * args[0].shape[-1]
        elif name in ("linalg_solve_triangular", "cholesky_solve"):
            rhs, triangles = (args[1], 1) if name == "linalg_solve_triangular" else (args[0], 2)
            self.decompositions += triangles * rhs.numel() * rhs.shape[-2]
        return result


_CUBES = {"linalg_cholesky_ex": 1 / 3, "cholesky_inverse": 2 / 3, "linalg_eigh": 9.0}


def _product(first: torch.Tensor, second: torch.Tensor) -> float:
    return 2.0 * first.numel() * (second.shape[-1] if second.ndim > 1 else 1)
