import gzip
import struct

import numpy as np
import pytest
import torch

from curvlib.cli import data


@pytest.fixture(autouse=True)
def _keep_global_state():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    yield
    torch.set_rng_state(state)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """No test reads the machine's own data sets or reaches a network."""
    system, cache = tmp_path / "system", tmp_path / "cache"
    monkeypatch.setattr(data, "SYSTEM_FOLDER", system)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))

    def unreachable(name):
        raise data.DataError(f"OpenML did not deliver {name} (test).")

    monkeypatch.setattr(data, "fetch", unreachable)
    return system, cache


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def tiny_fashion(tmp_path):
    """A folder with a Fashion-MNIST of 64 training and 16 test images, half of its files compressed."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    random = np.random.default_rng(0)
    for part, n in (("train", 64), ("t10k", 16)):
        images = random.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return folder
