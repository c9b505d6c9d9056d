"""Peak memory of a piece of work, measured in a process of its own."""

import gc
import multiprocessing
import os
import signal
from pathlib import Path

MEGABYTE = 2**20


def peak_increase(work, timeout=120.0):
    """Megabytes that the resident set of a forked process grows by, at its peak, while it calls `work`.

    Call it before anything else in the process has computed in threads: a fork does not take a thread pool along.
    Returns None where the system does not tell, and raises RuntimeError where `work` fails or takes too long.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(work, sending))
    process.start()
    sending.close()
    try:
        outcome = receiving.recv() if receiving.poll(timeout) else f"no result within {timeout:g} s"
    except EOFError:
        outcome = "the process died"
    finally:
        if process.is_alive() and process.pid and not isinstance(outcome, float):
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    if isinstance(outcome, str):
        raise RuntimeError(outcome)
    return outcome


def _measure(work, sending):
    try:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
        work()
        sending.send((_status("VmHWM") - before) / MEGABYTE)
    except BaseException as error:
        sending.send(f"{type(error).__name__}: {error}")


def _status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
