"""A loop may copy every batch into one tensor: what is kept of an earlier batch stays as it was."""

from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch
from parts import Y, assert_same, composed, network, values
from torch import nn
from torch.nn import functional

from curvlib import Empirical, Every, Exact, Sampled, Woodbury
from curvlib.capture.loans import Loan, memory
from curvlib.errors import CaptureError, FailureWarning, NotPositiveDefiniteError, RefreshError
from curvlib.solvers import KID, SENG, SPRING, Dense, Switch

STEPS = 5
BATCHES = torch.randn(STEPS, 12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def embedding():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(20, 3)).double()


def convolution():
    torch.manual_seed(0)
    layers = nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 3), nn.Tanh(), nn.Conv1d(4, 3, 3), nn.Flatten()
    return nn.Sequential(*layers).double()


def taught(make, overwrite, batches=BATCHES, refresh_later=None, **options):
    """Network after steps, each on a batch of its own, or all in one tensor."""
    model = make()
    optimizer, buffer = composed(model, **options), torch.empty_like(batches[0])
    for step, batch in enumerate(batches):
        if step == 2 and refresh_later is not None:
            optimizer.refresh = refresh_later
        buffer = buffer.copy_(batch) if overwrite else batch.clone()

        def closure(x=buffer):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), Y)
            loss.backward()
            return loss

        optimizer.step(closure)
    return model, optimizer


@pytest.mark.parametrize("fisher", [Exact(), Empirical(), Sampled()], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"solver": Woodbury()},
        {"solver": Woodbury(), "fused": True},
        {"solver": Woodbury(), "backend": "numpy"},
        {"solver": Woodbury(low_rank=0.9)},
        {"solver": SENG(columns=4)},
        {"solver": Switch((Woodbury(), SENG()), until=(1,))},
        {"solver": {"0": SENG(), "*": Woodbury()}},
    ],
    ids=str,
)
def test_rows_of_an_overwritten_batch_are_those_that_it_had(options, fisher):
    with_own, _ = taught(network, overwrite=False, fisher=fisher, refresh=3, **options)
    in_one, _ = taught(network, overwrite=True, fisher=fisher, refresh=3, **options)
    assert_same(in_one, with_own)


@pytest.mark.parametrize("make", [embedding, convolution])
def test_other_layers_keep_no_batch_either(make):
    batches = torch.arange(STEPS * 60).reshape(STEPS, 12, 5) * 7 % 6 if make is embedding else BATCHES
    with_own, _ = taught(make, overwrite=False, batches=batches, refresh=3)
    in_one, _ = taught(make, overwrite=True, batches=batches, refresh=3)
    assert_same(in_one, with_own)


@pytest.mark.parametrize("fused", [False, True])
def test_rows_that_were_not_meant_to_last_are_renewed_when_refreshes_become_rare(fused):
    options = {"fisher": Empirical(), "fused": fused, "refresh_later": Every(4)}
    with_own, optimizer = taught(network, overwrite=False, **options)
    in_one, _ = taught(network, overwrite=True, **options)
    assert_same(in_one, with_own)
    assert {state.refreshed for state in optimizer.curvature.values()} == {4}


@pytest.mark.parametrize(("refresh", "copied"), [(1, False), (2, True)])
def test_nothing_is_copied_for_steps_that_renew_everything(refresh, copied):
    model = network()
    optimizer = composed(model, fisher=Empirical(), refresh=refresh)
    x = BATCHES[0].clone()
    functional.cross_entropy(model(x), Y).backward()
    optimizer.step()
    kept = memory(optimizer.curvature["0"].estimate)
    assert (x.untyped_storage().data_ptr() in kept) != copied
    assert memory(optimizer.curvature["0"].inverse) & kept  # the same rows, once


@pytest.mark.parametrize("solver", [Woodbury(), SENG(), SPRING(), Dense(), KID()], ids=lambda one: type(one).__name__)
def test_which_solvers_hold_rows(solver):
    assert solver.holds_rows == isinstance(solver, Woodbury | SENG | SPRING)


def step_of(model, optimizer, x, unseen=False):
    optimizer.zero_grad()
    with optimizer.paused() if unseen else nullcontext():
        functional.cross_entropy(model(x), Y).backward()
    optimizer.step()


@pytest.mark.parametrize("backend", ["torch", "numpy"])
@pytest.mark.parametrize("overwritten", [False, True])
def test_a_step_without_curvature_of_its_own_goes_on_with_the_last_batch_only_where_it_is_there(overwritten, backend):
    model, x = network(), BATCHES[0].clone()
    optimizer = composed(model, fisher=Empirical(), refresh=1, backend=backend)
    step_of(model, optimizer, x.view_as(x))
    if not overwritten:
        step_of(model, optimizer, x.clone(), unseen=True)
        return
    before = values(model)
    x.copy_(BATCHES[1])
    with pytest.raises(CaptureError, match=r"step 1: block '0' has a gradient.*with in step 0 was overwritten since"):
        step_of(model, optimizer, x, unseen=True)
    assert_same(model, before)
    step_of(model, optimizer, x)


class Failing(Woodbury):
    """Fails while told to."""

    told: ClassVar[list] = []

    def factorize(self, estimate, damping):
        if self.told:
            raise NotPositiveDefiniteError("told to fail")
        return super().factorize(estimate, damping)


@pytest.mark.parametrize("overwritten", [False, True])
def test_an_inverse_of_an_overwritten_batch_does_not_stand_in(overwritten, monkeypatch):
    def only():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), nn.Flatten()).double()

    model, x = only(), BATCHES[0].clone()
    optimizer = composed(model, fisher=Empirical(), refresh=1, solver=Failing())
    for batch in BATCHES[:2]:
        step_of(model, optimizer, x.copy_(batch))
    x = x.copy_(BATCHES[2]) if overwritten else BATCHES[2].clone()
    before = values(model)
    monkeypatch.setattr(Failing, "told", [True])
    if overwritten:
        with pytest.raises(RefreshError, match="told to fail"):
            step_of(model, optimizer, x)
        assert_same(model, before)
    else:
        with pytest.warns(FailureWarning, match="the inverse of step 1 is used on"):
            step_of(model, optimizer, x)
    monkeypatch.undo()
    step_of(model, optimizer, x)


def test_a_loan_keeps_no_memory():
    x = torch.zeros(3)
    loan, state = Loan([x]), {"rows": x}
    assert not loan.broken(state)
    x.view(-1)[0] = 1
    assert loan.broken(state)
    assert not loan.broken({"rows": x.clone()})
    assert [counter.untyped_storage().nbytes() for counter, _, _ in loan._lent] == [0]
