"""Which place a backend means, what it refuses, and what CuPy's work is surrounded by; a stand-in serves for CuPy."""

import contextlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy_as_cupy import modules
from torch import nn

import curvlib
from curvlib.errors import ConfigurationError
from curvlib.precond import places
from curvlib.precond.backends import Placed
from curvlib.precond.places import CupyPlace, NumpyPlace, TorchPlace, place_for
from curvlib.precond.precision import _settings, multiplied

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def composed(**options):
    return curvlib.compose(
        nn.Sequential(nn.Linear(3, 2)),
        fisher=curvlib.Empirical(),
        solver=curvlib.Woodbury(),
        damping=1.0,
        lr=0.1,
        **options,
    )


def test_by_default_solvers_work_as_they_are():
    assert type(composed().solvers["0"]) is curvlib.Woodbury
    assert place_for("torch", "highest", [CPU]) is None
    assert place_for("torch", "highest", [CPU, GPU]) == TorchPlace("highest")
    assert place_for("torch", "high", [CPU]) == TorchPlace("high")
    assert place_for("numpy", "highest", [CPU]) == NumpyPlace()
    shared = composed(backend="numpy", matmul_precision="highest").solvers["0"]
    assert (type(shared), shared.place) == (Placed, NumpyPlace())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "jax"}, "backend must be one of 'torch', 'cupy', 'numpy', got 'jax'"),
        ({"matmul_precision": "low"}, "matmul_precision must be one of 'highest', 'high', 'medium', got 'low'"),
        ({"backend": "numpy", "matmul_precision": "high"}, "is torch's; backend='numpy' multiplies float32 as it is"),
        ({"backend": "cupy", "matmul_precision": "high"}, "CUPY_TF32"),
    ],
)
def test_words_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        composed(**options)


def test_parameters_elsewhere_are_refused():
    with pytest.raises(ConfigurationError, match="needs all parameters on one device; they are on cpu, cuda:0"):
        place_for("numpy", "highest", [CPU, GPU])
    with pytest.raises(ConfigurationError, match="works on the CPU, and the parameters are on cuda:0"):
        place_for("numpy", "highest", [GPU])
    with pytest.raises(ConfigurationError, match=r"got a tensor of shape \(2,\) on meta"):
        NumpyPlace().enter(torch.zeros(2, device="meta"))


# -- CuPy, found or not -----------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """Let torch believe in a GPU, and CuPy be whatever a test says."""

    def make(cuda="12.8", available=True, cupy=None, missing=False, **options):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        found = modules(**options)
        for name, module in found.items():
            monkeypatch.setitem(sys.modules, name, None if missing else module)
        monkeypatch.delitem(sys.modules, "curvlib.arrays.cupy_kernels", raising=False)
        return found

    yield make
    sys.modules.pop("curvlib.arrays.cupy_kernels", None)
    places._allocator.cache_clear()


@pytest.mark.parametrize(
    ("options", "device", "message"),
    [
        ({"cuda": None}, GPU, "this torch is built without CUDA"),
        ({"available": False, "missing": True}, GPU, "needs an NVIDIA GPU and its driver, and torch finds none"),
        ({}, CPU, r"they are on cpu: move the model with model.cuda\(\)"),
        ({"missing": True}, GPU, r"needs CuPy for CUDA 12: pip install 'curvlib\[cupy-cuda12\]'"),
        ({"missing": True, "cuda": "13.0"}, GPU, r"needs CuPy for CUDA 13: pip install 'curvlib\[cupy-cuda13\]'"),
        ({"version": "13.6.0"}, GPU, "needs CuPy 14 or later, not 13.6.0"),
        ({"runtime": 13000}, GPU, "built for CUDA 13, this torch for CUDA 12: pip uninstall cupy-cuda13x, then pip"),
    ],
)
def test_what_is_missing_is_said_with_what_to_install(machine, options, device, message):
    machine(**options)
    with pytest.raises(ConfigurationError, match=message):
        place_for("cupy", "highest", [device])


