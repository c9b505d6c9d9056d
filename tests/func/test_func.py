"""Factors of residual functions against autograd one residual at a time; steps against matrices."""

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, hessian

from curvlib.arrays import pack
from curvlib.errors import ConfigurationError, CurvatureError
from curvlib.func import (
    gauss_newton,
    joined,
    linearize,
    natural_gradient,
    residual_factors,
    spring,
)
from curvlib.solvers import Diagonal, Woodbury

N, DAMPING = 5, 0.2


def numbers(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng([seed, *shape]).standard_normal(shape))


def params():
    return {"w": numbers(3, 2), "b": numbers(3), "scale": numbers(1)[0]}


def field(p, x):
    return p["scale"] * torch.tanh(p["w"] @ x + p["b"])


def values(p, x, y):
    return field(p, x) - y


def scalar(p, x, y):
    return (field(p, x) * y).sum()


def curved(p, x, y):
    """Laplacian of every output by the input: a residual with derivatives of the network."""
    return torch.einsum("oii->o", hessian(field, argnums=1)(p, x)) - y


def slope(p, x, y):
    return grad(lambda z: field(p, z).sum())(x)[0] - y.sum()


RESIDUALS = [values, scalar, curved, slope]


def batch(seed=0):
    return numbers(N, 2, seed=seed), numbers(N, 3, seed=seed)


def by_hand(residual, p, *batch):
    """r and J, one sample and one residual at a time."""
    leaves = {name: value.clone().requires_grad_() for name, value in p.items()}
    r, J = [], []
    for sample in zip(*batch, strict=True):
        for one in residual(leaves, *sample).reshape(-1):
            rows = torch.autograd.grad(one, list(leaves.values()), retain_graph=True, materialize_grads=True)
            J.append(torch.cat([row.reshape(-1) for row in rows]))
            r.append(one.detach())
    return torch.stack(r), torch.stack(J)


def flat(vector):
    return torch.cat([value.reshape(-1) for value in vector.values()])


