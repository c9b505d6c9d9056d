"""Checkpoints that are truncated, flipped, foreign, crafted: a typed error, nothing executed, nothing half-applied."""

import copy
import hashlib
import io
import math
import os
import pickle
import random
from contextlib import suppress

import pytest
import torch
from small_net import built, same, small_net, train, values

from curvlib import Momentum, Sampled
from curvlib.cli.checkpoint import load_checkpoint, save_checkpoint
from curvlib.cli.contestants import hyperparameters
from curvlib.cli.data import load_dataset
from curvlib.cli.tasks import make_task
from curvlib.cli.trainer import RunIdentity, Trainer
from curvlib.errors import CurvatureError, DataError
from curvlib.solvers import EKFAC

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
MAGIC = b"curvlib checkpoint 1\n"


def sealed(payload):
    """A payload with the right magic and checksum, as anyone could make it."""
    return MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload


class Malicious:
    """Creates a file when it is unpickled by something careless."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def damaged(raw, choose):
    kind = choose.randrange(6)
    if kind == 0:
        return raw[: choose.randrange(len(raw))]
    if kind == 1:
        place = choose.randrange(len(raw))
        return raw[:place] + bytes([raw[place] ^ (1 << choose.randrange(8))]) + raw[place + 1 :]
    if kind == 2:
        return choose.randbytes(choose.randrange(2000))
    if kind == 3:  # the content is damaged before it is sealed
        payload = bytearray(raw[len(MAGIC) + 65 :])
        for _ in range(choose.randrange(1, 40)):
            payload[choose.randrange(len(payload))] = choose.randrange(256)
        return sealed(bytes(payload))
    if kind == 4:
        return sealed(raw[len(MAGIC) + 65 :][: choose.randrange(len(raw))])
    return sealed(choose.randbytes(choose.randrange(500)))


def files_are_refused(tmp_path, count, seed):
    choose = random.Random(seed)
    state = {"steps": 3, "tensor": torch.arange(50.0), "nested": {"a": [1, "x"]}}
    save_checkpoint(tmp_path, state)
    path = tmp_path / "checkpoint.pt"
    raw = path.read_bytes()
    refused = 0
    for _ in range(count):
        path.write_bytes(damaged(raw, choose))
        try:
            loaded, _ = load_checkpoint(tmp_path)
        except DataError as error:
            refused += 1
            if "--out" not in str(error):
                pytest.fail(f"no remedy: {error}")
        else:  # sealed again with a change that leaves a state
            assert isinstance(loaded, dict)
    return refused


def test_files(tmp_path):
    assert files_are_refused(tmp_path, 150, seed=0) > 130


@pytest.mark.parametrize("whole", [True, False], ids=["inside a state", "by itself"])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("sealing", [True, False], ids=["sealed", "bare"])
def test_nothing_is_executed(tmp_path, whole, protocol, sealing):
    trap = tmp_path / "executed"
    content = {"steps": 1, "optimizer": Malicious(trap)} if whole else Malicious(trap)
    buffer = io.BytesIO()
    torch.save(content, buffer, pickle_protocol=protocol)
    for payload in (buffer.getvalue(), pickle.dumps(content, protocol)):
        (tmp_path / "checkpoint.pt").write_bytes(sealed(payload) if sealing else payload)
        with pytest.raises(DataError):
            load_checkpoint(tmp_path)
        assert not trap.exists()
    pickle.loads(pickle.dumps(content))
    assert trap.exists()  # the trap works


# -- states that are data, but not the right data ---------------------------------------------------------------------

WRONG = [
    None, True, -1, 7, 2**70, math.nan, "x", b"x", [], {}, [1, 2], {"a": 1}, (1, 2), 1.5, torch.zeros(3),
    torch.full((2, 2), math.nan), torch.zeros((), dtype=torch.uint8), torch.arange(5), {"__kind__": "os.system"},
    {"__kind__": 3}, {"__kind__": "curvlib.precond.curvature.BlockState", "nonsense": 1},
]  # fmt: skip


def places(value, path=()):
    """Every place in a nest of containers."""
    found = [path] if path else []
    if isinstance(value, dict):
        found += [place for key in value for place in places(value[key], (*path, key))]
    elif isinstance(value, list | tuple):
        found += [place for key in range(len(value)) for place in places(value[key], (*path, key))]
    return found


def mutated(state, choose):
    """A copy of the state in which one to three places are wrong."""
    state = copy.deepcopy(state)
    for _ in range(choose.randint(1, 3)):
        *path, last = choose.choice(places(state))
        inner = state
        for key in path:
            inner = inner[key]
        if isinstance(inner, tuple):
            continue
        action = choose.randrange(4)
        if action == 0 and isinstance(inner, dict):
            del inner[last]
        elif action == 1 and isinstance(inner, dict):
            inner[choose.choice(["x", 3, "curvature", "params"])] = inner.pop(last)
        elif action == 2 and isinstance(inner[last], torch.Tensor) and inner[last].ndim:
            inner[last] = inner[last][:-1]
        else:
            inner[last] = choose.choice(WRONG)
        if not places(state):
            break
    return state


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and bool(((a == b) | (a != a) & (b != b)).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def states_are_refused(count, seed):
    choose, refused = random.Random(seed), 0
    model = small_net()
    given = {"fisher": Sampled(), "solver": {"0": EKFAC(), "*": EKFAC()}, "transforms": [Momentum(0.5)], "refresh": 2}
    optimizer = built(model, **given)
    train(model, optimizer, 3)
    good = copy.deepcopy(optimizer.state_dict())
    weights = values(model)
    for _ in range(count):
        wrong, before = mutated(good, choose), copy.deepcopy(optimizer.state_dict())
        try:
            optimizer.load_state_dict(wrong)
        except CurvatureError as error:
            refused += 1
            if len(str(error)) < 20:
                pytest.fail(f"no remedy: {error}")
            assert equal(optimizer.state_dict(), before)
        else:
            with suppress(CurvatureError):  # what cannot be known when it is loaded is said at the step
                train(model, optimizer, 2)
            assert all(torch.isfinite(p).all() for p in model.parameters())
            with torch.no_grad():
                for p, value in zip(model.parameters(), weights, strict=True):
                    p.copy_(value)
            optimizer.load_state_dict(copy.deepcopy(good))
        assert same(values(model), weights)
    train(model, optimizer, 2)
    return refused


def test_states_of_optimizers():
    assert states_are_refused(150, seed=0) > 75


@pytest.fixture(scope="module")
def trainer():
    before = torch.get_rng_state()
    task = make_task(load_dataset("digits", None), "mlp", torch.device("cpu"), width=0.02)
    identity = RunIdentity("digits", "mlp", "kfac", hyperparameters("kfac", "mlp", {}), 16, False, 0)
    trainer = Trainer(task, identity, 20)
    for _ in range(3):
        trainer.step()
    trainer.evaluate()
    yield trainer
    torch.set_rng_state(before)


def runs_are_refused(trainer, count, seed):
    choose, refused = random.Random(seed), 0
    good = copy.deepcopy(trainer.state_dict())
    for _ in range(count):
        wrong, before = mutated(good, choose), copy.deepcopy(trainer.state_dict())
        try:
            trainer.load_state_dict(wrong)
        except CurvatureError as error:
            refused += 1
            if "--out" not in str(error):
                pytest.fail(f"no remedy: {error}")
            assert equal(trainer.state_dict(), before)
        else:
            trainer.load_state_dict(copy.deepcopy(good))
    trainer.step()
    trainer.load_state_dict(good)
    return refused


def test_states_of_runs(trainer):
    assert runs_are_refused(trainer, 60, seed=0) > 30


@pytest.mark.nightly
def test_thousands(tmp_path, trainer, capsys):
    tried = {"files": 4000, "optimizer states": 2500, "run states": 600}
    refused = {
        "files": files_are_refused(tmp_path, tried["files"], seed=1),
        "optimizer states": states_are_refused(tried["optimizer states"], seed=1),
        "run states": runs_are_refused(trainer, tried["run states"], seed=1),
    }
    with capsys.disabled():
        print(f"\n{sum(tried.values())} bad checkpoints tried {tried}, refused {refused}")  # noqa: T201
    assert all(refused[kind] > 0.4 * tried[kind] for kind in tried)
