"""The cost model: floating-point operations by the sizes of what each operation is given."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["FORMULAS", "CountFlops"]

FORMULAS = {
    "matrix product (m × k)(k × n)": "2 m n k",
    "convolution and its gradients": "2 · samples · positions · d_out · d_in · kernel / groups, for each of them",
    "Cholesky factor, n × n": "n³ / 3",
    "solve with a Cholesky factor, k right-hand sides": "2 n² k",
    "solve with a triangle": "n² k",
    "solve by LU, k right-hand sides": "2 n³ / 3 + 2 n² k",
    "inverse": "2 n³",
    "symmetric eigendecomposition": "9 n³",
    "QR, m × n": "4 m n²",
    "SVD, m × n, m ≥ n": "14 m n² + 8 n³",
    "elementwise": "one for each element of the result",
    "sum and mean": "one for each element that goes in",
    "pull a cotangent back through a module": "what its forward pass costs, for each column; nothing for Empirical",
}
"""What `CountFlops` charges, in the order of the documentation."""


class CountFlops(TorchDispatchMode):  # type: ignore[no-untyped-call]  # in torch
    """Adds up the floating-point operations of everything that torch runs inside the context, by `FORMULAS`.

    Attributes
    ----------
    total
        Operations so far; a multiply-add is two.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # in torch
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in _OPERATIONS:
            self.total += _OPERATIONS[packet](*args)
        elif packet in flop_registry:
            self.total += int(flop_registry[packet](*args, **(kwargs or {}), out_val=result))
        elif packet in _REDUCTIONS:
            self.total += args[0].numel()
        elif torch.Tag.pointwise in func.tags and packet not in _COPIES:
            self.total += sum(leaf.numel() for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
        return result


def _batches(matrix: Tensor) -> int:
    return prod(matrix.shape[:-2])


def _cubic(factor: float) -> Callable[..., int]:
    def cost(matrix: Tensor, *rest: Any) -> int:
        return round(factor * _batches(matrix) * matrix.shape[-1] ** 3)

    return cost


def _cholesky_solve(rhs: Tensor, factor: Tensor, *rest: Any) -> int:
    return 2 * factor.shape[-1] * rhs.numel()


def _triangular_solve(factor: Tensor, rhs: Tensor, *rest: Any) -> int:
    return factor.shape[-1] * rhs.numel()


def _lu_solve(matrix: Tensor, rhs: Tensor, *rest: Any) -> int:
    n = matrix.shape[-1]
    return round(_batches(matrix) * 2 * n**3 / 3) + 2 * n * rhs.numel()


def _qr(matrix: Tensor, *rest: Any) -> int:
    return 4 * matrix.numel() * min(matrix.shape[-2:])


def _svd(matrix: Tensor, *rest: Any) -> int:
    short = min(matrix.shape[-2:])
    return 14 * matrix.numel() * short + 8 * _batches(matrix) * int(short**3)


def _convolution(x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
                 output_padding: Any, groups: int) -> int:  # fmt: skip
    # Every element of the weight meets every position of the side that it is slid over.
    space = x.shape[2:] if transposed else _positions(x, weight, stride, padding, dilation)
    return 2 * x.shape[0] * prod(space) * weight.numel()


def _positions(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> list[int]:
    sizes = []
    for axis, (size, kernel) in enumerate(zip(x.shape[2:], weight.shape[2:], strict=True)):
        step, margin, apart = (int(option[axis % len(option)]) for option in (stride, padding, dilation))
        sizes.append((size + 2 * margin - apart * (kernel - 1) - 1) // step + 1)
    return sizes


def _convolution_backward(
    g: Tensor, x: Tensor, weight: Tensor, sizes: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, wanted: Any,
) -> int:  # fmt: skip
    # torch's own formula counts the groups of a weight gradient too often.
    once = 2 * g.shape[0] * prod((x if transposed else g).shape[2:]) * weight.numel()
    return once * sum(map(bool, wanted[:2])) + (g.numel() if wanted[2] else 0)


_aten = torch.ops.aten
_OPERATIONS: dict[Any, Callable[..., int]] = {
    _aten.convolution: _convolution,
    _aten.convolution_backward: _convolution_backward,
    _aten.linalg_cholesky_ex: _cubic(1 / 3),
    _aten.cholesky: _cubic(1 / 3),
    _aten.cholesky_inverse: _cubic(2 / 3),
    _aten.cholesky_solve: _cholesky_solve,
    _aten._cholesky_solve_helper: _cholesky_solve,
    _aten.linalg_solve_triangular: _triangular_solve,
    _aten._linalg_solve_ex: _lu_solve,
    _aten.linalg_inv_ex: _cubic(2),
    _aten._linalg_eigh: _cubic(9),
    _aten.linalg_qr: _qr,
    _aten._linalg_svd: _svd,
}
_COPIES = {_aten.clone, _aten.copy_, _aten._to_copy, _aten.fill_, _aten.zeros_like, _aten.ones_like}
_REDUCTIONS = {_aten.sum, _aten.mean, _aten.linalg_vector_norm, _aten.var, _aten.amax, _aten.cumsum}
