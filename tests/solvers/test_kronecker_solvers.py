"""K-FAC, EKFAC, SKFAC and diagonal solvers against their definitions in explicit matrices, over several updates."""

import numpy as np
import pytest
import torch
from blocks import BUILDS, bias_corrected, gradient_of, kronecker_pairs, linear, matrices, numbers, positions, stored

from curvlib.errors import ConfigurationError
from curvlib.factors import Dense as DenseRows
from curvlib.factors import OuterProduct
from curvlib.solvers import EKFAC, KFAC, SKFAC, Diagonal, Identity
from curvlib.solvers.kfac import KFACEigen, KFACInverse

DAMPING = 0.3
UPDATES = 4


@pytest.fixture(params=["torch", "numpy"])
def library(request):
    return torch.from_numpy if request.param == "torch" else np.asarray


def run(solver, build, library):
    estimate, seen = None, []
    for seed in range(UPDATES):
        seen.append(build(library, seed))
        estimate = stored(solver.update(estimate, seen[-1]))
    gradient = gradient_of(seen[-1], library)
    natural = solver.solve(stored(solver.factorize(estimate, DAMPING)), gradient)
    return seen, matrices(seen[-1], gradient), matrices(seen[-1], natural)


def kron_solve(A, G, M):
    """(A ⊗ G)⁻¹ vec(M) with vec stacking columns, from the explicit Kronecker product."""
    solution = np.linalg.solve(np.kron(A, G), M.reshape(-1, order="F"))
    return solution.reshape(M.shape, order="F")


