"""The data sets of the command line, from local files, a system folder, OpenML or scikit-learn."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from curvlib.cli.idx import read_cifar, read_idx, write_idx
from curvlib.cli.openml import fetch
from curvlib.errors import ConfigurationError, DataError

__all__ = ["DATASETS", "Dataset", "MissingDataError", "load_dataset"]

Bytes = NDArray[np.uint8]

SYSTEM_FOLDER = Path("/usr/share/datasets")
_IDX_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_DIGITS_TEST = 360


class MissingDataError(DataError):
    """A data set is in none of the places where it was looked for."""


@dataclass(frozen=True)
class Dataset:
    """Images and labels of one data set.

    Parameters
    ----------
    name
        The name on the command line.
    source
        Where the data came from, for the report.
    train_images, test_images
        Bytes of shape ``(samples, channels, height, width)``.
    train_labels, test_labels
        Class numbers of shape ``(samples,)``.
    classes
        The number of classes.
    peak
        The byte that means white.
    note
        Why this data set stands in for another one; empty if it does not.
    """

    name: str
    source: str
    train_images: Bytes
    train_labels: Bytes
    test_images: Bytes
    test_labels: Bytes
    classes: int
    peak: int = 255
    note: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width


@dataclass(frozen=True)
class _Source:
    """What is known about one data set that lives in files or on OpenML."""

    openml: str
    classes: int
    training: int
    folders: tuple[str, ...]
    cifar_files: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    cifar_label_bytes: int = 1
    cifar_records: tuple[int, int] = (10_000, 10_000)
    package: str = ""

    def remedy(self, name: str) -> str:
        package = f"install the Debian package {self.package}, " if self.package else ""
        files = (
            f"the files {', '.join(self.cifar_files[0] + self.cifar_files[1])} of the binary version"
            if self.cifar_files
            else f"the files {', '.join(_IDX_NAMES)}, each plain or with .gz"
        )
        return (
            f"To get {name}: {package}let it be fetched from OpenML ({self.openml}) with a network connection, "
            f"or give a folder with {files} by --data-dir."
        )


_SOURCES: dict[str, _Source] = {
    "fashion-mnist": _Source("Fashion-MNIST", 10, 60_000, ("fashion-mnist",), package="dataset-fashion-mnist"),
    "mnist": _Source("mnist_784", 10, 60_000, ("mnist",)),
    "cifar10": _Source(
        "CIFAR_10",
        10,
        50_000,
        ("cifar-10-batches-bin", "cifar10"),
        (tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",)),
    ),
    "cifar100": _Source(
        "CIFAR-100",
        100,
        50_000,
        ("cifar-100-binary", "cifar100"),
        (("train.bin",), ("test.bin",)),
        cifar_label_bytes=2,
        cifar_records=(50_000, 10_000),
    ),
}

DATASETS = ("auto", *_SOURCES, "digits")


def cache_folder() -> Path:
    """Return the user's cache folder for downloaded data sets."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "curvlib"


def load_dataset(
    name: str, data_dir: Path | None = None, announce: Callable[[str], None] = lambda text: None
) -> Dataset:
    """Load a data set by name.

    Parameters
    ----------
    name
        One of `DATASETS`. ``"auto"`` is Fashion-MNIST or, where that cannot be had, the digits of scikit-learn.
    data_dir
        A folder with the data set's files. Where it is given, no other place is tried.
    announce
        Called with a line of text before a download, which can take minutes.

    Raises
    ------
    DataError
        If the files are corrupt or truncated, or the data set cannot be had.
    """
    if name == "digits":
        return _digits()
    if name == "auto":
        try:
            return load_dataset("fashion-mnist", data_dir, announce)
        except MissingDataError as error:
            # A folder that was named and does not hold the data is a mistake to report, not to paper over.
            if data_dir is not None:
                raise
            return _digits(note=f"digits stands in for fashion-mnist, which cannot be had here. {error}")
    if name not in _SOURCES:
        raise ConfigurationError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    source = _SOURCES[name]
    readers: tuple[Callable[[str, _Source, Path], Dataset | None], ...] = (_from_cifar, _from_idx)
    places = [data_dir] if data_dir else [SYSTEM_FOLDER, cache_folder()]
    for place in places:
        for folder in (place, *(place / below for below in source.folders)):
            # Without --data-dir only the data set's own folder counts: the places hold others' files as well.
            if folder == place and data_dir is None:
                continue
            for reader in readers:
                found = reader(name, source, folder)
                if found is not None:
                    return found
    if data_dir is not None:
        raise MissingDataError(f"{data_dir} does not hold {name}. {source.remedy(name)}")
    announce(f"{name} is not on this machine: fetching it from OpenML ({source.openml}) once")
    return _from_openml(name, source)


