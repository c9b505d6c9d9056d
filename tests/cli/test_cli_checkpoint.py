import os
from unittest.mock import ANY

import pytest
import torch

from curvlib.cli import outputs
from curvlib.cli.checkpoint import checkpoint_exists, load_checkpoint, save_checkpoint
from curvlib.cli.outputs import prepare_folder, write_atomically
from curvlib.errors import DataError


def states(n):
    return [{"steps": i, "tensor": torch.full((3,), float(i))} for i in range(n)]


def test_round_trip_keeps_the_previous_one(tmp_path):
    assert not checkpoint_exists(tmp_path)
    for state in states(3):
        save_checkpoint(tmp_path, state)
    assert checkpoint_exists(tmp_path)
    state, warning = load_checkpoint(tmp_path)
    assert (state["steps"], warning) == (2, "")
    assert torch.equal(state["tensor"], torch.full((3,), 2.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.previous.pt", "checkpoint.pt"]


def damage(path, kind):
    raw = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(raw[: len(raw) // 2])
    elif kind == "flipped":
        path.write_bytes(raw[:-20] + bytes([raw[-20] ^ 1]) + raw[-19:])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "foreign":
        torch.save({"steps": 1}, path)
    else:
        path.unlink()


@pytest.mark.parametrize("kind", ["truncated", "flipped", "empty", "foreign", "missing"])
def test_backup_is_used_and_never_pushed_out_by_a_corrupt_file(tmp_path, kind):
    for state in states(3):
        save_checkpoint(tmp_path, state)
    damage(tmp_path / "checkpoint.pt", kind)
    state, warning = load_checkpoint(tmp_path)
    assert state["steps"] == 1
    assert "backup" in warning
    save_checkpoint(tmp_path, {"steps": 7})
    damage(tmp_path / "checkpoint.pt", "flipped")
    assert load_checkpoint(tmp_path)[0]["steps"] == 1


@pytest.mark.parametrize(("kind", "message"), [("flipped", "checksum"), ("foreign", "not a checkpoint of curvlib")])
def test_no_good_one_left(tmp_path, kind, message):
    save_checkpoint(tmp_path, {"steps": 0})
    damage(tmp_path / "checkpoint.pt", kind)
    with pytest.raises(DataError, match=message) as caught:
        load_checkpoint(tmp_path)
    assert "--out" in str(caught.value)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(DataError, match="holds no checkpoint"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [[1, 2], os.getcwd])
def test_intact_file_with_another_content(tmp_path, content):
    save_checkpoint(tmp_path, content)
    with pytest.raises(DataError, match=r"training state|cannot be read as a checkpoint"):
        load_checkpoint(tmp_path)


def test_unreadable_checkpoint(tmp_path):
    (tmp_path / "checkpoint.pt").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        load_checkpoint(tmp_path)


def test_crash_while_writing_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    for state in states(2):
        save_checkpoint(tmp_path, state)

    def crash(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs.os, "fsync", crash)
    with pytest.raises(DataError, match="No space left"):
        save_checkpoint(tmp_path, {"steps": 9})
    assert load_checkpoint(tmp_path) == ({"steps": 1, "tensor": ANY}, "")
    assert not list(tmp_path.glob(".*"))


def test_rename_that_fails(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, {"steps": 0})

    def refuse(source, destination):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(DataError, match="cannot be written.*--out"):
        save_checkpoint(tmp_path, {"steps": 1})


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="--out"):
        prepare_folder(tmp_path / "file" / "out")


def test_atomic_write_replaces(tmp_path):
    write_atomically(tmp_path / "x", b"1")
    write_atomically(tmp_path / "x", b"2")
    assert (tmp_path / "x").read_bytes() == b"2"
    assert len(list(tmp_path.iterdir())) == 1
