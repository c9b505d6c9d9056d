"""`backend="numpy"` trains as torch does: the route of CuPy, without a GPU."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import curvlib
from curvlib import precond
from curvlib.errors import ConfigurationError
from curvlib.factors import Factors, OuterProduct
from curvlib.precond.backends import Placed, plain
from curvlib.precond.places import NumpyPlace
from curvlib.solvers import (
    EKFAC,
    KBFGS,
    KFAC,
    SKFAC,
    SOAP,
    SPRING,
    Diagonal,
    Identity,
    Shampoo,
    Solver,
    Switch,
    Woodbury,
)  # fmt: skip

INPUTS, LABELS = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(1)).double(), torch.arange(6) % 5


class Words(nn.Module):
    """An embedding before a linear layer, which is tied to it."""

    def __init__(self):
        super().__init__()
        self.table, self.inner, self.norm = nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.out = nn.Linear(4, 5)
        self.out.weight = self.table.weight

    def forward(self, x):
        return self.out(self.norm(torch.relu(self.inner(self.table((x[:, 0, 0].abs() * 9).long() % 5)))).mean(1))


def network():
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(2, 4, 3, stride=2, groups=2), nn.ReLU(), nn.Conv2d(4, 3, 2, bias=False), nn.Flatten()]
    return nn.Sequential(*convolutions, nn.Linear(12, 5)).double()


def words():
    torch.manual_seed(0)
    return Words().double()


def train(model, solver, backend, steps=3, resume=None, **options):
    options = {"fisher": curvlib.Sampled(curvlib.Categorical()), "damping": 0.1, **options}
    optimizer = curvlib.compose(
        model, solver=solver, lr=0.1, backend=backend, transforms=[curvlib.Momentum(0.9)], **options
    )
    if resume is not None:
        optimizer.load_state_dict(resume)

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(INPUTS), LABELS)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return optimizer


def parameters(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


EMPIRICAL = {"fisher": curvlib.Empirical()}
CASES = [
    (network, Woodbury(), {}),
    (network, Woodbury(), {"refresh": 2}),
    (network, Woodbury(), {"blocks": "network"}),
    (network, Woodbury(), {"fused": True, **EMPIRICAL}),
    (network, Woodbury(low_rank=0.5), {}),
    (network, KFAC(), {}),
    (network, KFAC(damping="exact"), {"damping": precond.TraceRelative(1.0)}),
    (network, EKFAC(), {"refresh": precond.Intervals(1, 2)}),
    (network, SKFAC(), {}),
    (network, Diagonal(), {}),
    (network, Identity(), {}),
    (network, Shampoo(), EMPIRICAL),
    (network, SPRING(), EMPIRICAL),
    (network, KBFGS(), EMPIRICAL),
    (network, Switch((Woodbury(), KFAC()), (2,)), {}),
    (network, Woodbury(), {"damping": precond.LevenbergMarquardt(0.5, every=1)}),
    (words, Woodbury(), {}),
    (words, Woodbury(), {"blocks": "network"}),
]


@pytest.mark.parametrize(("build", "solver", "options"), CASES, ids=str)
def test_the_same_parameters_after_three_steps(build, solver, options):
    models = [build(), build()]
    for model, backend in zip(models, ("torch", "numpy"), strict=True):
        train(model, solver, backend, **copy.deepcopy(options))  # a damping that adapts is no constant
    expected, found = map(parameters, models)
    assert not torch.equal(expected, parameters(build()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


class Watched(Woodbury):
    """Notes what kinds of arrays reach a solver, and whether it recognises its own rows."""

    def update(self, estimate, factors):
        state = super().update(estimate, factors)
        SEEN.append(("update", {type(a) for a in factors.dense().values.values()}, type(state.kernel)))
        return state

    def solve(self, inverse, gradient):
        SEEN.append(("solve", isinstance(gradient, Factors) and gradient is inverse.factors))
        return super().solve(inverse, gradient)


SEEN = []


def test_solvers_see_numpy_arrays_and_the_optimizer_keeps_tensors():
    SEEN.clear()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 5)).double()
    optimizer = train(model, Watched(), "numpy", fused=True, **EMPIRICAL)
    assert {entry for entry in map(str, SEEN) if "update" in entry} == {str(("update", {np.ndarray}, np.ndarray))}
    assert [entry[1] for entry in SEEN if entry[0] == "solve"] == [False, True, True]  # fused from the second step on
    assert type(optimizer.curvature["1"].estimate.kernel) is torch.Tensor
    assert type(plain(optimizer.solvers["1"])) is Watched


def test_memory_is_shared_in_both_directions():
    place, tensor = NumpyPlace(), torch.arange(6.0).reshape(2, 3)
    array = place.enter(tensor.t())
    assert array.strides == (4, 12)
    array[0, 1] = 9
    assert tensor[1, 0] == 9
    assert place.leave(array).data_ptr() == tensor.data_ptr()
    backwards, number, constant = array[::-1], array.sum(), np.broadcast_to(array[0, 0], (2,))
    assert place.leave(backwards).tolist() == backwards.tolist()  # no tensor runs backwards: a copy
    assert place.leave(number).shape == ()
    place.leave(constant).fill_(5)  # what is not to be written on is copied too
    assert tensor[0, 0] == 0


@pytest.mark.parametrize("solver", [Woodbury(), KFAC(), EKFAC(), SPRING(momentum=0.5), Shampoo()], ids=repr)
@pytest.mark.parametrize(("first", "then"), [("numpy", "numpy"), ("numpy", "torch"), ("torch", "numpy")])
def test_a_checkpoint_goes_on_in_any_place(solver, first, then):
    model, whole = network(), network()
    options = EMPIRICAL if solver.of_gradient or solver.of_fresh_rows else {}
    buffer = io.BytesIO()
    torch.save(train(model, solver, first, steps=2, **options).state_dict(), buffer)
    buffer.seek(0)
    train(model, solver, then, steps=2, resume=torch.load(buffer, weights_only=True), **options)
    train(whole, solver, "torch", steps=4, **options)
    torch.testing.assert_close(parameters(model), parameters(whole), rtol=0, atol=1e-10)


def test_a_placed_solver_is_the_solver_in_all_but_place():
    for solver in (KFAC(), SOAP(), SPRING(), KBFGS(), Woodbury(low_rank=0.5)):
        elsewhere = pickle.loads(pickle.dumps(copy.deepcopy(Placed(solver, NumpyPlace()))))
        assert (plain(elsewhere), elsewhere.place) == (solver, NumpyPlace())
        for trait in ("exact", *(name for name in dir(Solver) if name.startswith("of_"))):
            assert getattr(elsewhere, trait) == getattr(solver, trait)


def test_several_blocks_are_factorised_at_once():
    solver, elsewhere = Woodbury(), Placed(Woodbury(), NumpyPlace())
    rows = [OuterProduct(torch.randn(n, 5).double(), torch.randn(n, 4).double()) for n in (3, 3, 4)]
    for one in (solver, elsewhere):
        inverses = one.factorize_all([one.update(None, factors) for factors in rows], [0.1, 0.2, 0.3])
        for factors, inverse, damping in zip(rows, inverses, (0.1, 0.2, 0.3), strict=True):
            expected = solver.factorize(solver.update(None, factors), damping)
            torch.testing.assert_close(inverse.factor, expected.factor)


def test_explanations_and_errors_name_the_solver_itself():
    optimizer = curvlib.compose(
        network(), fisher=curvlib.Empirical(), solver=KBFGS(), damping=0.1, lr=0.1, backend="numpy"
    )
    with pytest.raises(ConfigurationError, match=r"^KBFGS \(block '0'\)"):
        optimizer.step()
    table = curvlib.explain(optimizer, INPUTS, loss=lambda outputs: functional.cross_entropy(outputs, LABELS))
    assert {row.solver for row in table.parameters} == {"KBFGS()"}


class FailsInFloat32(Woodbury):
    def factorize(self, estimate, damping):
        if estimate.kernel.dtype == np.float32:
            raise curvlib.NotPositiveDefiniteError("too narrow")
        return super().factorize(estimate, damping)


def test_a_failed_factorisation_climbs_the_ladder():
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 5))
    optimizer = curvlib.compose(
        model, fisher=curvlib.Empirical(), solver=FailsInFloat32(), damping=0.1, lr=0.1, backend="numpy"
    )
    functional.cross_entropy(model(INPUTS.float()), LABELS).backward()
    with pytest.warns(curvlib.CurvatureWarning, match="in float64"):
        optimizer.step()
    assert optimizer.curvature["1"].inverse.factor.dtype == torch.float32
