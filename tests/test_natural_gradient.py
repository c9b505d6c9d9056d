"""Laws 1 and 4: curvature and natural gradient of every block against the dense truth, in float64."""

from contextlib import ExitStack
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from corners import CONVOLUTIONS, CORNERS, HARD, MODES, batch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from truth import (
    CATEGORICAL,
    FAMILIES,
    GAUSSIAN,
    Preset,
    assert_close,
    column_names,
    gauss_newton,
    matrix,
    mean_gradient,
    natural,
    network,
    per_sample_gradients,
    per_sample_jacobians,
    step_taken,
    trainable,
    vector,
)

import curvlib
from curvlib.factors import cost

pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop:UserWarning", "ignore:Using padding='same':UserWarning"
)

FISHERS = ("sampled 1", "sampled 3", "empirical", "exact")

SOLVERS = (curvlib.Woodbury(), curvlib.solvers.Dense())


# -- the law, checked on one network and batch ------------------------------------------------------------------------


class Truth:
    """What curvlib has to reproduce for one network, batch and Fisher."""

    def __init__(self, model, family, kind, x):
        torch.manual_seed(1)
        outputs = model(x).detach()
        targets = family.targets(outputs)
        self.samples = len(x)
        self.gradient = mean_gradient(model, family.nll, x, targets)
        self.rows = self.loss = None
        if kind == "exact":
            self.fisher = curvlib.Exact(family.likelihood)
            self.jacobian = per_sample_jacobians(model, x)
            self.hessians = torch.stack([family.hessian(f.reshape(-1)) for f in outputs])
        elif kind == "empirical":
            self.fisher = curvlib.Empirical()
            self.loss = lambda outputs: family.nll(outputs, targets) / len(x)
            self.rows = per_sample_gradients(model, family.nll, x, targets)
        else:
            draws = [family.targets(outputs) for _ in range(int(kind.split()[1]))]
            self.fisher = curvlib.Sampled(Preset(family.likelihood, draws), len(draws))
            columns = [per_sample_gradients(model, family.nll, x, labels) for labels in draws]
            self.rows = {  # sample-major
                name: torch.stack([c[name] for c in columns], dim=1).flatten(0, 1) / len(draws) ** 0.5
                for name in columns[0]
            }

    def curvature(self, names):
        if self.rows is None:
            return gauss_newton(matrix(self.jacobian, names, 2), self.hessians, self.samples)
        J = matrix(self.rows, names)
        return J.T @ J / self.samples


def check(model, family, kind, x):
    """Every operation of every block's Factors, and both exact solvers, against the truth."""
    truth = Truth(model, family, kind, x)
    blocks = curvlib.collect(model, truth.fisher, x, loss=truth.loss)
    seen = []
    for block, factors in blocks.items():
        names = column_names(model, block, factors.shapes)
        seen += names
        F = truth.curvature(names)
        J = factors.dense().matrix()
        if truth.rows is not None:
            assert_close(J, matrix(truth.rows, names), f"{block} rows")
        check_algebra(block, factors, J, F)
        check_algebra(f"{block} compact", factors.compact(), J, F)
        check_solvers(block, factors, F, vector(truth.gradient, names))
    assert sorted(seen) == sorted(trainable(model)), "every trainable parameter lies in exactly one block"


def block_vector(flat, shapes):
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    return {name: part.reshape(shapes[name]) for name, part in zip(shapes, flat.split(sizes), strict=True)}


def check_algebra(what, factors, J, F):
    v, w = torch.randn(J.shape[1], dtype=J.dtype), torch.randn(J.shape[0], dtype=J.dtype)
    some = torch.arange(0, len(J), 2)
    assert len(factors) == len(J)
    assert_close(J.T @ J / factors.normalizer, F, f"{what} curvature")
    assert_close(factors.covariance() / factors.normalizer, F, f"{what} covariance")
    assert_close(vector(factors.diagonal(), factors.shapes) / factors.normalizer, F.diag(), f"{what} diagonal")
    assert_close(factors.gram(), J @ J.T, f"{what} gram")
    assert_close(factors.cross_gram(factors.rows(some)), J @ J[some].T, f"{what} cross-Gram")
    assert_close(factors.matvec(block_vector(v, factors.shapes)), J @ v, f"{what} J v")
    assert_close(vector(factors.rmatvec(w), factors.shapes), J.T @ w, f"{what} Jᵀ w")


def check_solvers(block, factors, F, gradient):
    # Relative to the curvature: any method, the truth's too, loses digits in proportion to trace(F) / λ.
    scale = float(F.trace()) or 1.0
    for solver in SOLVERS:
        estimate = solver.update(None, factors)
        for damping in (1e-3 * scale, scale):
            inverse = solver.factorize(estimate, damping)
            for g in (gradient, torch.randn_like(gradient)):
                solution = solver.solve(inverse, block_vector(g, factors.shapes))
                assert_close(vector(solution, factors.shapes), natural(F, damping, g), f"{block} {solver} {damping}")
            rows_mean = factors.dense().matrix().sum(0) / factors.normalizer
            solution = vector(solver.solve(inverse, factors), factors.shapes)
            assert_close(solution, natural(F, damping, rows_mean), f"{block} {solver} from factors")