def close(given, expected, tolerance=1e-10):
    torch.testing.assert_close(given, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("mode", ["auto", "reverse", "forward", "lazy"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_rows_are_derivatives_of_single_residuals(residual, mode, chunk):
    p, samples = params(), batch()
    line = linearize(residual, p, *samples, mode=mode, chunk=chunk)
    r, J = by_hand(residual, p, *samples)
    rows = line.factors
    close(line.values, r)
    close(rows.dense().matrix(), J)
    assert (len(rows), rows.size, rows.normalizer) == (len(r), 10, N)
    assert rows.shapes == {"w": (3, 2), "b": (3,), "scale": ()}
    v = {name: numbers(*shape, seed=4) for name, shape in rows.shapes.items()}
    close(rows.matvec(v), J @ flat(v))
    close(flat(rows.rmatvec(numbers(len(r), seed=5))), J.T @ numbers(len(r), seed=5))
    close(rows.gram(), J @ J.T)
    close(rows.row_weights(0.5), torch.full((len(r),), 0.5, dtype=torch.float64))
    close(rows.compact().rows(torch.tensor([1, 0])).matrix(), J[[1, 0]])
    close(line.loss, r.square().sum() / (2 * N))
    close(flat(line.gradient), J.T @ r / N)
    assert not rows.dense().matrix().requires_grad


def test_the_mode_with_fewer_passes_is_taken(monkeypatch):
    from curvlib.func import residuals

    taken = []
    for name in ("jacrev", "jacfwd"):
        original = getattr(residuals, name)
        monkeypatch.setattr(residuals, name, lambda *a, _o=original, _n=name, **k: taken.append(_n) or _o(*a, **k))
    many = {"scale": torch.tensor(2.0)}
    residual_factors(lambda p, x: p["scale"] * x, many, torch.ones(4, 3))
    residual_factors(values, params(), *batch())
    assert taken == ["jacfwd", "jacrev"]


def test_groups_of_residuals_add_up_with_their_weights():
    p = params()
    inside, edge = linearize(curved, p, *batch()), linearize(scalar, p, numbers(3, 2, seed=8), numbers(3, 3, seed=8))
    total = joined([inside, edge], [2.0, 0.5])
    close(total.loss, 2 * inside.loss + 0.5 * edge.loss)
    close(flat(total.gradient), 2 * flat(inside.gradient) + 0.5 * flat(edge.gradient))
    F = 2 * inside.factors.covariance() / N + 0.5 * edge.factors.covariance() / 3
    close(total.factors.covariance() / total.factors.normalizer, F)
    close(joined([inside, edge]).loss, inside.loss + edge.loss)


@pytest.mark.parametrize("few", [True, False])
def test_steps_are_damped_least_squares(few):
    p, previous = params(), None
    for seed in range(3):
        samples = [tensor[:2] for tensor in batch(seed)] if few else batch(seed)
        line = linearize(values, p, *samples)
        r, J = by_hand(values, p, *samples)
        n, eye = len(samples[0]), torch.eye(10, dtype=torch.float64)
        F = J.T @ J / n + DAMPING * eye
        close(flat(gauss_newton(line, DAMPING)), torch.linalg.solve(F, J.T @ r / n))
        last = 0 if previous is None else flat(previous)
        # argmin ‖Jp − r‖² / n + λ‖p − μ p'‖² as one least-squares problem
        stacked = torch.cat([J / n**0.5, DAMPING**0.5 * eye])
        target = torch.cat([r / n**0.5, DAMPING**0.5 * 0.9 * last + torch.zeros(10, dtype=torch.float64)])
        previous = spring(line, DAMPING, previous, 0.9)
        close(flat(previous), torch.linalg.lstsq(stacked, target[:, None]).solution[:, 0])
        p = {name: value - previous[name] for name, value in p.items()}


def test_any_solver_and_any_likelihood():
    def negative_log_likelihood(p, x, y):
        return -torch.distributions.Laplace(field(p, x).sum(), p["scale"].exp()).log_prob(y.sum())

    factors = residual_factors(negative_log_likelihood, params(), *batch())
    _, J = by_hand(negative_log_likelihood, params(), *batch())
    F, g = J.T @ J / N, J.mean(0)
    eye = torch.eye(10, dtype=torch.float64)
    close(flat(natural_gradient(factors, factors, damping=DAMPING)), torch.linalg.solve(F + DAMPING * eye, g))
    gradient = factors.rmatvec(factors.row_weights(1 / N))
    close(flat(natural_gradient(factors, gradient, Diagonal(), DAMPING)), g / (F.diagonal() + DAMPING))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: linearize(values, params(), *batch(), mode="both"), "'auto', 'reverse', 'forward', 'lazy'"),
        (lambda: linearize(values, params()), r"shapes \[\]"),
        (lambda: linearize(values, params(), torch.ones(2, 2), torch.ones(3, 3)), r"\(2, 2\), \(3, 3\)"),
        (lambda: linearize(values, {}, *batch()), "floating-point parameters"),
        (lambda: linearize(lambda p, x: x.long(), params(), torch.ones(2, 2)), "got torch.int64"),
        (lambda: linearize(lambda p, x: None, params(), torch.ones(2, 2)), "got NoneType"),
        (lambda: joined([linearize(values, params(), *batch())], [1, 2]), "1 groups of residuals need as many"),
        (lambda: joined([linearize(values, params(), *batch())], [0.0]), "positive weights"),
        (lambda: gauss_newton(linearize(values, params(), *batch()), 0.0), "positive finite"),
        (lambda: spring(linearize(values, params(), *batch()), 0.1, None, 1.0), r"\[0, 1\), got 1.0"),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()


def test_lazy_rows_are_kept_as_rows():
    lazy = residual_factors(values, params(), *batch(), mode="lazy")
    with pytest.raises(CurvatureError, match="cannot be saved"):
        pack(lazy)
    pack(Woodbury().update(None, lazy.with_samples(2)))


# -- a physics-informed network: −u'' = π² sin πx on (−1, 1), u(±1) = 0 ------------------------------------------------


@pytest.fixture(scope="module")
def poisson():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def u(p, x):
        return functional_call(model, p, (x[None],))[0]

    def equation(p, x):
        return grad(grad(u, argnums=1), argnums=1)(p, x) + torch.pi**2 * torch.sin(torch.pi * x)

    inside, edge = torch.linspace(-1, 1, 34).double()[1:-1], torch.tensor([-1.0, 1.0]).double()
    test = torch.linspace(-1, 1, 201).double()

    def line(p, x=inside):
        return joined([linearize(equation, p, x), linearize(u, p, edge)], [1.0, 10.0])

    def error(p):
        difference = torch.func.vmap(u, (None, 0))(p, test) - torch.sin(torch.pi * test)
        return float(difference.norm() / test.numel() ** 0.5)

    return start, line, error


STEPS = 60


def adam_error(poisson):
    start, line, error = poisson
    best = float("inf")
    for lr in (1e-3, 1e-2, 1e-1):
        p = {name: value.clone().requires_grad_() for name, value in start.items()}
        optimizer = torch.optim.Adam(p.values(), lr=lr)
        for _ in range(STEPS):
            gradient = line(p).gradient
            for name, value in p.items():
                value.grad = gradient[name]
            optimizer.step()
        best = min(best, error({name: value.detach() for name, value in p.items()}))
    return best


def test_gauss_newton_and_spring_solve_a_differential_equation(poisson):
    start, line, error = poisson
    adam = adam_error(poisson)
    p, damping = start, 1e-2
    for _ in range(STEPS):
        now = line(p)
        step = gauss_newton(now, damping)
        trial = {name: value - step[name] for name, value in p.items()}
        better = bool(line(trial).loss < now.loss)
        p, damping = (trial, damping / 3) if better else (p, damping * 4)
    assert error(p) < 1e-3 * adam

    drawn = {}
    for momentum in (0.0, 0.9):
        p, previous = start, None
        generator = torch.Generator().manual_seed(0)
        for _ in range(STEPS):
            x = 2 * torch.rand(12, generator=generator, dtype=torch.float64) - 1
            previous = spring(line(p, x), 0.1, previous, momentum)
            p = {name: value - 0.2 * previous[name] for name, value in p.items()}
        drawn[momentum] = error(p)
    assert drawn[0.9] < 0.02 * adam
    assert drawn[0.9] < 0.2 * drawn[0.0]  # new points at every step: momentum adds up what each of them says
