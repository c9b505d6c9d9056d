"""Random sequences of everything a loop may do, against a plain dense optimizer that is told the same, in float64."""

import copy
import math

import pytest
import torch
from dense_reference import LAYERS, Reference, layer_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from curvlib import Empirical, Exact, Momentum, WeightDecay, Woodbury, compose
from curvlib.errors import CurvatureError
from curvlib.solvers import Dense

ACTIONS = (
    "nothing", "forward", "forward", "eval", "eval with gradients", "backward", "backward", "accumulate",
    "step", "step", "step", "closure", "zero_grad", "zero_grad", "save", "load", "freeze", "unfreeze", "lr", "damping",
    "add group", "exception in forward", "exception in loss", "exception in closure", "step on nan",
)  # fmt: skip


class ToldError(Exception):
    pass


class Activation(nn.Module):
    error = None

    def forward(self, x):
        if self.error is not None:
            raise self.error
        return x.tanh()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), Activation(), nn.Linear(4, 3), Activation(), nn.Linear(3, 2)).double()


class Loop:
    """The real loop and the reference, side by side."""

    def __init__(self, empirical, every, momentum, decay, solver, late, verify):
        self.model = network()
        members = set(LAYERS[:2] if late else LAYERS)
        options = {"only": ["0", "2"]} if late else {"groups": [{"blocks": "0", "lr": 0.3}]}
        self.optimizer = compose(
            self.model, fisher=Empirical() if empirical else Exact(), solver=solver, damping=0.2, lr=0.2, refresh=every,
            transforms=[Momentum(momentum), WeightDecay(decay)], verify=verify, **options,
        )  # fmt: skip
        parameters = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        lr = {layer: 0.3 if layer == "0" and not late else 0.2 for layer in LAYERS}
        self.reference = Reference(
            network(), parameters, empirical, every, momentum, decay, lr, damping=0.2, members=members
        )
        self.open, self.saved, self.count = [], None, 0

    def batch(self):
        self.count += 1
        random = torch.Generator().manual_seed(self.count)
        size = 2 + int(torch.randint(5, (1,), generator=random))
        x = torch.randn(size, 3, dtype=torch.float64, generator=random)
        return x, torch.randint(2, (size,), generator=random)

    def forward(self):
        x, y = self.batch()
        passed = self.reference.forward(x)
        self.open.append((self.model(x), y, passed))

    def backward(self, share=1.0):
        if not self.open:
            self.forward()
        outputs, y, passed = self.open.pop()
        (share * functional.cross_entropy(outputs, y)).backward()
        self.reference.backward(passed, y, share)

    def step(self, closure=None):
        self.open.clear()
        before = self.optimizer.steps
        if self.reference.step():
            self.optimizer.step(closure)
            assert self.optimizer.steps == before + 1
        else:
            with pytest.raises(CurvatureError):
                self.optimizer.step(closure)
            assert self.optimizer.steps == before

    # -- actions ------------------------------------------------------------------------------------------------------

    def act(self, action, number):
        getattr(self, "do_" + action.replace(" ", "_"))(number)

    def do_nothing(self, number):
        """What sequences shrink to."""

    def do_forward(self, number):
        if len(self.open) < 3:
            self.forward()

    def do_eval(self, number):
        self.model.eval()
        with torch.no_grad():
            self.model(self.batch()[0])
        self.model.train()

    def do_eval_with_gradients(self, number):
        x, _ = self.batch()
        self.reference.forward(x)
        self.model.eval()
        self.model(x)
        self.model.train()

    def do_backward(self, number):
        self.backward(1.0 + number)

    def do_accumulate(self, number):
        for _ in range(2 + number):
            self.forward()
            self.backward(1 / (2 + number))

    def do_step(self, number):
        if number:
            self.optimizer.zero_grad()
            self.reference.zero_grad()
            self.forward()
            self.backward()
        self.step()

    def do_closure(self, number):
        self.open.clear()
        x, y = self.batch()
        self.reference.zero_grad()
        self.reference.backward(self.reference.forward(x), y, 1.0)

        def closure():
            self.optimizer.zero_grad()
            loss = functional.cross_entropy(self.model(x), y)
            loss.backward()
            return loss.detach()

        self.step(closure)

    def do_zero_grad(self, number):
        self.optimizer.zero_grad(set_to_none=True)
        self.reference.zero_grad()

    def do_save(self, number):
        state = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
        self.saved = (*state, self.reference.saved())

    def do_load(self, number):
        if self.saved is None or self.saved[2]["members"] != self.reference.members:
            return
        self.open.clear()
        weights, state, reference = self.saved
        for layer in self.reference.members:
            self.model[int(layer)].requires_grad_(layer not in reference["asleep"])
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(copy.deepcopy(state))
        self.reference.loaded(reference)

    def do_freeze(self, number):
        layer = LAYERS[number]
        left = self.reference.members - self.reference.frozen - {layer}
        if left:
            self.model[int(layer)].requires_grad_(False)
            self.reference.frozen.add(layer)

    def do_unfreeze(self, number):
        self.model[int(LAYERS[number])].requires_grad_(True)
        self.reference.frozen.discard(LAYERS[number])

    def do_lr(self, number):
        group = self.optimizer.param_groups[number % len(self.optimizer.param_groups)]
        group["lr"] = 0.1 + 0.1 * number
        theirs = {id(p) for p in group["params"]}
        for name, p in self.model.named_parameters():
            if id(p) in theirs:
                self.reference.lr[layer_of(name)] = group["lr"]

    def do_damping(self, number):
        self.optimizer.damping = self.reference.damping = (0.1, 0.5, 2.0)[number]

    def do_add_group(self, number):
        if "4" not in self.reference.members:
            self.optimizer.add_param_group({"params": ["4.weight", "4.bias"], "lr": 0.25})
            self.reference.add("4", 0.25)

    def do_exception_in_forward(self, number):
        x, _ = self.batch()
        self.reference.forward(x)
        self.model[1 if number else 3].error = ToldError()
        with pytest.raises(ToldError):
            self.model(x)
        self.model[1].error = self.model[3].error = None

    def do_exception_in_loss(self, number):
        x, _ = self.batch()
        self.reference.forward(x)
        outputs = self.model(x)
        with pytest.raises(ValueError, match="batch_size"):
            functional.cross_entropy(outputs, torch.zeros(1, dtype=torch.long)).backward()

    def do_exception_in_closure(self, number):
        def closure():
            self.forward()
            self.backward()
            raise ToldError

        with pytest.raises(ToldError):
            self.optimizer.step(closure)

    def do_step_on_nan(self, number):
        given = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if given:
            given[number % len(given)].grad.view(-1)[0] = math.nan
            self.reference.looked_at()
            with pytest.raises(CurvatureError):
                self.optimizer.step()
            self.open.clear()
            self.do_zero_grad(number)

    def compare(self, done):
        for name, p in self.model.named_parameters():
            expected = self.reference.parameters[name]
            error = float((p.detach() - expected).norm() / expected.norm())
            assert error < 1e-9, f"{name} differs by {error:.1e} after {done}"


