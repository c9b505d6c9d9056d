"""Memory that is used again: never while somebody holds it, and without a trace in what is computed."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import curvlib
from curvlib.arrays import Buffers, buffers

LIKE = torch.zeros(1)


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(buffers, "_LARGE", 1)


def test_memory_is_taken_again_when_the_last_view_of_it_is_gone():
    pool = Buffers()
    first = pool.empty(LIKE, (3, 4))
    view, place = first[1:, 2:], first.data_ptr()
    del first
    assert pool.empty(LIKE, (3, 4)).data_ptr() != place
    del view
    again = [pool.empty(LIKE, (12,)) for _ in range(2)]
    assert place in [one.data_ptr() for one in again]
    assert len(pool) == 2


def test_only_memory_of_the_same_size_is_taken_again_and_trim_lets_go_the_rest():
    pool = Buffers()
    held, gone = pool.empty(LIKE, (5,)), pool.empty(LIKE, (6,))
    del gone
    other = pool.empty(LIKE, (7,))
    assert len(pool) == 3
    pool.trim()
    assert len(pool) == 2
    assert (held.shape, other.shape) == ((5,), (7,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_and_shape(dtype):
    made = Buffers().empty(torch.zeros(1, dtype=dtype), (2, 3, 5))
    assert (made.dtype, made.shape, made.is_contiguous()) == (dtype, (2, 3, 5), True)


def test_tensors_without_memory_and_of_another_default_device():
    pool = Buffers()
    with FakeTensorMode():
        assert pool.empty(torch.zeros(1), (3, 4)).shape == (3, 4)
        assert pool.product(torch.ones(2, 3, 4), torch.ones(2, 4, 5)).shape == (2, 3, 5)
    assert pool.empty(LIKE.to("meta"), (3,)).is_meta
    assert len(pool) == 0
    with torch.device("meta"):
        assert pool.empty(LIKE, (3,)).device.type == "cpu"


def test_small_tensors_have_memory_of_their_own(monkeypatch):
    monkeypatch.setattr(buffers, "_LARGE", 1 << 10)
    pool = Buffers()
    assert pool.empty(LIKE, (255,)).shape == (255,)
    assert len(pool) == 0
    kept = pool.empty(LIKE, (256,))
    assert len(pool) == 1
    del kept


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3)), max_size=30))
def test_no_two_tensors_that_are_there_share_memory(moves):
    pool, held = Buffers(), {}
    for number, (take, size) in enumerate(moves):
        if take:
            held[number] = pool.empty(LIKE, (size,)).fill_(number)
        elif held:
            held.pop(next(iter(held)))
        assert all((tensor == number).all() for number, tensor in held.items())


def test_a_copy_begins_empty():
    pool = Buffers()
    kept = pool.empty(LIKE, (4,))
    assert len(copy.deepcopy(pool)) == len(pickle.loads(pickle.dumps(pool))) == 0
    assert len(pool) == 1
    assert copy.deepcopy(kept.fill_(2.0)).tolist() == [2.0] * 4


def test_a_product_of_matrices_of_any_library():
    first, second = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    pool = Buffers()
    torch.testing.assert_close(pool.product(first, second), first @ second)
    torch.testing.assert_close(pool.product(first.mT.contiguous().mT, second), first @ second)
    np.testing.assert_allclose(pool.product(first.numpy(), second.numpy()), (first @ second).numpy())
    assert torch.autograd.gradcheck(pool.product, (first.requires_grad_(), second))


class Network(nn.Module):
    """A convolution and a Linear on its positions, both with rows that are kept."""

    def __init__(self):
        super().__init__()
        self.convolution, self.positions, self.head = nn.Conv2d(2, 3, 3), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = functional.relu(self.convolution(x)).flatten(2).mT
        return self.head(functional.relu(self.positions(h)).mean(1))


def trained(steps, refresh):
    torch.manual_seed(0)
    model = Network()
    optimizer = curvlib.compose(
        model, fisher=curvlib.Empirical(), solver=curvlib.Woodbury(), damping=0.1, lr=0.1, refresh=refresh, fused=True
    )
    seen = []
    for x in torch.randn(steps, 6, 2, 9, 9):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), torch.arange(6) % 2).backward()
        optimizer.step()
        rows = {name: state.estimate.factors.dense() for name, state in optimizer.curvature.items()}
        seen.append([(value, value.clone()) for one in rows.values() for value in one.values.values()])
    return model, optimizer, seen


@pytest.mark.parametrize("refresh", [1, 2])
def test_training_is_the_same_and_rows_of_earlier_steps_stay_as_they_were(monkeypatch, refresh):
    model, optimizer, seen = trained(5, refresh)
    assert len(optimizer.plan.buffers) > 0
    for before, then in (pair for step in seen for pair in step):
        assert torch.equal(before, then)
    monkeypatch.setattr(buffers, "_LARGE", 1 << 40)
    plain, other, _ = trained(5, refresh)
    assert len(other.plan.buffers) == 0
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_as_many_buffers_as_two_steps_need_and_none_without_new_rows():
    model, optimizer, seen = trained(8, 1)
    seen.clear()
    counts = []
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(model(torch.randn(6, 2, 9, 9)), torch.arange(6) % 2).backward()
        optimizer.step()
        counts.append(len(optimizer.plan.buffers))
    assert counts[0] == counts[1] == counts[2]
    optimizer.refresh = curvlib.Every(100)
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(model(torch.randn(6, 2, 9, 9)), torch.arange(6) % 2).backward()
        optimizer.step()
    assert len(optimizer.plan.buffers) == counts[0] // 2
