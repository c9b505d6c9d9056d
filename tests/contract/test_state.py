"""State: whole, read back by every format, on another device or in another precision, or refused."""

import copy
import io

import pytest
import torch
from parts import X, assert_same, backward, composed, network, train, values
from torch import nn

import curvlib
from curvlib import Empirical, KLClip, Momentum, Sampled, Woodbury, flat_state, nested_state
from curvlib.errors import CurvatureError
from curvlib.precond import Graft, Intervals, LevenbergMarquardt
from curvlib.solvers import EKFAC, KFAC, KID, KIS, SOAP, Diagonal, Switch

OPTIONS = {
    "sampled labels": {"fisher": Sampled(samples=2), "refresh": 3, "transforms": [KLClip(), Momentum(0.9)], "seed": 7},
    "averages": {"solver": KFAC(decay=0.9), "refresh": Intervals(2, 4)},
    "several solvers": {"solver": {"0": EKFAC(), "2": Diagonal(), "*": Woodbury()}, "transforms": [Graft("adam")]},
    "a solver's own randomness": {"solver": Switch((KID(0.5), KIS(0.5)), (2,)), "fisher": Empirical()},
    "momentum inside": {"solver": SOAP(), "fisher": Empirical()},
    "groups": {"groups": [{"blocks": "2", "lr": 0.1, "damping": 0.4}], "fisher": Sampled()},
}


