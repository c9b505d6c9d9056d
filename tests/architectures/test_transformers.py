"""Architectures that no one here wrote, tiny and with random weights: every parameter in a block, every row exact."""

import importlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

import curvlib
from curvlib.layers import fallback, partition, register, registry

transformers = pytest.importorskip("transformers", reason="make architectures installs transformers")

VOCABULARY, CLASSES = 11, 3
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENDS = {"bos_token_id": 0, "eos_token_id": 0}

MODELS = {
    "BertForSequenceClassification": {"vocab_size": VOCABULARY, "max_position_embeddings": 9, **SIZES, **NO_DROPOUT},
    "GPT2LMHeadModel": {
        "vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 9, **ENDS,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "ViTForImageClassification": {"image_size": 16, "patch_size": 8, **SIZES, **NO_DROPOUT},
    "ResNetForImageClassification": {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 2]},
    "ConvNextForImageClassification": {
        "num_stages": 2, "hidden_sizes": [4, 8], "depths": [1, 2], "patch_size": 2, "image_size": 16,
        "layer_scale_init_value": 0.5, "drop_path_rate": 0.0,
    },
    "LlamaForCausalLM": {
        "vocab_size": VOCABULARY, "num_key_value_heads": 1, "max_position_embeddings": 16, "attention_dropout": 0.0,
        **SIZES,
        **ENDS,
    },
    "T5ForConditionalGeneration": {
        "vocab_size": VOCABULARY, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2,
        "relative_attention_num_buckets": 6, "relative_attention_max_distance": 8, "dropout_rate": 0.0,
        "pad_token_id": 0, "decoder_start_token_id": 0, "tie_word_embeddings": True,
    },
}  # fmt: skip

SIZED = {
    "unequal": (3, 5),
    "as many samples as positions": (5, 5),
    "positions a multiple": (2, 4),
    "one sample": (1, 5),
}


