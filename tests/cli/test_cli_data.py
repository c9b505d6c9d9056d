import gzip
import sys
import types

import numpy as np
import pytest

from curvlib.cli import data, openml
from curvlib.cli.idx import read_cifar, read_idx, write_idx
from curvlib.errors import ConfigurationError, DataError


@pytest.mark.parametrize("name", ["a-ubyte", "a-ubyte.gz"])
@pytest.mark.parametrize("shape", [(5,), (3, 4, 2), (2, 3, 4, 4)])
def test_idx_round_trip(tmp_path, name, shape):
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    write_idx(tmp_path / name, array)
    read = read_idx(tmp_path / name, "")
    assert read.shape == shape
    assert np.array_equal(read, array)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x1f\x8b\x08", "not an IDX file"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00", "not an IDX file"),
        (b"<html>not found</html>", "not an IDX file"),
        (b"\x00\x00\x08\x03\x00\x00", "header has 6 of 16"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x05abc", "truncated"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x02abc", "corrupt"),
    ],
)
def test_bad_idx_names_the_file_and_the_remedy(tmp_path, raw, message):
    path = tmp_path / "broken-ubyte"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path, "Do this.")
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith("Do this.")


@pytest.mark.parametrize("cut", [3, 30, -6])
def test_truncated_gzip(tmp_path, cut):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(bytes(1000) + b"abc")[:cut])
    with pytest.raises(DataError, match="corrupt or truncated"):
        read_idx(path, "")


def test_corrupt_gzip_stream(tmp_path):
    path = tmp_path / "x.gz"
    raw = bytearray(gzip.compress(np.random.default_rng(0).bytes(500)))
    raw[12:40] = b"\xff" * 28
    path.write_bytes(raw)
    with pytest.raises(DataError, match="corrupt or truncated"):
        read_idx(path, "")


def test_unreadable_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path / "absent", "")


def test_fashion_mnist_from_a_folder(tiny_fashion):
    dataset = data.load_dataset("fashion-mnist", tiny_fashion)
    assert dataset.shape == (1, 28, 28)
    assert dataset.train_images.shape == (64, 1, 28, 28)
    assert dataset.test_labels.tolist() == [i % 10 for i in range(16)]
    assert str(tiny_fashion) in dataset.source
    assert dataset.note == ""


@pytest.mark.parametrize("which", [0, 1])
def test_system_folder_then_cache(tiny_fashion, places, which):
    places[which].mkdir()
    tiny_fashion.rename(places[which] / ("fashion-mnist" if which == 0 else "curvlib"))
    if which == 1:
        (places[1] / "curvlib").rename(places[1] / "fashion-mnist")
        (places[1] / "curvlib").mkdir()
        (places[1] / "fashion-mnist").rename(places[1] / "curvlib" / "fashion-mnist")
    assert len(data.load_dataset("fashion-mnist").train_images) == 64
    assert data.load_dataset("auto").name == "fashion-mnist"


def test_the_default_cache_is_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.cache_folder() == tmp_path / ".cache" / "curvlib"


def test_parent_folder_is_understood(tiny_fashion):
    (tiny_fashion.parent / "above").mkdir()
    tiny_fashion.rename(tiny_fashion.parent / "above" / "fashion-mnist")
    assert data.load_dataset("fashion-mnist", tiny_fashion.parent / "above").name == "fashion-mnist"


def test_truncated_member_names_file_and_remedies(tiny_fashion):
    path = tiny_fashion / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError) as caught:
        data.load_dataset("auto", tiny_fashion)
    for part in (str(path), "truncated", "dataset-fashion-mnist", "OpenML", "--data-dir"):
        assert part in str(caught.value)


def test_missing_member(tiny_fashion):
    (tiny_fashion / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.*missing"):
        data.load_dataset("fashion-mnist", tiny_fashion)


def test_empty_data_dir_is_an_error_even_for_auto(tmp_path):
    with pytest.raises(DataError, match="does not hold fashion-mnist"):
        data.load_dataset("auto", tmp_path)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train-labels-idx1-ubyte", np.zeros(63, np.uint8), "64 images and 63 labels"),
        ("train-labels-idx1-ubyte", np.full(64, 10, np.uint8), "labels reach 10"),
        ("train-labels-idx1-ubyte", np.zeros((64, 1), np.uint8), "2 dimensions instead of 1"),
        ("t10k-images-idx3-ubyte", np.zeros((16, 27, 28), np.uint8), r"test images \(1, 27, 28\)"),
        ("t10k-images-idx3-ubyte", np.zeros((16, 28), np.uint8), "2 dimensions instead of 3"),
    ],
)
def test_parts_that_do_not_fit(tiny_fashion, name, array, message):
    write_idx(tiny_fashion / name, array)
    with pytest.raises(DataError, match=message):
        data.load_dataset("fashion-mnist", tiny_fashion)


def test_auto_says_that_digits_stand_in():
    dataset = data.load_dataset("auto")
    assert dataset.name == "digits"
    assert "stands in for fashion-mnist" in dataset.note
    assert "OpenML did not deliver" in dataset.note


