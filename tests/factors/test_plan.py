"""Routes: every one forced on every layer shape of the corner cases, and limits on memory."""

import itertools
import math

import pytest
import torch
from corners import CORNERS
from hypothesis import given, settings
from hypothesis import strategies as st
from largest import Largest
from torch import nn
from torch.nn import functional

import curvlib
from curvlib import Exact, Gaussian, Momentum, Plan, Sampled, Woodbury
from curvlib.arrays import pack, unpack
from curvlib.errors import ConfigurationError
from curvlib.factors import Route, SharedOuter, cost
from curvlib.layers import ConvolutionFactors
from curvlib.layers.autocorrelation import Kernel
from curvlib.layers.sample_gradients import SAMPLE_GRADIENTS

ROWS = ("grouped", "unfold", "forward", "shifted")
ROUTES = [Route(*answers) for answers in itertools.product(ROWS, ("pairs", "rows"), ("factored", "rows"))]
PLANS = {
    **{f"{route.rows}, {route.gram}, {route.keep}": Plan(routes={"*": route}) for route in ROUTES},
    "a limit of 100 bytes": Plan(memory_limit=100),
    "rows in parts": Plan(memory_limit=100, routes={"*": Route(gram="rows")}),
    "timed": Plan(timed=True),
}
ALONE = [Route(rows, "rows", "rows") for rows in ROWS] + [
    Route("unfold", "pairs", "factored"),
    Route("grouped", "rows", "factored"),
]
"""Every answer at least once; the other combinations, which meet the same code, are run at night."""
FORCED = [
    pytest.param(name, marks=() if plan.routes.get("*") in (None, Route(gram="rows"), *ALONE) else pytest.mark.nightly)
    for name, plan in PLANS.items()
]
SHAPES = [name for name in CORNERS if "fallback" not in name]


def rows_of(name, plan=None, dtype=torch.float64):
    build, x = CORNERS[name]
    torch.manual_seed(0)
    model = build().to(dtype)
    # Some corners take indices.
    x = x.to(dtype) if x.is_floating_point() else x
    rest = "freeze" if any(p.requires_grad for p in model.parameters()) else None
    return curvlib.collect(model, Exact(Gaussian()), x, plan=plan, verify=False, rest=rest)


def close(given, expected, tolerance):
    given, expected = given.double(), expected.double()
    torch.testing.assert_close(given, expected, rtol=tolerance, atol=tolerance * max(1.0, float(expected.abs().max())))


def compare_with_dense_rows(name, plan, dtype, tolerance):
    """Everything that a route computes, against explicit rows of the cost model's own in float64."""
    plain = {block: rows.dense() for block, rows in rows_of(name).items()}
    blocks = rows_of(name, plan, dtype)
    assert blocks.keys() == plain.keys()
    for block, rows in blocks.items():
        dense, kept = plain[block], rows.compact()
        matrix = torch.cat([values.flatten(1) for values in dense.values.values()], dim=1)
        vector = {name: torch.cos(torch.arange(p.numel()).double()).reshape(p.shape[1:]) for name, p in (
            (name, values[:1]) for name, values in dense.values.items()
        )}  # fmt: skip
        flat = torch.cat([vector[name].flatten() for name in dense.values])
        vector = {name: values.to(dtype) for name, values in vector.items()}
        weights = torch.sin(torch.arange(len(matrix)).double())
        for form in (rows, kept):
            close(form.gram(), matrix @ matrix.T, tolerance)
            close(form.cross_gram(rows), matrix @ matrix.T, tolerance)
            close(form.matvec(vector), matrix @ flat, tolerance)
            product = form.rmatvec(weights.to(dtype))
            close(torch.cat([product[name].flatten() for name in dense.values]), matrix.T @ weights, tolerance)
            for name, values in form.dense().values.items():
                close(values, dense.values[name], tolerance)


@pytest.mark.parametrize("plan", FORCED)
@pytest.mark.parametrize("name", SHAPES)
def test_every_route_equals_the_dense_rows(name, plan):
    compare_with_dense_rows(name, PLANS[plan], torch.float64, 1e-10)


@pytest.mark.parametrize("plan", FORCED)
@pytest.mark.parametrize("name", SHAPES)
def test_routes_agree_in_single_precision(name, plan):
    compare_with_dense_rows(name, PLANS[plan], torch.float32, 1e-4)


