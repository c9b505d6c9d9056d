"""Second moments of rows in a Kronecker eigenbasis, with temporaries that stay in the cache."""

from __future__ import annotations

from curvlib.arrays import Array, aligned_product, namespace, sum_of_squares
from curvlib.factors import cost

__all__ = ["rotated_product_squares", "rotated_row_squares"]


def rotated_row_squares(rows: Array, inputs: Array | None, cotangents: Array | None) -> Array:
    """``Σ_i (Q_Gᵀ W_i Q_A)²`` for explicit rows W, shape ``(groups, d_out, d)``.

    Parameters
    ----------
    rows
        Shape ``(rows, groups, d_out, d)``. Where neither basis is given, they are overwritten.
    inputs, cotangents
        Q_A, shape ``(groups, d, d)``, and Q_G, shape ``(groups, d_out, d_out)``; None for what the rows have had.
    """
    if cotangents is not None:
        rows = namespace(rows).matrix_transpose(cotangents) @ rows
    if inputs is None:
        return sum_of_squares(rows)
    if inputs.shape[0] > 1:
        return sum_of_squares(rows @ inputs)
    # One large product where the basis is the same for all.
    rotated = aligned_product(rows.reshape(-1, rows.shape[3]), inputs[0])
    return sum_of_squares(rotated.reshape(rows.shape))


def rotated_product_squares(cotangents: Array, inputs: Array, basis: Array | None) -> Array:
    """``Σ_i (Q_Gᵀ G_iᵀ A_i)²`` for inputs that are rotated already, shape ``(groups, d_out, d)``.

    Parameters
    ----------
    cotangents
        Gᵀ, shape ``(n, columns, groups, d_out, positions)``.
    inputs
        A, shape ``(n, groups, positions, d)``, the rows `W_i Q_A` being products of both.
    basis
        Q_G, shape ``(groups, d_out, d_out)``; None for cotangents that are rotated too.
    """
    xp = namespace(inputs)
    n, columns, groups, d_out, positions = cotangents.shape
    flat = xp.permute_dims(cotangents, (0, 2, 1, 3, 4)).reshape(n, groups, columns * d_out, positions)
    step = cost.rotated_chunk(columns * groups * d_out * inputs.shape[3], n)
    total: Array = 0
    for start in range(0, n, step):
        rows = flat[start : start + step] @ inputs[start : start + step]
        if basis is not None:
            apart = rows.reshape(*rows.shape[:2], columns, d_out, -1)
            rows = (xp.matrix_transpose(basis)[:, None] @ apart).reshape(rows.shape)
        total = total + sum_of_squares(rows)
    return total.reshape(groups, columns, d_out, -1).sum(axis=1)