def test_missing_libraries_and_an_old_driver_are_told_apart(machine, monkeypatch):
    machine()
    monkeypatch.setitem(sys.modules, "cupyx.scipy.linalg", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'cupy-cuda12x\[ctk\]'"):
        place_for("cupy", "highest", [GPU])
    machine(runtime=12090)["cupy"].cuda.is_available = lambda: False
    with pytest.raises(ConfigurationError, match="driver may be older"):
        place_for("cupy", "highest", [GPU])


def test_a_machine_with_all_of_it_is_taken(machine):
    machine()
    assert place_for("cupy", "highest", [GPU]) == CupyPlace(0)
    assert place_for("cupy", "highest", [torch.device("cuda")]) == CupyPlace(0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cupy_is_refused():
    with pytest.raises(ConfigurationError, match="backend='cupy'"):
        composed(backend="cupy")


# -- CuPy at work -----------------------------------------------------------------------------------------------------


@pytest.fixture
def at_work(machine, monkeypatch):
    """A place on the stand-in, and the log of what its work is surrounded by."""
    log = []
    machine(log=log)

    @contextlib.contextmanager
    def device(number):
        log.append(("torch's device", number))
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda number: SimpleNamespace(cuda_stream=40 + number))
    monkeypatch.setattr(torch.cuda, "caching_allocator_alloc", lambda *given: log.append(("alloc", *given)) or 123)
    monkeypatch.setattr(torch.cuda, "caching_allocator_delete", lambda pointer: log.append(("free", pointer)))
    return CupyPlace(2), log


def test_work_is_on_torchs_device_stream_and_memory(at_work):
    place, log = at_work
    with place.working():
        log.append("work")
    allocate, release = allocator = places._allocator().malloc
    assert log == [
        ("torch's device", 2), ("device", 2), ("stream", (0, 42)), ("allocator", allocator), "work",
        ("end of allocator", allocator), ("end of stream", (0, 42)), ("end of device", 2),
    ]  # fmt: skip
    log.clear()
    assert allocate(4096, 2) == 123
    release(123, 2)
    assert log == [("alloc", 4096, 2, 77), ("free", 123)]


def test_a_captured_graph_is_refused(at_work, monkeypatch):
    place, _ = at_work
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ConfigurationError, match="cannot be captured in a CUDA graph"), place.working():
        pass


def test_tensors_go_in_by_dlpack_and_those_of_other_devices_are_refused(at_work, monkeypatch):
    place, log = at_work
    with pytest.raises(ConfigurationError, match=r"works on cuda:2, .* on cpu"):
        place.enter(torch.zeros(3))
    monkeypatch.setattr(places, "_require_device", lambda *given: None)
    tensor = torch.zeros(3, requires_grad=True)
    place.enter(tensor)[0] = 5
    assert (tensor[0].item(), log) == (5, ["from_dlpack"])


def test_arrays_come_out_by_dlpack_and_those_that_run_backwards_are_copied():
    array = np.arange(3.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", modules()["cupy"])
        CupyPlace(0).leave(array)[0] = 7
        assert CupyPlace(0).leave(array[::-1]).tolist() == [2, 1, 7]
    assert array[0] == 7


# -- precision --------------------------------------------------------------------------------------------------------


def settings():
    return [now for now, _, _ in _settings("highest")]


def test_precision_is_set_for_the_work_and_restored():
    before, seen = settings(), []
    for word in ("highest", "high", "medium"):
        with contextlib.suppress(ZeroDivisionError), multiplied(word):
            seen.append(settings())
            assert seen[-1] == [then for _, then, _ in _settings(word)]
            raise ZeroDivisionError
        assert settings() == before
    assert len(set(map(tuple, seen))) == 3


def test_older_torch_has_global_settings(monkeypatch):
    cudnn = SimpleNamespace(allow_tf32=True)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    with multiplied("high"):
        assert (torch.get_float32_matmul_precision(), cudnn.allow_tf32) == ("high", True)
    with multiplied("highest"):
        assert (torch.get_float32_matmul_precision(), cudnn.allow_tf32) == ("highest", False)
    assert (torch.get_float32_matmul_precision(), cudnn.allow_tf32) == ("highest", True)


class Notes(curvlib.Woodbury):
    def factorize(self, estimate, damping):
        SEEN.append(settings())
        return super().factorize(estimate, damping)


SEEN = []


def test_solvers_work_with_the_precision_that_was_asked_for():
    SEEN.clear()
    model = nn.Linear(4, 3)
    optimizer = curvlib.compose(
        model, fisher=curvlib.Empirical(), solver=Notes(), damping=1.0, lr=0.1, matmul_precision="high"
    )
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    assert SEEN == [[then for _, then, _ in _settings("high")]] != [settings()]
