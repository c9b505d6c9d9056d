"""curvlinops: K-FAC, EKFAC and their inverses; products with the Gauss-Newton matrix and the empirical Fisher.

Known differences, each with its factor below:

- Its K-FAC treats weight and bias apart unless told otherwise; curvlib has one matrix [W, b].
- A damping λ of its K-FAC is added to each factor, so that it is λ² on their product; curvlib's "plain" adds √λ.
- Its empirical Fisher of a loss that averages over C outputs (MSE, BCE) is C times the mean outer product of the
  gradients of the samples' losses, which is curvlib's.
- curvlib's likelihoods sum over a sample's outputs: `Gaussian(variance=C / 2)` is `MSELoss`, and `Bernoulli` is C times
  `BCEWithLogitsLoss`.
- With a label a position, curvlib's empirical Fisher has a row a sample, curvlinops one a label.
- Grouped convolutions are left out: its K-FAC averages inputs over groups, which is not the block's factor.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional
from truth import network, step_taken
from twins import CLASSES, NETS, assert_same, batch, by_parameter

import curvlib
from curvlib.factors import Sum
from curvlib.solvers import EKFAC, KFAC

curvlinops = pytest.importorskip("curvlinops", reason="make peers installs curvlinops")

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

DAMPING = 0.03
FISHERS = {"type-2": curvlib.Exact(), "empirical": curvlib.Empirical()}
DAMPINGS = {
    "exact": {"damping": DAMPING, "use_exact_damping": True},
    "pi": {"damping": DAMPING, "use_heuristic_damping": True},
    "plain": {"damping": (DAMPING**0.5, DAMPING**0.5)},
}


def loss_of(y):
    return lambda outputs: functional.cross_entropy(outputs, y)


def gradient_of(model, loss):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, [*model.parameters()]), strict=True))


def times(operator, vector):
    return dict(zip(vector, operator @ [*vector.values()], strict=True))


def vector_like(model):
    generator = torch.Generator().manual_seed(5)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}


def their_natural(kind, model, data, gradient, inverse, apart=False, **options):
    operator = kind(
        model, nn.CrossEntropyLoss(), [*model.parameters()], [data], separate_weight_and_bias=apart, **options
    )
    return times(curvlinops.KFACInverseLinearOperator(operator, **inverse), gradient)


def our_natural(solver, factors, gradient):
    return {
        f"{block}.{name}": value
        for block, rows in factors.items()
        for name, value in solver.solve(
            solver.factorize(solver.update(None, rows), DAMPING),
            {name: gradient[f"{block}.{name}"] for name in rows.shapes},
        ).items()
    }


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("net", NETS)
class TestInverse:
    @pytest.fixture
    def setting(self, net, fisher):
        model, (x, y) = NETS[net][0](), batch(net)
        factors = curvlib.collect(model, FISHERS[fisher], x, loss=loss_of(y))
        return model, (x, y), factors, gradient_of(model, loss_of(y)(model(x)))

    @pytest.mark.parametrize("damping", DAMPINGS)
    def test_kfac(self, setting, fisher, sharing, damping):
        model, data, factors, gradient = setting
        expected = their_natural(
            curvlinops.KFACLinearOperator, model, data, gradient, DAMPINGS[damping],
            fisher_type=fisher, kfac_approx=sharing,
        )  # fmt: skip
        assert_same(our_natural(KFAC(sharing, damping=damping), factors, gradient), expected)

    def test_ekfac(self, setting, fisher, sharing):
        model, data, factors, gradient = setting
        expected = their_natural(
            curvlinops.EKFACLinearOperator, model, data, gradient, DAMPINGS["exact"],
            fisher_type=fisher, kfac_approx=sharing,
        )  # fmt: skip
        assert_same(our_natural(EKFAC(sharing), factors, gradient), expected)

    @pytest.mark.parametrize("solver", [KFAC, EKFAC])
    def test_weight_and_bias_apart(self, setting, fisher, sharing, solver):
        model, data, _, gradient = setting
        kind = {KFAC: curvlinops.KFACLinearOperator, EKFAC: curvlinops.EKFACLinearOperator}[solver]
        expected = their_natural(
            kind, model, data, gradient, DAMPINGS["exact"], True, fisher_type=fisher, kfac_approx=sharing
        )
        ours = solver(sharing, damping="exact") if solver is KFAC else solver(sharing)
        given = {}
        for name in ("weight", "bias"):
            for full, p in model.named_parameters():
                p.requires_grad_(full.endswith(name))
            alone = curvlib.collect(model, FISHERS[fisher], data[0], loss=loss_of(data[1]))
            given |= our_natural(ours, alone, gradient)
        assert_same({name: given[name] for name in expected}, expected)


# -- the curvature itself, of the whole network ------------------------------------------------------------------------


def network_rows(model, fisher, x, loss=None):
    """Factors of all blocks as one, named as the model names its parameters."""
    parts = curvlib.collect(model, fisher, x, loss=loss)
    named = [rows.renamed({name: f"{block}.{name}" for name in rows.shapes}) for block, rows in parts.items()]
    return Sum(tuple(named), samples=named[0].normalizer)


LOSSES = {
    # loss, targets, likelihood, GGN and empirical Fisher of the peer over curvlib's
    "cross entropy": (nn.CrossEntropyLoss(), "labels", curvlib.Categorical(), 1, 1),
    "squares": (nn.MSELoss(), "numbers", curvlib.Gaussian(variance=CLASSES / 2), 1, CLASSES),
    "logits": (nn.BCEWithLogitsLoss(), "bits", curvlib.Bernoulli(), 1 / CLASSES, CLASSES),
}


def targets(kind, labels):
    hot = functional.one_hot(labels, CLASSES).double()
    return {"labels": labels, "bits": hot, "numbers": 3 * hot - 1}[kind]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("net", NETS)
class TestProducts:
    def test_gauss_newton(self, net, loss):
        model, (x, y) = NETS[net][0](), batch(net)
        criterion, kind, likelihood, factor, _ = LOSSES[loss]
        peer = curvlinops.GGNLinearOperator(model, criterion, [*model.parameters()], [(x, targets(kind, y))])
        block = curvlib.func.Curvature(network_rows(model, curvlib.Exact(likelihood), x))
        v = vector_like(model)
        assert_same(times(peer, v), block @ v, factor)

    def test_empirical_fisher(self, net, loss):
        model, (x, y) = NETS[net][0](), batch(net)
        criterion, kind, *_, factor = LOSSES[loss]
        goal = targets(kind, y)
        peer = curvlinops.EFLinearOperator(model, criterion, [*model.parameters()], [(x, goal)])
        rows = network_rows(model, curvlib.Empirical(), x, lambda outputs: criterion(outputs, goal))
        v = vector_like(model)
        assert_same(times(peer, v), curvlib.func.Curvature(rows) @ v, factor)


@pytest.mark.parametrize("net", NETS)
def test_the_optimizer_solves_with_their_gauss_newton_matrix(net):
    model, (x, y) = NETS[net][0](), batch(net)
    parameters = [*model.parameters()]
    peer = curvlinops.GGNLinearOperator(model, nn.CrossEntropyLoss(), parameters, [(x, y)])
    size = sum(p.numel() for p in parameters)
    identity = torch.eye(size, dtype=torch.float64)
    gradient = gradient_of(model, loss_of(y)(model(x)))
    flat = torch.linalg.solve(
        peer @ identity + DAMPING * identity, torch.cat([g.reshape(-1) for g in gradient.values()])
    )
    parts = flat.split([p.numel() for p in parameters])
    expected = {n: part.reshape(g.shape) for (n, g), part in zip(gradient.items(), parts, strict=True)}
    optimizer = curvlib.compose(
        model, fisher=curvlib.Exact(), solver=curvlib.Woodbury(), blocks="network", damping=DAMPING, lr=1.0
    )
    loss_of(y)(model(x)).backward()
    assert_same(step_taken(model, optimizer), expected)
    optimizer.detach()


# -- a label a position ------------------------------------------------------------------------------------------------


class ClassesSecond(nn.Module):
    def forward(self, x):
        return x.movedim(-1, 1)


@pytest.mark.parametrize(("fisher", "factor"), [("type-2", 1), ("empirical", 5)])
def test_kfac_with_a_label_a_position(fisher, factor):
    """The empirical Fisher counts samples in curvlib, labels there: with 5 labels a sample G is 5 times theirs."""
    model = network(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES), ClassesSecond())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 5, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, CLASSES, (8, 5), generator=generator)
    operator = curvlinops.KFACLinearOperator(
        model, nn.CrossEntropyLoss(), [*model.parameters()], [(x, y)],
        fisher_type=fisher, separate_weight_and_bias=False,
    )  # fmt: skip
    factors = curvlib.collect(model, FISHERS[fisher], x, loss=loss_of(y))

    def product(rows):
        pair, layout = rows.kronecker(), rows.kronecker_rows().layout
        inner = {name: v[f"{block_of[id(rows)]}.{name}"] for name in rows.shapes}
        return layout.vector(pair.cotangents / rows.normalizer @ layout.matrix(inner) @ pair.inputs)

    block_of = {id(rows): block for block, rows in factors.items()}
    v = vector_like(model)
    assert_same(times(operator, v), by_parameter(factors, product), factor)
