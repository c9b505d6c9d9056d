"""Steps on Factors and residuals: natural gradient, Gauss–Newton, SPRING."""

from __future__ import annotations

from curvlib.arrays import Array, Vector, add_diagonal, cholesky
from curvlib.errors import ConfigurationError
from curvlib.factors import Factors
from curvlib.func.residuals import Linearization
from curvlib.solvers import Dense, Solver, Woodbury
from curvlib.solvers.base import Gradient, check_block, check_damping
from curvlib.solvers.spring import proximal_solve

__all__ = ["gauss_newton", "natural_gradient", "spring"]


def natural_gradient(
    factors: Factors, gradient: Gradient, solver: Solver | None = None, damping: float = 1e-3
) -> dict[str, Array]:
    """Return ``(F + λI)⁻¹ g`` for the curvature F of `factors`, by any solver, in one call without state.

    Parameters
    ----------
    factors
        Rows J; ``F = JᵀJ / normalizer``.
    gradient
        g, a block vector, or Factors that stand for the mean of their rows.
    solver
        How F is inverted; None for `Woodbury`, exact.
    damping
        λ > 0.
    """
    chosen = Woodbury() if solver is None else solver
    return chosen.solve(chosen.factorize(chosen.update(None, factors), damping), gradient)


def gauss_newton(line: Linearization, damping: float) -> dict[str, Array]:
    """Return the exact damped Gauss–Newton step p = ``(JᵀJ / n + λI)⁻¹ Jᵀ r / n``; subtract it from the parameters.

    Parameters
    ----------
    line
        From `linearize` or `joined`.
    damping
        λ > 0: Levenberg's, in the units of the mean squared Jacobian.

    Notes
    -----
    With fewer rows than parameters it is ``Jᵀ (J Jᵀ / n + λI)⁻¹ r / n`` (push-through; "ENGD-W" for physics-informed
    networks, arXiv 2505.12149), which stays accurate where λ is tiny; otherwise the explicit normal equations.
    """
    return spring(line, damping, None, 0.0)


def spring(
    line: Linearization, damping: float, previous: Vector | None = None, momentum: float = 0.99
) -> dict[str, Array]:
    """Return a Gauss–Newton step that is drawn to the previous one; subtract it from the parameters.

    Parameters
    ----------
    line
        From `linearize` or `joined`, of the current parameters and batch.
    damping
        λ > 0.
    previous
        What the last call returned; None at first.
    momentum
        μ in [0, 1).

    Notes
    -----
    SPRING (arXiv 2401.10190): ``p_k = μ p_{k−1} + Jᵀ (J Jᵀ / n + λI)⁻¹ (r − μ J p_{k−1}) / n``, the minimiser of
    ``‖J p − r‖² / n + λ ‖p − μ p_{k−1}‖²``. What small batches say of different directions adds up over steps.
    """
    if not 0 <= momentum < 1:
        raise ConfigurationError(f"the momentum inside the solve must lie in [0, 1), got {momentum!r}")
    rows, damping = line.factors, check_damping(damping)
    if rows.size > len(rows):
        factor = cholesky(add_diagonal(rows.gram() / rows.normalizer, damping))
        return proximal_solve(rows, factor, line.values / rows.normalizer, previous, momentum)
    gradient = line.gradient
    if previous is not None:
        check_block(previous, rows.shapes)
        gradient = {name: value + damping * momentum * previous[name] for name, value in gradient.items()}
    return natural_gradient(rows, gradient, Dense(), damping)
