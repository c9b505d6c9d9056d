"""No step reads a number of the device: seen on a CPU, by what torch is asked, and on a device that has no numbers."""

import pytest
import torch
from host_reads import host_reads
from torch import nn
from torch.nn import functional

import curvlib
from curvlib import Empirical, Exact, Gaussian, Momentum, Sampled, WeightDecay, Woodbury, arrays, compose
from curvlib.arrays import torch_decompositions
from curvlib.precond import GradientClip, Graft, KLClip, NormConstraint, PureStep, TrustRatio
from curvlib.precond.deferral import Later, Verdict
from curvlib.precond.deferring import Deferring
from curvlib.solvers import EKFAC, KFAC, SKFAC, SPRING, Dense, Diagonal, Eva, Identity, MinSR

USUAL = (KLClip(), WeightDecay(1e-3), Momentum(0.9, nesterov=True))
CONFIGURATIONS = {
    "TENGraD": {},
    "TENGraD, exact": {"fisher": Exact()},
    "TENGraD, Bernoulli": {"fisher": Sampled(curvlib.Bernoulli())},
    "TENGraD, Gaussian": {"fisher": Sampled(Gaussian(), samples=2)},
    "TENGraD, empirical": {"fisher": Empirical()},
    "TENGraD, gradients as rows": {"fisher": Empirical(), "fused": True, "transforms": (Momentum(0.9),)},
    "TENGraD, whole network": {"blocks": "network"},
    "TENGraD, float64": {"factorize_in": "float64"},
    "TENGraD, dampings": {"damping": {"0": 0.1, "*": 0.2}},
    "every transform": {
        "transforms": (
            GradientClip(1.0), WeightDecay(1e-3, coupled=True), KLClip(), Graft("adam"), TrustRatio(),
            NormConstraint(1.0),
        ),
    },
    "KFAC": {"solver": KFAC()},
    "KFAC, Cholesky, without balance": {"solver": KFAC(form="cholesky", damping="plain")},
    "KFAC, reduced": {"solver": KFAC(sharing="reduce")},
    "SKFAC": {"solver": SKFAC()},
    "Dense": {"solver": Dense()},
    "Diagonal": {"solver": Diagonal()},
    "Eva": {"solver": Eva(), "fisher": Empirical()},
    "Identity": {"solver": Identity()},
    "SPRING": {"solver": SPRING(), "fisher": Empirical()},
    "MinSR": {"solver": MinSR(), "fisher": Empirical()},
    "AdamW beside it": {"rest": "adamw"},
}  # fmt: skip
EIGEN = {"EKFAC": EKFAC(), "KFAC, exact": KFAC(damping="exact"), "low rank": Woodbury(low_rank=0.9)}