def bases(factors):
    """Factors without what is wrapped around them, the terms of a sum one by one."""
    if hasattr(factors, "terms"):
        return [one for term in factors.terms for one in bases(term)]
    return bases(factors.base) if hasattr(factors, "base") else [factors]


def convolutions_of(name, plan=None):
    return [one for rows in rows_of(name, plan).values() for one in bases(rows) if isinstance(one, ConvolutionFactors)]


CONVOLUTIONS = [name for name in SHAPES if convolutions_of(name)]


def test_the_corners_have_convolutions_of_every_kind():
    assert len(CONVOLUTIONS) >= 41
    assert {"depthwise", "ConvTranspose", "1x1 convolution", "channels_last 3d"} < set(CONVOLUTIONS)


@pytest.mark.parametrize("route", ROWS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_rows_of_a_convolution_by_parts_equal_the_whole(name, route, monkeypatch):
    plan = PLANS[f"{route}, rows, rows"]
    whole = [rows.dense().values for rows in convolutions_of(name, plan)]
    for limit in ("_GROUPED", "_UNFOLDED"):
        monkeypatch.setattr(cost, limit, 1)
    for values, expected in zip(convolutions_of(name, plan), whole, strict=True):
        for parameter, rows in values.dense().values.items():
            close(rows, expected[parameter], 1e-12)


@pytest.mark.parametrize("limit", [1, 1 << 20])
@pytest.mark.parametrize("route", ROWS)
def test_rows_of_a_convolution_can_be_differentiated(route, limit, monkeypatch):
    monkeypatch.setattr(cost, "_GROUPED", limit)
    monkeypatch.setattr(cost, "_UNFOLDED", limit)
    torch.manual_seed(0)
    images, cotangents = torch.randn(2, 2, 6, 3).double(), torch.randn(2, 2, 2, 2, 2).double()

    def rows(x, g):
        form = ConvolutionFactors(x, g, (2, 2, 3, 2), stride=(2, 1), dilation=(1, 1), groups=1)
        return form.planned(Plan(routes={"*": Route(rows=route)}).of("")).dense().values["weight"]

    assert torch.autograd.gradcheck(rows, (images.requires_grad_(), cotangents.requires_grad_()))


@pytest.mark.parametrize("route", ROWS)
def test_rows_of_a_convolution_are_compiled_in_one_graph(route):
    torch.manual_seed(0)
    images, cotangents = torch.randn(4, 4, 6, 5), torch.randn(4, 2, 6, 2, 3)
    plan = Plan(routes={"*": Route(rows=route)}).of("")

    def rows(x, g):
        form = ConvolutionFactors(x, g, (6, 2, 3, 3), stride=(2, 1), dilation=(1, 1), groups=2)
        return form.planned(plan).dense().values["weight"]

    torch.compiler.reset()
    compiled = torch.compile(rows, fullgraph=True, backend="eager")
    close(compiled(images, cotangents), rows(images, cotangents), 1e-6)


@st.composite
def geometries(draw):
    """A convolution whose kernel fits at least once, with any remainder."""
    axes = draw(st.integers(1, 3))
    one = lambda low, high: draw(st.tuples(*[st.integers(low, high)] * axes))  # noqa: E731
    size, stride, dilation, padding, more = one(1, 4), one(1, 4), one(1, 3), one(0, 3), one(0, 5)
    space = [
        max(1, apart * (taps - 1) + 1 - 2 * zeros) + rest
        for taps, apart, zeros, rest in zip(size, dilation, padding, more, strict=True)
    ]
    return Kernel(size, stride, dilation, padding), space, draw(st.sampled_from([1, 2])), draw(st.integers(1, 2))


@settings(max_examples=60, deadline=None)
@given(geometries())
def test_rows_are_exact_for_any_convolution(geometry):
    kernel, space, groups, width = geometry
    torch.manual_seed(0)
    layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(space)](
        2 * groups, width * groups, kernel.size, kernel.stride, kernel.padding, kernel.dilation, groups
    ).double()
    images = torch.randn(3, 2 * groups, *space).double()
    outputs = layer(images)
    g = torch.randn_like(outputs)
    expected = torch.stack(
        [torch.autograd.grad(out, layer.weight, one, retain_graph=True)[0] for out, one in zip(outputs, g, strict=True)]
    )
    for gradients, _ in SAMPLE_GRADIENTS.values():
        for step in (2, 3):
            found = gradients([g, 2 * g], images, tuple(layer.weight.shape), kernel, groups, step)
            close(found[0], expected, 1e-12)
            close(found[1], 2 * expected, 1e-12)