def test_digits_are_split_the_same_way_each_time():
    first, second = data.load_dataset("digits"), data.load_dataset("digits")
    assert first.train_images.shape == (1437, 1, 8, 8)
    assert len(first.test_images) == 360
    assert first.peak == 16 == first.train_images.max()
    assert np.array_equal(first.test_images, second.test_images)
    assert first.note == ""


def test_unreachable_data_set_is_an_error_where_it_was_asked_for():
    with pytest.raises(DataError, match=r"OpenML did not deliver mnist_784.*--data-dir"):
        data.load_dataset("mnist")


def test_unknown_name():
    with pytest.raises(ConfigurationError, match="unknown data set 'imagenet'"):
        data.load_dataset("imagenet")


def cifar_file(path, records, label_bytes, seed=0):
    table = np.random.default_rng(seed).integers(0, 10, (records, label_bytes + 3072), dtype=np.uint8)
    path.write_bytes(table.tobytes())
    return table


@pytest.mark.parametrize(
    ("name", "files", "label_bytes"),
    [
        ("cifar10", [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"], 1),
        ("cifar100", ["train.bin", "test.bin"], 2),
    ],
)
def test_cifar_binary_version(tmp_path, monkeypatch, name, files, label_bytes):
    import dataclasses

    small = dataclasses.replace(data._SOURCES[name], cifar_records=(4, 4))
    monkeypatch.setitem(data._SOURCES, name, small)
    tables = [cifar_file(tmp_path / file, 4, label_bytes, i) for i, file in enumerate(files)]
    dataset = data.load_dataset(name, tmp_path)
    assert dataset.shape == (3, 32, 32)
    assert len(dataset.train_images) == 4 * (len(files) - 1)
    assert dataset.test_labels.tolist() == tables[-1][:, label_bytes - 1].tolist()
    assert np.array_equal(dataset.train_images[0].ravel(), tables[0][0, label_bytes:])
    (tmp_path / files[0]).write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="truncated"):
        data.load_dataset(name, tmp_path)
    (tmp_path / files[0]).unlink()
    with pytest.raises(DataError, match="cannot be read"):
        data.load_dataset(name, tmp_path)


def test_cifar_file_that_is_too_long(tmp_path):
    cifar_file(tmp_path / "x.bin", 5, 1)
    with pytest.raises(DataError, match="corrupt"):
        read_cifar(tmp_path / "x.bin", "", label_bytes=1, records=4)


def small_source(monkeypatch):
    import dataclasses

    monkeypatch.setitem(data._SOURCES, "mnist", dataclasses.replace(data._SOURCES["mnist"], training=20))


def test_openml_table_is_split_and_cached(monkeypatch, places):
    small_source(monkeypatch)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 784), dtype=np.uint8)
    labels = (np.arange(30) % 10).astype(np.uint8)
    calls = []
    monkeypatch.setattr(data, "fetch", lambda name: calls.append(name) or (pixels, labels))
    said = []
    fetched = data.load_dataset("mnist", announce=said.append)
    cached = data.load_dataset("mnist", announce=said.append)
    assert len(said) == 1
    assert "fetching it from OpenML (mnist_784)" in said[0]
    assert calls == ["mnist_784"]
    assert "OpenML" in fetched.source
    assert str(places[1]) in cached.source
    assert np.array_equal(fetched.test_images, cached.test_images)
    assert cached.train_images.shape == (20, 1, 28, 28)


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, places):
    small_source(monkeypatch)
    table = np.zeros((30, 784), np.uint8), np.zeros(30, np.uint8)
    monkeypatch.setattr(data, "fetch", lambda name: table)

    def full(path, array):
        raise DataError("disk full")

    monkeypatch.setattr(data, "write_idx", full)
    assert len(data.load_dataset("mnist").train_images) == 20
    assert list(places[1].joinpath("curvlib").iterdir()) == []
    places[1].joinpath("curvlib").rmdir()
    places[1].joinpath("curvlib").write_text("a file in the way")
    assert len(data.load_dataset("mnist").train_images) == 20


def test_openml_table_of_another_shape(monkeypatch):
    small_source(monkeypatch)
    monkeypatch.setattr(data, "fetch", lambda name: (np.zeros((30, 783), np.uint8), np.zeros(30, np.uint8)))
    with pytest.raises(DataError, match=r"shape \(30, 783\)"):
        data.load_dataset("mnist")


def test_fetch_reads_openml(monkeypatch):
    import sklearn.datasets

    bundle = types.SimpleNamespace(data=np.ones((2, 4)), target=np.array(["3", "7"]))
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", lambda *args, **options: bundle)
    pixels, labels = openml.fetch("anything")
    assert pixels.dtype == labels.dtype == np.uint8
    assert labels.tolist() == [3, 7]


@pytest.mark.parametrize("error", [OSError("no network"), ValueError("md5 differs"), Exception("not ARFF")])
def test_fetch_failure(monkeypatch, error):
    import sklearn.datasets

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fail)
    with pytest.raises(DataError, match="OpenML did not deliver anything"):
        openml.fetch("anything")


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"curvlib\[race\]"):
        openml.fetch("anything")
    with pytest.raises(ConfigurationError, match=r"curvlib\[race\]"):
        data.load_dataset("digits")
