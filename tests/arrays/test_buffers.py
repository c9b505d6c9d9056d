"""Memory that is used again: never while somebody holds it, and without a trace in what is computed."""

import copy
import itertools
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
from curvlib.arrays import Buffers, adjoining, buffers, torch_kernels

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


def test_a_round_that_takes_no_memory_leaves_all_for_the_next():
    pool = Buffers()
    old = pool.empty(LIKE, (5,))
    pool.trim()
    place = old.data_ptr()
    del old
    for _ in range(3):
        pool.trim()
    assert len(pool) == 1
    new = pool.empty(LIKE, (5,))
    assert new.data_ptr() == place
    pool.trim()
    assert len(pool) == 1


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


@pytest.fixture
def everything_lies_side_by_side(monkeypatch):
    for module in (buffers, torch_kernels):
        monkeypatch.setattr(module, "SIDE_BY_SIDE", range(1, 1 << 10))


def one_behind_the_other(first, second):
    return first.data_ptr() + first.nbytes == second.data_ptr()


@pytest.mark.usefixtures("everything_lies_side_by_side")
class TestSideBySide:
    @pytest.fixture(autouse=True)
    def nothing_is_large(self, monkeypatch):
        for name in ("_LARGE", "_TOGETHER"):
            monkeypatch.setattr(buffers, name, 1 << 10)

    def test_from_the_second_round_on_and_the_last_asked_for_lies_first(self):
        pool = Buffers()
        asked = [pool.empty(LIKE, (2, 3)) for _ in range(4)]
        assert len(pool) == 0
        pool.trim()
        again = [pool.empty(LIKE, (2, 3)).fill_(number) for number in range(4)]
        assert all(one_behind_the_other(later, one) for one, later in itertools.pairwise(again))
        assert [one.unique().tolist() for one in again] == [[0.0], [1.0], [2.0], [3.0]]
        more = pool.empty(LIKE, (2, 3))
        assert len({one.untyped_storage().data_ptr() for one in (*asked, *again, more)}) == 6

    def test_in_several_wholes_where_one_would_be_large(self):
        pool = Buffers()
        kept = [pool.empty(LIKE, (10, 10)) for _ in range(5)]
        pool.trim()
        kept = [pool.empty(LIKE, (10, 10)) for _ in range(5)]
        wholes = [one.untyped_storage().nbytes() for one in kept]
        assert wholes == [800, 800, 800, 800, 400]

    def test_of_one_shape_and_dtype_only(self):
        pool = Buffers()
        shapes = [(2, 3), (3, 2), (2, 3), (3, 2)]
        for _ in range(2):
            pool.trim()
            kept = [pool.empty(LIKE, shape) for shape in shapes] + [pool.empty(LIKE.double(), (2, 3))]
        assert [one.untyped_storage().nbytes() for one in kept] == [48, 48, 48, 48, 48]
        assert one_behind_the_other(kept[2], kept[0])
        assert one_behind_the_other(kept[3], kept[1])
        assert kept[0].untyped_storage().data_ptr() != kept[1].untyped_storage().data_ptr()

    def test_a_round_without_any_changes_nothing_and_one_in_vain_does_not_count(self):
        pool = Buffers()
        for _ in range(2):
            pool.empty(LIKE, (2, 3))
        pool.trim()
        pool.trim()
        for _ in range(7):
            pool.empty(LIKE, (2, 3))
        pool.restart()
        one, other = (pool.empty(LIKE, (2, 3)) for _ in range(2))
        assert one_behind_the_other(other, one)
        assert one.untyped_storage().nbytes() == 48

    def test_memory_of_a_whole_is_taken_again_when_none_of_its_parts_is_held(self):
        pool = Buffers()
        places = []
        for _ in range(4):
            one, other = (pool.empty(LIKE, (2, 3)) for _ in range(2))
            places.append(other.data_ptr())
            pool.trim()
            del one
        assert places[1] != places[2]
        del other
        again = [pool.empty(LIKE, (2, 3)) for _ in range(2)]
        assert again[1].data_ptr() == places[-1]