def averages(seen, sharing, decay):
    """Averaged A and G of every group."""
    history = [list(kronecker_pairs(factors, sharing)) for factors in seen]
    for group in range(len(history[0])):
        yield tuple(bias_corrected([entry[group][which] for entry in history], decay) for which in (0, 1))


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("decay", [0.0, 0.8])
@pytest.mark.parametrize(
    ("damping", "form"),
    [
        *((damping, form) for damping in ("pi", "plain") for form in ("cholesky", "inverse", "eigen")),
        ("exact", "eigen"),
    ],
)
def test_kfac_is_its_textbook_definition(build, sharing, decay, damping, form, library):
    seen, gradient, natural = run(KFAC(sharing, decay, damping, form), build, library)
    for group, (A, G) in enumerate(averages(seen, sharing, decay)):
        if damping == "exact":
            full = np.kron(A, G) + DAMPING * np.eye(len(A) * len(G))
            expected = np.linalg.solve(full, gradient[group].reshape(-1, order="F")).reshape(G.shape[0], -1, order="F")
        else:
            pi = np.sqrt((np.trace(A) / len(A)) / (np.trace(G) / len(G))) if damping == "pi" else 1.0
            root = np.sqrt(DAMPING)
            expected = kron_solve(A + pi * root * np.eye(len(A)), G + root / pi * np.eye(len(G)), gradient[group])
        np.testing.assert_allclose(natural[group], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("damping", ["pi", "plain", "exact"])
def test_kfac_takes_the_eigenbasis_where_the_damping_is_no_product(damping):
    solver = KFAC(damping=damping)
    inverse = solver.factorize(solver.update(None, linear(torch.from_numpy, 0)), DAMPING)
    assert isinstance(inverse, KFACEigen if damping == "exact" else KFACInverse)


@pytest.mark.parametrize(
    ("d_in", "d_out", "form", "explicit"),
    [
        (5, 4, "auto", (True, True)),
        (40, 2, "auto", (True, True)),
        (300, 2, "auto", (False, True)),
        (2, 300, "auto", (True, False)),
        (40, 2, "inverse", (True, True)),
        (5, 4, "cholesky", (False, False)),
    ],
)
def test_kfac_inverts_explicitly_what_is_used_by_many_right_hand_sides(d_in, d_out, form, explicit, library):
    factors = OuterProduct(library(numbers(6, d_in)), library(numbers(6, d_out)))
    solver = KFAC(form=form)
    estimate = solver.update(None, factors)
    inverse = stored(solver.factorize(estimate, DAMPING))
    assert tuple(inverse.explicit) == explicit
    expected = KFAC(form="eigen").factorize(estimate, DAMPING)
    for gradient in (gradient_of(factors, library), factors):
        for name, value in KFAC().solve(expected, gradient).items():
            np.testing.assert_allclose(solver.solve(inverse, gradient)[name], value, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("basis_every", [1, 3])
def test_ekfac_rescales_in_the_eigenbasis(build, sharing, basis_every, library):
    decay = 0.8
    seen, gradient, natural = run(EKFAC(sharing, decay, basis_every), build, library)
    basis_at = (UPDATES - 1) // basis_every * basis_every
    since = seen[basis_at:]
    for group, (A, G) in enumerate(averages(seen[: basis_at + 1], sharing, decay)):
        Q_A, Q_G = np.linalg.eigh(A)[1], np.linalg.eigh(G)[1]
        history = []
        for factors in since:
            a, g = positions(factors)
            rows = np.einsum("ncro,ncri->ncoi", g[:, :, :, group], a[:, :, :, group])
            rotated = np.einsum("po,ncpq,qi->ncoi", Q_G, rows, Q_A)
            history.append((rotated**2).sum((0, 1)) / factors.normalizer)
        moments = bias_corrected(history, decay)
        expected = Q_G @ ((Q_G.T @ gradient[group] @ Q_A) / (moments + DAMPING)) @ Q_A.T
        np.testing.assert_allclose(natural[group], expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("basis_every", [1, 2])
def test_ekfac_follows_the_eigenbasis_by_orthogonal_iteration(build, basis_every, library):
    decay = 0.8
    seen, gradient, natural = run(EKFAC("expand", decay, basis_every, "qr"), build, library)
    changes = range(0, UPDATES, basis_every)
    for group in range(len(gradient)):
        bases: list = [None, None]
        for at in changes:
            pair = list(averages(seen[: at + 1], "expand", decay))[group]
            for side, matrix in enumerate(pair):
                if at == 0:
                    bases[side] = np.linalg.eigh(matrix)[1]
                    continue
                Q = bases[side]
                Q = Q[:, np.argsort(-np.diag(Q.T @ matrix @ Q), kind="stable")]
                bases[side] = np.linalg.qr(matrix @ Q)[0]
        Q_A, Q_G = bases
        history = []
        for factors in seen[changes[-1] :]:
            a, g = positions(factors)
            rows = np.einsum("ncro,ncri->ncoi", g[:, :, :, group], a[:, :, :, group])
            history.append((np.einsum("po,ncpq,qi->ncoi", Q_G, rows, Q_A) ** 2).sum((0, 1)) / factors.normalizer)
        moments = bias_corrected(history, decay)
        expected = Q_G @ ((Q_G.T @ gradient[group] @ Q_A) / (moments + DAMPING)) @ Q_A.T
        np.testing.assert_allclose(natural[group], expected, rtol=1e-8, atol=1e-9)


def test_following_an_eigenbasis_that_stays_leaves_it_where_it_is():
    factors = linear(torch.from_numpy, 0)
    solver = EKFAC(decay=0.0, basis="qr")
    first = solver.update(None, factors)
    second = solver.update(first, factors)
    for matrix, basis in ((second.factors.inputs, second.inputs), (second.factors.cotangents, second.cotangents)):
        rotated = basis.mT @ matrix @ basis
        torch.testing.assert_close(rotated, torch.diag_embed(rotated.diagonal(dim1=1, dim2=2)), atol=1e-10, rtol=0)


def test_ekfac_is_nearest_among_diagonals_in_its_basis():
    factors = linear(torch.from_numpy, 0)
    rows = np.concatenate([np.asarray(v).reshape(len(factors), -1) for v in factors.dense().values.values()], axis=1)
    truth = rows.T @ rows / 6
    A, G = next(kronecker_pairs(factors, "expand"))
    Q_A, Q_G = np.linalg.eigh(A)[1], np.linalg.eigh(G)[1]
    estimate = EKFAC().update(None, factors)
    distance = {}
    layout = estimate.layout
    basis = np.stack(
        [
            np.concatenate(
                [
                    np.asarray(part).reshape(-1)
                    for part in layout.vector(torch.from_numpy(np.outer(q, p))[None]).values()
                ]
            )
            for q in Q_G.T
            for p in Q_A.T
        ],
        axis=1,
    )
    for name, moments in {
        "ekfac": np.asarray(estimate.moments[0]),
        "kfac": np.outer(*(np.linalg.eigh(m)[0] for m in (G, A))),
    }.items():
        distance[name] = np.linalg.norm(truth - basis @ np.diag(moments.reshape(-1)) @ basis.T)
    assert distance["ekfac"] < distance["kfac"]
    best = np.diag(basis.T @ truth @ basis)
    np.testing.assert_allclose(np.sort(np.asarray(estimate.moments[0]).reshape(-1)), np.sort(best), atol=1e-10)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("balanced", [True, False])
def test_skfac_is_kfac_of_the_current_batch(build, sharing, balanced, library):
    _, _, natural = run(SKFAC(sharing, balanced), build, library)
    _, _, expected = run(KFAC(sharing, decay=0.0, damping="pi" if balanced else "plain"), build, library)
    np.testing.assert_allclose(natural, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_diagonal_divides_by_averaged_squares(build, power, library):
    decay = 0.8
    seen, gradient, natural = run(Diagonal(decay, power), build, library)
    history = []
    for factors in seen:
        squares = {name: (np.asarray(v) ** 2).sum(0) / factors.normalizer for name, v in factors.dense().values.items()}
        history.append(matrices(factors, squares))
    expected = gradient / (bias_corrected(history, decay) + DAMPING) ** power
    np.testing.assert_allclose(natural, expected, rtol=1e-10)


@pytest.mark.parametrize("build", BUILDS)
def test_identity_passes_the_gradient_through(build, library):
    _, gradient, natural = run(Identity(), build, library)
    np.testing.assert_array_equal(natural, gradient)


def test_kfac_is_exact_for_one_sample_with_one_column():
    factors = OuterProduct(torch.from_numpy(numbers(1, 5)), torch.from_numpy(numbers(1, 1, 4)), bias="bias")
    pair = factors.kronecker()
    layout = factors.kronecker_rows().layout
    row = layout.matrix({name: value[0] for name, value in factors.dense().values.items()})[0]
    torch.testing.assert_close(
        torch.kron(pair.inputs[0], pair.cotangents[0]), torch.outer(row.T.reshape(-1), row.T.reshape(-1))
    )


@pytest.mark.parametrize("solver", [KFAC(), EKFAC(), SKFAC(), KFAC(damping="exact")], ids=str)
def test_zero_curvature_is_no_division_by_zero(solver):
    factors = linear(torch.from_numpy, 0).scaled(0.0)
    gradient = gradient_of(factors, torch.from_numpy)
    natural = solver.solve(solver.factorize(solver.update(None, factors), 0.25), gradient)
    assert all(torch.isfinite(value).all() for value in natural.values())


@pytest.mark.parametrize("solver", [KFAC(), EKFAC(), SKFAC()], ids=str)
def test_rows_without_a_kronecker_form_are_refused_with_what_to_use(solver):
    with pytest.raises(ConfigurationError, match="use Woodbury, Dense or Diagonal"):
        solver.update(None, DenseRows(weight=torch.ones(3, 2, 2)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KFAC("average"), "'expand', 'reduce'"),
        (lambda: KFAC(decay=1.0), r"\[0, 1\), got 1.0"),
        (lambda: KFAC(damping="tikhonov"), "'pi', 'plain', 'exact'"),
        (lambda: KFAC(form="qr"), "'auto', 'cholesky', 'inverse', 'eigen'"),
        (lambda: KFAC(damping="exact", form="cholesky"), "no Cholesky form .* use form='eigen'"),
        (lambda: KFAC(damping="exact", form="inverse"), "no Cholesky form .* use form='eigen'"),
        (lambda: EKFAC(basis="svd"), "'eigh', 'qr'"),
        (lambda: EKFAC("both"), "'expand', 'reduce'"),
        (lambda: SKFAC("both"), "'expand', 'reduce'"),
        (lambda: EKFAC(decay=-0.1), r"\[0, 1\)"),
        (lambda: EKFAC(basis_every=0), "at least 1"),
        (lambda: Diagonal(decay=2.0), r"\[0, 1\)"),
    ],
)
def test_bad_hyperparameters_are_refused(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()
