"""PReLU against per-sample autograd."""

import pytest
import torch
from one_layer import check_layer, numbers, prepared
from torch import nn

INPUTS = [numbers(4, 3), numbers(4, 3, 5), numbers(4, 3, 2, 2).to(memory_format=torch.channels_last)]


@pytest.mark.parametrize("x", INPUTS)
@pytest.mark.parametrize("slopes", [1, 3])
def test_rows(x, slopes):
    check_layer(prepared(nn.PReLU(slopes)), x)


def test_one_slope_for_scalars_and_its_kink():
    check_layer(prepared(nn.PReLU()), torch.tensor([[0.0], [-1.0], [2.0]], dtype=torch.float64))
