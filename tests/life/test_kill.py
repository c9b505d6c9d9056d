"""``curvlib train`` is killed, again and again, and ends where an undisturbed run ends, bit for bit."""

import itertools
import os
import signal
import sys

import pytest
import torch
from killed import Runner, equal

from curvlib.cli import outputs
from curvlib.cli.checkpoint import checkpoint_exists, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks and kills")


def killed_and_whole(tmp_path, kills, steps, every, optimizer):
    runner = Runner()
    options = ["--optimizer", optimizer, "--steps", str(steps), "--checkpoint-every", str(every)]
    saved = runner.kill_at_random(tmp_path / "killed", kills, steps, *options)
    parts = runner.finish(tmp_path / "killed", *options)
    whole = runner.finish(tmp_path / "whole", *options)
    assert whole["steps"] == parts["steps"] == steps
    assert saved == sorted(saved)
    assert all(step % every == 0 for step in saved)  # a whole interval is the most that is lost
    for key in ("model", "optimizer", "batches", "random"):
        assert equal(whole[key], parts[key]), key
    assert [point["step"] for point in parts["history"]] == [point["step"] for point in whole["history"]]
    assert not list((tmp_path / "killed").glob(".*"))


def test_a_few_kills(tmp_path):
    killed_and_whole(tmp_path, kills=4, steps=150, every=3, optimizer="tengrad")


@pytest.mark.nightly
@pytest.mark.parametrize("optimizer", ["tengrad", "kfac"])
def test_thirty_kills(tmp_path, optimizer):
    killed_and_whole(tmp_path, kills=30, steps=900, every=5, optimizer=optimizer)


CALLS = ("open", "fsync", "replace", "unlink")


def saving_until(folder, fatal):
    """Save checkpoints 1, 2, 3 in a fork that is killed at its call number `fatal` to the file system.

    The last one that was done, and whether the fork came to its end.
    """
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        count = itertools.count()

        def counted(function):
            def call(*args, **kwargs):
                if next(count) == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        for name in CALLS:
            setattr(outputs.os, name, counted(getattr(os, name)))
        original = outputs.Path.open
        outputs.Path.open = counted(original)
        for steps in (1, 2, 3):
            save_checkpoint(folder, {"steps": steps, "tensor": torch.full((64,), float(steps))})
            os.write(sender, b"%d" % steps)
        os._exit(0)
    os.close(sender)
    done = os.read(receiver, 16)
    while more := os.read(receiver, 16):
        done += more
    os.close(receiver)
    _, status = os.waitpid(child, 0)
    return int(done[-1:] or b"0"), not os.WIFSIGNALED(status)


def test_a_kill_at_every_single_moment_of_saving(tmp_path):
    for fatal in itertools.count():
        folder = tmp_path / str(fatal)
        folder.mkdir()
        done, whole = saving_until(folder, fatal)
        if done or checkpoint_exists(folder):
            state, _ = load_checkpoint(folder)
            assert state["steps"] in (done, done + 1), f"call {fatal}: {done} were saved, {state['steps']} is there"
            assert torch.equal(state["tensor"], torch.full((64,), float(state["steps"])))
        if whole:
            break
    assert fatal > 12  # each save writes, syncs, renames twice and syncs the folder
