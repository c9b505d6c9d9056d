"""What is refused, at construction or at a step, and changes nothing."""

import math

import pytest
import torch
from loop import X, Y, backward, built, network, same, steps, unchanged_by, values
from torch import nn
from torch.nn import functional

from curvlib import Categorical, Empirical, Exact, KLClip, Momentum, WeightDecay, Woodbury, compose
from curvlib.arrays import Deferred, Product
from curvlib.errors import CaptureError, ConfigurationError, NonFiniteError
from curvlib.precond.checks import check_directions
from curvlib.solvers import EKFAC, KFAC, KIS, SKFAC, SOAP, Switch


def test_a_step_before_any_backward():
    model = network()
    unchanged_by(model, built(model), r"call loss.backward\(\) before")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_name_their_parameters(bad):
    model = network()
    optimizer = built(model, fisher=Empirical(), transforms=[Momentum()])
    steps(model, optimizer, 2)
    optimizer.zero_grad()
    backward(model)
    model[2].weight.grad[0, 0] = bad
    momentum = optimizer.state[model[0].weight]["Momentum.momentum"].clone()
    unchanged_by(model, optimizer, r"step 2: the gradient is not finite in 2.weight")
    assert torch.equal(optimizer.state[model[0].weight]["Momentum.momentum"], momentum)
    steps(model, optimizer, 1)


def test_a_loss_that_is_not_finite():
    model = network()
    optimizer = built(model)
    before = values(model)

    def closure():
        backward(model)
        return torch.tensor(math.nan)

    with pytest.raises(CaptureError, match="the loss is nan"):
        optimizer.step(closure)
    assert same(values(model), before)


def test_outputs_that_are_not_finite():
    model = network()
    optimizer = built(model, verify=False)
    with pytest.raises(CaptureError, match="outputs are not finite"):
        model(X * math.inf)
    steps(model, optimizer, 1)


def test_an_empty_batch():
    model = network()
    optimizer = built(model)
    with pytest.raises(CaptureError, match="at least one; skip empty batches"):
        model(X[:0])
    steps(model, optimizer, 1)


def test_outputs_that_do_not_fit_the_likelihood():
    model = nn.Linear(5, 1).double()
    optimizer = built(model)
    with pytest.raises(ConfigurationError, match=r"at least two classes, got outputs of shape \(12, 1\)"):
        model(X)
    optimizer.detach()


def test_curvature_that_was_never_seen():
    model = network()
    with torch.enable_grad():
        outputs = model(X)
    optimizer = built(model)
    functional.cross_entropy(outputs, Y).backward()
    unchanged_by(model, optimizer, "step 0: block '0' has a gradient, but no call of its module was seen")


