"""Which passes are refused, and with what remedy."""

import pytest
import torch
from passes import FISHERS
from torch import nn

import curvlib
from curvlib.errors import CaptureError, ConfigurationError


def test_an_input_changed_in_place_is_refused():
    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
            self.body.weight.requires_grad_(False)

        def forward(self, x):
            x = x * 1.0
            h = self.body(x)
            x.add_(1)
            return self.head(h)

    with pytest.raises(CaptureError, match="'body'.*changed in place"):
        curvlib.collect(Changed(), FISHERS["exact"], torch.randn(5, 4))


class Dictionary(nn.Module):
    def __init__(self, squeeze=False):
        super().__init__()
        self.body = nn.Linear(4, 2)
        self.squeeze = squeeze

    def forward(self, x):
        out = self.body(x)
        return out.sum() if self.squeeze else {"logits": out, "extra": x}


def test_outputs_in_a_container_need_a_choice():
    with pytest.raises(CaptureError, match="returns dict.*output=lambda"):
        curvlib.collect(Dictionary(), curvlib.Exact(), torch.randn(3, 4))
    taken = curvlib.collect(Dictionary(), curvlib.Exact(), torch.randn(3, 4), output=lambda result: result["logits"])
    assert len(taken["body"]) == 6


def test_outputs_without_samples_are_refused():
    with pytest.raises(CaptureError, match=r"shape \(\).*first axis must be the samples"):
        curvlib.collect(Dictionary(squeeze=True), curvlib.Exact(), torch.randn(3, 4))
    with pytest.raises(CaptureError, match="at least one; skip empty batches"):
        curvlib.collect(nn.Linear(4, 2), curvlib.Exact(), torch.randn(0, 4))


def test_wrong_columns_of_a_users_fisher_are_refused():
    class Short(curvlib.Exact):
        def cotangents(self, outputs, generator):
            return super().cotangents(outputs, generator)[..., :1]

    with pytest.raises(CaptureError, match=r"\(columns, \*outputs\)"):
        curvlib.collect(nn.Linear(4, 2), Short(), torch.randn(3, 4))


def test_an_adapter_of_one_tensor_refuses_calls_with_two():
    class Wrapped(nn.Linear):
        def forward(self, x, y):
            return super().forward(x + y)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Wrapped(4, 2)

        def forward(self, x):
            return self.body(x, x)

    with pytest.raises(CaptureError, match="2 input tensors.*whole_call=True"):
        curvlib.collect(Model(), curvlib.Exact(), torch.randn(3, 4))


def test_the_empirical_fisher_needs_a_loss():
    with pytest.raises(ConfigurationError, match="needs loss="):
        curvlib.collect(nn.Linear(4, 2), curvlib.Empirical(), torch.randn(3, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_gradient_that_is_zero_but_for_rounding_passes_the_check(dtype):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            scores = self.query(x) @ self.key(x).mT  # a bias of keys moves all scores of a query alike
            return self.head(scores.softmax(-1) @ x).mean(1)

    torch.manual_seed(0)
    model = Attention().to(dtype)
    taken = curvlib.collect(model, curvlib.Exact(), torch.randn(3, 5, 4, dtype=dtype))
    rows = taken["key"].dense().values
    assert rows["bias"].norm() < 1e-5 * rows["weight"].norm()


def test_an_adapter_that_fails_on_a_subclass_is_named_with_the_remedy():
    class ChannelsFirst(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    model = nn.Sequential(ChannelsFirst(4), nn.Flatten(), nn.Linear(20, 3))
    with pytest.raises(CaptureError, match=r"'0' \(ChannelsFirst.*failed.*register\(ChannelsFirst\).*fallback"):
        curvlib.collect(model, curvlib.Exact(), torch.randn(3, 4, 5))
