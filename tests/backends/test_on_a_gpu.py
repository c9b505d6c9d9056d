"""What only a GPU can show: shared memory, torch's stream and allocator, and steps that wait for nothing."""

import pytest
import torch
from libraries import needs_cuda, needs_cupy
from torch import nn
from torch.nn import functional

import curvlib
from curvlib import arrays
from curvlib.errors import ConfigurationError, NonFiniteError
from curvlib.factors import OuterProduct, SharedOuter
from curvlib.precond import GradientClip, PureStep
from curvlib.precond.places import CupyPlace
from curvlib.solvers import EKFAC, KFAC, SKFAC, SPRING, Dense, Diagonal, Woodbury

pytestmark = needs_cuda


def network():
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(2, 4, 3, stride=2, groups=2), nn.ReLU(), nn.Conv2d(4, 3, 2, bias=False), nn.Flatten()]
    return nn.Sequential(*convolutions, nn.Linear(12, 5)).double().cuda()


def train(model, solver, steps=3, refresh=1, **options):
    optimizer = curvlib.compose(model, solver=solver, damping=0.1, lr=0.1, refresh=refresh, **options)
    x, y = torch.linspace(-1, 1, 6 * 128).cos().reshape(6, 2, 8, 8).double().cuda(), torch.arange(6).cuda() % 5
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.fixture
def waits_raise():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


# -- torch ------------------------------------------------------------------------------------------------------------

ROWS = [
    lambda: OuterProduct(torch.randn(8, 5, device="cuda"), torch.randn(8, 2, 4, device="cuda"), bias="bias", samples=8),
    lambda: SharedOuter(
        torch.randn(8, 3, 1, 5, device="cuda"), torch.randn(8, 1, 3, 1, 4, device="cuda"), (4, 5), samples=8
    ),
]


@pytest.mark.parametrize("build", ROWS)
@pytest.mark.parametrize("solver", [Woodbury(), Dense(), KFAC(), SKFAC(), Diagonal()], ids=repr)
def test_no_verb_of_a_solver_waits_for_the_device(solver, build, waits_raise):
    rows = build()
    with arrays.deferred() as checks:
        inverse = solver.factorize(solver.update(None, rows), 0.1)
        natural = solver.solve(inverse, {name: torch.ones(shape, device="cuda") for name, shape in rows.shapes.items()})
        assert checks.good is None or checks.good.is_cuda
    torch.cuda.set_sync_debug_mode("default")
    checks.raise_if_failed()
    assert all(bool(torch.isfinite(value).all()) for value in natural.values())


STEPS = {
    "TENGraD": {"fisher": curvlib.Sampled()},
    "TENGraD, exact": {"fisher": curvlib.Exact()},
    "TENGraD, empirical": {},
    "TENGraD, gradients as rows": {"fused": True, "transforms": (curvlib.Momentum(0.9),)},
    "TENGraD, float64": {"factorize_in": "float64", "matmul_precision": "high"},
    "KFAC": {"solver": KFAC()},
    "SKFAC": {"solver": SKFAC()},
    "Dense": {"solver": Dense()},
    "Diagonal": {"solver": Diagonal()},
    "EKFAC": {"solver": EKFAC(), "refresh": 100},
    "clipped": {"transforms": (GradientClip(1.0), curvlib.Momentum(0.9))},
}


@pytest.mark.parametrize("refresh", [1, 3, 100])
@pytest.mark.parametrize("name", STEPS)
def test_no_step_waits_for_the_device(name, refresh):
    model, usual = network(), (curvlib.KLClip(), curvlib.WeightDecay(1e-3), curvlib.Momentum(0.9))
    options = {"fisher": curvlib.Empirical(), "solver": Woodbury(), "transforms": usual, "refresh": refresh}
    optimizer = curvlib.compose(model, damping=0.1, lr=0.1, **{**options, **STEPS[name]})
    x, y = torch.ones(6, 2, 8, 8, device="cuda").double(), torch.zeros(6, device="cuda", dtype=torch.int64)
    try:
        for step in range(6):
            if step == 2:  # the first pass is checked, and the first curvature looked at
                torch.cuda.set_sync_debug_mode("error")
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.health.steps == 6
    assert not optimizer._wary


@pytest.mark.parametrize("solver", [Woodbury(), Dense(), KFAC(), SKFAC()], ids=repr)
def test_steps_are_those_that_are_looked_at_at_once(solver):
    ends = [train(network(), solver, steps=6, fisher=curvlib.Exact(), deferred=deferred) for deferred in (False, None)]
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-12)


def test_routes_are_chosen_by_timing_them():
    optimizer = curvlib.compose(network(), solver=Woodbury(), damping=0.1, lr=0.1)
    assert optimizer.plan.timed
    assert not curvlib.compose(network(), solver=Woodbury(), damping=0.1, lr=0.1, plan=curvlib.Plan()).plan.timed


