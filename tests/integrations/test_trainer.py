"""Inside the Trainer of Hugging Face: ``Trainer(optimizers=(optimizer, scheduler))``, with checkpoints."""

import pytest
import torch
from inside import CLASSES, X, Y, composed, network
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

import curvlib

pytest.importorskip("accelerate", reason="make integrations installs accelerate, which the Trainer needs")
transformers = pytest.importorskip("transformers", reason="make integrations installs transformers")


class Points(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return {"x": X[index], "labels": Y[index]}


class Classifier(nn.Module):
    """A module as the Trainer wants it: labels in, loss and logits out."""

    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, x, labels=None):
        logits = self.network(x)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def logits(result):
    return result["logits"]


def made(model):
    optimizer = composed(model, output=logits)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)


def trainer(model, path, epochs=2, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(path), num_train_epochs=epochs, per_device_train_batch_size=32, use_cpu=True, report_to="none",
        disable_tqdm=True, seed=0, **{"save_strategy": "no", "max_grad_norm": 1.0, **options},
    )  # fmt: skip
    return transformers.Trainer(model=model, args=arguments, train_dataset=Points(), optimizers=made(model))


def loss_of(model):
    return float(model(X, Y)["loss"].detach())


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3}, {"bf16": True}], ids=str)
def test_it_learns(options, tmp_path):
    model = Classifier()
    before = loss_of(model)
    one = trainer(model, tmp_path, epochs=6, **options)
    one.train()
    steps = 6 if "gradient_accumulation_steps" in options else 18
    assert one.state.global_step == steps
    assert loss_of(model) < (0.8 if steps == 18 else 0.95) * before
    optimizer = getattr(one.optimizer, "optimizer", one.optimizer)
    assert isinstance(optimizer, curvlib.NaturalGradient)
    assert optimizer.steps == steps
    assert len(optimizer.curvature) == 2


def test_a_checkpoint_resumes(tmp_path):
    model, again = Classifier(), Classifier()
    trainer(model, tmp_path / "whole", epochs=4, save_strategy="epoch").train()
    saved = sorted((tmp_path / "whole").iterdir(), key=lambda folder: int(folder.name.partition("-")[2]))[1]
    one = trainer(again, tmp_path / "again", epochs=4)
    one.train(resume_from_checkpoint=str(saved))
    assert getattr(one.optimizer, "optimizer", one.optimizer).steps == 12
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_transformer_learns(tmp_path):
    """A model of theirs, whose blocks are of attention, embeddings and norms."""
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=9, num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    words = torch.randint(11, (64, 7), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row[0] % CLASSES} for row in words]
    optimizer = curvlib.TENGraD(model, lr=0.1, refresh=4, output=lambda result: result.logits)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=16, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="no", logging_strategy="no", seed=0,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
    one = transformers.Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, schedule))
    result = one.train()
    assert optimizer.steps == 8
    assert 0 < result.training_loss < 2
