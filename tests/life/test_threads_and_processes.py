"""Threads and processes: data loaders with workers, forks, and two models trained at once."""

import io
import multiprocessing
import sys
import threading

import pytest
import torch
from loops import FISHERS, X, Y, built, same, train, values, wide_net
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from curvlib.solvers import EKFAC, Dense, Woodbury


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums in another number of threads may differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prepared(seed, solver, fisher):
    model = wide_net(seed)
    optimizer = built(model, solver=solver, fisher=FISHERS[fisher], seed=seed)
    return model, optimizer, torch.randn(X.shape, generator=torch.Generator().manual_seed(seed))


def run(model, optimizer, x, steps=12):
    train(model, optimizer, steps, x)
    return values(model)


def test_models_in_threads_train_as_they_do_one_after_the_other():
    jobs = [(0, Woodbury(), "sampled"), (1, EKFAC(), "exact"), (2, Woodbury(), "empirical"), (3, EKFAC(), "sampled")]
    expected = [run(*prepared(*job)) for job in jobs]
    # Initial weights come from torch's one generator, which threads would draw from in any order.
    ready = [prepared(*job) for job in jobs]
    results, errors = {}, []
    together = threading.Barrier(len(jobs))

    def work(place, one):
        try:
            torch.set_num_threads(1)
            together.wait()
            results[place] = run(*one)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=entry) for entry in enumerate(ready)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(same(results[place], one) for place, one in enumerate(expected))


def test_one_model_may_be_evaluated_in_another_thread_between_steps():
    model, twin = wide_net(), wide_net()
    optimizer, other = built(model), built(twin)
    for _ in range(3):
        train(model, optimizer)
        train(twin, other)

        def evaluate():
            with torch.no_grad():
                model(X)

        thread = threading.Thread(target=evaluate)
        thread.start()
        thread.join()
    assert same(values(model), values(twin))


fork = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")


@fork
@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_data_loader_workers(context):
    def epoch(workers):
        model = wide_net()
        optimizer = built(model, solver=Dense() if context == "fork" else Woodbury(), fisher=FISHERS["exact"])
        options = {"num_workers": workers, "multiprocessing_context": context} if workers else {}
        for x, y in DataLoader(TensorDataset(X, Y), batch_size=8, **options):
            train(model, optimizer, 1, x, y)
        return values(model)

    assert same(epoch(0), epoch(2))


def _evaluated(model, sender):
    torch.set_num_threads(1)
    with torch.no_grad():
        sender.send(model(X).tolist())


def _resumed(state, sender):
    torch.set_num_threads(1)
    saved = torch.load(io.BytesIO(state), weights_only=True)
    model = wide_net()
    optimizer = built(model)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, 3)
    sender.send([p.tolist() for p in values(model)])


def in_a_process(context, target, argument):
    receiver, sender = multiprocessing.get_context(context).Pipe(duplex=False)
    process = multiprocessing.get_context(context).Process(target=target, args=(argument, sender))
    process.start()
    sender.close()
    result = receiver.recv() if receiver.poll(60) else None  # or an EOFError, if it died
    process.join(10)
    assert process.exitcode == 0
    return result


@fork
def test_a_fork_in_the_middle_of_a_step_disturbs_nobody():
    model, twin = wide_net(), wide_net()
    optimizer, other = built(model), built(twin)
    train(model, optimizer, 2)
    train(twin, other, 2)
    optimizer.zero_grad()
    outputs = model(X)
    with torch.no_grad():
        expected = model(X).tolist()
    assert in_a_process("fork", _evaluated, model) == expected
    functional.cross_entropy(outputs, Y).backward()
    optimizer.step()
    train(twin, other)
    assert same(values(model), values(twin))


@fork
def test_another_process_goes_on_from_a_saved_state():
    model = wide_net()
    optimizer = built(model)
    train(model, optimizer, 3)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    there = in_a_process("forkserver", _resumed, buffer.getvalue())
    train(model, optimizer, 3)
    assert [p.tolist() for p in values(model)] == there
