"""Routes: every one forced on every layer shape of the corner cases, and limits on memory."""

import itertools
import math

import pytest
import torch
from corners import CORNERS
from largest import Largest
from torch import nn
from torch.nn import functional

import curvlib
from curvlib import Exact, Gaussian, Momentum, Plan, Sampled, Woodbury
from curvlib.arrays import pack, unpack
from curvlib.errors import ConfigurationError
from curvlib.factors import Route, cost
from curvlib.layers import ConvolutionFactors

ROUTES = [
    Route(*answers) for answers in itertools.product(("grouped", "unfold"), ("pairs", "rows"), ("factored", "rows"))
]
PLANS = {
    **{f"{route.rows}, {route.gram}, {route.keep}": Plan(routes={"*": route}) for route in ROUTES},
    "a limit of 100 bytes": Plan(memory_limit=100),
    "rows in parts": Plan(memory_limit=100, routes={"*": Route(gram="rows")}),
    "timed": Plan(timed=True),
}
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
    torch.testing.assert_close(given, expected, rtol=tolerance, atol=tolerance * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", SHAPES)
def test_every_route_equals_the_dense_rows(name, plan):
    plain = {block: rows.dense() for block, rows in rows_of(name).items()}
    for block, rows in rows_of(name, PLANS[plan]).items():
        dense, kept = plain[block], rows.compact()
        matrix = torch.cat([values.flatten(1) for values in dense.values.values()], dim=1)
        vector = {name: torch.cos(torch.arange(p.numel()).double()).reshape(p.shape[1:]) for name, p in (
            (name, values[:1]) for name, values in dense.values.items()
        )}  # fmt: skip
        flat = torch.cat([vector[name].flatten() for name in dense.values])
        weights = torch.sin(torch.arange(len(matrix)).double())
        for form in (rows, kept):
            close(form.gram(), matrix @ matrix.T, 1e-10)
            close(form.cross_gram(rows), matrix @ matrix.T, 1e-10)
            close(form.matvec(vector), matrix @ flat, 1e-10)
            given = form.rmatvec(weights)
            close(torch.cat([given[name].flatten() for name in dense.values]), matrix.T @ weights, 1e-10)
            for name, values in form.dense().values.items():
                close(values, dense.values[name], 1e-10)


CONVOLUTIONS = [name for name in SHAPES if "conv" in name or "padding" in name or "dil" in name]


@pytest.mark.parametrize(("route", "limit"), [("grouped", "_GROUPED"), ("unfold", "_UNFOLDED")])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_rows_of_a_convolution_by_parts_equal_the_whole(name, route, limit, monkeypatch):
    plan = PLANS[f"{route}, rows, rows"]
    whole = {block: rows.dense() for block, rows in rows_of(name, plan).items()}
    monkeypatch.setattr(cost, limit, 1)
    for block, rows in rows_of(name, plan).items():
        for parameter, values in rows.dense().values.items():
            close(values, whole[block].values[parameter], 1e-12)


@pytest.mark.parametrize(("route", "limit"), [("grouped", "_GROUPED"), ("unfold", "_UNFOLDED")])
def test_rows_of_a_convolution_by_parts_can_be_differentiated(route, limit, monkeypatch):
    monkeypatch.setattr(cost, limit, 1)
    torch.manual_seed(0)
    images, cotangents = torch.randn(4, 3, 5, 5).double(), torch.randn(4, 2, 6, 3, 3).double()

    def rows(x, g):
        form = ConvolutionFactors(x, g, (6, 3, 3, 3), stride=(1, 1), dilation=(1, 1), groups=1)
        return form.planned(Plan(routes={"*": Route(rows=route)}).of("")).dense().values["weight"]

    assert torch.autograd.gradcheck(rows, (images.requires_grad_(), cotangents.requires_grad_()))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_routes_agree_in_single_precision(name):
    for plan in PLANS.values():
        for block, rows in rows_of(name, plan, torch.float32).items():
            expected = rows_of(name, None, torch.float64)[block].gram().float()
            close(rows.compact().gram(), expected, 1e-4)


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
    assert {question for question, _ in measured} == {"rows", "gram"}
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


@pytest.mark.parametrize(
    "make",
    [
        lambda: Plan(memory_limit=0),
        lambda: Plan(memory_limit=math.nan),
        lambda: Plan(memory_limit=True),
        lambda: Plan(routes={"*": "rows"}),
        lambda: Route(rows="shifted"),
        lambda: Route(gram="grouped"),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(ConfigurationError):
        make()
