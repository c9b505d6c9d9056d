"""Where the samples are, and what all of them share."""

import pytest
import torch
from passes import FISHERS, capture_of
from torch import nn

import curvlib
from curvlib.errors import CaptureError


def test_the_input_must_have_the_samples_first_too():
    class Wrapped(nn.Linear):
        def forward(self, x):
            return super().forward(x.T[:, :4])

    with pytest.raises(CaptureError, match=r"input has shape \(4, 3\) and its output \(3, 2\).*3 samples"):
        curvlib.collect(Wrapped(4, 2), curvlib.Exact(), torch.randn(4, 3))


class Positions(nn.Module):
    """A learned embedding of positions that all samples share, added by broadcasting."""

    def __init__(self, lead):
        super().__init__()
        self.words, self.positions, self.head = nn.Embedding(9, 4), nn.Embedding(7, 4), nn.Linear(4, 3)
        self.lead = lead

    def forward(self, x):
        index = torch.arange(x.shape[1])
        h = self.words(x) + self.positions(index[None] if self.lead else index)
        return self.head(h.tanh().mean(1))


@pytest.mark.parametrize("samples", [3, 5, 6])
@pytest.mark.parametrize("lead", [True, False])
@pytest.mark.parametrize("kind", FISHERS)
def test_what_all_samples_share_has_rows_for_each(lead, kind, samples):
    model = Positions(lead).double()
    x = torch.randint(0, 9, (samples, 5), generator=torch.Generator().manual_seed(0))
    if not lead and kind == "empirical":  # with as many positions as samples, too
        with pytest.raises(CaptureError, match="'positions'.*all samples share its output.*use Sampled or Exact"):
            curvlib.collect(model, FISHERS[kind], x, loss=lambda out: out.square().mean())
        return
    taken = curvlib.collect(model, FISHERS[kind], x, loss=lambda out: out.square().sum() / samples)
    assert len(taken["positions"]) == samples * (3 if kind == "exact" else 1)
    if kind == "exact":
        rows = taken["positions"].dense().matrix().reshape(samples, 3, -1)
        for sample in range(samples):
            for column in range(3):
                output = model(x[sample : sample + 1])[0, column]
                (row,) = torch.autograd.grad(output, [model.positions.weight])
                torch.testing.assert_close(rows[sample, column], row.flatten())


def test_the_sample_axis_told_once_is_kept():
    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.body(x.transpose(0, 1)).tanh().mean(0))

    model = SequenceFirst().double()
    capture = capture_of(model, curvlib.Exact(), every_pass=True)
    model(torch.randn(5, 7, 4, dtype=torch.float64))
    capture.take()
    x = torch.randn(7, 7, 4, dtype=torch.float64)  # as many samples as positions: the layout must not flip
    model(x)
    rows = capture.take()["body"].dense().values["weight"].reshape(7, 3, 4, 4)
    capture.detach()
    columns = curvlib.Exact().cotangents(model(x).detach(), None)
    for sample in range(7):
        output = (model(x[sample : sample + 1])[0] * columns[1, sample]).sum()
        torch.testing.assert_close(rows[sample, 1], torch.autograd.grad(output, [model.body.weight])[0])


@pytest.mark.parametrize("first", [1, 3])
def test_what_all_samples_share_stays_so_in_a_batch_of_another_size(first):
    model = Positions(lead=False).double()
    capture = capture_of(model, curvlib.Exact(), every_pass=True)
    for samples in (first, 4, 5):  # at last as many samples as positions
        x = torch.randint(0, 9, (samples, 5), generator=torch.Generator().manual_seed(samples))
        outputs = model(x)
        rows = capture.take()["positions"].dense().values["weight"].reshape(samples, 3, 7, 4)
    capture.detach()
    columns = curvlib.Exact().cotangents(outputs.detach(), None)
    for sample in range(5):
        output = (model(x[sample : sample + 1])[0] * columns[1, sample]).sum()
        torch.testing.assert_close(rows[sample, 1], torch.autograd.grad(output, [model.positions.weight])[0])