def _from_idx(name: str, source: _Source, folder: Path) -> Dataset | None:
    paths = [_existing(folder / file) for file in _IDX_NAMES]
    if not any(paths):
        return None
    remedy = source.remedy(name)
    for file, path in zip(_IDX_NAMES, paths, strict=True):
        if path is None:
            raise DataError(f"{folder / file} (or {file}.gz) is missing beside its siblings. {remedy}")
    arrays = [read_idx(path, remedy) for path in paths if path is not None]
    for path, array, dimensions in zip(paths, arrays, ((3, 4), (1,), (3, 4), (1,)), strict=True):
        if array.ndim not in dimensions:
            raise DataError(f"{path} is an array of {array.ndim} dimensions instead of {dimensions[0]}. {remedy}")
    images = [array[:, None] if array.ndim == 3 else array for array in arrays[::2]]
    return _checked(name, source, f"IDX files in {folder}", images, arrays[1::2], str(folder))


def _from_cifar(name: str, source: _Source, folder: Path) -> Dataset | None:
    if source.cifar_files is None or not any(
        (folder / file).exists() for files in source.cifar_files for file in files
    ):
        return None
    images, labels = [], []
    for files, records in zip(source.cifar_files, source.cifar_records, strict=True):
        parts = [
            read_cifar(folder / file, source.remedy(name), label_bytes=source.cifar_label_bytes, records=records)
            for file in files
        ]
        images.append(np.concatenate([part[0] for part in parts]))
        labels.append(np.concatenate([part[1] for part in parts]))
    return _checked(name, source, f"CIFAR's binary files in {folder}", images, labels, str(folder))


def _from_openml(name: str, source: _Source) -> Dataset:
    try:
        table, labels = fetch(source.openml)
    except DataError as error:
        raise MissingDataError(f"{error} {source.remedy(name)}") from error
    side = 32 if source.cifar_files else 28
    origin = f"OpenML ({source.openml}, version 1)"
    if table.shape[1] % (side * side) or len(table) <= source.training or len(labels) != len(table):
        raise DataError(f"{origin} delivered a table of shape {table.shape}. {source.remedy(name)}")
    images = table.reshape(len(table), -1, side, side)
    split = [slice(None, source.training), slice(source.training, None)]
    dataset = _checked(name, source, origin, [images[part] for part in split], [labels[part] for part in split], origin)
    _store(dataset, cache_folder() / source.folders[-1])
    return dataset


def _store(dataset: Dataset, folder: Path) -> None:
    arrays = (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels)
    # The cache only saves the next download: without it the race goes on. A folder that is renamed when it is whole
    # never looks corrupt to another process.
    with contextlib.suppress(OSError, DataError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            whole = Path(temporary) / folder.name
            whole.mkdir()
            for file, array in zip(_IDX_NAMES, arrays, strict=True):
                write_idx(whole / f"{file}.gz", array)
            whole.replace(folder)


def _checked(name: str, source: _Source, origin: str, images: list[Bytes], labels: list[Bytes], place: str) -> Dataset:
    for part, pictures, numbers in zip(("training", "test"), images, labels, strict=True):
        if len(pictures) != len(numbers) or len(pictures) == 0:
            raise DataError(
                f"{place}: the {part} part has {len(pictures)} images and {len(numbers)} labels. {source.remedy(name)}"
            )
        if int(numbers.max()) >= source.classes:
            raise DataError(
                f"{place}: the {part} labels reach {int(numbers.max())}, {name} has the classes 0 to "
                f"{source.classes - 1}. {source.remedy(name)}"
            )
    if images[0].shape[1:] != images[1].shape[1:]:
        raise DataError(
            f"{place}: training images are {images[0].shape[1:]}, test images {images[1].shape[1:]}. "
            f"{source.remedy(name)}"
        )
    return Dataset(name, origin, images[0], labels[0], images[1], labels[1], source.classes)


def _digits(note: str = "") -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigurationError(
            "the digits data set needs scikit-learn: pip install 'curvlib[race]', or choose another --data"
        ) from error
    bundle = load_digits()
    order = np.random.default_rng(0).permutation(len(bundle.images))
    images = bundle.images.astype(np.uint8)[order][:, None]
    labels = bundle.target.astype(np.uint8)[order]
    training = len(images) - _DIGITS_TEST
    return Dataset(
        "digits",
        f"scikit-learn's bundled digits, {_DIGITS_TEST} of them kept for the test",
        images[:training],
        labels[:training],
        images[training:],
        labels[training:],
        classes=10,
        peak=16,
        note=note,
    )


def _existing(path: Path) -> Path | None:
    packed = path.with_name(path.name + ".gz")
    return next((candidate for candidate in (path, packed) if candidate.exists()), None)
