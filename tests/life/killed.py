"""``curvlib train`` in processes of their own, from a server that has imported everything, and their violent end."""

import multiprocessing
import os
import random
import signal
import time

import torch

from curvlib.cli import main
from curvlib.cli.checkpoint import checkpoint_exists, load_checkpoint

OPTIONS = ["--data", "digits", "--model", "mlp", "--threads", "1", "--batch-size", "64", "--eval-samples", "20"]


def train(arguments, quiet=True):
    if quiet:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    raise SystemExit(main(["train", *arguments]))


class Runner:
    """Runs the command in forks of a server that has torch and the data library loaded already."""

    def __init__(self):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["curvlib.cli", "sklearn.datasets", "torch._dynamo"])

    def start(self, folder, *options):
        resume = ["--resume"] if checkpoint_exists(folder) else []
        process = self.context.Process(target=train, args=([*OPTIONS, "--out", str(folder), *options, *resume],))
        process.start()
        return process

    def finish(self, folder, *options):
        process = self.start(folder, *options)
        process.join(900)  # a busy machine takes its time
        assert process.exitcode == 0
        return load_checkpoint(folder)[0]

    def kill_at_random(self, folder, kills, seed, *options):
        """Kill the run that many times, each later than the process takes to begin; return the steps then saved."""
        moments, saved = random.Random(seed), []
        while len(saved) < kills:
            before = _stamp(folder)
            process = self.start(folder, *options)
            # From the first sign of life: a checkpoint that was not there.
            deadline = time.monotonic() + 60
            while _stamp(folder) == before and process.is_alive() and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(moments.uniform(0.0, 0.15))
            if not process.is_alive():
                raise AssertionError(f"the run ended by itself after {len(saved)} kills: give it more steps")
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert process.exitcode == -signal.SIGKILL
            saved.append(load_checkpoint(folder)[0]["steps"])
        return saved


def _stamp(folder):
    try:
        return os.stat(folder / "checkpoint.pt").st_mtime_ns
    except FileNotFoundError:
        return None


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b