def step(model, x, y, **composition):
    optimizer = curvlib.compose(
        model, fisher=Sampled(), solver=Woodbury(), damping=0.1, lr=0.01, transforms=[Momentum()], verify=False,
        **composition,
    )  # fmt: skip
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return optimizer


def test_a_wide_linear_layer_never_holds_rows_as_large_as_its_parameters():
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    x, y = torch.randn(64, 512), torch.randint(0, 10, (64,))
    with Largest() as largest:
        step(model, x, y)
    assert largest.elements <= 512 * 512  # a gradient


@pytest.mark.parametrize("limit", [1 << 14, 1 << 16])
def test_convolutions_respect_the_limit(limit):
    torch.manual_seed(0)
    build = lambda: nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 3))  # noqa: E731
    x, y = torch.randn(24, 8, 4, 4), torch.randint(0, 3, (24,))
    models = []
    for plan in (None, Plan(memory_limit=limit, routes={"*": Route(gram="rows")})):
        torch.manual_seed(1)
        models.append(build())
        with Largest() as largest:
            step(models[-1], x, y, plan=plan)
    rows, batch = 24 * 8 * 32 * 9, 24 * 32 * 16
    assert largest.elements < max(limit / 4, batch) + 1 < rows
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_a_timed_plan_measures_each_size_once():
    plan = Plan(timed=True, routes={"3": Route(keep="factored")})
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Identity(), nn.ReLU(), nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(4, 3)
    )
    optimizer = step(model, torch.randn(5, 2, 4, 4), torch.randint(0, 3, (5,)), plan=plan)
    measured = dict(plan.measured)
    assert {key.question for key in measured} == {"rows", "gram"}
    step(model, torch.randn(5, 2, 4, 4), torch.randint(0, 3, (5,)), plan=plan)
    assert plan.measured == measured
    state = optimizer.state_dict()["curvature"]["blocks"]
    assert pack(unpack(state)).keys() == state.keys()


def test_explain_shows_the_routes_and_follows_the_plan():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 64, 3))
    x, y = torch.randn(6, 8, 8, 8), torch.randint(0, 3, (6,))
    route = {row.name: row.route for row in curvlib.explain(model, x).parameters}
    assert route["0.weight"] == "rows by unfold, Gram over rows, keeps rows" or "grouped" in route["0.weight"]
    forced = step(model, x, y, plan=Plan(routes={"0": Route("unfold", "pairs", "factored")}))
    explanation = curvlib.explain(forced, x)
    assert explanation.parameters[0].route == "rows by unfold, Gram over pairs, keeps factored"
    assert "Route of 0: rows by unfold" in str(explanation)


def one_layer(layer, x, plan, dtype=torch.float32):
    """Factors of one layer, of a cotangent of its own for each sample."""
    rows = curvlib.collect(layer.to(dtype), Sampled(Gaussian()), x.to(dtype), plan=plan, verify=False)
    return rows.popitem()[1]


def test_what_is_measured_serves_nothing_else_of_equal_sizes():
    plan = Plan(timed=True)
    layers = {
        "3x3": (nn.Conv2d(8, 8, 3, padding=1), torch.randn(4, 8, 6, 6)),
        "1x1": (nn.Conv2d(72, 8, 1), torch.randn(4, 72, 6, 6)),
        "strided": (nn.Conv2d(8, 8, 3, stride=2, padding=1), torch.randn(4, 8, 12, 12)),
        "dilated": (nn.Conv2d(8, 8, 3, dilation=2, padding=2), torch.randn(4, 8, 6, 6)),
        "unpadded": (nn.Conv2d(8, 8, 3), torch.randn(4, 8, 8, 8)),
        "lines": (nn.Conv2d(8, 8, 3, padding=1), torch.randn(4, 8, 4, 9)),
        "sequence": (nn.Linear(72, 8), torch.randn(4, 36, 72)),
    }
    expected = 0
    for dtype in (torch.float32, torch.float64):
        for name, (layer, x) in layers.items():
            rows = one_layer(layer, x, plan, dtype)
            rows.gram(), rows.dense()
            expected += 1 if name == "sequence" else 2
            assert len(plan.measured) == expected, name
    assert len({key.sizes for key in plan.measured}) == 1


