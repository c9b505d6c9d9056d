"""The solver seam: three verbs on explicit state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from curvlib.arrays import Array, Product, Vector, add_multiples, require_finite
from curvlib.errors import ConfigurationError
from curvlib.factors import Factors
from curvlib.hyperparameters import Checked

__all__ = ["Evaluation", "Gradient", "Solver"]

Gradient = Vector | Factors
"""A block's gradient: explicit, or as fresh Factors J that stand for ``Jᵀ1 / normalizer``."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One evaluation of a block on a batch.

    Parameters
    ----------
    parameters
        Values of the block's parameters at the time, a block vector.
    factors
        The rows that this evaluation gave.
    """

    parameters: Vector
    factors: Factors


class Solver(Checked, ABC):
    """Turns the Factors of one block into products with its damped inverse curvature.

    A solver is an immutable object of hyperparameters. What it learns lives in two states that the caller keeps apart:
    the *estimate* (what was seen of the curvature) and the *inverse* (what was factorised from it, possibly stale).
    """

    of_gradient: ClassVar[bool] = False
    """Whether the statistics are those of the loss's mean gradient, so that Factors must come from `Empirical`."""

    of_fresh_rows: ClassVar[bool] = False
    """Whether the gradient must be a combination of the same rows, so that they are taken anew at every step."""

    of_second_pass: ClassVar[bool] = False
    """Whether `follow` compares a step's batch before and after the step, so that steps need a closure."""

    of_preactivations: ClassVar[bool] = False
    """Whether `follow` reads pre-activations off rows: a trained weight times inputs, no table, no lone bias."""

    holds_rows: ClassVar[bool] = True
    """Whether states may hold arrays of the rows that `update` was given.

    Such rows get memory of their own where states outlast a step: the next batch may be written over this one.
    """

    @property
    def of_kronecker_rows(self) -> bool:
        """Whether rows must have a Kronecker form (`Factors.kronecker_rows`)."""
        return False

    @property
    def exact(self) -> bool:
        """Whether `solve` applies the inverse of the damped block itself, up to rounding."""
        return True

    @abstractmethod
    def update(self, estimate: Any, factors: Factors) -> Any:
        """Take in new curvature.

        Parameters
        ----------
        estimate
            What an earlier call returned; None at first.
        factors
            Rows of the block; their curvature is ``JᵀJ / normalizer``.
        """

    def update_all(self, estimates: Sequence[Any], factors: Sequence[Factors]) -> list[Any]:
        """Do `update` for several blocks at once; a method that decomposes there may do so side by side.

        Parameters
        ----------
        estimates, factors
            One for each block.
        """
        return [self.update(estimate, rows) for estimate, rows in zip(estimates, factors, strict=True)]

    @abstractmethod
    def factorize(self, estimate: Any, damping: float) -> Any:
        """Prepare solves with ``curvature + damping · identity``: the costly part.

        Parameters
        ----------
        estimate
            From `update`.
        damping
            λ > 0, in the units of the curvature.

        Raises
        ------
        ConfigurationError
            If the damping is not a positive number.
        NotPositiveDefiniteError
            If the damped curvature is not positive definite in its precision.
        """

    def factorize_all(self, estimates: Sequence[Any], dampings: Sequence[float]) -> list[Any]:
        """Do `factorize` for several blocks at once; a method whose blocks have equal sizes may batch them.

        Parameters
        ----------
        estimates, dampings
            One for each block.

        Raises
        ------
        ConfigurationError, NotPositiveDefiniteError
            As `factorize`, for any of the blocks.
        """
        return [self.factorize(estimate, damping) for estimate, damping in zip(estimates, dampings, strict=True)]

    @abstractmethod
    def solve(self, inverse: Any, gradient: Gradient) -> dict[str, Array]:
        """Return the natural gradient ``(curvature + damping · identity)⁻¹ gradient`` as a block vector.

        Parameters
        ----------
        inverse
            From `factorize`.
        gradient
            A block vector, or fresh Factors that stand for one.
        """

    def solve_all(self, inverses: Sequence[Any], gradients: Sequence[Gradient]) -> list[dict[str, Array]]:
        """Do `solve` for several blocks at once, as `factorize_all` does."""
        return [self.solve(inverse, gradient) for inverse, gradient in zip(inverses, gradients, strict=True)]

    def solve_lazily(self, inverses: Sequence[Any], gradients: Sequence[Gradient]) -> list[dict[str, Array | Product]]:
        """Do `solve_all`, but leave to later what is a product of two matrices.

        What comes next, such as momentum, adds it to something while it is made. Only methods that end with such a
        product override this.
        """
        return self.solve_all(inverses, gradients)

    def _inherits(self, owner: type, *names: str) -> bool:
        """Whether these methods are those of a class, so that another of its methods may stand for them."""
        kind = type(self)
        return kind is owner or all(getattr(kind, name) is getattr(owner, name) for name in names)

    @property
    def keeps_rows(self) -> bool:
        """Whether `update` begins with `Factors.compact`, so that rows may be brought to that form beforehand."""
        return False

    def gains_from_rows(self, factors: Factors, same: bool, together: bool = False) -> bool:
        """Whether `solve` is cheaper when the gradient comes as fresh rows instead of explicitly.

        Parameters
        ----------
        factors
            Rows of the kind and sizes that are to be expected.
        same
            Whether the gradient's rows will be the very rows that the inverse was made of.
        together
            Whether they will be of the same passes as those, with the same inputs.
        """
        return False

    def remember(self, estimate: Any, natural: Vector) -> Any:
        """Return the estimate after a step that used `natural`; methods with momentum inside the solve override this.

        Parameters
        ----------
        estimate
            From `update`.
        natural
            What `solve` returned.
        """
        return estimate

    def follow(self, estimate: Any, inverse: Any, before: Evaluation, after: Evaluation) -> Any:
        """Return the estimate after a step, from the same batch evaluated before and after it.

        Called after `remember`, at the steps that took new curvature, of solvers with `of_second_pass`.

        Parameters
        ----------
        estimate, inverse
            From `update` and `factorize`, as the step used them.
        before, after
            The block at both ends of the step.
        """
        return estimate