CONFIGURATIONS = st.tuples(
    st.booleans(), st.integers(1, 3), st.sampled_from([0.0, 0.5]), st.sampled_from([0.0, 0.1]),
    st.sampled_from([Woodbury(), Dense()]), st.booleans(), st.booleans(),
)  # fmt: skip
SEQUENCES = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 2)), min_size=20, max_size=35)


def follow(configuration, sequence):
    loop = Loop(*configuration)
    for place, (action, number) in enumerate(sequence):
        loop.act(action, number)
        loop.compare(sequence[: place + 1])


@settings(max_examples=50, suppress_health_check=list(HealthCheck))
@given(CONFIGURATIONS, SEQUENCES)
def test_fifty_random_sequences(configuration, sequence):
    follow(configuration, sequence)


@pytest.mark.nightly
@settings(max_examples=600, derandomize=False, suppress_health_check=list(HealthCheck))
@given(CONFIGURATIONS, SEQUENCES)
def test_six_hundred_random_sequences(configuration, sequence):
    follow(configuration, sequence)


def test_the_sequences_are_not_idle():
    """A typical sequence takes steps that move parameters, with curvature of several ages."""
    loop = Loop(False, 2, 0.5, 0.1, Woodbury(), True, True)
    for action in ("accumulate", "step", "freeze", "step", "add group", "step", "unfreeze", "step", "step on nan"):
        loop.act(action, 1)
        loop.compare(action)
    assert loop.optimizer.steps == loop.reference.steps == 4
    assert set(loop.reference.curvature) == set(LAYERS)