def through_torch(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def through_safetensors(state, path):
    safetensors = pytest.importorskip("safetensors.torch")
    tensors, text = flat_state(state)
    safetensors.save_file(tensors, path / "state", metadata={"structure": text})
    with pytest.importorskip("safetensors").safe_open(path / "state", "pt") as file:
        return nested_state({key: file.get_tensor(key) for key in file.keys()}, file.metadata()["structure"])  # noqa: SIM118


def through_distributed(state, path):
    import torch.distributed.checkpoint as dcp

    tensors, text = flat_state(state)
    dcp.save({"tensors": tensors, "structure": text}, checkpoint_id=path / "state", no_dist=True)
    saved = dcp.FileSystemReader(path / "state").read_metadata().state_dict_metadata
    room = {
        name.removeprefix("tensors."): torch.empty(one.size, dtype=one.properties.dtype)
        for name, one in saved.items()
        if name.startswith("tensors.")
    }
    loaded = {"tensors": room, "structure": ""}
    dcp.load(loaded, checkpoint_id=path / "state", no_dist=True)
    return nested_state(loaded["tensors"], loaded["structure"])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("way", ["torch", "safetensors", "distributed"])
def test_resuming_continues_bit_for_bit(name, way, tmp_path):
    def made():
        model = network()
        return model, composed(model, **OPTIONS[name])

    model, optimizer = made()
    train(model, optimizer, 5)
    weights, state = copy.deepcopy(model.state_dict()), optimizer.state_dict()
    ways = {
        "torch": lambda: through_torch(state),
        "safetensors": lambda: through_safetensors(state, tmp_path),
        "distributed": lambda: through_distributed(state, tmp_path),
    }
    state = ways[way]()
    again, resumed = made()
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert resumed.steps == 5
    train(model, optimizer, 5)
    train(again, resumed, 5)
    assert_same(model, again)


def test_state_of_a_damping_that_follows_the_loss_and_of_waiting_blocks():
    def made():
        model = network()
        return model, composed(model, damping=LevenbergMarquardt(1.0, every=1), refresh=100)

    def step(model, optimizer):
        optimizer.step(lambda: (optimizer.zero_grad(), backward(model))[1])

    model, optimizer = made()
    step(model, optimizer)
    optimizer.param_groups[0]["solver"] = KFAC()
    model(X)  # the change is seen: rows of all blocks are waited for
    weights, state = copy.deepcopy(model.state_dict()), through_torch(optimizer.state_dict())
    assert state["curvature"]["wanting"] == ["0", "2", "4"]
    again, resumed = made()
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    resumed.param_groups[0]["solver"] = KFAC()
    for _ in range(3):
        step(model, optimizer)
        step(again, resumed)
    assert_same(model, again)
    assert resumed.damping.current == optimizer.damping.current != 1.0
    assert resumed.curvature["0"].refreshed == 1


@pytest.mark.parametrize(("saved_in", "loaded_in"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_state_takes_the_precision_of_the_parameters(saved_in, loaded_in):
    options = {"transforms": [Momentum(0.9)], "refresh": 100, "solver": {"0": Woodbury(), "2": KFAC(), "4": EKFAC()}}
    model = network(saved_in)
    optimizer = composed(model, **options)
    train(model, optimizer, 2)
    twin = network(loaded_in)
    twin.load_state_dict(model.state_dict())
    other = composed(twin, **options)
    other.load_state_dict(through_torch(optimizer.state_dict()))
    for state in other.curvature.values():
        curvlib.arrays.map_arrays(lambda array: _check(array, loaded_in), (state.estimate, state.inverse))
    assert all(other.state[p]["Momentum.momentum"].dtype == loaded_in for p in twin.parameters())
    train(model, optimizer, 2)
    train(twin, other, 2)
    for name, p in twin.named_parameters():
        torch.testing.assert_close(p.double(), model.get_parameter(name).double(), rtol=1e-3, atol=1e-4)


def _check(array, dtype):
    assert array.dtype == dtype or not array.is_floating_point()
    return array


def test_state_in_half_precision_is_that_of_float32():
    model, twin = network(torch.bfloat16), network(torch.float32)
    optimizer, other = composed(model, refresh=100), composed(twin, refresh=100)
    train(model, optimizer)
    other.load_state_dict(optimizer.state_dict())
    for name, state in other.curvature.items():
        curvlib.arrays.map_arrays(lambda array: _check(array, torch.float32), (state.estimate, state.inverse))
        assert state.inverse.factor is optimizer.curvature[name].inverse.factor  # nothing to cast, nothing copied


def test_what_estimate_and_inverse_share_stays_shared():
    model = nn.Linear(20, 3).double()
    x, y = torch.randn(4, 20).double(), torch.arange(4) % 3
    optimizer = composed(model)
    train(model, optimizer, 1, x, y)
    state = optimizer.curvature["Linear"]
    assert state.estimate.factors.inputs is state.inverse.factors.inputs
    narrow = nn.Linear(20, 3)
    other = composed(narrow)
    other.load_state_dict(optimizer.state_dict())
    state = other.curvature["Linear"]
    assert state.estimate.factors.inputs is state.inverse.factors.inputs


def test_labels_of_a_checkpoint_from_another_kind_of_device_are_drawn_anew():
    model = network()
    optimizer = composed(model, fisher=Sampled(), seed=3)
    train(model, optimizer, 2)
    state = optimizer.state_dict()
    state["curvature"] = {
        **state["curvature"], "generator_device": "cuda", "generator": torch.zeros(16, dtype=torch.uint8)
    }  # fmt: skip
    drawn = []
    for _ in range(2):
        other = composed(network(), fisher=Sampled(), seed=3)
        other.load_state_dict(state)
        drawn.append(other._generator.get_state())
    assert torch.equal(*drawn)
    assert torch.equal(drawn[0], torch.Generator().manual_seed(5).get_state())


def test_numbers_of_groups_are_the_saved_ones_and_solvers_the_composed_ones():
    model = network()
    optimizer = composed(model, groups=[{"blocks": "0", "damping": 0.7}])
    optimizer.param_groups[1]["lr"] = 0.125
    state = optimizer.state_dict()
    assert all("solver" not in group for group in state["param_groups"])
    other = composed(network(), groups=[{"blocks": "0", "damping": 0.1, "solver": Woodbury()}])
    other.load_state_dict(state)
    assert [(group["lr"], group["damping"]) for group in other.param_groups] == [(0.5, 0.7), (0.125, 0.1)]
    assert [group["solver"] for group in other.param_groups] == [Woodbury(), None]
    for group in state["param_groups"]:  # saved before there was such an option
        del group["maximize"]
    other.load_state_dict(state)
    assert other.param_groups[0]["maximize"] is False


def test_state_of_what_is_frozen_fits_what_is_frozen():
    def made():
        model = network()
        return model, composed(model)

    model, optimizer = made()
    model[0].requires_grad_(False)
    train(model, optimizer, 2)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    again, resumed = made()
    with pytest.raises(CurvatureError, match="freeze what was frozen"):
        resumed.load_state_dict(state)
    again[0].requires_grad_(False)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    for one in (model, again):
        one[0].requires_grad_(True)
    train(model, optimizer, 2)
    train(again, resumed, 2)
    assert_same(model, again)


def damages():
    def curvature(**given):
        return lambda state: {**state, "curvature": {**state["curvature"], **given}}

    def group(**given):
        return lambda state: {**state, "param_groups": [{**one, **given} for one in state["param_groups"]]}

    def block(value):
        return lambda state: curvature(blocks={**state["curvature"]["blocks"], "0": value})(state)

    return {
        "no curvature": (lambda state: {"state": {}, "param_groups": []}, "holds no curvature"),
        "no dictionary": (lambda state: {**state, "curvature": 3}, "holds no curvature"),
        "another version": (curvature(version=0), "version 0"),
        "other blocks": (curvature(blocks={}), r"belongs to the blocks \[\]"),
        "another solver": (curvature(solvers={"0": "KFAC"}), "that of KFAC, the optimizer solves with Woodbury"),
        "steps": (curvature(steps="many"), "damaged"),
        "generator": (curvature(generator=torch.zeros(3)), "damaged"),
        "no tensor": (curvature(generator="seed"), "damaged"),
        "damping": (curvature(damping=-3.0), "cannot be used: damping"),
        "a block": (block(7), "damaged"),
        "a kind": (block({"__kind__": "os.system"}), "kind 'os.system', which is unknown"),
        "learning rate": (group(lr="fast"), "cannot be used: lr"),
        "no groups": (lambda state: {key: value for key, value in state.items() if key != "param_groups"}, "damaged"),
        "state of a parameter": (lambda state: {**state, "state": {0: 3}}, "damaged"),
    }


@pytest.mark.parametrize("name", damages())
def test_what_cannot_be_read_changes_nothing(name):
    damage, message = damages()[name]
    model = network()
    optimizer = composed(model, damping=LevenbergMarquardt(1.0), transforms=[Momentum(0.9)])
    optimizer.step(lambda: backward(model))
    state = copy.deepcopy(optimizer.state_dict())
    before = (optimizer.curvature, optimizer.steps, optimizer.param_groups, optimizer.state, values(model))
    with pytest.raises(CurvatureError, match=message):
        optimizer.load_state_dict(damage(state))
    after = (optimizer.curvature, optimizer.steps, optimizer.param_groups, optimizer.state)
    assert all(one is other for one, other in zip(before[:2], after[:2], strict=True))
    assert before[2:4] == after[2:4]
    optimizer.load_state_dict(state)


def test_other_groups_are_refused_by_torch_and_change_nothing():
    optimizer = composed(network())
    state = composed(network(), groups=[{"blocks": "0"}]).state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(state)
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", '{"a": {"__tensor__": "missing"}}', '{"__pairs__": [[[1], 2]]}', '{"__pairs__": 3}']
)
def test_a_damaged_text_is_refused(text):
    with pytest.raises(CurvatureError, match="flat_state"):
        nested_state({}, text)


def test_a_value_without_a_form_is_refused():
    with pytest.raises(CurvatureError, match="a.b is a object"):
        flat_state({"a": {"b": object()}})


def test_flat_tensors_share_no_memory():
    base = torch.arange(6.0)
    tensors, text = flat_state(
        {"a": base, "b": base, "c": base[:2], "d": base.reshape(2, 3).T, 3: [base[2:], None, 1.5]}
    )
    assert len(tensors) == 4
    assert len({one.untyped_storage().data_ptr() for one in tensors.values()}) == 4
    assert all(one.is_contiguous() for one in tensors.values())
    back = nested_state(tensors, text)
    assert back["a"] is back["b"]
    assert torch.equal(back["d"], base.reshape(2, 3).T)
    assert torch.equal(back[3][0], base[2:])
    assert back[3][1:] == [None, 1.5]


def test_what_drops_the_curvature_is_refused():
    """`torch.distributed.checkpoint.state_dict` keeps what torch's own optimizers have; nothing is lost in silence."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = network()
    optimizer = composed(model, transforms=[Momentum(0.9)])
    train(model, optimizer, 2)
    state, before = get_optimizer_state_dict(model, optimizer), optimizer.curvature
    with pytest.raises(CurvatureError, match=r"keeps only 'state' and 'param_groups' \(curvlib.flat_state"):
        set_optimizer_state_dict(model, optimizer, state)
    assert optimizer.curvature is before