def test_sparse_gradients():
    model = nn.Sequential(nn.Embedding(10, 3, sparse=True), nn.Flatten(), nn.Linear(6, 3)).double()
    optimizer = built(model, verify=False, refresh=5)
    with optimizer.paused():
        functional.cross_entropy(model(torch.arange(8).reshape(4, 2)), Y[:4]).backward()
    unchanged_by(model, optimizer, "sparse=False")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0}, "damping must be a positive"),
        ({"damping": -1.0}, "damping must be a positive"),
        ({"damping": math.nan}, "damping must be a positive"),
        ({"damping": "auto"}, "number > 0, a Damping or"),
        ({"damping": True}, "number > 0, a Damping or"),
        ({"refresh": 0}, "refresh interval must be an integer ≥ 1"),
        ({"refresh": 2.5}, "refresh interval"),
        ({"lr": -0.1}, "lr must be"),
        ({"lr": math.inf}, "lr must be"),
        ({"lr": "fast"}, "lr must be"),
        ({"fisher": Categorical()}, "fisher must be Sampled"),
        ({"solver": Woodbury}, "must be a Solver"),
        ({"transforms": [0.9]}, "transforms must be"),
    ],
    ids=str,
)
def test_bad_parts_are_refused_at_construction_and_leave_no_hooks(options, message):
    model = network()
    with pytest.raises(ConfigurationError, match=message):
        built(model, **options)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda: KLClip(0), "bound > 0"),
        (lambda: Momentum(1.0), r"decay in \[0, 1\)"),
        (lambda: WeightDecay(-1), "rate ≥ 0"),
        (lambda: WeightDecay(math.nan), "rate ≥ 0"),
        (lambda: compose("model", fisher=Exact(), solver=Woodbury(), damping=1.0, lr=1.0), "torch.nn.Module"),
        (lambda: built(nn.ReLU()), "no trainable parameters"),
    ],
)
def test_parts_check_themselves(part, message):
    with pytest.raises(ConfigurationError, match=message):
        part()


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(5, 5))

    def forward(self, x):
        return x @ self.gain


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (
            lambda: nn.LSTM(5, 5),
            {"solver": KFAC()},
            r"'1' \(recurrent; KFAC\).*solver=\{'1': Woodbury\(\), '\*': KFAC\(",
        ),
        (lambda: nn.LayerNorm(5), {"solver": SOAP(), "fisher": Empirical()}, r"'1' \(layer_norm; SOAP\)"),
        (lambda: nn.MultiheadAttention(5, 1), {"solver": EKFAC()}, r"'1' \(multihead_attention; EKFAC\)"),
        (Gain, {"solver": KIS(sharing="reduce")}, r"'1' \(torch.func fallback; KIS\)"),
        (lambda: nn.Linear(5, 5), {"solver": KFAC(), "blocks": "network"}, r"'network' \(linear; KFAC\)"),
        (lambda: nn.LayerNorm(5), {"solver": Switch((Woodbury(), SKFAC()), (1,))}, r"'1' \(layer_norm; Switch\)"),
    ],
)
def test_kronecker_solvers_of_blocks_that_are_no_products_are_refused_at_construction(build, options, message):
    model = nn.Sequential(nn.Linear(5, 5), build(), nn.Linear(5, 5))
    with pytest.raises(ConfigurationError, match=f"of one weight matrix; those of .*{message}"):
        built(model, **options)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    if "blocks" not in options:
        built(model, **{**options, "solver": {"1": Woodbury(), "*": options["solver"]}})


@pytest.mark.parametrize(
    ("left", "right", "addend", "fine"),
    [
        (1e18, 1e18, None, True),
        (1e18, 1e18, 1e18, True),
        (1e30, 1e30, None, False),
        (math.nan, 0.0, None, False),
        (1.0, 1.0, math.inf, False),
        (1.0, 1.0, math.nan, False),
    ],
)
@pytest.mark.parametrize("deferred", [False, True])
def test_products_are_looked_at_before_they_are_multiplied(left, right, addend, fine, deferred):
    """Both matrices of the third are finite."""
    added = None if addend is None else torch.full((2, 2), addend)
    product = Product(torch.full((2, 3), left), torch.full((3, 2), right), None, added, -0.1)
    later = Deferred() if deferred else None
    directions = {"0": {"weight": torch.ones(3)}, "1": {"weight": product, "bias": torch.ones(2)}}
    refused = None
    try:
        check_directions(directions, [torch.ones(1)], 7, cause=lambda: None, later=later)
        if later is not None:
            later.raise_if_failed()
    except NonFiniteError as error:
        refused = str(error)
    assert (refused is None) == fine
    assert fine or "step 7: the natural gradient of block '1' is not finite" in refused


@pytest.mark.parametrize("solver", [KFAC(), KFAC(damping="exact"), EKFAC()], ids=repr)
def test_a_natural_gradient_that_is_a_product_is_refused_before_momentum_takes_it(solver):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 3))
    options = {"lr": 0.1, "refresh": 10, "transforms": [Momentum()], "fused": True}
    optimizer = compose(model, fisher=Exact(), solver=solver, damping=1.0, **options)
    x, y = torch.randn(4, 30), torch.tensor([0, 1, 2, 0])
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    before, momentum = values(model), optimizer.state[model[0].weight]["Momentum.momentum"].clone()
    optimizer.zero_grad()
    (1e38 * functional.cross_entropy(model(x), y)).backward()
    with pytest.raises((NonFiniteError, CaptureError), match="not finite"):
        optimizer.step()
    assert same(values(model), before)
    assert torch.equal(optimizer.state[model[0].weight]["Momentum.momentum"], momentum)