LAYERS = {
    "convolution": lambda: (nn.Conv2d(8, 8, 3, padding=1), torch.randn(6, 8, 8, 8)),
    "sequence": lambda: (nn.Linear(8, 8), torch.randn(6, 16, 8)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_explain_shows_what_was_measured_and_rows_take_it(layer, monkeypatch):
    torch.manual_seed(0)
    layer, x = LAYERS[layer]()
    model, y = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(3)), torch.randint(0, 3, (6,))
    model(x)
    modelled = curvlib.explain(model, x).parameters[0].route
    plan = Plan(timed=True)
    optimizer = curvlib.compose(model, fisher=Sampled(), solver=Woodbury(), damping=0.1, lr=0.1, plan=plan)
    rows = one_layer(layer, x, plan)
    for route in (curvlib.explain(optimizer, x).parameters[0].route, rows.route):
        assert "Gram over a route yet to be timed" in route
        assert ("rows by a route yet to be timed" in route) == isinstance(rows, ConvolutionFactors)
    assert not plan.measured  # neither times anything

    rows.gram(), rows.dense()
    answers = {"rows": ROWS, "gram": ("pairs", "rows")}
    words = {"rows": "rows by", "gram": "Gram over"}
    for key in plan.measured:
        others = [one for one in answers[key.question] if f"{words[key.question]} {one}" not in modelled]
        plan.measured[key] = others[-1]
    planted = dict(plan.measured)
    shown = curvlib.explain(optimizer, x).parameters[0].route
    assert {f"{words[key.question]} {answer}" in shown for key, answer in planted.items()} == {True}
    assert plan.measured == planted

    taken = []

    def noted(name, function):
        def call(*args, **kwargs):
            taken.append(name)
            return function(*args, **kwargs)

        return call

    for route, (gradients, chunk) in SAMPLE_GRADIENTS.items():
        monkeypatch.setitem(SAMPLE_GRADIENTS, route, (noted(f"rows by {route}", gradients), chunk))
    monkeypatch.setattr(SharedOuter, "pair_gram", noted("Gram over pairs", SharedOuter.pair_gram))
    monkeypatch.setattr(SharedOuter, "row_gram", noted("Gram over rows", SharedOuter.row_gram))
    for key, answer in planted.items():
        taken.clear()
        rows.dense() if key.question == "rows" else rows.gram()
        assert taken == [f"{words[key.question]} {answer}"]
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def test_sums_that_explain_makes_do_not_count_what_is_timed():
    torch.manual_seed(0)
    layer, x = LAYERS["convolution"]()
    model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(3))
    model(x)
    counted = []
    for plan in (Plan(), Plan(timed=True)):
        optimizer = curvlib.compose(model, fisher=Sampled(), solver=Woodbury(), damping=0.1, lr=0.1, plan=plan)
        counted.append([row.refresh_flops for row in curvlib.explain(optimizer, x).parameters])
        optimizer.detach()
    assert counted[0] == counted[1]


@pytest.mark.parametrize("name", CORNERS)
def test_without_timing_no_clock_is_read(name, monkeypatch):
    def read(compute):
        raise AssertionError("a route was timed")

    monkeypatch.setattr("curvlib.factors.plan._seconds", read)
    for plan in (None, Plan(), Plan(memory_limit=100), Plan(routes={"*": Route(gram="rows")})):
        for rows in rows_of(name, plan).values():
            assert rows.route is not None
            for form in (rows, rows.compact()):
                form.gram(), form.cross_gram(rows), form.dense()
        assert plan is None or not plan.measured


@pytest.mark.parametrize(
    "make",
    [
        lambda: Plan(memory_limit=0),
        lambda: Plan(memory_limit=math.nan),
        lambda: Plan(memory_limit=True),
        lambda: Plan(routes={"*": "rows"}),
        lambda: Route(rows="autocorrelation"),
        lambda: Route(gram="grouped"),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(ConfigurationError):
        make()
