"""K-BFGS against the paper's algorithm in explicit matrices, and its pairs against a plain loop with two passes."""

import copy

import numpy as np
import pytest
import torch
from blocks import LIBRARIES, numbers
from single_rows import close, grouped, linear, no_bias, sequence, table
from torch import nn

import curvlib
from curvlib.arrays import pack, unpack
from curvlib.errors import CaptureError, ConfigurationError
from curvlib.factors import Dense as DenseRows
from curvlib.factors import OuterProduct
from curvlib.precond import KLClip, LevenbergMarquardt, Momentum
from curvlib.solvers import KBFGS, Woodbury
from curvlib.solvers.base import Evaluation

BUILDS = [linear, no_bias, sequence, grouped]
SECONDS = ["powell", "levenberg-marquardt"]


def bfgs(H, s, y):
    rho, identity = 1 / (s @ y), np.eye(len(s))
    return (identity - rho * np.outer(s, y)) @ H @ (identity - rho * np.outer(y, s)) + rho * np.outer(s, s)


def damped(H, s, y, root, second, powell=0.2):
    if s @ y < powell * (y @ H @ y):
        theta = (1 - powell) * (y @ H @ y) / (y @ H @ y - s @ y)
        s = theta * s + (1 - theta) * H @ y
    if second == "levenberg-marquardt":
        return s, y + root * s
    if s @ y < root * (s @ s):
        theta = (1 - root) * (s @ s) / (s @ s - s @ y)
        y = theta * y + (1 - theta) * s
    return s, y


class Paper:
    """The algorithm for one group; averages of pairs begin at zero, as the authors have it, which changes no update."""

    def __init__(self, damping, second, decay=0.9):
        self.root, self.second, self.decay = damping**0.5, second, decay
        self.history, self.Ha, self.Hg, self.s, self.y = [], None, None, 0.0, 0.0

    def update(self, A, d_out):
        self.history.append(A)
        weights = self.decay ** np.arange(len(self.history))[::-1]
        A = sum(w * one for w, one in zip(weights / weights.sum(), self.history, strict=True))
        self.damped = A + self.root * np.eye(len(A))
        if self.Ha is None:
            self.Ha, self.Hg = np.linalg.inv(self.damped), np.eye(d_out)

    def follow(self, mean, moved, changed):
        s = self.Ha @ mean
        self.Ha = bfgs(self.Ha, s, self.damped @ s)
        self.s = self.decay * self.s + (1 - self.decay) * moved
        self.y = self.decay * self.y + (1 - self.decay) * changed
        self.Hg = bfgs(self.Hg, *damped(self.Hg, self.s, self.y, self.root, self.second))


def step(solver, estimate, before, after, values, damping):
    """One update with its follow-up, states through storage; the inverse that the step used."""
    estimate = unpack(pack(solver.update(estimate, before.factors)))
    inverse = unpack(pack(solver.factorize(estimate, damping)))
    rows = (before.factors, after.factors)
    ends = [Evaluation(value, factors) for value, factors in zip(values, rows, strict=True)]
    return unpack(pack(solver.follow(estimate, inverse, *ends))), inverse


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("second", SECONDS)
@pytest.mark.parametrize("size", [0.02, 1.0, "convex"])
def test_steps_are_those_of_the_paper(build, second, size, library):
    solver, array, damping = KBFGS(damping=second), LIBRARIES[library], 0.3
    estimate, papers = None, None
    for seed in range(5):
        before, after, other = build(array, seed), build(array, seed), build(array, seed + 200)
        shapes = before.factors.shapes
        values = [{n: array(numbers(*shape, seed=seed + 20 * i)) for n, shape in shapes.items()} for i in range(2)]
        moved = [
            np.einsum("goi,gi->go", block.matrix(value), block.means()[0])
            for block, value in zip((before, other), values, strict=True)
        ]
        # Arbitrary changes of the cotangents are damped in one way or both; y = 3 s is not.
        change = 3 * (moved[1] - moved[0]) / before.g.shape[1] if size == "convex" else size * other.g
        after.a, after.g = other.a, before.g + change
        after.factors = with_rows(before.factors, array, after.a, after.g, after.bias)
        estimate, inverse = step(solver, estimate, before, after, values, damping)
        groups, d_out = before.g.shape[2:]
        papers = papers or [Paper(damping, second) for _ in range(groups)]
        gradient = {n: numbers(*shape, seed=9) for n, shape in shapes.items()}
        natural = before.matrix(solver.solve(inverse, {n: array(value) for n, value in gradient.items()}))
        mean, changed = before.means()[0], after.means()[1] - before.means()[1]
        for k, paper in enumerate(papers):
            paper.update(before.moments()[0][k], d_out)
            close(natural[k], paper.Hg @ before.matrix(gradient)[k] @ paper.Ha)
            paper.follow(mean[k], moved[1][k] - moved[0][k], changed[k])
            close(np.asarray(estimate.cotangents)[k], paper.Hg)
            close(np.asarray(estimate.inputs)[k], paper.Ha)
            assert np.linalg.eigvalsh(paper.Hg).min() > 0


