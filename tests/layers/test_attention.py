"""Attention and the Transformer's layers against autograd on each sample alone."""

import itertools
import math

import pytest
import torch
from per_sample import assert_exact, numbers, randomized
from torch import nn

import curvlib
from curvlib.errors import CaptureError
from curvlib.factors import SharedOuter

N, WIDTH = 4, 4


class Attends(nn.Module):
    """Self- or cross-attention, with masks of every kind, that may use the attention weights too."""

    def __init__(self, cross=False, mask=None, weights=None, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, **options)
        self.cross, self.mask, self.weights = cross, mask, weights
        self.first = options.get("batch_first", False)
        self.widths = options.get("kdim") or WIDTH, options.get("vdim") or WIDTH
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        query = x[..., :WIDTH]
        keys = [x[:, 1:, -width:] for width in self.widths] if self.cross else [query, query]
        masks = self.masks(x, 4 if self.cross else 5)
        if not self.first:
            query, *keys = (part.transpose(0, 1) for part in (query, *keys))
        if not self.cross:
            keys = [query, query]
        options = {} if self.weights is None else {"average_attn_weights": self.weights == "averaged"}
        out, table = self.attention(query, *keys, **masks, need_weights=self.weights is not None, **options)
        out = (out if self.first else out.transpose(0, 1)).square().sum(1)
        return self.head(out) * (1 if table is None else 1 + table.square().flatten(1).sum(1, keepdim=True))

    def masks(self, x, keys):
        padding = (x[:, -keys:, 0] > 0.5) & (torch.arange(keys) > 0)
        causal = torch.ones(5, keys, dtype=torch.bool).triu(1)
        spread = x[:, -keys:, 1].tanh()
        each = torch.stack([spread[:, None].expand(-1, 5, -1), spread[:, None].expand(-1, 5, -1) / 2], 1).flatten(0, 1)
        return {
            None: {},
            "padding": {"key_padding_mask": padding},
            "causal": {"attn_mask": causal, "is_causal": keys == 5},
            "both": {"attn_mask": causal, "key_padding_mask": padding},
            "numbers": {
                "attn_mask": each,
                "key_padding_mask": padding.to(x).masked_fill(padding, -math.inf),
            },
        }[self.mask]


OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "bias_kv and zero": {"add_bias_kv": True, "add_zero_attn": True},
    "separate": {"kdim": 3, "vdim": 2},
    "separate, bias_kv": {"kdim": 3, "vdim": 4, "add_bias_kv": True, "bias": True},
}


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
@pytest.mark.parametrize("cross", [True, False], ids=["cross", "self"])
@pytest.mark.parametrize("name", OPTIONS)
def test_rows_of_attention_are_exact(name, cross, batch_first):
    options = OPTIONS[name]
    if "kdim" in options and not cross:
        cross = True
    for mask, weights in itertools.product(
        (None, "padding", "causal", "both", "numbers"), (None, "averaged", "by head")
    ):
        if mask not in (None, "both") and weights is not None:
            continue
        model = randomized(Attends(cross, mask, weights, batch_first=batch_first, **options))
        taken = assert_exact(model, numbers(N, 5, 5), blocks=["attention"])
    assert any(isinstance(term, SharedOuter) for term in taken["attention"].terms)


@pytest.mark.parametrize("frozen", ["in_proj", "out_proj", "bias", "weight"])
def test_frozen_parts_of_attention(frozen):
    model = randomized(Attends(add_bias_kv=True))
    for name, p in model.attention.named_parameters():
        p.requires_grad_(frozen not in name)
    assert_exact(model, numbers(N, 5, 5))


def test_a_query_that_may_meet_nothing_counts_for_nothing():
    class Blind(Attends):
        def masks(self, x, keys):
            return {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(0)}  # the first may meet no one

    assert_exact(randomized(Blind(mask="causal")), numbers(N, 5, 5))


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layers_are_attention_linear_and_norm_blocks(batch_first, training, norm_first):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(WIDTH, 2, 6, dropout=0.0, batch_first=batch_first, norm_first=norm_first)
            self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=not norm_first and batch_first)
            self.head = nn.Linear(WIDTH, 2)

        def forward(self, x):
            padding = (x[..., 0] > 0.5) & (torch.arange(5) > 0)
            h = self.encoder(x if batch_first else x.transpose(0, 1), src_key_padding_mask=padding)
            h = h if batch_first else h.transpose(0, 1)
            return self.head(h.masked_fill(padding[..., None], 0).sum(1))

    model = randomized(Encoder()).train(training)
    taken = assert_exact(model, numbers(N, 5, WIDTH))
    layer = "encoder.layers.0."
    assert [*taken] == [layer + part for part in ("self_attn", "linear1", "linear2", "norm1", "norm2")] + ["head"]
    # With nothing trainable inside, torch takes its fused path for what is no block.
    model.encoder.requires_grad_(False)
    assert [*assert_exact(model, numbers(N, 5, WIDTH))] == ["head"]
    model.encoder.layers[0].norm2.requires_grad_(True)
    assert [*assert_exact(model, numbers(N, 5, WIDTH))] == [layer + "norm2", "head"]


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
def test_a_whole_transformer(batch_first):
    class Translator(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Transformer(WIDTH, 2, 1, 1, 6, dropout=0.0, batch_first=batch_first)
            self.head = nn.Linear(WIDTH, 2)

        def forward(self, x):
            source, target = x[:, :3], x[:, 3:]
            if not batch_first:
                source, target = source.transpose(0, 1), target.transpose(0, 1)
            mask = nn.Transformer.generate_square_subsequent_mask(2, dtype=x.dtype)
            h = self.body(source, target, tgt_mask=mask, tgt_is_causal=True)
            return self.head((h if batch_first else h.transpose(0, 1)).sum(1))

    taken = assert_exact(randomized(Translator()), numbers(N, 5, WIDTH))
    assert {"body.decoder.layers.0.self_attn", "body.decoder.layers.0.multihead_attn"} < taken.keys()


def test_windows_of_a_sample_may_be_merged_into_the_batch():
    class Windows(Attends):
        def forward(self, x):
            windows = x.reshape(-1, 3, WIDTH)
            return self.head(self.attention(windows, windows, windows)[0].reshape(len(x), -1, WIDTH).square().sum(1))

    assert_exact(randomized(Windows(batch_first=True)), numbers(N, 6, WIDTH))


def test_what_cannot_be_exact_is_refused():
    with pytest.raises(CaptureError, match="MultiheadAttention: its dropout draws numbers.*eval mode"):
        curvlib.collect(Attends(dropout=0.1).double(), curvlib.Exact(), numbers(N, 5, 5))

    class Mixed(Attends):
        def forward(self, x):
            return self.head(self.attention(x, x, x)[0].mean(1))

    with pytest.raises(CaptureError, match="batch of 5 .batch_first=False., and the model's output has 4 samples"):
        curvlib.collect(Mixed().double(), curvlib.Exact(), numbers(N, 5, WIDTH))
