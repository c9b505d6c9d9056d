"""Capture inside the user's own loop: which passes count, what is left behind, what is refused."""

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional

import curvlib
from curvlib.capture import Capture
from curvlib.capture.rows import Pass
from curvlib.errors import CaptureError, ConfigurationError
from curvlib.layers import partition

FISHERS = {
    "sampled": curvlib.Sampled(curvlib.Gaussian()),
    "exact": curvlib.Exact(curvlib.Gaussian()),
    "empirical": curvlib.Empirical(),
}


@pytest.fixture(params=FISHERS)
def fisher(request):
    return FISHERS[request.param]


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)).double()


def batch(n=5):
    return torch.randn(n, 4, dtype=torch.float64)


def capture_of(model, fisher, **options):
    return Capture(model, partition(model).blocks, fisher, generator=torch.Generator().manual_seed(0), **options)


def rows(taken):
    return {name: len(factors) for name, factors in taken.items()}


def test_only_passes_that_a_backward_went_through_count(fisher):
    model = build()
    capture = capture_of(model, fisher)
    unused = model(batch(3))
    with torch.no_grad():
        model(batch(9))
    used = model(batch(5))
    model.eval()
    model(batch(7))
    used.square().sum().backward()
    columns = 2 if isinstance(fisher, curvlib.Exact) else 1
    assert rows(capture.take()) == {"0": 5 * columns, "2": 5 * columns}
    assert capture.take() == {}
    unused.sum().backward()
    assert rows(capture.take()) == {"0": 3 * columns, "2": 3 * columns}


def test_several_passes_before_one_backward_are_one_batch(fisher):
    model = build()
    capture = capture_of(model, fisher)
    one, two = batch(3), batch(5)
    (model(one).square().sum() + model(two).square().sum()).backward()
    taken = capture.take()
    assert all(factors.normalizer == 8 for factors in taken.values())
    capture.generator.manual_seed(0)
    model(torch.cat([one, two])).square().sum().backward()
    whole = capture.take()
    if not isinstance(fisher, curvlib.Sampled):
        for name in taken:
            torch.testing.assert_close(taken[name].dense().matrix(), whole[name].dense().matrix())


def test_two_backward_passes_through_one_graph_accumulate():
    model = build()
    capture = capture_of(model, curvlib.Empirical(reduction="sum"))
    outputs = model(batch())
    outputs.sum().backward(retain_graph=True)
    outputs.square().sum().backward()
    taken = capture.take()
    for block in capture.blocks:
        for name, parameter in block.parameters.items():
            summed = taken[block.name].rmatvec(taken[block.name].row_weights(1.0))[name]
            torch.testing.assert_close(summed, parameter.grad)


def test_empirical_rows_add_up_to_the_gradient():
    model = build()
    capture = capture_of(model, curvlib.Empirical())
    functional.mse_loss(model(batch(6)), torch.ones(6, 2, dtype=torch.float64)).backward()
    taken = capture.take()
    for block in capture.blocks:
        mean = taken[block.name].rmatvec(taken[block.name].row_weights(1 / 6))
        for name, parameter in block.parameters.items():
            torch.testing.assert_close(mean[name], parameter.grad)


def test_a_module_used_twice_gives_summed_rows(fisher):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4).double(), nn.Linear(4, 2).double()

        def forward(self, x):
            return self.head(self.body(self.body(x).tanh()).tanh())

    model = Twice()
    taken = curvlib.collect(model, fisher, batch(), loss=lambda out: out.square().mean())
    assert set(taken) == {"body", "head"}  # rows and gradients agreed, or collect would have refused


def test_a_block_unused_in_one_pass_counts_zero_rows_there(fisher):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(4, 2).double(), nn.Linear(4, 2).double()

        def forward(self, x, left):
            return self.left(x) if left else self.right(x)

    model = Branch()
    capture = capture_of(model, fisher)
    (model(batch(3), True).sum() + model(batch(5), False).sum()).backward()
    taken = capture.take()
    assert taken["left"].normalizer == taken["right"].normalizer == 8
    assert len(taken["left"]) * 5 == len(taken["right"]) * 3