class Float64(TorchFunctionMode):
    """Some norms and softmaxes compute in float32 whatever the model's dtype; here they do so in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda leaf: torch.float64 if leaf is torch.float32 else leaf, (args, kwargs or {}))
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)


def build(name):
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**MODELS[name], num_labels=CLASSES)).double().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype) + 0.3 * (p.ndim == 1))
        for buffer_name, buffer in model.named_buffers():
            if "running_" in buffer_name:
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype))
    return model


def inputs(name, samples, length):
    generator = torch.Generator().manual_seed(samples)
    if "Image" in name:
        return {"pixel_values": torch.randn(samples, 3, 16, 16, generator=generator, dtype=torch.float64)}
    ids = torch.randint(1, VOCABULARY, (samples, length), generator=generator)
    if name.startswith("T5"):
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)[:, :-1]}
    if name.startswith("Bert"):
        padded = torch.ones_like(ids)
        padded[-1, -2:] = 0
        return {"input_ids": ids, "attention_mask": padded}
    return {"input_ids": ids}


# -- what a user registers --------------------------------------------------------------------------------------------


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))

    # A LayerNorm by name that may have its channels first.
    convnext = importlib.import_module("transformers.models.convnext.modeling_convnext")
    register(convnext.ConvNextLayerNorm)(fallback)

    @register(transformers.pytorch_utils.Conv1D, columns=True, positionwise=True)
    def transposed_linear(layer, x, g):
        x, g = x.reshape(len(x), -1, x.shape[-1]), g.reshape(*g.shape[:2], -1, g.shape[-1])
        weight = torch.einsum("npi,ncpo->ncio", x, g)
        return curvlib.factors.Dense(weight=weight.flatten(0, 1), bias=g.sum(2).flatten(0, 1))


# -- the truth --------------------------------------------------------------------------------------------------------


def logits(result):
    return result.logits


def rows_alone(model, given, columns):
    """Parameter to its rows (sample, column), each sample through the model and autograd alone."""
    parameters = list(model.parameters())
    rows = {p: [] for p in parameters}
    for sample in range(columns.shape[1]):
        output = logits(model(**{key: value[sample : sample + 1] for key, value in given.items()}))[0]
        for cotangent in columns[:, sample]:
            found = torch.autograd.grad(output, parameters, cotangent, retain_graph=True, allow_unused=True)
            for p, gradient in zip(parameters, found, strict=True):
                rows[p].append((torch.zeros_like(p) if gradient is None else gradient).flatten())
    return {p: torch.stack(values) for p, values in rows.items()}


def check(model, given, fisher):
    """Every block against the truth, errors relative to the size of the block."""
    seeded = [torch.Generator().manual_seed(3) for _ in range(2)]
    taken = curvlib.collect(model, fisher, kwargs=given, output=logits, generator=seeded[0], rest="fallback")
    blocks = partition(model, bare="fallback").blocks
    covered = [p for block in blocks for p in block.parameters.values()]
    assert len(covered) == len({*map(id, covered)})
    assert {*map(id, covered)} == {*map(id, model.parameters())}
    outputs = logits(model(**given))
    columns = fisher.cotangents(outputs.detach(), seeded[1])
    rows = rows_alone(model, given, columns)
    total = dict(zip(covered, torch.autograd.grad(outputs, covered, columns.sum(0), allow_unused=True), strict=True))
    for block in blocks:
        factors = taken[block.name]
        J = torch.cat([rows[p] for p in block.parameters.values()], dim=1)
        size = J.norm()
        assert len(factors) == len(J)
        assert size > 1e-12, block.name
        assert (factors.gram() - J @ J.T).norm() <= 1e-9 * size**2, f"Gram of {block.name}"
        sums = factors.rmatvec(factors.row_weights(1.0))
        for name, p in block.parameters.items():
            gradient = torch.zeros_like(p) if total[p] is None else total[p]
            assert (sums[name] - gradient).norm() <= 1e-9 * size, f"gradient of {block.name}.{name}"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# -- the tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZED)
@pytest.mark.parametrize("name", MODELS)
def test_every_block_is_exact(name, sizes, registered):
    with Float64():
        check(build(name), inputs(name, *SIZED[sizes]), curvlib.Sampled(curvlib.Categorical(dim=-1), samples=2))


@pytest.mark.parametrize("name", MODELS)
def test_every_block_has_the_exact_fisher(name, registered):
    with Float64():
        check(build(name), inputs(name, 2, 3), curvlib.Exact(curvlib.Categorical(dim=-1)))


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_nothing_registered_for_language_models(name):
    with Float64():
        check(build(name), inputs(name, 3, 5), curvlib.Sampled(curvlib.Categorical(dim=-1)))


def test_a_subclass_that_computes_something_else_is_named():
    name = "ConvNextForImageClassification"
    with pytest.raises(curvlib.errors.CaptureError, match=r"register\(ConvNextLayerNorm\)\(curvlib.layers.fallback\)"):
        curvlib.collect(build(name), curvlib.Exact(), kwargs=inputs(name, 2, 0), output=logits, rest="fallback")


def test_a_model_in_its_own_precision_passes_the_check():
    # Inner float32 in a float64 model rounds what autograd says; the check at the first pass allows for it.
    name = "T5ForConditionalGeneration"
    for given in (inputs(name, 3, 5), inputs(name, 2, 5)):
        fisher = curvlib.Exact(curvlib.Categorical(dim=-1))
        assert curvlib.collect(build(name), fisher, kwargs=given, output=logits, rest="fallback")


def test_later_batches_keep_what_the_first_showed(registered):
    # Relative positions of shape (5, 5) are no samples, of a batch of one, of three, or of five.
    name = "T5ForConditionalGeneration"
    with Float64():
        model, fisher = build(name), curvlib.Exact(curvlib.Categorical(dim=-1))
        capture = curvlib.capture.Capture(model, partition(model).blocks, fisher, logits, every_pass=True)
        block = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
        for samples in (1, 3, 5):
            model(**inputs(name, samples, 5))
            rows = capture.take()[block]
            given = inputs(name, samples, 5)
            capture.armed = False
            columns = fisher.cotangents(logits(model(**given)).detach(), None)
            J = rows_alone(model, given, columns)[model.get_parameter(f"{block}.weight")]
            capture.armed = True
            assert (rows.gram() - J @ J.T).norm() <= 1e-9 * J.norm() ** 2
        capture.detach()
