"""Inverse-free Kronecker curvature: roots of the inverse factors, updated by multiplication."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from curvlib.arrays import Array, add_diagonal, device, namespace, record, trace
from curvlib.errors import ConfigurationError
from curvlib.factors import Factors, KroneckerLayout, KroneckerRows, Sharing
from curvlib.solvers.average import check_decay
from curvlib.solvers.base import Gradient, Solver, as_vector, check_block, check_choice, check_damping, check_finite

__all__ = ["SINGD", "SINGDEstimate", "SINGDInverse"]

Structure = Literal["dense", "diagonal"]
"""What a root is restricted to; a diagonal one is kept as its diagonal."""


@record
@dataclass(frozen=True, eq=False)
class SINGDEstimate:
    """Estimate: roots K and C with ``K Kᵀ ≈ A⁻¹`` and ``C Cᵀ ≈ G⁻¹``, and the momenta of their updates.

    Shapes ``(groups, d, d)`` and ``(groups, d_out, d_out)``, without the last axis where diagonal.
    """

    inputs: Array
    cotangents: Array
    input_momentum: Array
    cotangent_momentum: Array
    layout: KroneckerLayout


@record
@dataclass(frozen=True, eq=False)
class SINGDInverse:
    """Inverse: ``K Kᵀ`` and ``C Cᵀ``, or their diagonals."""

    inputs: Array
    cotangents: Array
    layout: KroneckerLayout


@dataclass(frozen=True)
class SINGD(Solver):
    """SINGD (Lin et al. 2024, arXiv 2312.05705): structured K-FAC without inversion or decomposition, and IKFAC.

    Parameters
    ----------
    damping
        λ > 0. It acts inside the multiplicative update, so it belongs to the method; the damping of `factorize` has no
        place in it and changes nothing.
    rate
        β₁ > 0, step size of the update of K and C.
    momentum
        α₁ in [0, 1) of that update; IKFAC has none.
    kfac_like
        IKFAC: both factors are updated independently. K Kᵀ then follows the inverse of K-FAC's average of A + λI with
        weight β₁ for the newest batch, up to terms of order β₁² an update.
    inputs, cotangents
        "dense" or "diagonal" structure of K and of C.
    normalized
        Divides β₁ by the largest entry of m where that exceeds 1, and multiplies what m takes in by 1 − α₁: steadier
        while K and C are far from where they belong. An option of the authors' code.
    sharing
        "expand" or "reduce" for weights shared over positions (arXiv 2311.00636).

    Notes
    -----
    K and C begin as identities, their momenta m as zero. With H_K = Kᵀ A K, H_C = Cᵀ G C, and tr the trace divided by
    the size of the matrix, an update is

        m_K ← α₁ m_K + (tr(H_C) H_K + λ tr(CᵀC) KᵀK − I) / 2,    K ← K (I − β₁ m_K),
        m_C ← α₁ m_C + (tr(H_K) H_C + λ tr(KᵀK) CᵀC − I) / 2,    C ← C (I − β₁ m_C),

    each term restricted to the structure; IKFAC has 1 for every tr. A and G are those of `KFAC` for the current batch.
    The natural gradient is ``C Cᵀ [W, b] K Kᵀ``. The paper uses the empirical Fisher; any other will do.
    """

    exact: ClassVar[bool] = False
    holds_rows: ClassVar[bool] = False
    of_kronecker_rows: ClassVar[bool] = True
    damping: float = 1e-3
    rate: float = 1e-2
    momentum: float = 0.5
    kfac_like: bool = False
    inputs: Structure = "dense"
    cotangents: Structure = "dense"
    normalized: bool = False
    sharing: Sharing = "expand"

    def __post_init__(self) -> None:
        check_damping(self.damping)
        check_decay(self.momentum)
        if not self.rate > 0:
            raise ConfigurationError(f"the rate of the update of K and C must be positive, got {self.rate!r}")
        check_choice("inputs", self.inputs, get_args(Structure))
        check_choice("cotangents", self.cotangents, get_args(Structure))
        check_choice("sharing", self.sharing, get_args(Sharing))

    def update(self, estimate: SINGDEstimate | None, factors: Factors) -> SINGDEstimate:
        apart = factors.kronecker_rows(self.sharing)
        old = self._start(apart) if estimate is None else estimate
        K, C = old.inputs, old.cotangents
        H_K, H_C = _input_moment(apart, K), _moment(_times(apart.cotangents, C), factors.normalizer, C)
        m_K, K = self._moved(K, old.input_momentum, H_K, H_C, C)
        m_C, C = self._moved(C, old.cotangent_momentum, H_C, H_K, old.inputs)
        return SINGDEstimate(K, C, m_K, m_C, apart.layout)

    def _start(self, apart: KroneckerRows) -> SINGDEstimate:
        layout = apart.layout
        d_in = 0 if layout.weight is None else int(apart.inputs.shape[2])
        K = _identity(apart.inputs, d_in + (layout.bias is not None), self.inputs)
        C = _identity(apart.cotangents, int(apart.cotangents.shape[2]), self.cotangents)
        return SINGDEstimate(K, C, 0 * K, 0 * C, layout)

    def _moved(self, root: Array, momentum: Array, own: Array, other: Array, other_root: Array) -> tuple[Array, Array]:
        """New momentum and root of one side, from both sides' projected moments and the other side's root."""
        weight, damping = 1.0, self.damping
        if not self.kfac_like:
            spread = (slice(None), *[None] * (root.ndim - 1))
            weight = _mean_trace(other)[spread]
            damping = self.damping * _mean_trace(_inner(other_root))[spread]
        change = 0.5 * _plus_identity(weight * own + damping * _inner(root), -1.0)
        kept = 0.0 if self.kfac_like else self.momentum
        momentum = kept * momentum + ((1 - kept) * change if self.normalized else change)
        rate = self.rate
        if self.normalized:
            xp = namespace(momentum)
            largest = xp.max(xp.abs(momentum), axis=tuple(range(1, momentum.ndim)), keepdims=True)
            rate = rate / xp.where(largest > 1, largest, xp.ones_like(largest))
        return momentum, root - rate * _times(root, momentum)

    def factorize(self, estimate: SINGDEstimate, damping: float) -> SINGDInverse:
        check_damping(damping)
        check_finite(input_roots=estimate.inputs, cotangent_roots=estimate.cotangents)
        return SINGDInverse(_outer(estimate.inputs), _outer(estimate.cotangents), estimate.layout)

    def solve(self, inverse: SINGDInverse, gradient: Gradient) -> dict[str, Array]:
        vector = as_vector(gradient)
        check_block(vector, inverse.layout.shapes)
        transpose = namespace(inverse.inputs).matrix_transpose
        left = _times(transpose(inverse.layout.matrix(vector)), inverse.cotangents)
        return inverse.layout.vector(_times(transpose(left), inverse.inputs))


# Both structures, told apart by their number of axes: (groups, d, d) dense, (groups, d) diagonal.


def _identity(like: Array, size: int, structure: Structure) -> Array:
    """Identities, one for each group of `like`."""
    shape = (like.shape[0], size, size) if structure == "dense" else (like.shape[0], size)
    return _plus_identity(namespace(like).zeros(shape, dtype=like.dtype, device=device(like)), 1.0)


def _plus_identity(matrix: Array, value: float) -> Array:
    return add_diagonal(matrix, value) if matrix.ndim == 3 else matrix + value


def _times(matrix: Array, factor: Array) -> Array:
    """``M F`` for F of either structure; M is dense unless it is diagonal like F."""
    if factor.ndim == 3:
        return matrix @ factor
    return matrix * (factor if matrix.ndim == 2 else factor[:, None, :])


def _inner(root: Array) -> Array:
    """``Kᵀ K``."""
    return namespace(root).matrix_transpose(root) @ root if root.ndim == 3 else root * root


def _outer(root: Array) -> Array:
    """``K Kᵀ``."""
    return root @ namespace(root).matrix_transpose(root) if root.ndim == 3 else root * root


def _mean_trace(matrix: Array) -> Array:
    """Trace over size, shape ``(groups,)``."""
    return (trace(matrix) if matrix.ndim == 3 else matrix.sum(axis=1)) / matrix.shape[-1]


def _moment(rows: Array, count: int, like: Array) -> Array:
    """Second moment of rows, shape ``(groups, rows, d)``, restricted to the structure of `like`."""
    if like.ndim == 2:
        return (rows * rows).sum(axis=1) / count
    return namespace(rows).matrix_transpose(rows) @ rows / count


def _input_moment(apart: KroneckerRows, root: Array) -> Array:
    """``Kᵀ A K`` restricted to the structure of K, without appending the 1 of a bias to the rows."""
    if root.ndim == 3:
        rows = apart.project_inputs(root)
        return _moment(rows, rows.shape[1], root)
    squares = [] if apart.layout.weight is None else [_moment(apart.inputs, apart.inputs.shape[1], root)]
    if apart.layout.bias is not None:
        squares.append(namespace(root).ones_like(root[:, :1]))
    return root * root * (squares[0] if len(squares) == 1 else namespace(root).concat(squares, axis=1))
