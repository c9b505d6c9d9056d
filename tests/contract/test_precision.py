"""Half precision, autocast, GradScaler, and the precision of factorisations."""

import copy

import pytest
import torch
from parts import X, Y, assert_same, backward, composed, moved, network, train, values
from torch import nn
from torch.nn import functional

import curvlib
from curvlib import Empirical, Exact, KLClip, Momentum, Sampled, Woodbury
from curvlib.errors import ConfigurationError
from curvlib.precond.factorized import FactorizedIn
from curvlib.solvers import EKFAC, KFAC, SOAP, Dense, Diagonal

HALVES = [torch.float16, torch.bfloat16]


def dtypes(optimizer):
    found = set()
    for state in optimizer.curvature.values():
        curvlib.arrays.map_arrays(lambda array: found.add(array.dtype) or array, (state.estimate, state.inverse))
    return found


def batch(samples=64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 5, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 1).long()


def loss_of(model):
    x, y = batch()
    with torch.no_grad():
        return float(functional.cross_entropy(model(x.to(next(model.parameters()).dtype)).float(), y))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("solver", [Woodbury(), Dense(), KFAC(), EKFAC(), Diagonal()], ids=str)
@pytest.mark.parametrize("fisher", [Exact(), Empirical(), Sampled()], ids=str)
def test_parameters_in_half_precision(fisher, solver, dtype):
    model = network(dtype)
    optimizer = composed(model, fisher=fisher, solver=solver, transforms=[KLClip(), Momentum(0.5)], refresh=2)
    before = loss_of(model)
    for _ in range(8):
        train(model, optimizer, 1, *batch())
    assert loss_of(model) < 0.9 * before
    assert dtypes(optimizer) == {torch.float32}  # Gram and covariance are sums in float32
    assert all(p.dtype == dtype and torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("solver", [Dense(), KFAC()], ids=str)
def test_sums_of_half_precision_are_those_of_float32(solver):
    """Not only the type: the curvature is that of the rounded model, to float32's accuracy."""
    half, single = network(torch.bfloat16), network(torch.float32)
    single.load_state_dict(half.state_dict())
    x, y = batch(512)
    estimates = []
    for model in (half, single):
        optimizer = composed(model, solver=solver, fisher=Exact())
        train(model, optimizer, 1, x.bfloat16(), y)
        state = optimizer.curvature["0"].estimate
        estimates.append(state.matrix if solver == Dense() else state.inputs)
    # Cotangents and activations are rounded to 8 bits, independently: a sum in bfloat16 would be off by percents.
    assert float((estimates[0] - estimates[1]).norm() / estimates[1].norm()) < 4e-3


# -- autocast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("everything", [False, True], ids=["forward", "whole loop"])
@pytest.mark.parametrize("fisher", [Exact(), Empirical(), Sampled()], ids=str)
def test_autocast_around_the_forward_pass_or_the_whole_loop(fisher, everything):
    model = network(torch.float32)
    optimizer = composed(model, fisher=fisher, transforms=[KLClip()])
    x, y = batch()
    before = loss_of(model)
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            optimizer.zero_grad()
            outputs = model(x)
            assert outputs.dtype == torch.bfloat16
            loss = functional.cross_entropy(outputs.float(), y)
            if everything:
                loss.backward()
                optimizer.step()
        if not everything:
            loss.backward()
            optimizer.step()
    assert loss_of(model) < 0.8 * before
    assert dtypes(optimizer) == {torch.float32}


@pytest.mark.parametrize("solver", [Dense(), KFAC(), EKFAC(), Woodbury()], ids=str)
@pytest.mark.parametrize("fisher", [Exact(), Empirical()], ids=str)
@pytest.mark.parametrize("options", [{}, {"fused": True, "transforms": [Momentum()]}], ids=["", "fused"])
def test_the_engines_own_arithmetic_is_not_autocast(fisher, solver, options):
    """Products of curvature keep float32 inside autocast: the step is the same whether it is inside or outside."""
    finals = []
    x, y = batch()
    for inside in (False, True):
        model = network(torch.float32)
        optimizer = composed(model, fisher=fisher, solver=solver, damping=1e-3, lr=1e-2, **options)
        with torch.autocast("cpu", torch.bfloat16):
            loss = functional.cross_entropy(model(x).float(), y)
        loss.backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            optimizer.step()
        finals.append(values(model))
    assert_same(*finals)


def test_rows_made_inside_autocast_are_products_in_float32():
    model = nn.Linear(5, 3)
    x, _ = batch()
    with torch.autocast("cpu", torch.bfloat16):
        rows = curvlib.collect(model, Exact(), x)["Linear"]
    dense = rows.dense().values["weight"]
    reference = curvlib.collect(model, Exact(), x)["Linear"].dense().values["weight"]
    assert dense.dtype == torch.float32
    assert float((dense - reference).norm() / reference.norm()) < 1e-2


# -- GradScaler -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("unscaled", [False, True], ids=["scaler.step", "scaler.unscale_ and clipping"])
def test_a_scaler_changes_nothing(kind, unscaled):
    finals = []
    for enabled in (False, True):
        model = network()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=enabled)
        scale = scaler.get_scale if enabled else 1.0
        fisher = {"exact": Exact(), "sampled": Sampled(), "empirical": Empirical(loss_scale=scale)}[kind]
        optimizer = composed(model, fisher=fisher, refresh=2, transforms=[KLClip(), Momentum(0.9)])
        for _ in range(4):
            optimizer.zero_grad()
            scaler.scale(functional.cross_entropy(model(X), Y)).backward()
            if unscaled:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        finals.append(values(model))
    assert_same(*finals, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("fisher", [Exact(), Sampled(), Empirical()], ids=str)
@pytest.mark.parametrize("who", ["optimizer", "model"])
def test_a_skipped_step_changes_nothing_and_its_rows_go(fisher, who):
    model, twin = network(), network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    optimizer, other = composed(model, fisher=fisher, refresh=2), composed(twin, fisher=fisher, refresh=2)
    train(model, optimizer, 2)
    train(twin, other, 2)
    state, before = copy.deepcopy(optimizer.curvature), values(model)
    labels = optimizer._generator.get_state()
    (model if who == "model" else optimizer).zero_grad()
    scaler.scale(functional.cross_entropy(model(X), Y) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 0.5
    assert moved(model, before) == set()
    assert optimizer.steps == 2
    assert {name: one.refreshed for name, one in optimizer.curvature.items()} == dict.fromkeys(state, 0)
    assert optimizer._due
    optimizer._generator.set_state(labels)  # the pass that was skipped had drawn some
    (model if who == "model" else optimizer).zero_grad()
    backward(model)
    optimizer.step()
    train(twin, other)
    assert_same(model, twin)
    assert optimizer.curvature["0"].refreshed == 2


def test_half_precision_with_a_scaler_from_the_beginning():
    """float16 as one trains in it: the scale is found by skipping steps."""
    model = network(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=100)
    optimizer = composed(model, fisher=Sampled(), transforms=[KLClip()], refresh=3)
    x, y = batch()
    before, skipped = loss_of(model), 0
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = functional.cross_entropy(model(x).float(), y)
        scaler.scale(loss).backward()
        taken = optimizer.steps
        scaler.step(optimizer)
        scaler.update()
        skipped += optimizer.steps == taken
    assert skipped > 0
    assert optimizer.steps + skipped == 30
    assert loss_of(model) < 0.5 * before


# -- the precision of factorisations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver", [Woodbury(), Dense(), KFAC(), KFAC(decay=0.9), EKFAC(), SOAP(), Diagonal()], ids=str
)  # fmt: skip
def test_factorisations_in_float64_leave_float64_as_it_is(solver):
    options = {"solver": solver, "fisher": Empirical(), "refresh": 1, "lr": 0.05}
    model, twin = network(), network()
    train(model, composed(model, **options, factorize_in="float64"), 4)
    train(twin, composed(twin, **options), 4)
    assert_same(model, twin)


@pytest.mark.parametrize("solver", [Woodbury(), Dense(), KFAC()], ids=str)
def test_factorisations_in_float64_are_better_ones(solver):
    """At little damping an inverse in float32 has lost digits that one in float64 has."""
    x, y = batch(256)
    errors = []
    for factorize_in in (None, "float64"):
        model = network(torch.float32)
        optimizer = composed(model, solver=solver, fisher=Exact(), damping=1e-6, lr=1.0, factorize_in=factorize_in)
        train(model, optimizer, 1, x, y)
        assert dtypes(optimizer) == {torch.float32}
        error = 0.0
        for name, state in optimizer.curvature.items():
            own, estimate = optimizer.solvers[name], curvlib.arrays.map_arrays(torch.Tensor.double, state.estimate)
            vector = {inner: torch.randn(p.shape).double() for inner, p in model.get_submodule(name).named_parameters()}
            truth = own.solve(own.factorize(estimate, state.damping), vector)
            found = own.solve(curvlib.arrays.map_arrays(torch.Tensor.double, state.inverse), vector)
            error += sum(float((found[inner] - truth[inner]).norm() / truth[inner].norm()) for inner in truth)
        errors.append(error)
    assert 3 * errors[1] < errors[0]


def test_the_choice_is_checked_and_reaches_every_block():
    with pytest.raises(ConfigurationError, match=r"factorize_in must be None .* or 'float64', got 'half'"):
        composed(network(), factorize_in="half")
    optimizer = composed(network(), factorize_in="float64", solver={"0": KFAC(), "*": Woodbury()})
    assert optimizer.solvers == {
        "0": FactorizedIn(KFAC()),
        "2": FactorizedIn(Woodbury()),
        "4": FactorizedIn(Woodbury()),
    }
    with pytest.raises(ConfigurationError, match=r"SOAP \(block '0'\) works on the loss's own gradient"):
        composed(network(), factorize_in="float64", solver=SOAP())
