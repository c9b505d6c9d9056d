"""Capture inside the user's own loop: which passes count, what is left behind."""

import gc

import pytest
import torch
from passes import FISHERS, batch, build, capture_of, rows
from torch import nn
from torch.nn import functional

import curvlib
from curvlib.capture.records import Pass, Place


@pytest.fixture(params=FISHERS)
def fisher(request):
    return FISHERS[request.param]


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


LAYOUTS = {
    "as it is": lambda g: g.clone(),
    "a part of another tensor": lambda g: torch.cat([g, g, g])[len(g) : 2 * len(g)].copy_(g),
    "another order": lambda g: g.T.contiguous().T,
    "one number for all": lambda g: g[:1, :1].expand_as(g),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cotangent_of_a_view_is_laid_out_as_its_base_was(layout):
    output = nn.Linear(3, 4)(torch.randn(2, 5, 3))
    place = Place(output)
    assert place.tensor.shape == (10, 4)
    gradient = LAYOUTS[layout](torch.randn(10, 4))
    assert torch.equal(place.cotangent(gradient), gradient.reshape(2, 5, 4))