def check_damping(damping: float) -> float:
    """Return the damping if it is a positive finite number.

    Raises
    ------
    ConfigurationError
        Otherwise.
    """
    value = float(damping)
    if not 0 < value < float("inf"):
        raise ConfigurationError(f"damping must be a positive finite number, got {damping}")
    return value


def as_vector(gradient: Gradient) -> Vector:
    """Return the gradient as an explicit block vector."""
    if isinstance(gradient, Factors):
        return gradient.rmatvec(gradient.row_weights(1 / gradient.normalizer))
    return gradient


def corrected(vectors: Sequence[Vector], corrections: Sequence[Vector], damping: float) -> list[dict[str, Array]]:
    """``v / λ + c``: what the identity of Woodbury leaves of the gradient v of each of several blocks.

    Parameters
    ----------
    vectors
        v of each, block vectors.
    corrections
        c of each, Jᵀ w of weights that the factor −1 / λ is in already; they give their memory to the result.
    damping
        λ.
    """
    arrays = [array for correction in corrections for array in correction.values()]
    others = [vector[name] for vector, correction in zip(vectors, corrections, strict=True) for name in correction]
    made = iter(add_multiples(arrays, others, 1 / damping))
    return [{name: next(made) for name in correction} for correction in corrections]


def sample_space_pays(factors: Factors) -> bool:
    """Whether products of a gradient's rows with other rows, n × n, are cheaper than products with the gradient."""
    sizes = factors.outer_sizes
    if sizes is None:
        return False
    rows, d_in, d_out = sizes
    return rows * (d_in + d_out) < d_in * d_out


def together_pays(gradient: Factors, rows: Factors) -> bool:
    """Whether rows of one pass are cheaper to combine with each other than with the gradient written out.

    They have the inputs' Gram in common, and one product with the inputs makes the sum of both.
    """
    return rows_of_one_pass_pay(gradient) and rows.same_inputs(gradient)


def rows_of_one_pass_pay(factors: Factors) -> bool:
    """Whether ``n² d_out + n d_in d_out`` is less than the three products with inputs of an explicit gradient."""
    sizes = factors.outer_sizes
    return sizes is not None and sizes[0] < 2 * sizes[1]


def check_block(vector: Vector, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a gradient that does not belong to the block.

    Raises
    ------
    ConfigurationError
        With the names and shapes of both.
    """
    given = {name: tuple(array.shape) for name, array in vector.items()}
    expected = {name: tuple(shape) for name, shape in shapes.items()}
    # One by one: a compiler that has met several sizes cannot compare mappings of shapes.
    if given.keys() != expected.keys() or any(given[name] != shape for name, shape in expected.items()):
        raise ConfigurationError(f"the gradient has parameters {given}, the curvature {expected}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a word that is none of the choices.

    Raises
    ------
    ConfigurationError
        With the choices.
    """
    if value not in choices:
        raise ConfigurationError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_gradient_rows(factors: Factors) -> None:
    """Refuse Factors whose rows cannot stand for the loss's mean gradient, because a sample has several.

    Raises
    ------
    ConfigurationError
        With both numbers.
    """
    if len(factors) > factors.normalizer:
        raise ConfigurationError(
            "this solver takes statistics of the mean gradient that the rows stand for, so a sample has one row, the "
            f"gradient of its loss; got {len(factors)} rows for {factors.normalizer} observations: use "
            "fisher=Empirical()"
        )


def check_finite(**arrays: Array) -> None:
    """Refuse curvature that is not finite, where no factorisation would notice.

    Raises
    ------
    NotPositiveDefiniteError
        Naming the array.
    """
    for name, array in arrays.items():
        require_finite(name.replace("_", " "), array)
