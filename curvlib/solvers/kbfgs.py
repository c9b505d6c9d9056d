"""Kronecker factors whose inverses follow BFGS updates: one by its action, one by a step's change of the batch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from curvlib.arrays import Array, add_diagonal, cholesky, cholesky_solve, is_finite, namespace, product, record
from curvlib.errors import ConfigurationError
from curvlib.factors import Factors, KroneckerLayout, OneHotOuter
from curvlib.solvers.average import averaged, check_decay
from curvlib.solvers.base import (
    Evaluation,
    Gradient,
    Solver,
    as_vector,
    check_block,
    check_choice,
    check_damping,
    check_finite,
)
from curvlib.solvers.eva import mean_vectors

__all__ = ["KBFGS", "KBFGSEstimate", "KBFGSInverse"]

PairDamping = Literal["powell", "levenberg-marquardt"]


@record
@dataclass(frozen=True, eq=False)
class KBFGSEstimate:
    """Estimate: what the inverse factors have learnt so far.

    Parameters
    ----------
    moments
        Average of A, shape ``(groups, d, d)``.
    mean_inputs, mean_cotangents
        ā and ḡ of the newest batch, shapes ``(groups, d)`` and ``(groups, d_out)``.
    inputs
        A⁻¹ as BFGS has it, shape ``(groups, d, d)``; None before the first step.
    cotangents
        G⁻¹, shape ``(groups, d_out, d_out)``.
    steps, changes
        Averages of s and y, shape ``(groups, d_out)``.
    layout, count, pairs
        How matrices relate to parameters; how many batches A and how many pairs s and y are averages of.
    """

    moments: Array
    mean_inputs: Array
    mean_cotangents: Array
    inputs: Array | None
    cotangents: Array
    steps: Array
    changes: Array
    layout: KroneckerLayout
    count: int
    pairs: int


@record
@dataclass(frozen=True, eq=False)
class KBFGSInverse:
    """Inverse: A⁻¹ and G⁻¹ of the estimate, and λ."""

    inputs: Array
    cotangents: Array
    layout: KroneckerLayout
    damping: float


@dataclass(frozen=True)
class KBFGS(Solver):
    """K-BFGS (Goldfarb, Ren, Bahamou 2020, arXiv 2006.08877): Kronecker factors of the Hessian, inverted by BFGS.

    A quasi-Newton method: the block's Hessian is taken as A ⊗ G with A the moments of the inputs and G the Hessian in
    the pre-activations, of which it sees the action along the steps that are made. It evaluates the batch again after
    each step that takes new curvature, so ``optimizer.step`` needs a closure, and it is of the loss's own gradient
    (`Empirical`).

    Parameters
    ----------
    decay
        Weight of the past in the average of A, bias-corrected.
    pair_decay
        Weight of the past in the averages of s and y.
    powell
        μ₁ in (0, 1): least sᵀy relative to yᵀG⁻¹y.
    damping
        What keeps G⁻¹ from growing, after Powell's damping: "powell", the authors' first form, needs λ < 1;
        "levenberg-marquardt", their later one (arXiv 2102.06737), takes any λ.

    Notes
    -----
    With ā and h̄ = W ā + b the batch means of inputs and pre-activations, ḡ that of their cotangents, M = [W, b]:

        p = G⁻¹ M A⁻¹,    A⁻¹ = (A + √λ I)⁻¹ and G⁻¹ = I at first.

    After the step, ``X ← BFGS(X; s, y) = (I − ρ s yᵀ) X (I − ρ y sᵀ) + ρ s sᵀ`` with ρ = 1 / sᵀy is applied

    - to A⁻¹ with s = A⁻¹ ā and y = (A + √λ I) s (Hessian action);
    - to G⁻¹ with s and y the averages of the changes of h̄ and ḡ over the step, doubly damped: where
      sᵀy < μ₁ yᵀG⁻¹y, s ← θ s + (1 − θ) G⁻¹y with θ = (1 − μ₁) yᵀG⁻¹y / (yᵀG⁻¹y − sᵀy); then "powell": where
      sᵀy < √λ sᵀs, y ← θ y + (1 − θ) s with θ = (1 − √λ) sᵀs / (sᵀs − sᵀy); "levenberg-marquardt": y ← y + √λ s.

    Where weights are shared over positions, ā and h̄ are means over them and ḡ is the sum, so that A ⊗ G has the
    gradient's scale. The later paper has the sum for A and the mean for G, of the same product; with P positions its
    λ is split into √(λP) and √(λ/P). Grouped convolutions have factors of their own in each group. The authors begin
    A with a pass over all data, and average gradients before the solve; here A begins with the first batch, and
    momentum is a transform. Steps without a usable pair (no change, or one that is not finite) leave G⁻¹ as it is.
    """

    exact: ClassVar[bool] = False
    holds_rows: ClassVar[bool] = False
    of_gradient: ClassVar[bool] = True
    of_second_pass: ClassVar[bool] = True
    of_kronecker_rows: ClassVar[bool] = True
    of_preactivations: ClassVar[bool] = True
    decay: float = 0.9
    pair_decay: float = 0.9
    powell: float = 0.2
    damping: PairDamping = "powell"

    def __post_init__(self) -> None:
        check_decay(self.decay)
        check_decay(self.pair_decay)
        check_choice("damping", self.damping, get_args(PairDamping))
        if not 0 < self.powell < 1:
            raise ConfigurationError(f"powell, a bound on sᵀy / yᵀG⁻¹y, must lie in (0, 1), got {self.powell!r}")

    def update(self, estimate: KBFGSEstimate | None, factors: Factors) -> KBFGSEstimate:
        mean, cotangents, layout = _means(factors)
        moments = factors.kronecker().inputs
        if estimate is None:
            xp = namespace(cotangents)
            zeros = xp.zeros_like(cotangents)
            identity = add_diagonal(xp.zeros_like(zeros[:, :, None] * zeros[:, None, :]), 1.0)
            return KBFGSEstimate(moments, mean, cotangents, None, identity, zeros, zeros, layout, 1, 0)
        return dataclasses.replace(
            estimate,
            moments=averaged(estimate.moments, estimate.count, moments, self.decay),
            mean_inputs=mean,
            mean_cotangents=cotangents,
            count=estimate.count + 1,
        )

    def factorize(self, estimate: KBFGSEstimate, damping: float) -> KBFGSInverse:
        damping = check_damping(damping)
        if self.damping == "powell" and damping >= 1:
            raise ConfigurationError(
                f"K-BFGS with Powell's damping of both kinds needs a damping below 1, got {damping}: use "
                "KBFGS(damping='levenberg-marquardt')"
            )
        check_finite(
            input_moments=estimate.moments,
            mean_cotangents=estimate.mean_cotangents,
            inverse_cotangents=estimate.cotangents,
        )
        inputs = estimate.inputs
        if inputs is None:
            damped = add_diagonal(estimate.moments, math.sqrt(damping))
            inputs = cholesky_solve(cholesky(damped), add_diagonal(namespace(damped).zeros_like(damped), 1.0))
        check_finite(inverse_inputs=inputs)
        return KBFGSInverse(inputs, estimate.cotangents, estimate.layout, damping)

    def solve(self, inverse: KBFGSInverse, gradient: Gradient) -> dict[str, Array]:
        vector = as_vector(gradient)
        check_block(vector, inverse.layout.shapes)
        half = product(inverse.cotangents, inverse.layout.matrix(vector))
        return inverse.layout.vector(product(half, inverse.inputs))

    def follow(
        self, estimate: KBFGSEstimate, inverse: KBFGSInverse, before: Evaluation, after: Evaluation
    ) -> KBFGSEstimate:
        inputs = inverse.inputs if estimate.inputs is None else estimate.inputs
        root = math.sqrt(inverse.damping)
        s = _times(inputs, estimate.mean_inputs)
        inputs = _bfgs(inputs, s, _times(estimate.moments, s) + root * s)
        moved, changed = (new - old for old, new in zip(_state(before), _state(after), strict=True))
        if not (is_finite(moved) and is_finite(changed)):
            return dataclasses.replace(estimate, inputs=inputs)
        steps = averaged(estimate.steps, estimate.pairs, moved, self.pair_decay)
        changes = averaged(estimate.changes, estimate.pairs, changed, self.pair_decay)
        cotangents = _bfgs(estimate.cotangents, *self._damped(estimate.cotangents, steps, changes, root))
        return dataclasses.replace(
            estimate, inputs=inputs, cotangents=cotangents, steps=steps, changes=changes, pairs=estimate.pairs + 1
        )

    def _damped(self, inverse: Array, s: Array, y: Array, root: float) -> tuple[Array, Array]:
        """Return the pair with sᵀy ≥ μ₁ yᵀ G⁻¹ y, and then at least √λ sᵀs."""
        Hy = _times(inverse, y)
        s = _mixed(s, Hy, _dot(s, y), _dot(y, Hy), self.powell)
        if self.damping == "levenberg-marquardt":
            return s, y + root * s
        return s, _mixed(y, s, _dot(s, y), _dot(s, s), root)


def _means(factors: Factors) -> tuple[Array, Array, KroneckerLayout]:
    if isinstance(factors, OneHotOuter):
        raise ConfigurationError(
            f"parameters {list(factors.shapes)} are a table that is looked up in, without the pre-activations "
            "that K-BFGS follows: use Woodbury, Diagonal or KFAC for this block"
        )
    means = mean_vectors(factors)
    if means[2].weight is None:
        raise ConfigurationError(
            f"K-BFGS follows pre-activations, which a block with the parameters {list(factors.shapes)} alone does not "
            "determine because its weight is frozen: use Woodbury, Dense or Diagonal for this block"
        )
    return means


def _state(evaluation: Evaluation) -> tuple[Array, Array]:
    """Mean pre-activation (up to a frozen bias) and mean cotangent, each of shape ``(groups, d_out)``."""
    inputs, cotangents, layout = _means(evaluation.factors)
    return _times(layout.matrix(evaluation.parameters), inputs), cotangents


def _times(matrix: Array, vector: Array) -> Array:
    return (matrix @ vector[:, :, None])[:, :, 0]


def _dot(a: Array, b: Array) -> Array:
    return (a * b).sum(axis=1)[:, None]


def _mixed(vector: Array, other: Array, curvature: Array, size: Array, bound: float) -> Array:
    """θ v + (1 − θ) o, which raises the curvature of a pair to the bound times `size` where it is below that."""
    xp = namespace(vector)
    low = curvature < bound * size
    theta = (1 - bound) * size / xp.where(low, size - curvature, xp.ones_like(size))
    return xp.where(low, theta * vector + (1 - theta) * other, vector)


def _bfgs(inverse: Array, s: Array, y: Array) -> Array:
    """``(I − ρ s yᵀ) X (I − ρ y sᵀ) + ρ s sᵀ`` with ρ = 1 / sᵀy; X where sᵀy is not positive."""
    xp = namespace(inverse)
    curvature, Hy = _dot(s, y), _times(inverse, y)
    usable = curvature > xp.finfo(curvature.dtype).smallest_normal
    rho = xp.where(usable, 1 / xp.where(usable, curvature, xp.ones_like(curvature)), xp.zeros_like(curvature))
    scaled = rho * s
    weight = (1 + rho * _dot(y, Hy))[:, :, None]
    cross = scaled[:, :, None] * Hy[:, None, :]
    return inverse + weight * scaled[:, :, None] * s[:, None, :] - cross - xp.matrix_transpose(cross)
