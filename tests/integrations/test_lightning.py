"""Inside Lightning: automatic and manual optimisation, schedulers, accumulation, checkpoints."""

import warnings

import pytest
import torch
from inside import X, Y, assert_same, batches, composed, network, plain_loop
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning", reason="make integrations installs lightning")


class Automatic(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, index):
        x, y = batch
        return functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        optimizer = composed(self.network)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Manual(Automatic):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        optimizer.step()
        scheduler.step()


class Whole(Automatic):
    """The optimizer watches the Lightning module itself."""

    def configure_optimizers(self):
        return composed(self)


def fitted(module, epochs=2, path=None, **options):
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning advises on data loaders and hardware
        trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=32), ckpt_path=path)
    return trainer


def plain(epochs=2, decay=0.9, **options):
    model = network()
    optimizer = composed(model)
    plain_loop(model, optimizer, epochs, torch.optim.lr_scheduler.ExponentialLR(optimizer, decay), **options)
    return model


@pytest.mark.parametrize("kind", [Automatic, Manual])
def test_steps_are_those_of_the_plain_loop(kind):
    module = kind()
    trainer = fitted(module)
    assert_same(module.network, plain())
    assert trainer.optimizers[0].steps == 2 * len(batches())


def test_the_optimizer_may_watch_the_module_itself():
    module = Whole()
    fitted(module)
    assert_same(module.network, plain(decay=1.0))


def test_accumulation_and_clipping():
    module = Automatic()
    fitted(module, accumulate_grad_batches=3, gradient_clip_val=0.5)
    assert_same(module.network, plain(accumulate=3, clip=0.5))


def test_mixed_precision():
    module = Automatic()
    before = float(functional.cross_entropy(module(X), Y).detach())
    fitted(module, epochs=4, precision="bf16-mixed")
    assert float(functional.cross_entropy(module(X), Y).detach()) < 0.8 * before


def test_a_checkpoint_resumes(tmp_path):
    module, twin, again = Automatic(), Automatic(), Automatic()
    fitted(module, epochs=4)
    trainer = fitted(twin, epochs=2)
    trainer.save_checkpoint(tmp_path / "state.ckpt")
    trainer = fitted(again, epochs=4, path=tmp_path / "state.ckpt")
    assert trainer.optimizers[0].steps == 4 * len(batches())
    assert_same(module, again, rtol=0.0, atol=0.0)