def with_rows(factors, array, a, g, bias):
    """Factors of the same kind with other inputs and cotangents."""
    a = a[..., :-1] if bias else a
    if isinstance(factors, OuterProduct):
        return OuterProduct(array(a[:, 0, 0]), array(g[:, 0, 0]), bias="bias" if bias else None, samples=len(a))
    return type(factors)(array(a), array(g), factors.weight_shape, bias="bias" if bias else None, samples=len(a))


@pytest.mark.parametrize("second", SECONDS)
def test_a_pair_without_use_leaves_the_inverse_as_it_is(second):
    solver, before = KBFGS(damping=second), linear(torch.from_numpy, 0)
    values = {name: torch.ones(shape, dtype=torch.float64) for name, shape in before.factors.shapes.items()}
    still = step(solver, None, before, before, [values, values], 0.3)[0]
    assert bool((still.cotangents[0] == torch.eye(5)).all())
    nan = {name: value * float("nan") for name, value in values.items()}
    lost = step(solver, None, before, before, [values, nan], 0.3)[0]
    assert lost.pairs == 0
    assert bool((lost.cotangents[0] == torch.eye(5)).all())


def test_conformance():
    factors = {build.__name__: build(torch.from_numpy, 0).factors for build in BUILDS}
    # Not "damping": the cotangents' inverse begins as the identity, whatever λ is.
    laws = ("truth", "scale", "state", "failure")
    assert curvlib.testing.check_solver(KBFGS(damping="levenberg-marquardt"), factors, laws=laws)["refused"] == []


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (DenseRows(weight=torch.ones(3, 2, 2)), "use Woodbury, Dense or Diagonal"),
        (table(torch.from_numpy, 0).factors, "a table that is looked up in.*: use Woodbury, Diagonal or KFAC"),
        (linear(torch.from_numpy, 0).factors.restricted(["bias"]), "its weight is frozen: use Woodbury"),
        (OuterProduct(torch.ones(3, 4), torch.ones(3, 2, 5), samples=3), "use fisher=Empirical"),
    ],
    ids=["dense", "table", "frozen weight", "columns"],
)
def test_rows_that_it_has_no_meaning_for_are_refused(factors, message):
    with pytest.raises(ConfigurationError, match=message):
        KBFGS().update(None, factors)


def test_bad_hyperparameters_are_refused():
    for values, message in [
        ({"decay": 1.0}, r"\[0, 1\)"),
        ({"pair_decay": -0.1}, r"\[0, 1\)"),
        ({"powell": 0.0}, "powell"),
        ({"damping": "none"}, "'powell', 'levenberg-marquardt'"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            KBFGS(**values)
    estimate = KBFGS().update(None, linear(torch.from_numpy, 0).factors)
    with pytest.raises(ConfigurationError, match="a damping below 1, got 1.5: use KBFGS"):
        KBFGS().factorize(estimate, 1.5)


# -- in an optimizer --------------------------------------------------------------------------------------------------


def perceptron(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def batches(count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(10, 4, generator=generator, dtype=dtype), torch.randint(3, (10,), generator=generator))
        for _ in range(count)
    ]


def compose(model, solver=None, **options):
    arguments = {"damping": 0.3, "lr": 0.2, **options}
    return curvlib.compose(model, fisher=curvlib.Empirical(), solver=solver or KBFGS(), **arguments)


def closure_of(model, optimizer, x, y, set_to_none=True):
    def closure():
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def means(model, x, y):
    """Batch means of pre-activations and of their cotangents for every linear layer, by plain hooks; the gradients."""
    outputs = []
    linear_layers = [module for module in model if isinstance(module, nn.Linear)]
    handles = [
        m.register_forward_hook(lambda m, args, output: outputs.append((args[0], output))) for m in linear_layers
    ]
    loss = nn.functional.cross_entropy(model(x), y)
    cotangents = torch.autograd.grad(loss, [h for _, h in outputs], retain_graph=True)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for handle in handles:
        handle.remove()
    inputs = [torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], dim=1).detach().numpy() for a, _ in outputs]
    h = [h.detach().mean(0).numpy() for _, h in outputs]
    return inputs, h, [g.sum(0).numpy() for g in cotangents], gradients


