"""Eigenvalues and products of the curvature that solvers keep in their estimates, for looking at it."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from curvlib.arrays import Vector
from curvlib.solvers.dense import Covariance, flatten
from curvlib.solvers.diagonal import DiagonalEstimate
from curvlib.solvers.ekfac import EKFACEstimate
from curvlib.solvers.kfac import KFACEstimate
from curvlib.solvers.skfac import SKFACEstimate
from curvlib.solvers.spring import SPRINGEstimate
from curvlib.solvers.switch import SwitchEstimate
from curvlib.solvers.woodbury import WoodburyEstimate

__all__ = ["eigenvalues", "quadratic"]


@singledispatch
def eigenvalues(estimate: Any) -> Tensor | None:
    """Eigenvalues of a block's curvature as its solver has it, at least all that are not zero; None where unknown.

    Parameters
    ----------
    estimate
        From `Solver.update`. Estimates of your own: ``eigenvalues.register``.

    Returns
    -------
    Tensor or None
        Shape ``(k,)``, none negative.
    """
    return None


@singledispatch
def quadratic(estimate: Any, vector: Vector) -> float | None:
    """``vᵀFv`` with a block's curvature F as its solver has it; None where unknown.

    Parameters
    ----------
    estimate
        As for `eigenvalues`; ``quadratic.register``.
    vector
        v, a block vector.
    """
    return None


@eigenvalues.register(WoodburyEstimate)
@eigenvalues.register(SPRINGEstimate)
def _of_kernel(estimate: WoodburyEstimate | SPRINGEstimate) -> Tensor:
    # JJᵀ has the eigenvalues of JᵀJ that are not zero, and more zeros where there are more rows than parameters.
    return _symmetric(estimate.kernel)[-estimate.factors.size :]


@quadratic.register(WoodburyEstimate)
@quadratic.register(SPRINGEstimate)
def _by_rows(estimate: WoodburyEstimate | SPRINGEstimate, vector: Vector) -> float:
    return float(estimate.factors.matvec(vector).square().sum()) / estimate.factors.normalizer


@eigenvalues.register
def _of_matrix(estimate: Covariance) -> Tensor:
    return _symmetric(estimate.matrix)


@quadratic.register
def _by_matrix(estimate: Covariance, vector: Vector) -> float:
    flat = flatten(vector, estimate.shapes)
    return float(flat @ (estimate.matrix @ flat))


@eigenvalues.register
def _of_product(estimate: KFACEstimate) -> Tensor:
    return _outer(_symmetric(estimate.cotangents), _symmetric(estimate.inputs))


@quadratic.register
def _by_product(estimate: KFACEstimate, vector: Vector) -> float:
    matrix = estimate.layout.matrix(vector)
    return float((matrix * (estimate.cotangents @ matrix @ estimate.inputs)).sum())


@eigenvalues.register
def _of_moments(estimate: EKFACEstimate) -> Tensor:
    return estimate.moments.flatten()  # type: ignore[no-any-return]  # a tensor here


@quadratic.register
def _by_moments(estimate: EKFACEstimate, vector: Vector) -> float:
    rotated = estimate.cotangents.mT @ estimate.layout.matrix(vector) @ estimate.inputs
    return float((estimate.moments * rotated.square()).sum())


@eigenvalues.register
def _of_row_pairs(estimate: SKFACEstimate) -> Tensor:
    a, g = (_symmetric(rows @ rows.mT)[..., -rows.shape[-1] :] for rows in (estimate.inputs, estimate.cotangents))
    return _outer(g, a)


@quadratic.register
def _by_row_pairs(estimate: SKFACEstimate, vector: Vector) -> float:
    matrix = estimate.layout.matrix(vector)
    return float((estimate.cotangents @ matrix @ estimate.inputs.mT).square().sum())


@eigenvalues.register
def _of_diagonal(estimate: DiagonalEstimate) -> Tensor:
    return torch.cat([values.flatten() for values in estimate.diagonal.values()])


@quadratic.register
def _by_diagonal(estimate: DiagonalEstimate, vector: Vector) -> float:
    return sum(float((values * vector[name].square()).sum()) for name, values in estimate.diagonal.items())


@eigenvalues.register
def _of_present(estimate: SwitchEstimate) -> Tensor | None:
    return eigenvalues(estimate.estimate)


@quadratic.register
def _by_present(estimate: SwitchEstimate, vector: Vector) -> float | None:
    return quadratic(estimate.estimate, vector)


def _symmetric(matrix: Any) -> Tensor:
    values: Tensor = torch.linalg.eigvalsh(matrix)
    return values.clamp_min(0)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Products of the eigenvalues of Kronecker factors, groups and all."""
    return (left[:, :, None] * right[:, None, :]).flatten()
