"""Factors of any per-sample residual function, derivatives of a network included."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.func import jacfwd, jacrev, jvp, vjp, vmap

from curvlib.arrays import Array, Vector
from curvlib.errors import ConfigurationError
from curvlib.factors import Dense, Factors, cat

__all__ = ["Linearization", "Mode", "Residual", "joined", "linearize", "residual_factors"]

Residual: TypeAlias = Callable[..., Tensor]
"""``residual(params, *sample)``: residuals of one sample, a scalar or an array of any shape."""

Mode = Literal["auto", "reverse", "forward", "lazy"]


@dataclass(frozen=True, eq=False)
class Linearization:
    """Residuals r and their Jacobian J: the model ``r − J p`` of a step −p.

    Parameters
    ----------
    values
        r, shape ``(rows,)``, in the order of the factors' rows.
    factors
        J. The loss is ``‖r‖² / (2 normalizer)``, its gradient ``Jᵀ r / normalizer``, its Gauss–Newton matrix
        ``JᵀJ / normalizer``.
    """

    values: Array
    factors: Factors

    @property
    def loss(self) -> Array:
        """Half the mean squared residual, a scalar."""
        return (self.values * self.values).sum() / (2 * self.factors.normalizer)

    @property
    def gradient(self) -> dict[str, Array]:
        """Gradient of the loss, a block vector."""
        return self.factors.rmatvec(self.values / self.factors.normalizer)


def linearize(
    residual: Residual, params: Mapping[str, Tensor], *batch: Tensor, mode: Mode = "auto", chunk: int | None = None
) -> Linearization:
    """Residuals of a batch and their Jacobian with respect to `params`.

    Parameters
    ----------
    residual
        Called as ``residual(params, *sample)`` with one sample of every tensor of the batch; written in operations
        that `torch.func` can transform. It may itself contain `torch.func.grad`, `hessian` or `jvp` of a network
        (`torch.func.functional_call`): residuals of differential equations.
    params
        Name to parameter; those that are not given here are constants.
    *batch
        Tensors whose first axis is the n samples.
    mode
        "reverse" takes one backward pass a residual of a sample, "forward" one forward pass a parameter, and "auto"
        the fewer. "lazy" makes no rows before they are asked for: products with J and Jᵀ are one pass each.
    chunk
        Samples to differentiate at a time, to bound memory; None for all.

    Returns
    -------
    Linearization
        With n · m rows, sample-major, for m residuals a sample; they stand for n observations.

    Raises
    ------
    ConfigurationError
        If there are no parameters, the batch has no common size, or the residual is no floating-point tensor.

    Examples
    --------
    >>> import torch, curvlib
    >>> params = {"slope": torch.tensor(2.0)}
    >>> line = curvlib.func.linearize(lambda p, x, y: p["slope"] * x - y, params, torch.arange(3.0), torch.ones(3))
    >>> line.factors.dense().values["slope"]
    tensor([0., 1., 2.])
    """
    if mode not in get_args(Mode):
        raise ConfigurationError(f"mode must be one of {', '.join(map(repr, get_args(Mode)))}, got {mode!r}")
    fixed = {name: p.detach() for name, p in params.items()}
    samples = _samples(fixed, batch)
    one = residual(fixed, *(tensor[0] for tensor in batch))
    if not isinstance(one, Tensor) or not one.is_floating_point():
        raise ConfigurationError(
            "a residual function returns a floating-point tensor, the residuals of one sample; got "
            f"{one.dtype if isinstance(one, Tensor) else type(one).__name__}"
        )

    def flat(parameters: Mapping[str, Tensor], *sample: Tensor) -> tuple[Tensor, Tensor]:
        values = residual(parameters, *sample).reshape(-1)
        return values, values

    columns = one.numel()
    axes = (None, *(0 for _ in batch))
    if mode == "lazy":
        lazy = LazyRows(
            lambda p, *b: vmap(flat, axes, chunk_size=chunk)(p, *b)[0], fixed, batch, columns, samples=samples
        )
        return Linearization(lazy.outputs(fixed).reshape(-1), lazy)
    reverse = mode == "reverse" or (mode == "auto" and columns <= sum(p.numel() for p in fixed.values()))
    jacobian = (jacrev if reverse else jacfwd)(flat, has_aux=True)
    rows, values = vmap(jacobian, axes, chunk_size=chunk)(fixed, *batch)
    dense = {name: rows[name].detach().reshape(samples * columns, *p.shape) for name, p in fixed.items()}
    return Linearization(values.detach().reshape(-1), Dense(dense, samples=samples))


def residual_factors(
    residual: Residual, params: Mapping[str, Tensor], *batch: Tensor, mode: Mode = "auto", chunk: int | None = None
) -> Factors:
    """Return the Jacobian of the residuals of a batch as Factors: `linearize` without the values."""
    return linearize(residual, params, *batch, mode=mode, chunk=chunk).factors


def joined(parts: Sequence[Linearization], weights: Sequence[float] | None = None) -> Linearization:
    """Several groups of residuals as one, for the loss ``Σ_k weight_k loss_k``.

    Parameters
    ----------
    parts
        Groups such as an equation inside, its boundary, its data, each with samples of its own; same parameters.
    weights
        One positive number a group; None for 1 each.

    Returns
    -------
    Linearization
        All rows one after the other, scaled so that loss, gradient and Gauss–Newton matrix are the weighted sums.

    Raises
    ------
    ConfigurationError
        If groups and weights differ in number, a weight is not positive, or parameters differ.
    """
    given = [1.0] * len(parts) if weights is None else [float(weight) for weight in weights]
    if not parts or len(given) != len(parts) or not all(0 < weight < float("inf") for weight in given):
        raise ConfigurationError(f"{len(parts)} groups of residuals need as many positive weights, got {given}")
    total = sum(part.factors.normalizer for part in parts)
    scales = [(weight * total / part.factors.normalizer) ** 0.5 for part, weight in zip(parts, given, strict=True)]
    scaled = [(part.values * scale, part.factors.scaled(scale)) for part, scale in zip(parts, scales, strict=True)]
    return Linearization(torch.cat([values for values, _ in scaled]), cat([factors for _, factors in scaled]))


@dataclass(frozen=True, eq=False)
class LazyRows(Factors):
    """Rows of the Jacobian of a function of parameters, made when they are asked for.

    Parameters
    ----------
    function
        ``function(params, *batch)``: outputs of shape ``(n, columns)``.
    params
        Where it is differentiated.
    batch
        Its other arguments.
    columns
        Outputs of a sample.

    Notes
    -----
    J v is one forward-mode pass, Jᵀ w one backward pass; everything else makes rows.
    """

    function: Callable[..., Tensor]
    params: dict[str, Tensor]
    batch: tuple[Tensor, ...]
    columns: int

    def outputs(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return the outputs as a function of the parameters alone."""
        return self.function(params, *self.batch)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self.params.items()}

    def __len__(self) -> int:
        return int(self.batch[0].shape[0]) * self.columns

    @property
    def like(self) -> Tensor:
        return next(iter(self.params.values()))

    def dense(self) -> Dense:
        def row(params: Mapping[str, Tensor], *sample: Tensor) -> Tensor:
            return self.function(params, *(tensor[None] for tensor in sample))[0]

        rows: dict[str, Tensor] = vmap(jacrev(row), (None, *(0 for _ in self.batch)))(self.params, *self.batch)
        shapes = self.shapes
        return Dense({name: rows[name].reshape(len(self), *shapes[name]) for name in shapes}, samples=self.samples)

    def matvec(self, vector: Vector) -> Tensor:
        tangent = {name: vector[name] for name in self.params}
        product: Tensor = jvp(self.outputs, (self.params,), (tangent,))[1]
        return product.detach().reshape(-1)

    def rmatvec(self, weights: Array) -> dict[str, Tensor]:
        pull: Any = vjp(self.outputs, self.params)[1]
        return {name: value.detach() for name, value in pull(weights.reshape(-1, self.columns))[0].items()}

    def compact(self) -> Dense:
        return self.dense()


def _samples(params: Mapping[str, Tensor], batch: Sequence[Tensor]) -> int:
    sizes = {int(tensor.shape[0]) if tensor.ndim else 0 for tensor in batch}
    if len(sizes) != 1 or 0 in sizes:
        raise ConfigurationError(
            "a residual function needs a batch of tensors whose first axis is the samples, the same number in each; "
            f"got shapes {[tuple(tensor.shape) for tensor in batch]}"
        )
    if not params or not all(p.is_floating_point() for p in params.values()) or not any(map(_count, params.values())):
        raise ConfigurationError(
            "a residual function needs floating-point parameters to be differentiated by; got "
            f"{ {name: (tuple(p.shape), p.dtype) for name, p in params.items()} }"
        )
    return sizes.pop()


def _count(tensor: Tensor) -> int:
    return prod(tensor.shape)