def test_a_step_that_fails_moves_nothing_and_is_told_of_one_step_later():
    model = network()
    optimizer = curvlib.compose(model, fisher=curvlib.Empirical(), solver=Woodbury(), damping=0.1, lr=0.1)
    x, y = torch.randn(6, 2, 8, 8, device="cuda").double(), torch.arange(6, device="cuda") % 5
    for number in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        functional.cross_entropy(model(x * (torch.nan if number == 2 else 1)), y).backward()
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    with pytest.raises(NonFiniteError, match="step 2"):
        optimizer.state_dict()


@pytest.mark.parametrize("solver", [Woodbury(), KFAC(decay=0.0), SKFAC(), Dense()], ids=repr)
def test_a_pure_step_is_captured_as_a_graph(solver):
    pure = PureStep(
        network(), functional.cross_entropy, solver=solver, damping=0.1, lr=0.1, transforms=[curvlib.Momentum(0.9)]
    )
    batches = [(torch.randn(6, 2, 8, 8, device="cuda").double(), torch.randint(5, (6,), device="cuda")) for _ in "123"]
    x, y = (tensor.clone() for tensor in batches[0])
    state, expected = pure.init(x), pure.init(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), arrays.deferred():
        for _ in range(3):  # libraries make their handles and workspaces
            pure(state, (x,), (y,))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), arrays.deferred() as checks:
        new, loss = pure(state, (x,), (y,))
        good = checks.good
        pure.write(state, new, good)
    for batch in batches:
        for static, fresh in zip((x, y), batch, strict=True):
            static.copy_(fresh)
        graph.replay()
        expected, expected_loss = pure(expected, batch[:1], batch[1:])
        assert bool(good)
        torch.testing.assert_close(loss, expected_loss)
    for name, value in state["parameters"].items():
        torch.testing.assert_close(value, expected["parameters"][name], rtol=0, atol=1e-10)
    before = {name: value.clone() for name, value in state["parameters"].items()}
    x.fill_(torch.nan)
    graph.replay()
    assert not bool(good)
    assert all(torch.equal(value, before[name]) for name, value in state["parameters"].items())


def test_precision_holds_for_curvature_alone():
    matrix = torch.randn(512, 512, device="cuda")
    exact = (matrix.double() @ matrix.double().T).float()
    rows = OuterProduct(matrix, torch.ones(512, 1, device="cuda"))
    before = torch.get_float32_matmul_precision()
    for precision, accurate in (("highest", True), ("high", False)):
        solver = curvlib.compose(
            nn.Sequential(nn.Linear(512, 1, bias=False)).cuda(), fisher=curvlib.Empirical(), solver=SPRING(),
            damping=1.0, lr=0.1, matmul_precision=precision,
        ).solvers["0"]  # fmt: skip
        error = (solver.update(None, rows).kernel * 512 - exact).abs().max()
        if accurate or torch.cuda.get_device_capability() >= (8, 0):
            assert (float(error) < 1e-3) == accurate
    assert torch.get_float32_matmul_precision() == before


# -- CuPy -------------------------------------------------------------------------------------------------------------


def with_cupy(test):
    for mark in needs_cupy:
        test = mark(test)
    return test


@with_cupy
def test_memory_is_shared_in_both_directions():
    place, tensor = CupyPlace(0), torch.arange(6.0, device="cuda").reshape(2, 3)
    with place.working():
        array = place.enter(tensor.t())
        array[0, 1] = 9
        assert place.leave(array).data_ptr() == tensor.data_ptr()
        assert place.leave(array[::-1]).tolist() == array[::-1].tolist()
    assert tensor[1, 0] == 9


@with_cupy
def test_memory_is_torchs():
    import cupy

    before = torch.cuda.memory_allocated()
    with CupyPlace(0).working():
        array = cupy.zeros(1 << 20)
    assert torch.cuda.memory_allocated() >= before + (1 << 23)
    tensor = CupyPlace(0).leave(array)
    del array
    assert tensor.sum() == 0
    del tensor
    assert torch.cuda.memory_allocated() == before


@with_cupy
@pytest.mark.parametrize("own_stream", [False, True])
@pytest.mark.parametrize("solver", [Woodbury(), Dense(), KFAC(), KFAC(damping="exact"), EKFAC(), Diagonal()], ids=repr)
def test_training_is_that_of_torch(solver, own_stream):
    options = {"fisher": curvlib.Sampled(curvlib.Categorical())}
    expected = train(network(), solver, **options)
    stream = torch.cuda.Stream() if own_stream else torch.cuda.default_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = train(network(), solver, backend="cupy", **options)
    torch.cuda.synchronize()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@with_cupy
def test_a_captured_graph_is_refused():
    place, graph = CupyPlace(0), torch.cuda.CUDAGraph()
    with (
        torch.cuda.graph(graph),
        pytest.raises(ConfigurationError, match="cannot be captured in a CUDA graph"),
        place.working(),
    ):
        pass


@with_cupy
def test_tensors_of_the_cpu_are_refused():
    with pytest.raises(ConfigurationError, match="on cpu"):
        CupyPlace(0).enter(torch.zeros(2))
