"""Faults of every kind under every solver: parameters finite, unchanged by a step that fails; counted and named."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from small_net import X, same, small_net, values
from torch.nn import functional

import curvlib
from curvlib import Empirical, Exact, Gaussian, Momentum, Woodbury, compose
from curvlib.arrays import map_arrays, torch_kernels
from curvlib.capture import Capture
from curvlib.errors import CurvatureError, FailureWarning, NonFiniteError
from curvlib.solvers import (
    EKFAC,
    FNGD,
    KBFGS,
    KFAC,
    KID,
    KIS,
    MKOR,
    SENG,
    SINGD,
    SKFAC,
    SOAP,
    SPRING,
    Dense,
    Diagonal,
    Eva,
    Identity,
    MinSR,
    Shampoo,
    Switch,
)

SOLVERS = {
    **{type(one).__name__: one for one in (
        Woodbury(), Dense(), KFAC(), EKFAC(), SKFAC(), Diagonal(), Identity(), KIS(), KID(), SENG(), Eva(), MKOR(),
        SINGD(), SPRING(), MinSR(), FNGD(first_epoch=1), KBFGS(), Shampoo(), SOAP(),
    )},
    "KFAC eigen": KFAC(form="eigen"),
    "KFAC exact": KFAC(damping="exact"),
    "Switch": Switch((Woodbury(), Dense()), (1,)),
}  # fmt: skip
TARGETS = torch.randn(10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


class Run:
    def __init__(self, solver, **options):
        self.model = small_net()
        given = {"refresh": 1, "transforms": [Momentum(0.5)], **options}
        fresh = solver.of_gradient or solver.of_fresh_rows
        fisher = Empirical() if fresh else Exact(Gaussian())
        self.optimizer = compose(self.model, fisher=fisher, solver=solver, damping=0.3, lr=0.05, **given)
        self.x, self.y, self.spoil = X, TARGETS, None

    def step(self):
        def closure():
            self.optimizer.zero_grad()
            loss = functional.mse_loss(self.model(self.x), self.y)
            loss.backward()
            if self.spoil is not None:
                self.model[2].weight.grad[0, 0] = self.spoil
            return loss.detach()

        self.optimizer.step(closure)

    def finite(self):
        return all(torch.isfinite(p).all() for p in self.model.parameters())


# -- faults -----------------------------------------------------------------------------------------------------------


def in_inputs(value):
    def inject(run, patch):
        run.x = X.clone()
        run.x[2, 1] = value

    return inject


def in_activations(value):
    def inject(run, patch):
        patch.setattr(run.model[1], "forward", lambda x: x.tanh() + value * torch.eye(*x.shape, dtype=x.dtype))

    return inject


def in_labels(value):
    def inject(run, patch):
        run.y = TARGETS.clone()
        run.y[0, 0] = value

    return inject


def in_gradients(value):
    def inject(run, patch):
        run.spoil = value

    return inject


def in_factors(change):
    def inject(run, patch):
        taken = Capture.taken

        def spoiled(self):
            result = taken(self)

            def spoil(array):
                return change(array.clone()) if array.is_floating_point() else array

            return replace(result, factors={name: map_arrays(spoil, one) for name, one in result.factors.items()})

        patch.setattr(Capture, "taken", spoiled)

    return inject


def first(value):
    def change(array):
        array[(0,) * array.ndim] = value
        return array

    return change


def in_kernels(change):
    def inject(run, patch):
        cholesky, eigh = torch_kernels.cholesky, torch_kernels.eigh
        patch.setattr(torch_kernels, "cholesky", lambda matrix, wait: cholesky(change(matrix), wait))
        patch.setattr(torch_kernels, "eigh", lambda matrix: eigh(change(matrix)))

    return inject


def eye(matrix):
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype).expand_as(matrix)


def raising(error, *kernels):
    def inject(run, patch):
        def fail(*args):
            raise error

        for name in kernels:
            patch.setattr(torch_kernels, name, fail)

    return inject


def update_out_of_memory(run, patch):
    def fail(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory (told)")

    for kind in {type(solver) for solver in run.optimizer.solvers.values()}:
        patch.setattr(kind, "update", fail)
        patch.setattr(kind, "update_all", fail)


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory (told)")
NO_CONVERGENCE = torch.linalg.LinAlgError("linalg.eigh: failed to converge (told)")
FAULTS = {
    "NaN in an input": in_inputs(math.nan),
    "inf in an input": in_inputs(math.inf),
    "NaN in activations": in_activations(math.nan),
    "inf in activations": in_activations(math.inf),
    "NaN in a label": in_labels(math.nan),
    "inf in a label": in_labels(-math.inf),
    "NaN in a gradient": in_gradients(math.nan),
    "inf in a gradient": in_gradients(math.inf),
    "NaN in factors": in_factors(first(math.nan)),
    "inf in factors": in_factors(first(math.inf)),
    "factors all zero": in_factors(torch.zeros_like),
    "factors that overflow": in_factors(lambda array: array * 1e160),
    "denormal factors": in_factors(lambda array: array * 1e-310),
    "indefinite kernels": in_kernels(lambda matrix: matrix - 1e3 * eye(matrix)),
    "singular kernels": in_kernels(torch.ones_like),
    "kernels all zero": in_kernels(torch.zeros_like),
    "huge kernels": in_kernels(lambda matrix: matrix * 1e300),
    "infinite kernels": in_kernels(lambda matrix: matrix + math.inf),
    "denormal kernels": in_kernels(lambda matrix: matrix * 1e-310),
    "decompositions that fail": raising(NO_CONVERGENCE, "cholesky", "eigh", "qr", "triangular_solve"),
    "no memory for decompositions": raising(OUT_OF_MEMORY, "cholesky", "eigh"),
    "no memory on a CPU": raising(RuntimeError("DefaultCPUAllocator: can't allocate memory"), "cholesky", "eigh"),
    "no memory for an update": update_out_of_memory,
}
SURE = ("inputs", "input", "activations", "label", "gradient")


CASES = [
    # At the first refresh there is no inverse to fall back on, whatever the solver: a few stand for all.
    pytest.param(name, fault, earlier, marks=[] if earlier or name in ("Woodbury", "EKFAC") else pytest.mark.nightly)
    for name in SOLVERS
    for fault in FAULTS
    for earlier in (0, 2)
]


@pytest.mark.parametrize(("name", "fault", "earlier"), CASES)
def test_a_fault_leaves_parameters_finite_and_is_counted_and_named(name, fault, earlier):
    run = Run(SOLVERS[name])
    for _ in range(earlier):
        run.step()
    before, states = values(run.model), run.optimizer.curvature
    buffers = {p: {key: value.clone() for key, value in held.items()} for p, held in run.optimizer.state.items()}
    raised = None
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        FAULTS[fault](run, patch)
        try:
            run.step()
        except CurvatureError as error:
            raised = error
        run.x, run.y, run.spoil = X, TARGETS, None
    health = run.optimizer.health
    assert run.finite()
    if raised is not None:
        assert same(values(run.model), before)
        assert run.optimizer.curvature is states
        assert run.optimizer.steps == earlier
        for p, held in buffers.items():
            assert all(torch.equal(run.optimizer.state[p][key], value) for key, value in held.items())
        assert health.refused == 1
        assert health.last_failure == str(raised)
        assert "block" in str(raised) or isinstance(raised, NonFiniteError)
    elif any(issubclass(one.category, FailureWarning) for one in told):
        assert sum(block.failures + block.retries for block in health.values()) >= 1
        assert {one.message.block for one in told} <= set(health)
    if fault.split()[-1] in SURE:
        assert raised is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.step()
        run.step()
    assert run.finite()
    # The first epoch of FNGD and the first inverse of BFGS have a say in all later steps: huge curvature, no steps.
    assert same(values(run.model), before) == (earlier == 0 and fault == "huge kernels" and name in ("FNGD", "KBFGS"))


@pytest.mark.parametrize("fault", ["NaN in a label", "NaN in factors", "indefinite kernels", "no memory for an update"])
@pytest.mark.parametrize("policy", ["gradient", "skip", "raise"])
def test_every_policy_leaves_parameters_finite(policy, fault):
    run = Run(Woodbury(), on_failure=policy)
    before = values(run.model)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        FAULTS[fault](run, patch)
        if policy == "raise" or (policy == "gradient" and fault == "NaN in a label"):
            with pytest.raises(CurvatureError):
                run.step()
        else:
            run.step()
        run.x, run.y, run.spoil = X, TARGETS, None
    assert run.finite()
    assert same(values(run.model), before) == (policy != "gradient" or fault == "NaN in a label")
    run.step()
    assert run.finite()
    assert run.optimizer.health["0"].staleness == 0


def test_the_table_has_every_solver():
    assert {type(one) for one in SOLVERS.values()} >= {
        getattr(curvlib.solvers, name) for name in curvlib.solvers.__all__ if name != "Solver"
    }