@pytest.mark.usefixtures("everything_lies_side_by_side")
class TestAdjoining:
    def matrices(self, count, n=4, d=16):
        return list(torch.randn(count, n, d))

    def test_parts_in_any_order(self):
        (a, b), (c, d) = self.matrices(2), self.matrices(2)
        several = [d, b, a, c]
        stacks = adjoining(several)
        assert sorted(place for places, _ in stacks for place in places) == [0, 1, 2, 3]
        assert sorted(len(places) for places, _ in stacks) == [2, 2]
        for places, stack in stacks:
            assert torch.equal(stack, torch.stack([several[place] for place in places]))
            assert stack.untyped_storage().data_ptr() == several[places[0]].untyped_storage().data_ptr()

    def test_gaps_transposes_and_strangers_stand_alone(self):
        parts = self.matrices(6)
        transposed = list(torch.randn(2, 16, 4).mT)
        for several in ([parts[0], parts[2], parts[4], torch.randn(4, 16)], transposed):
            stacks = adjoining(several)
            assert [len(places) for places, _ in stacks] == [1] * len(several)
            for (place,), stack in stacks:
                assert torch.equal(stack[0], several[place])

    @pytest.mark.parametrize(("count", "threads", "gains"), [(1, 1, False), (2, 2, True), (3, 2, False), (5, 2, True)])
    def test_only_where_threads_have_as_much_to_do(self, monkeypatch, count, threads, gains):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        assert bool(adjoining(self.matrices(count))) == gains

    def test_not_where_rows_begin_inside_a_line_of_the_cache_nor_for_other_libraries(self):
        assert adjoining(self.matrices(2, d=17)) == []
        assert adjoining([one.numpy() for one in self.matrices(2)]) == []
        with FakeTensorMode():
            assert adjoining([torch.zeros(4, 16), torch.zeros(4, 16)]) == []

    @pytest.mark.parametrize(("n", "d"), [(32, 16384), (64, 9216), (17, 16400), (50, 8000)])
    def test_products_have_the_same_bits_however_many_are_in_a_stack(self, monkeypatch, n, d):
        monkeypatch.setattr(torch_kernels, "SIDE_BY_SIDE", range(1 << 20, (8 << 20) + 1))
        whole, weights = torch.randn(4, n, d), torch.randn(4, n)
        grams, sums = whole @ whole.mT, weights[:, None] @ whole
        for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
            apart = [whole[number].clone() for number in order]
            for several in ([whole[number] for number in order], apart, list(torch.stack(apart))):
                stacks = adjoining(several)
                assert sum(len(places) for places, _ in stacks) == 4
                for places, stack in stacks:
                    own = [order[place] for place in places]
                    assert torch.equal(stack @ stack.mT, grams[own])
                    assert torch.equal(weights[own][:, None] @ stack, sums[own])


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


class Alike(nn.Module):
    """Linear layers of one shape on sequences, whose rows are kept."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x.mean(1))


def run(model, optimizer, batches):
    for x in batches:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), torch.arange(6) % 2).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def composed(refresh):
    torch.manual_seed(0)
    model = Alike()
    options = {"solver": curvlib.Woodbury(), "damping": 0.1, "lr": 0.1, "refresh": refresh, "fused": True}
    return model, curvlib.compose(model, fisher=curvlib.Empirical(), **options)


@pytest.mark.parametrize("refresh", [1, 3])
def test_rows_that_lie_side_by_side_train_alike_and_resume_bit_for_bit(monkeypatch, tmp_path, refresh):
    monkeypatch.setattr(buffers, "_LARGE", 1 << 40)
    sizes = range(6 * 16 * 16 * 4, 6 * 16 * 16 * 4 + 1)
    for module in (buffers, torch_kernels):
        monkeypatch.setattr(module, "SIDE_BY_SIDE", sizes)
    batches = torch.randn(9, 6, 20, 16)
    model, optimizer = composed(refresh)
    run(model, optimizer, batches[:5])
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "saved")
    whole = run(model, optimizer, batches[5:])
    rows = [optimizer.curvature[f"layers.{number}"].estimate.factors for number in range(4)]
    matrices = [getattr(one, "base", one).values["weight"].flatten(1) for one in rows]
    assert [len(places) for places, _ in adjoining(matrices)] == [4]
    other, resumed = composed(refresh)
    parameters, state = torch.load(tmp_path / "saved", weights_only=True)
    other.load_state_dict(parameters)
    resumed.load_state_dict(state)
    assert all(map(torch.equal, whole, run(other, resumed, batches[5:])))
    for module in (buffers, torch_kernels):
        monkeypatch.setattr(module, "SIDE_BY_SIDE", range(1))
    for mine, theirs in zip(whole, run(*composed(refresh), batches), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("refresh", [1, 3])
def test_as_many_buffers_as_two_refreshes_need(refresh):
    model, optimizer = trained(8, refresh)[:2]
    counts = []
    for _ in range(3 * refresh):
        optimizer.zero_grad()
        functional.cross_entropy(model(torch.randn(6, 2, 9, 9)), torch.arange(6) % 2).backward()
        optimizer.step()
        counts.append(len(optimizer.plan.buffers))
    held = sum(lent.view() is not None for lent in optimizer.plan.buffers._memory)
    assert set(counts[refresh:]) == {counts[-1]}
    assert held < counts[-1] <= 2 * held
