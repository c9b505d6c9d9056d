"""Inside accelerate: preparing, accumulation, clipping, mixed precision, checkpoints."""

import pytest
import torch
from inside import X, Y, assert_same, batches, composed, network, plain_loop
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

accelerate = pytest.importorskip("accelerate", reason="make integrations installs accelerate")


@pytest.fixture
def accelerator(request):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    yield accelerate.Accelerator(cpu=True, **getattr(request, "param", {}))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def trained(accelerator, model, optimizer, epochs=2, accumulate=False, clip=None, scheduler=None):
    loader = DataLoader(TensorDataset(X, Y), batch_size=32)
    if scheduler is None:
        forward, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    else:
        forward, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(forward):
                accelerator.backward(functional.cross_entropy(forward(x), y))
                if clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(forward.parameters(), clip)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                optimizer.zero_grad()
    return optimizer


def test_steps_are_those_of_the_plain_loop(accelerator):
    model, twin = network(), network()
    optimizer, other = composed(model), composed(twin)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    trained(accelerator, model, optimizer, clip=0.5, scheduler=schedule)
    plain_loop(twin, other, 2, torch.optim.lr_scheduler.ExponentialLR(other, 0.9), clip=0.5)
    assert_same(model, twin)
    assert optimizer.steps == 6


@pytest.mark.parametrize("accelerator", [{"gradient_accumulation_steps": 3}], indirect=True)
def test_accumulation(accelerator):
    model, twin = network(), network()
    optimizer, other = composed(model), composed(twin)
    trained(accelerator, model, optimizer)
    plain_loop(twin, other, 2, accumulate=3)
    assert_same(model, twin)
    assert optimizer.steps == 2


@pytest.mark.parametrize("accelerator", [{"mixed_precision": "bf16"}], indirect=True)
def test_mixed_precision(accelerator):
    model = network()
    optimizer = composed(model)
    before = float(functional.cross_entropy(model(X), Y).detach())
    trained(accelerator, model, optimizer, epochs=4)
    assert float(functional.cross_entropy(model(X), Y).detach()) < 0.7 * before
    state = optimizer.curvature["0"].inverse
    assert state.factor.dtype == torch.float32


def test_a_checkpoint_of_the_accelerator_is_whole(accelerator, tmp_path):
    model = network()
    prepared = trained(accelerator, model, composed(model))
    accelerator.save_state(str(tmp_path / "state"))
    kept = {name: p.clone() for name, p in model.state_dict().items()}
    plain_loop(model, prepared, 1)
    finals = {name: p.clone() for name, p in model.state_dict().items()}
    accelerator.load_state(str(tmp_path / "state"))
    assert all(torch.equal(p, kept[name]) for name, p in model.state_dict().items())
    assert prepared.optimizer.steps == 6
    plain_loop(model, prepared, 1)
    assert all(torch.equal(p, finals[name]) for name, p in model.state_dict().items())
    assert len(batches()) == 3