class Scaled(nn.Module):
    """Has a parameter outside every block."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * x


def network(bare=False):
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(2, 4, 3, stride=2, groups=2), nn.ReLU(), nn.Conv2d(4, 3, 2, bias=False), nn.Flatten()]
    return nn.Sequential(*convolutions, *([Scaled()] if bare else []), nn.Linear(12, 5))


def composed(model, refresh, **options):
    given = {"fisher": Sampled(), "solver": Woodbury(), "damping": 0.1, "transforms": USUAL, **options}
    return compose(model, lr=0.1, refresh=refresh, **{"deferred": True, **given})


def batch(device="cpu"):
    return torch.linspace(-1, 1, 6 * 128, device=device).cos().reshape(6, 2, 8, 8), torch.arange(6, device=device) % 5


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.fixture
def reads(monkeypatch):
    """Reads by the host, but for those of verdicts that have had a whole step to arrive."""
    with host_reads() as mode:
        mode.allowed = True
        monkeypatch.setattr(Verdict, "holds", mode.allowing(Verdict.holds))
        monkeypatch.setattr(torch.optim.AdamW, "step", mode.allowing(torch.optim.AdamW.step))  # counts on the host
        yield mode


def found(mode, options, refresh, steps=4):
    model = network(bare="rest" in options)
    optimizer, given = composed(model, refresh, **options), batch()
    for number in range(2 + steps):
        mode.allowed = number < 2  # the first pass is checked, and the first curvature looked at
        step(model, optimizer, *given)
    mode.allowed = True
    assert not optimizer._wary
    assert optimizer.health.steps == 2 + steps
    return mode.found


@pytest.mark.parametrize("refresh", [1, 3, 100])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_no_step_reads_a_number(name, refresh, reads):
    options = CONFIGURATIONS[name]
    if getattr(options.get("solver"), "of_fresh_rows", False) and refresh > 1:
        pytest.skip("solves for the gradient of its own rows alone")
    assert found(reads, options, refresh) == []


class Last(nn.Module):
    """The last position of a sequence, of what an LSTM or anything else returns."""

    def forward(self, x):
        return (x[0] if isinstance(x, tuple) else x)[:, -1]


def encoder():
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)


NETWORKS = {
    "attention": lambda: nn.Sequential(encoder(), Last(), nn.Linear(8, 5)),
    "recurrence": lambda: nn.Sequential(nn.LSTM(8, 6, batch_first=True), Last(), nn.Linear(6, 5)),
    "normalisation": lambda: nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.PReLU(), Last(), nn.Linear(6, 5)),
    "batch normalisation": lambda: nn.Sequential(nn.Conv1d(6, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(24, 5)),
    "transposed": lambda: nn.Sequential(
        nn.ConvTranspose1d(6, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(40, 5)
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_no_layer_reads_a_number(name, reads):
    torch.manual_seed(0)
    model, x, y = NETWORKS[name](), torch.randn(10, 6, 8), torch.arange(10) % 5
    optimizer = composed(model, 1)
    for number in range(3):
        reads.allowed = number < 2
        step(model, optimizer, x, y)
    reads.allowed = True
    assert reads.found == []
    assert optimizer._unseen is not None


@pytest.mark.parametrize("refresh", [1, 3])
@pytest.mark.parametrize("name", [*CONFIGURATIONS, *EIGEN])
def test_steps_are_those_that_are_looked_at_at_once(name, refresh):
    options = CONFIGURATIONS.get(name, {"solver": EIGEN.get(name)})
    if getattr(options.get("solver"), "of_fresh_rows", False) and refresh > 1:
        pytest.skip("solves for the gradient of its own rows alone")
    ends = []
    for deferred in (False, True):
        model = network(bare="rest" in options)
        optimizer, (x, y) = composed(model, refresh, **{"deferred": deferred, **options}), batch()
        for number in range(10):
            step(model, optimizer, x.roll(number, 0), y)
        assert (optimizer._unseen is not None) == deferred
        ends.append((list(model.parameters()), [value for held in optimizer.state.values() for value in held.values()]))
        assert optimizer.health.steps == 10
    for left, right in zip(*(parameters + buffers for parameters, buffers in ends), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", EIGEN)
def test_eigendecompositions_alone_are_waited_for(name, reads):
    assert found(reads, {"solver": EIGEN[name]}, 100) == []
    files = {line.split(" at ")[1].split(":")[0] for line in found(reads, {"solver": EIGEN[name]}, 1)}
    truncation = {"/factors/lowrank.py"} if name == "low rank" else set()  # how much is kept decides a shape
    assert files == {"/arrays/torch_decompositions.py", "/arrays/linalg.py"} | truncation


def test_what_reads_is_seen(reads):
    reads.allowed = False
    x = torch.arange(4.0)
    for look in (
        lambda: bool(x[0] > 1), lambda: float(x.sum()), lambda: x.tolist(), lambda: x.numpy(), lambda: x.cpu(),
        lambda: x[x > 1], lambda: x.nonzero(), lambda: torch.equal(x, x), lambda: torch.linalg.cholesky(torch.eye(2)),
        lambda: torch.linalg.eigh(torch.eye(2)), lambda: torch.tensor([1.0]), lambda: x[[0, 1]], lambda: x.unique(),
        lambda: torch.multinomial(x + 1, 1), lambda: torch.repeat_interleave(torch.ones(2, dtype=torch.int64)),
        lambda: torch.linalg.svd(torch.eye(2)), lambda: torch.linalg.solve(torch.eye(2), x[:2]), lambda: x.max().item(),
    ):  # fmt: skip
        before = len(reads.found)
        look()
        assert len(reads.found) > before
    before = len(reads.found)
    torch.linalg.cholesky_ex(torch.eye(2))
    torch.where(x > 1, x, torch.zeros_like(x))
    assert len(reads.found) == before


def test_a_verdict_travels_in_the_background(monkeypatch):
    """What torch is told on a GPU, in order; nothing of it can be run here."""
    told = []

    class Told:
        def __init__(self, name):
            self.name = name

        def __getattr__(self, verb):
            return lambda *args, **kwargs: told.append((self.name, verb, kwargs))

        def __bool__(self):
            told.append((self.name, "read", {}))
            return True

    class Good(Told):
        is_cuda, device = True, "cuda:0"

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: told.append(("torch", "empty", kwargs)) or Told("host"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: Told("event"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    verdict = Verdict(Good("good"))
    assert told == [
        ("torch", "empty", {"dtype": torch.bool, "device": "cpu", "pin_memory": True}),
        ("host", "copy_", {"non_blocking": True}),
        ("event", "record", {}),
    ]
    assert verdict.holds()
    assert told[3:] == [("event", "synchronize", {}), ("host", "read", {})]


@pytest.mark.parametrize("rows", [3, 512], ids=["a call each", "all at once"])
def test_several_systems_are_solved_without_magma(rows, monkeypatch):
    monkeypatch.setattr(torch_decompositions, "_TOGETHER_UP_TO", rows)
    square, rhs = torch.randn(4, 2, 6, 9, dtype=torch.float64), torch.randn(4, 2, 6, 5, dtype=torch.float64)
    matrices = square @ square.mT
    found = torch_decompositions._solved_together(torch.linalg.cholesky(matrices), rhs)
    torch.testing.assert_close(found, torch.linalg.solve(matrices, rhs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("composed_eagerly", [{"deferred": False}, {"deferred": None}])
def test_on_a_cpu_steps_read_unless_told_otherwise(composed_eagerly, reads):
    model = network()
    optimizer = compose(model, fisher=Empirical(), solver=Woodbury(), damping=0.1, lr=0.1, **composed_eagerly)
    step(model, optimizer, *batch())
    reads.allowed = False
    step(model, optimizer, *batch())
    assert reads.found


@pytest.mark.parametrize("solver", [Woodbury(), KFAC(decay=0.0), SKFAC(), Dense()], ids=repr)
def test_no_pure_step_reads_a_number(solver, reads):
    pure = PureStep(network(), functional.cross_entropy, solver=solver, damping=0.1, lr=0.1, transforms=[Momentum(0.9)])
    x, y = batch()
    state, expected = pure.init(x), pure.init(x)
    reads.allowed = False
    for _ in range(2):
        with arrays.deferred() as checks:
            new, loss = pure(state, (x,), (y,))
            good = checks.good
            pure.write(state, new, good)
    reads.allowed = True
    assert reads.found == []
    assert bool(good)
    for _ in range(2):
        expected, expected_loss = pure(expected, (x,), (y,))
    assert torch.equal(loss, expected_loss)
    for name, value in state["parameters"].items():
        assert torch.equal(value, expected["parameters"][name])
    for left, right in zip(state["buffers"]["0.momentum"], expected["buffers"]["0.momentum"], strict=True):
        assert torch.equal(left, right)


def test_a_pure_step_that_fails_writes_nothing():
    pure = PureStep(network(), functional.cross_entropy, solver=Woodbury(), damping=0.1, lr=0.1)
    x, y = batch()
    state = pure.init(x)
    before = {name: value.clone() for name, value in state["parameters"].items()}
    with arrays.deferred() as checks:
        pure.write(state, pure(state, (x * torch.nan,), (y,))[0], checks.good)
    assert not bool(checks.good)
    assert all(torch.equal(value, before[name]) for name, value in state["parameters"].items())
    pure.write(state, pure(state, (x,), (y,))[0])
    assert not torch.equal(state["parameters"]["4.weight"], before["4.weight"])


# -- a device without numbers: reading one is an error, and so is a tensor of the CPU among its tensors ----------------


@pytest.fixture
def no_numbers(monkeypatch):
    ordinary = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device=None: ordinary())  # the device has none
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device=None: False)  # nor this
    for name in ("exponential_", "bernoulli", "normal_"):  # nor any use for a source of randomness
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *_, original=original, generator=None: original(self))
    monkeypatch.setattr(torch, "bernoulli", lambda probabilities, generator: probabilities.bernoulli())
    monkeypatch.setattr(Deferring, "_later", lambda self, rows: Later())  # the first step too
    monkeypatch.setattr(Verdict, "holds", lambda self: True)


@pytest.mark.parametrize("refresh", [1, 2])
@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if name != "AdamW beside it"])
def test_a_step_needs_no_numbers(name, refresh, no_numbers):
    options = CONFIGURATIONS[name]
    if getattr(options.get("solver"), "of_fresh_rows", False) and refresh > 1:
        pytest.skip("solves for the gradient of its own rows alone")
    model = network().to("meta")
    optimizer = composed(model, refresh, verify=False, **options)
    for _ in range(3):
        step(model, optimizer, *(tensor.to("meta") for tensor in batch()))
    assert optimizer.steps == 3
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(next(model.parameters()).detach().sum())
