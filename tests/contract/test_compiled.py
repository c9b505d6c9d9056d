"""Models that torch compiles: before or after composing, whole or in parts, the steps are those of the plain model."""

import shutil

import pytest
import torch
from parts import assert_same, backward, composed, network

from curvlib import Empirical, Exact, Sampled, Woodbury
from curvlib.solvers import KFAC

needs_a_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch.compile's C++ compiler is missing"
)


def composed_first(model, options):
    optimizer = composed(model, **options)
    return optimizer, torch.compile(model)


def compiled_first(model, options):
    compiled = torch.compile(model)
    return composed(model, **options), compiled


def composed_of_the_compiled(model, options):
    compiled = torch.compile(model)
    return composed(compiled, **options), compiled


def in_place(model, options):
    optimizer = composed(model, **options)
    model.compile()
    return optimizer, model


def layer_by_layer(model, options):
    optimizer = composed(model, **options)
    for layer in model:
        layer.compile()
    return optimizer, model


ORDERS = [composed_first, compiled_first, composed_of_the_compiled, in_place, layer_by_layer]


@needs_a_compiler
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
@pytest.mark.parametrize(
    "options",
    [
        {"fisher": Exact(), "refresh": 2},
        {"fisher": Sampled(), "solver": KFAC()},
        {"fisher": Empirical(), "refresh": 2},
    ],
    ids=lambda options: type(options["fisher"]).__name__,
)
def test_steps_are_those_of_the_plain_model(order, options):
    torch.compiler.reset()
    model, twin = network(), network()
    optimizer, forward = order(model, options)
    other = composed(twin, **options)
    for _ in range(4):
        for one, call in ((optimizer, forward), (other, twin)):
            one.zero_grad()
            backward(call)
            one.step()
    assert_same(model, twin, rtol=1e-10, atol=1e-13)


def test_the_backend_that_needs_no_compiler():
    """What dynamo does to hooks does not depend on what it compiles to."""
    torch.compiler.reset()
    model, twin = network(), network()
    optimizer, other = composed(model, fisher=Sampled()), composed(twin, fisher=Sampled())
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        for one, call in ((optimizer, compiled), (other, twin)):
            one.zero_grad()
            backward(call)
            one.step()
    assert_same(model, twin)
    optimizer.detach()
    backward(compiled)


@needs_a_compiler
def test_fused_gradients_of_a_compiled_model():
    torch.compiler.reset()
    finals = []
    for compile_it in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 18), torch.nn.Tanh(), torch.nn.Linear(18, 4)).double()
        x = torch.randn(5, 20, generator=torch.Generator().manual_seed(0)).double()
        optimizer = composed(model, fisher=Empirical(), solver=Woodbury(), fused=True)
        call = torch.compile(model) if compile_it else model
        for _ in range(4):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(call(x), torch.arange(5) % 4).backward()
            optimizer.step()
        finals.append({name: p.detach() for name, p in model.named_parameters()})
    assert_same(*finals, rtol=1e-9, atol=1e-11)