def test_nothing_outlives_a_pass_without_backward(fisher):
    model = build()
    capture = capture_of(model, fisher)
    outputs = model(batch())
    assert any(isinstance(one, Pass) for one in gc.get_objects())
    del outputs
    gc.collect()
    assert not any(isinstance(one, Pass) for one in gc.get_objects())
    assert capture.take() == {}


def test_the_model_is_as_it_was_after_detach(fisher):
    model = build()
    capture = capture_of(model, fisher)
    capture.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    model(batch()).sum().backward()
    assert capture.take() == {}


def test_gradients_and_random_state_are_those_of_the_plain_loop(fisher):
    results = []
    for watched in (False, True):
        model = build()
        capture = capture_of(model, fisher) if watched else None
        torch.manual_seed(3)
        functional.dropout(model(batch()), 0.5).sum().backward()
        results.append([p.grad for p in model.parameters()])
        if capture:
            capture.take()
    assert all(torch.equal(plain, watched) for plain, watched in zip(*results, strict=True))


def test_an_exception_in_forward_leaves_everything_usable(fisher):
    model = build()
    capture = capture_of(model, fisher)
    with pytest.raises(RuntimeError):
        model(torch.ones(3, 5, dtype=torch.float64))
    model(batch()).sum().backward()
    assert set(capture.take()) == {"0", "2"}


def test_not_listening_while_unarmed(fisher):
    model = build()
    capture = capture_of(model, fisher)
    capture.armed = False
    model(batch()).sum().backward()
    assert capture.take() == {}


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


def test_the_input_must_have_the_samples_first_too():
    class Wrapped(nn.Linear):
        def forward(self, x):
            return super().forward(x.T[:, :4])

    with pytest.raises(CaptureError, match=r"input has shape \(4, 3\) and its output \(3, 2\).*3 samples"):
        curvlib.collect(Wrapped(4, 2), curvlib.Exact(), torch.randn(4, 3))


def test_the_empirical_fisher_needs_a_loss():
    with pytest.raises(ConfigurationError, match="needs loss="):
        curvlib.collect(nn.Linear(4, 2), curvlib.Empirical(), torch.randn(3, 4))


def test_parts_of_the_model_that_do_not_matter_have_no_rows():
    class Extra(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.idle = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            self.idle(x)
            return self.body(x)

    assert set(curvlib.collect(Extra(), curvlib.Exact(), torch.randn(3, 4))) == {"body"}
    frozen = nn.Sequential(nn.Linear(4, 3).requires_grad_(False), nn.Linear(3, 2))
    assert set(curvlib.collect(frozen, curvlib.Exact(), torch.randn(3, 4))) == {"1"}


def test_a_model_whose_output_needs_no_gradient_is_left_alone():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 2)

        def forward(self, x):
            return self.body(x).detach()

    assert curvlib.collect(Constant(), curvlib.Exact(), torch.randn(3, 4)) == {}


def test_an_output_that_is_made_anew_counts_when_the_loss_uses_the_original():
    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 3)

        def forward(self, x):
            return self.body(x.transpose(0, 1))

    model = SequenceFirst().double()
    x, labels = torch.randn(5, 7, 4, dtype=torch.float64), torch.arange(35).reshape(7, 5) % 3
    optimizer = curvlib.compose(
        model,
        fisher=curvlib.Exact(curvlib.Categorical(dim=-1)),
        solver=curvlib.Woodbury(),
        damping=0.1,
        lr=0.0,
        output=lambda out: out.transpose(0, 1),
    )
    functional.cross_entropy(model(x).flatten(0, 1), labels.flatten()).backward()
    optimizer.step()
    optimizer.detach()
    samples_first = curvlib.collect(nn.Sequential(model.body), optimizer.fisher, x)["0"]
    torch.testing.assert_close(
        optimizer.curvature["body"].estimate.matrix, samples_first.covariance() / samples_first.normalizer
    )


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
