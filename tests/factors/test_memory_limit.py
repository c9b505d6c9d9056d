"""A plan's limit on memory, on every exact route: the largest tensor of Grams, products and whole steps."""

import dataclasses
from functools import partial

import pytest
import torch
from kinds import numbers
from largest import Largest
from torch import nn

import curvlib
from curvlib import Empirical, Plan, Sampled, Woodbury
from curvlib.factors import Dense, OneHotOuter, Route, SharedOuter, cost
from curvlib.layers import ConvolutionFactors
from curvlib.layers.autocorrelation import windows
from curvlib.solvers import EKFAC, KFAC

N = 16
ROUTES = {"pairs": Route(gram="pairs"), "rows": Route(gram="rows"), "free": Route()}


def shared(positions, d_in, d_out, groups=1, columns=1, seed=0):
    return SharedOuter(
        numbers("torch", N, positions, groups, d_in, seed=seed),
        numbers("torch", N, columns, positions, groups, d_out, seed=seed + 1),
        weight_shape=(groups * d_out, d_in),
        bias="bias",
    )


def convolution(channels, d_out, space=4, taps=3, groups=1, stride=1, columns=1, seed=0):
    positions = (space - 1) // stride + 1
    return ConvolutionFactors(
        numbers("torch", N, channels, space, space, seed=seed),
        numbers("torch", N, columns, d_out, positions, positions, seed=seed + 1),
        weight_shape=(d_out, channels // groups, taps, taps),
        stride=(stride, stride),
        dilation=(1, 1),
        groups=groups,
        bias="bias",
        padding=(taps // 2, taps // 2),
    )


def lookups(vocabulary, positions, d, columns=1, seed=0):
    torch.manual_seed(seed)
    indices = torch.randint(0, vocabulary, (N, positions))
    return OneHotOuter(indices, numbers("torch", N, columns, positions, d, seed=seed), vocabulary)


def batch(factors):
    """Elements of the largest of what the factors are made of."""
    return max(value.numel() for value in vars(factors).values() if isinstance(value, torch.Tensor))


def planned(factors, route, limit=None):
    return factors.planned(Plan(limit, {"*": ROUTES[route]}).of(""))


# Each with rows and tables several times as large as its batch and its Gram.
PAIRS = {
    "sequences": lambda seed=0: shared(16, 16, 12, seed=seed),
    "groups": lambda seed=0: shared(16, 4, 4, groups=3, seed=seed),
    "columns": lambda seed=0: shared(12, 8, 8, columns=3, seed=seed),
    "convolution": lambda seed=0: convolution(8, 8, seed=seed),
    "grouped": lambda seed=0: convolution(8, 8, groups=2, seed=seed),
    "depthwise": lambda seed=0: convolution(8, 8, groups=8, seed=seed),
    "strided": lambda seed=0: convolution(6, 8, space=8, stride=2, columns=2, seed=seed),
}
ROWS = {
    "sequences": lambda seed=0: shared(4, 64, 48, seed=seed),
    "groups": lambda seed=0: shared(3, 32, 32, groups=3, seed=seed),
    "columns": lambda seed=0: shared(4, 48, 48, columns=3, seed=seed),
    "convolution": lambda seed=0: convolution(16, 16, seed=seed),
    "grouped": lambda seed=0: convolution(32, 32, groups=2, seed=seed),
    "depthwise": lambda seed=0: convolution(8, 16, space=2, taps=5, groups=8, seed=seed),
    "strided": lambda seed=0: convolution(8, 32, space=6, stride=2, columns=2, seed=seed),
}
CASES = [
    *((name, make, route) for route in ("pairs", "free") for name, make in PAIRS.items()),
    *((name, make, route) for route in ("rows", "free") for name, make in ROWS.items()),
]


def measured(compute):
    with Largest() as largest:
        result = compute()
    return result, largest.elements


def close(given, expected):
    torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("product", ["gram", "cross", "cross with a scaled one", "cross with one without a plan"])
@pytest.mark.parametrize(("name", "make", "route"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_grams_respect_the_limit(name, make, route, product):
    own, other = make(), make(seed=50)
    bound = max(batch(own), len(own) ** 2)

    def compute(limit):
        mine = planned(own, route, limit)
        if product == "gram":
            return measured(mine.gram)
        theirs = other if "without" in product else planned(other, route, limit)
        return measured(lambda: mine.cross_gram(theirs.scaled(0.5) if "scaled" in product else theirs))

    (free, most), (result, elements) = compute(None), compute(8 * bound)
    close(result, free)
    assert elements <= bound
    if route == "rows" or (route == "pairs" and "scaled" not in product):  # a scaled one is multiplied out by default
        assert most >= 2 * bound


@pytest.mark.parametrize("name", ["convolution", "grouped", "strided"])
def test_products_of_different_kinds_respect_the_limit(name):
    own, other = ROWS[name](), ROWS[name](seed=50)
    theirs = other.dense()
    expected, bound = own.dense().cross_gram(theirs), max(batch(own), batch(other.patches()), len(own) ** 2)
    mine = planned(own, "rows", 8 * bound)
    a_sample = own.sizes.columns * own.size
    for two in (theirs, theirs.scaled(1.0), other.patches()):
        result, elements = measured(lambda two=two: mine.cross_gram(two))
        close(result, expected)
        assert elements <= max(bound, a_sample) < len(own) * own.size
    result, elements = measured(lambda: theirs.cross_gram(mine))
    close(result, expected.T)
    assert elements <= max(bound, a_sample)


@pytest.mark.parametrize("name", ["sequences", "grouped", "strided", "depthwise"])
def test_covariances_and_diagonals_respect_the_limit(name):
    own = ROWS[name]()
    a_sample = own.sizes.columns * own.size
    bound = max(batch(own), 2 * a_sample)
    limited = planned(own, "free", 8 * bound)
    diagonal, most = measured(own.diagonal)
    given, elements = measured(limited.diagonal)
    assert elements <= bound < most
    for parameter, value in diagonal.items():
        close(given[parameter], value)
    small = PAIRS[name]()
    close(planned(small, "free", 8).covariance(), small.covariance())


def test_lookups_respect_the_limit():
    frequent = lookups(N, 4 * N, 8)
    limit = batch(frequent) // 8
    assert isinstance(planned(frequent, "free").compact(), Dense)
    kept = planned(frequent, "free", 8 * limit).compact()
    assert isinstance(kept, OneHotOuter)
    close(kept.gram(), frequent.gram())
    close(kept.cross_gram(frequent.dense()), frequent.gram())
    close(kept.diagonal()["weight"], frequent.diagonal()["weight"])

    table = lookups(5 * N, 4 * N, 8)
    decoder = shared(8, 8, 5 * N)
    decoder = SharedOuter(decoder.inputs, decoder.cotangents, decoder.weight_shape)
    bound = max(batch(table), batch(decoder))
    expected, most = measured(lambda: table.cross_gram(decoder))
    limited = planned(table, "free", 8 * bound)
    for one, two, truth in ((limited, decoder, expected), (decoder, limited, expected.T)):
        result, elements = measured(lambda one=one, two=two: one.cross_gram(two))
        close(result, truth)
        assert elements <= bound < most / 4


class Sequences(nn.Module):
    """Lookups, a linear map and perhaps a recurrent layer over positions."""

    def __init__(self, d, cell):
        super().__init__()
        self.table, self.linear, self.head = nn.Embedding(5 * N, d), nn.Linear(d, d), nn.Linear(d, 3)
        self.cell = nn.GRU(d, d, batch_first=True) if cell else None

    def forward(self, x):
        x = torch.tanh(self.linear(self.table(x)))
        return self.head((x if self.cell is None else self.cell(x)[0]).mean(1))


class Tied(nn.Module):
    """Two linear maps over positions that have their weight in common, but not their biases."""

    def __init__(self, d):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).mean(1))


def images(layer):
    return nn.Sequential(layer, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(layer.out_channels, 3))


def indices(positions):
    return torch.randint(0, 5 * N, (N, positions), generator=torch.Generator().manual_seed(0))


# Narrow layers of many positions, for tables of their pairs, and wide ones of few.
MANY = {
    "sequences": (lambda: Sequences(12, False), indices(24)),
    "recurrent": (lambda: Sequences(8, True), indices(48)),
    "tied": (lambda: Tied(12), numbers("torch", N, 24, 12)),
    "convolution": (lambda: images(nn.Conv2d(8, 8, 3, padding=1)), numbers("torch", N, 8, 4, 4)),
    "grouped": (lambda: images(nn.Conv2d(8, 8, 3, padding=1, groups=2)), numbers("torch", N, 8, 4, 4)),
    "depthwise": (lambda: images(nn.Conv2d(8, 8, 3, padding=1, groups=8)), numbers("torch", N, 8, 4, 4)),
    "strided": (lambda: images(nn.Conv2d(8, 8, 3, padding=1, stride=2)), numbers("torch", N, 8, 8, 8)),
}
FEW = {
    "sequences": (lambda: Sequences(48, False), indices(4)),
    "recurrent": (lambda: Sequences(32, True), indices(4)),
    "tied": (lambda: Tied(48), numbers("torch", N, 4, 48)),
    "convolution": (lambda: images(nn.Conv2d(16, 24, 3, padding=1)), numbers("torch", N, 16, 4, 4)),
    "grouped": (lambda: images(nn.Conv2d(32, 32, 3, padding=1, groups=2)), numbers("torch", N, 32, 4, 4)),
    "depthwise": (lambda: images(nn.Conv2d(16, 16, 5, padding=2, groups=16)), numbers("torch", N, 16, 2, 2)),
    "strided": (lambda: images(nn.Conv2d(8, 32, 3, padding=1, stride=2)), numbers("torch", N, 8, 4, 4)),
}
STEPS = [
    *((name, *model, route) for route in ("pairs", "free") for name, model in MANY.items()),
    *((name, *model, route) for route in ("rows", "free") for name, model in FEW.items()),
]


def unavoidable(model, x):
    """Elements of the largest activation, parameter and Gram."""
    sizes = [x.numel(), N * N, *(p.numel() for p in model.parameters())]

    def note(module, given, out):
        # The three gates of a recurrent layer are activations too.
        sizes.append(3 * out[0].numel() if isinstance(module, nn.GRU) else out.numel())

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return max(sizes)


def steps(build, x, solver, fisher, plan, **composition):
    """Parameters after two steps, and the elements of the largest tensor and of the largest unavoidable one."""
    torch.manual_seed(0)
    model = build().double()
    floor = unavoidable(model, x)
    y = torch.arange(N) % 3
    optimizer = curvlib.compose(
        model, fisher=fisher, solver=solver, damping=0.1, lr=0.01, verify=False, plan=plan, **composition
    )
    with Largest() as largest:
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return [p.detach() for p in model.parameters()], largest.elements, floor


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("fisher", [Empirical(), Sampled()], ids=["Empirical", "Sampled"])
@pytest.mark.parametrize(("name", "build", "x", "route"), STEPS, ids=lambda v: v if isinstance(v, str) else "")
def test_whole_steps_respect_the_limit(name, build, x, route, fisher, fused):
    # Rows that are kept explicitly have their Gram from them.
    routes = {"*": Route(gram="pairs", keep="factored") if route == "pairs" else ROUTES[route]}
    free, most, floor = steps(build, x, Woodbury(), fisher, Plan(routes=routes), fused=fused)
    given, elements, _ = steps(build, x, Woodbury(), fisher, Plan(8 * floor, routes), fused=fused)
    for one, other in zip(given, free, strict=True):
        close(one, other)
    assert elements <= floor
    if route != "free":
        assert most >= 2 * floor


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("name", ["sequences", "groups", "columns", "convolution", "grouped", "depthwise", "strided"])
@pytest.mark.parametrize("frozen", [None, "weight", "bias"])
def test_kronecker_moments_respect_the_limit(name, frozen, lines, monkeypatch):
    monkeypatch.setattr(cost, "lines_beat_patches", lambda *sizes: lines)
    for make in (PAIRS[name], ROWS[name]):
        own = dataclasses.replace(make(), **({} if frozen is None else {frozen: None}))
        sizes, pair = own.sizes, own.kronecker()
        a_sample = sizes.columns * sizes.groups * sizes.d_out * pair.inputs.shape[-1]
        bases = [torch.linalg.qr(one).Q for one in (pair.inputs, pair.cotangents)]
        # A sample of lines of the image, or of patches, its rows, and the factors.
        unfolded = sizes.groups * sizes.positions * pair.inputs.shape[-1]
        padded = windows(own.images, own._kernel).untyped_storage().nbytes() // 8 if hasattr(own, "images") else 0
        bound = max(batch(own), padded, a_sample, pair.inputs.numel(), pair.cotangents.numel(), unfolded)
        limited = planned(own, "free", 8 * bound)
        for sharing in ("expand", "reduce"):
            expected, (given, elements) = own.kronecker(sharing), measured(partial(limited.kronecker, sharing))
            close(given.inputs, expected.inputs)
            close(given.cotangents, expected.cotangents)
            assert elements <= bound
        given, elements = measured(partial(limited.rotated_squares, *bases))
        close(given, own.rotated_squares(*bases))
        assert elements <= bound


def test_rows_of_k_fac_are_larger_without_the_limit():
    wide, long = ROWS["convolution"](), convolution(4, 8, space=8)
    bases = [torch.eye(one.shape[-1]).double()[None] for one in (wide.kronecker().inputs, wide.kronecker().cotangents)]
    bound = wide.size
    assert measured(lambda: wide.rotated_squares(*bases))[1] >= 8 * bound
    assert measured(planned(long, "free").kronecker)[1] >= 2 * batch(long)


@pytest.mark.parametrize("solver", [KFAC(), EKFAC()], ids=["KFAC", "EKFAC"])
@pytest.mark.parametrize("name", [name for name in MANY if name not in ("tied", "recurrent")])
def test_whole_kronecker_steps_respect_the_limit(name, solver):
    build, x = MANY[name]
    free, _, floor = steps(build, x, solver, Empirical(), None)
    bound = max(floor, 5 * N * 5 * N)  # a factor of the lookups
    given, elements, _ = steps(build, x, solver, Empirical(), Plan(8 * bound))
    for one, other in zip(given, free, strict=True):
        close(one, other)
    assert elements <= bound


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("fisher", [Empirical(), Sampled()], ids=["Empirical", "Sampled"])
def test_an_exact_step_on_a_wide_layer_never_holds_rows_as_large_as_its_parameters(fisher, fused):
    width, n = 4096, 256
    model = nn.Sequential(nn.Linear(width, width, bias=False), nn.Linear(width, 10, bias=False))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.01)
    x, y = torch.cos(torch.arange(n * width).reshape(n, width)), torch.arange(n) % 10
    optimizer = curvlib.compose(model, fisher=fisher, solver=Woodbury(), damping=0.1, lr=0.01, fused=fused)
    with Largest() as largest:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert largest.elements <= width * width  # a gradient; the rows have n times as many