# -- law 1 on random networks -----------------------------------------------------------------------------------------


@dataclass
class Case:
    """A drawn network, printable."""

    layers: list
    shape: tuple
    n: int
    frozen: set
    seed: int
    family: object
    kind: str

    def build(self):
        layers = [nn.Flatten() if layer is None else layer[0](*layer[1:-1], **layer[-1]) for layer in self.layers]
        model = network(*layers, seed=self.seed)
        for index, p in enumerate(model.parameters()):
            p.requires_grad_(index not in self.frozen)
        return model, torch.randn(self.n, *self.shape, dtype=torch.float64)


def padded(draw, mode, padding, size, dilation):
    """Kernel size and padding of one axis that PyTorch accepts."""
    limit = {"reflect": size - 1, "circular": size}.get(mode, 2 * size)
    if padding == "same":
        kernels = [k for k in (1, 2, 3) if dilation * (k - 1) - dilation * (k - 1) // 2 <= limit]
        return draw(st.sampled_from(kernels)), 0
    pad = draw(st.integers(0, min(2, limit))) if padding == "numbers" else 0
    kernels = [k for k in (1, 2, 3) if dilation * (k - 1) + 1 <= size + 2 * pad]
    return draw(st.sampled_from(kernels)), pad


@st.composite
def convolutions(draw, dims, channels, space):
    groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
    mode, padding = draw(st.sampled_from(MODES)), draw(st.sampled_from(["same", "valid", "numbers"]))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    stride = tuple(1 if padding == "same" else draw(st.integers(1, 3)) for _ in range(dims))
    axes = [padded(draw, mode, padding, size, d) for size, d in zip(space, dilation, strict=True)]
    out = groups * draw(st.integers(1, 2))
    options = {
        "kernel_size": tuple(kernel for kernel, _ in axes),
        "padding": tuple(pad for _, pad in axes) if padding == "numbers" else padding,
        "padding_mode": mode,
        "stride": stride,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    return (CONVOLUTIONS[dims], channels, out, options)


@st.composite
def cases(draw):
    family = draw(st.sampled_from(FAMILIES))
    dims = draw(st.integers(0, 3))
    layers = []
    if dims:
        most = {1: 6, 2: 4, 3: 3}[dims]
        shape = (draw(st.integers(1, 4)), *(draw(st.integers(2, most)) for _ in range(dims)))
    else:
        shape = tuple(draw(st.integers(1, 4)) for _ in range(draw(st.integers(1, 2))))
    sample = torch.zeros(1, *shape)
    for _ in range(draw(st.integers(1, 3 if dims < 3 else 2)) - 1 + bool(dims)):
        if dims:
            layer = draw(convolutions(dims, sample.shape[1], tuple(sample.shape[2:])))
        else:
            layer = (nn.Linear, sample.shape[-1], draw(st.integers(1, 4)), {"bias": draw(st.booleans())})
        sample = layer[0](*layer[1:-1], **layer[-1])(sample)
        layers += [layer, (nn.ReLU, {"inplace": draw(st.booleans())})]
    layers.append(None)
    width = draw(st.integers(2 if family is CATEGORICAL else 1, 3))
    layers.append((nn.Linear, sample.numel(), width, {"bias": draw(st.booleans())}))
    names = sum(1 if layer[-1].get("bias") is False else 2 for layer in layers if layer and layer[0] is not nn.ReLU)
    frozen = draw(st.sets(st.integers(0, names - 1), max_size=names - 1) if draw(st.booleans()) else st.just(set()))
    return Case(
        layers,
        shape,
        n=draw(st.integers(1, 33)),
        frozen=frozen,
        seed=draw(st.integers(0, 99)),
        family=family,
        kind=draw(st.sampled_from(FISHERS)),
    )


@given(cases())
def test_every_block_of_a_random_network_equals_the_dense_truth(case):
    model, x = case.build()
    check(model, case.family, case.kind, x)


# -- laws 1 and 3 on named corner cases -------------------------------------------------------------------------------


ROUTES = {
    "pairs": {"pairs_beat_rows": lambda *_: True, "rows_are_cheaper_to_keep": lambda *_: False, "chunk": lambda *_: 2},
    "rows": {"pairs_beat_rows": lambda *_: False, "rows_are_cheaper_to_keep": lambda *_: True},
}


@pytest.mark.parametrize("name", CORNERS)
@pytest.mark.parametrize("kind", ["sampled 2", "empirical", "exact"])
def test_corner_case_equals_the_dense_truth(name, kind):
    build, x = CORNERS[name]
    check(build(), CATEGORICAL, kind, x)


@pytest.mark.parametrize("route", ["pairs", "rows"])
@pytest.mark.parametrize("name", [name for name in CORNERS if "fallback" not in name])
def test_every_route_gives_the_same_answer(name, route):
    build, x = CORNERS[name]
    with ExitStack() as stack:
        for function, answer in ROUTES[route].items():
            stack.enter_context(mock.patch.object(cost, function, answer))
        check(build(), CATEGORICAL, "sampled 2", x)


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("kind", ["sampled 2", "empirical", "exact"])
def test_a_hard_case_is_exact_or_refused(name, kind):
    build, x = HARD[name]
    model = build()
    before = {name: id(p) for name, p in model.named_parameters()}
    torch.manual_seed(0)
    targets = torch.randint(2, (len(x),))
    fisher = {"empirical": curvlib.Empirical(), "exact": curvlib.Exact()}.get(kind, curvlib.Sampled(samples=2))
    try:
        curvlib.collect(model, fisher, x, loss=lambda outputs: nn.functional.cross_entropy(outputs, targets))
        refused = False
    except curvlib.CurvatureError:
        refused = True
    assert {name: id(p) for name, p in model.named_parameters()} == before, "the model keeps its parameters"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    if not refused:
        check(build(), CATEGORICAL, kind, x)


# -- outputs with positions -------------------------------------------------------------------------------------------


POSITIONS = {  # likelihood, network, input, observations a sample
    "classes last": (curvlib.Categorical(dim=-1), lambda: network(nn.Linear(4, 3)), batch(5, 2, 4), 2),
    "classes second": (curvlib.Categorical(), lambda: network(nn.Conv1d(2, 3, 2)), batch(5, 2, 4), 3),
    "Gaussian": (curvlib.Gaussian(0.25), lambda: network(nn.Linear(4, 3)), batch(5, 2, 4), 1),
    "Bernoulli": (curvlib.Bernoulli(), lambda: network(nn.Conv1d(2, 3, 2)), batch(5, 2, 4), 1),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_outputs_with_positions_equal_the_dense_truth(name):
    likelihood, build, x, each = POSITIONS[name]
    model = build()
    outputs = model(x).detach()
    labels = likelihood.sample(outputs, None)
    family = next(f for f in FAMILIES if type(f.likelihood) is type(likelihood))

    def nll(outputs, targets):  # any axis of classes
        return family.nll(
            outputs.movedim(likelihood.dim, 1) if likelihood == curvlib.Categorical(-1) else outputs, targets
        )

    def hessian(f, y):
        return torch.func.hessian(lambda flat: nll(flat.reshape(1, *f.shape), y[None]))(f.reshape(-1))

    names = list(trainable(model))
    hessians = torch.stack([hessian(f, y) for f, y in zip(outputs, labels, strict=True)])
    F = gauss_newton(matrix(per_sample_jacobians(model, x), names, 2), hessians, len(x) * each)
    (exact,) = curvlib.collect(model, curvlib.Exact(likelihood), x).values()
    assert_close(exact.covariance() / exact.normalizer, F, "exact")
    (sampled,) = curvlib.collect(model, curvlib.Sampled(Preset(likelihood, [labels])), x).values()
    rows = matrix(per_sample_gradients(model, nll, x, labels), names)
    assert_close(sampled.dense().matrix(), rows, "rows")
    assert_close(sampled.covariance() / sampled.normalizer, rows.T @ rows / (len(x) * each), "sampled")


# -- sampled labels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_labels_are_drawn_from_the_model_with_the_given_generator(family):
    model, x = network(nn.Linear(4, 3)), batch(6, 4)
    labels = family.likelihood.sample(model(x), torch.Generator().manual_seed(5))
    fisher = curvlib.Sampled(family.likelihood)
    (rows,) = curvlib.collect(model, fisher, x, generator=torch.Generator().manual_seed(5)).values()
    expected = matrix(per_sample_gradients(model, family.nll, x, labels), list(trainable(model)))
    assert_close(rows.dense().matrix(), expected)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_the_sampled_fisher_tends_to_the_exact_one(family):
    model, x = network(nn.Linear(3, 2)), batch(4, 3)
    truth = Truth(model, family, "exact", x).curvature(["weight", "bias"])
    generator = torch.Generator().manual_seed(0)
    (rows,) = curvlib.collect(model, curvlib.Sampled(family.likelihood, 20_000), x, generator=generator).values()
    assert_close(rows.covariance() / rows.normalizer, truth, tolerance=0.03)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_without_damping_the_natural_gradient_of_a_full_rank_block_is_the_inverse_times_the_gradient(solver):
    model, x = network(nn.Linear(3, 2)), batch(20, 3)
    y = torch.randn(20, 2, dtype=torch.float64)
    F = Truth(model, GAUSSIAN, "exact", x).curvature(["weight", "bias"])
    gradient = mean_gradient(model, GAUSSIAN.nll, x, y)
    fisher = curvlib.Exact(GAUSSIAN.likelihood)
    optimizer = curvlib.compose(model, fisher=fisher, solver=solver, damping=1e-13, lr=1.0)
    (GAUSSIAN.nll(model(x), y) / 20).backward()
    step = step_taken(model, optimizer)
    assert_close(vector(step, gradient), torch.linalg.solve(F, vector(gradient, gradient)), tolerance=1e-9)
