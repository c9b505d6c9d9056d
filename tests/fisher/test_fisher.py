"""Likelihoods and Fisher kinds against autograd and against each other."""

import math

import pytest
import torch
from torch.nn import functional

from curvlib import Bernoulli, Categorical, Empirical, Exact, Gaussian, Sampled
from curvlib.errors import CaptureError, ConfigurationError

CASES = [
    (Categorical(), (6, 4), torch.tensor([0, 3, 1, 1, 2, 0])),
    (Categorical(), (3, 4, 2), torch.tensor([[0, 3], [1, 1], [2, 0]])),
    (Categorical(dim=-1), (3, 2, 4), torch.tensor([[0, 3], [1, 1], [2, 0]])),
    (Gaussian(0.7), (5, 3), torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3)),
    (Gaussian(), (5,), torch.linspace(-1, 1, 5, dtype=torch.float64)),
    (Bernoulli(), (4, 2, 2), torch.tensor([0.0, 1, 1, 0] * 4, dtype=torch.float64).reshape(4, 2, 2)),
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request):
    likelihood, shape, targets = request.param
    outputs = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return likelihood, outputs, targets


def test_residuals_are_the_gradient_of_the_loss_times_observations(case):
    likelihood, outputs, targets = case
    gradient = torch.func.grad(lambda o: likelihood.loss(o, targets))(outputs)
    torch.testing.assert_close(likelihood.residual(outputs, targets), gradient * likelihood.observations(outputs))


def test_hessian_roots_square_to_the_hessian_of_the_loss(case):
    likelihood, outputs, targets = case
    size = outputs.numel()
    hessian = torch.func.hessian(lambda o: likelihood.loss(o.reshape(outputs.shape), targets))(outputs.reshape(-1))
    columns = likelihood.hessian_root(outputs)
    n = outputs.shape[0]
    blocks = columns.reshape(len(columns), n, -1)
    ours = torch.block_diag(*torch.einsum("cni,cnj->nij", blocks, blocks))
    torch.testing.assert_close(ours, hessian.reshape(size, size) * likelihood.observations(outputs))


def test_sampled_cotangents_average_to_the_exact_fisher(case):
    likelihood, outputs, _ = case
    many = Sampled(likelihood, samples=2000).cotangents(outputs, torch.Generator().manual_seed(0))
    exact = Exact(likelihood).cotangents(outputs, None)
    n = outputs.shape[0]
    moments = [torch.einsum("cni,cnj->nij", c.reshape(len(c), n, -1), c.reshape(len(c), n, -1)) for c in (many, exact)]
    assert (moments[0] - moments[1]).norm() < 0.1 * moments[1].norm()


def test_losses_are_those_of_torch():
    outputs, labels = torch.randn(6, 4), torch.tensor([0, 3, 1, 1, 2, 0])
    torch.testing.assert_close(Categorical().loss(outputs, labels), functional.cross_entropy(outputs, labels))
    targets = torch.rand(6, 4)
    torch.testing.assert_close(Gaussian(2.0).loss(outputs, targets), functional.mse_loss(outputs, targets))
    expected = functional.binary_cross_entropy_with_logits(outputs, targets, reduction="sum") / 6
    torch.testing.assert_close(Bernoulli().loss(outputs, targets), expected)


def test_draws_follow_the_seed_and_the_dtype():
    outputs = torch.randn(50, 4)
    for fisher in (Sampled(), Sampled(Gaussian()), Sampled(Bernoulli())):
        one, two, three = (fisher.cotangents(outputs, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
        assert torch.equal(one, two)
        assert not torch.equal(one, three)
    assert Sampled().cotangents(outputs.bfloat16(), None).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Gaussian(0.0), "variance > 0"),
        (lambda: Gaussian(math.nan), "variance > 0"),
        (lambda: Sampled(samples=0), "at least one draw"),
        (lambda: Sampled(samples=1.5), "at least one draw"),
        (lambda: Sampled(3), "needs a likelihood"),
        (lambda: Exact("mse"), "needs a likelihood"),
        (lambda: Empirical(reduction="none"), "'mean' or 'sum'"),
        (lambda: Empirical(loss_scale=0.0).scale(3), "loss_scale must be"),
        (lambda: Empirical(loss_scale=lambda: math.nan).scale(3), "loss_scale must be"),
        (lambda: Empirical().cotangents(torch.ones(2, 2), None), "call loss.backward"),
        (lambda: Categorical().check(torch.ones(4, dtype=torch.long)), "floating-point outputs"),
        (lambda: Categorical().check(torch.ones(4)), r"\(n, classes, …\).*\(4,\)"),
        (lambda: Categorical(dim=2).check(torch.ones(4, 3)), "classes on axis 2"),
        (lambda: Categorical(dim=0).check(torch.ones(4, 3)), "classes on axis 0"),
        (lambda: Categorical().check(torch.ones(4, 1)), "at least two classes.*Bernoulli"),
        (lambda: Gaussian().check(torch.ones(0, 3)), "at least one sample"),
        (lambda: Categorical().loss(torch.ones(2, 3), torch.tensor([0, 3])), "0 … 2 .* 0 to 3"),
        (lambda: Categorical().loss(torch.ones(2, 3), torch.tensor([-1, 0])), "from -1 to 0"),
        (lambda: Categorical().loss(torch.ones(2, 3), torch.tensor([0.0, 1.0])), "integer labels"),
        (lambda: Categorical().loss(torch.ones(2, 3), torch.tensor([0])), r"shape \(2,\), got"),
        (lambda: Gaussian().loss(torch.ones(2, 3), torch.ones(2)), "outputs' shape"),
        (lambda: Bernoulli().loss(torch.ones(2), torch.tensor([0.0, 2.0])), "between 0 and 1"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()


def test_outputs_that_are_not_finite_are_refused():
    with pytest.raises(CaptureError, match="not finite"):
        Sampled().cotangents(torch.tensor([[1.0, math.nan]]), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_are_those_that_torch_draws(dtype):
    outputs = torch.randn(50, 7, 3, dtype=dtype)
    source, other = (torch.Generator().manual_seed(4) for _ in range(2))
    drawn = Categorical().sample(outputs, source)
    probabilities = outputs.movedim(1, -1).softmax(-1).reshape(-1, 7)
    assert torch.equal(drawn, torch.multinomial(probabilities, 1, generator=other).reshape(50, 3))
    assert torch.equal(source.get_state(), other.get_state())
    spoiled = outputs.index_fill(0, torch.tensor([3]), torch.nan)  # refused elsewhere, and no label out of range here
    assert int(Categorical().sample(spoiled, source).max()) < 7
    assert float(Bernoulli().sample(spoiled, source).max()) == 1