def test_an_optimizer_follows_a_plain_loop_of_two_passes():
    model, plain = perceptron(), perceptron()
    optimizer, papers = compose(model), [Paper(0.3, "powell") for _ in range(2)]
    for x, y in batches(5):
        optimizer.step(closure_of(model, optimizer, x, y))
        inputs, h, g, gradients = means(plain, x, y)
        with torch.no_grad():
            for k, paper in enumerate(papers):
                paper.update(inputs[k].T @ inputs[k] / len(x), len(h[k]))
                M = torch.cat([gradients[2 * k], gradients[2 * k + 1][:, None]], dim=1).numpy()
                direction = torch.from_numpy(paper.Hg @ M @ paper.Ha)
                plain[2 * k].weight -= 0.2 * direction[:, :-1]
                plain[2 * k].bias -= 0.2 * direction[:, -1]
        _, h_new, g_new, _ = means(plain, x, y)
        for k, (paper, name) in enumerate(zip(papers, ("0", "2"), strict=True)):
            paper.follow(inputs[k].mean(0), h_new[k] - h[k], g_new[k] - g[k])
            estimate, weight = optimizer.curvature[name].estimate, 1 - 0.9 ** estimate_count(optimizer)
            close(estimate.steps[0].numpy() * weight, paper.s)
            close(estimate.changes[0].numpy() * weight, paper.y)
            close(estimate.cotangents[0].numpy(), paper.Hg)
            close(estimate.inputs[0].numpy(), paper.Ha)
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            close(ours.detach().numpy(), theirs.detach().numpy())


def estimate_count(optimizer):
    return optimizer.curvature["0"].estimate.pairs


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_stay_those_of_the_first_evaluation(set_to_none):
    model, plain, ((x, y),) = perceptron(), perceptron(), batches(1)
    optimizer = compose(model)
    expected = torch.autograd.grad(nn.functional.cross_entropy(plain(x), y), list(plain.parameters()))
    calls, closure = [], closure_of(model, optimizer, x, y, set_to_none)
    loss = optimizer.step(lambda: calls.append(None) or closure())
    assert len(calls) == 2
    assert optimizer.needs_closure
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))
    assert float(nn.functional.cross_entropy(model(x), y).detach()) < loss.item()


def test_a_step_without_a_closure_is_refused_before_anything_changes():
    model, ((x, y),) = perceptron(), batches(1)
    optimizer = compose(model, {"0": KBFGS(), "*": Woodbury()})
    nn.functional.cross_entropy(model(x), y).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ConfigurationError, match=r"KBFGS \(block '0'\).*call optimizer.step\(closure\)"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert optimizer.steps == 0
    assert not compose(perceptron(), Woodbury()).needs_closure


def test_the_second_evaluation_must_be_of_the_same_batch():
    model = perceptron()
    optimizer, sizes = compose(model), iter((10, 7))

    def closure():
        n = next(sizes)
        loss = nn.functional.cross_entropy(model(torch.ones(n, 4, dtype=torch.float64)), torch.arange(n) % 3)
        loss.backward()
        return loss

    with pytest.raises(CaptureError, match="10 rows before the step and 7 after it.*the same batch"):
        optimizer.step(closure)


def test_only_steps_with_new_curvature_evaluate_twice_and_what_they_learn_is_used_at_once():
    model = perceptron()
    optimizer, calls = compose(model, refresh=3), []
    for x, y in batches(5):
        closure = closure_of(model, optimizer, x, y)
        optimizer.step(lambda closure=closure: calls.append(None) or closure())
        state = optimizer.curvature["2"]
        assert torch.equal(state.inverse.cotangents, state.estimate.cotangents)
    assert len(calls) == 5 + 2
    assert state.estimate.pairs == 2
    assert not torch.equal(state.inverse.cotangents[0], torch.eye(3, dtype=torch.float64))


def test_it_resumes_bit_for_bit_beside_other_solvers_damping_by_the_loss_and_half_precision():
    def parts(model):
        damping = LevenbergMarquardt(0.2, every=2, most=0.9)
        return compose(model, {"0": KBFGS(), "*": Woodbury()}, damping=damping, transforms=[KLClip(1.0), Momentum(0.5)])

    model, data = perceptron(), batches(6)
    optimizer = parts(model)
    for number, (x, y) in enumerate(data):
        if number == 3:
            again = perceptron()
            again.load_state_dict(model.state_dict())
            resumed = parts(again)
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step(closure_of(model, optimizer, x, y))
        if number >= 3:
            resumed.step(closure_of(again, resumed, x, y))
    assert optimizer.curvature["0"].estimate.pairs == 6
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    half = perceptron(torch.bfloat16)
    optimizer = compose(half)
    for x, y in batches(2, torch.bfloat16):
        optimizer.step(closure_of(half, optimizer, x, y))
    assert optimizer.curvature["0"].estimate.cotangents.dtype == torch.float32


def test_sampled_labels_are_refused():
    with pytest.raises(ConfigurationError, match="KBFGS.*needs fisher=Empirical"):
        curvlib.compose(perceptron(), fisher=curvlib.Sampled(), solver=KBFGS(), damping=0.3, lr=0.1)
