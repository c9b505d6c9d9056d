"""Step times and memory on a GPU: curvlib in torch and in CuPy, SGD, and the peers that are installed.

    python -m benchmarks.gpu [--out benchmarks/results] [--workloads "W1*,ResNet*"] [--methods "SGD*,curvlib*"]
        [--rounds 5] [--device cuda] [--smoke]

Writes ``gpu-<name of the device>.json`` and ``.md``. `make gpu` runs it after the tests that need a GPU; without one it
says so. ``--device cpu --smoke`` runs every workload once at tiny sizes, so that a test can.
"""

import argparse
import gc
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

import torch
from torch import nn
from torch.nn import functional

import curvlib
from benchmarks.peers import libraries  # noqa: F401  # registers its rows
from benchmarks.peers.methods import DAMPING, LR, METHODS, MOMENTUM, NORMS, Method, ordinary
from benchmarks.peers.timing import interleaved
from benchmarks.peers.workloads import EncoderLayer, convolutions, mlp, resnet20
from benchmarks.record import commit, table, write
from curvlib.cli.environment import describe_environment
from curvlib.solvers import EKFAC, KFAC, Woodbury

REFERENCE = "SGD, momentum"

# -- networks ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Residual block: a chain of convolutions with BatchNorm, and a convolution of one tap where shapes change."""

    def __init__(self, channels, widths, kernels, strides):
        super().__init__()
        layers, before, stride = [], channels, max(strides)
        for width, kernel, step in zip(widths, kernels, strides, strict=True):
            layers += [
                nn.Conv2d(before, width, kernel, step, kernel // 2, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            before = width
        layers.pop()  # the last activation comes after the sum
        self.chain = nn.Sequential(*layers)
        self.short = nn.Sequential()
        if stride != 1 or channels != before:
            self.short = nn.Sequential(nn.Conv2d(channels, before, 1, stride, bias=False), nn.BatchNorm2d(before))

    def forward(self, x):
        return functional.relu(self.chain(x) + self.short(x))


def resnet(depths, bottleneck, width=64):
    """ResNet for CIFAR shapes: a first convolution of 3 × 3 with stride 1, four stages, no first pooling."""
    layers, channels = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()], width
    for stage, depth in enumerate(depths):
        inner = width * 2**stage
        for place in range(depth):
            stride = 2 if stage and not place else 1
            widths, kernels, strides = (inner, inner), (3, 3), (stride, 1)
            if bottleneck:
                widths, kernels, strides = (inner, inner, 4 * inner), (1, 3, 1), (1, stride, 1)
            layers.append(Block(channels, widths, kernels, strides))
            channels = widths[-1]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Patches(nn.Module):
    """Image to tokens: a convolution as wide as its stride, and positions that are not trained."""

    def __init__(self, width, patch, tokens):
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.register_buffer("positions", torch.linspace(0, 50, tokens * width).cos().reshape(tokens, width))

    def forward(self, x):
        return self.embed(x).flatten(2).transpose(1, 2) + self.positions


class Mean(nn.Module):
    """Mean over tokens, in place of a class token."""

    def forward(self, x):
        return x.mean(1)


def vit(width=384, depth=12, heads=6, patch=4, image=32):
    """ViT-S shapes at patches of 4 × 4."""
    layers = [EncoderLayer(width, heads, 4 * width) for _ in range(depth)]
    tokens = (image // patch) ** 2
    return nn.Sequential(Patches(width, patch, tokens), *layers, nn.LayerNorm(width), Mean(), nn.Linear(width, 10))


def encoder(width=128):
    return nn.Sequential(*(EncoderLayer(width, 4, 4 * width) for _ in range(2)), Mean(), nn.Linear(width, 10))


@dataclass(frozen=True)
class Workload:
    """A network and the shape of its input, and both at a size that a test can wait for."""

    build: object
    shape: tuple
    small: object
    small_shape: tuple

    def problem(self, device, smoke):
        """Model, inputs and labels on random data."""
        torch.manual_seed(0)
        build, shape = (self.small, self.small_shape) if smoke else (self.build, self.shape)
        model = build().to(device)
        return model, torch.randn(shape, device=device), torch.randint(0, 10, shape[:1], device=device)


IMAGES = (8, 3, 8, 8)
WORKLOADS = {
    "W1, MLP, batch 1024": Workload(mlp, (1024, 784), lambda: nn.Linear(20, 10), (8, 20)),
    "W2, ConvNet, batch 512": Workload(convolutions, (512, 3, 32, 32), convolutions, IMAGES),
    "W3, ResNet-20, batch 512": Workload(resnet20, (512, 3, 32, 32), lambda: resnet((1,), False, 4), IMAGES),
    "W4, encoder, batch 256": Workload(encoder, (256, 64, 128), partial(encoder, 16), (8, 5, 16)),
    "ResNet-18, batch 128": Workload(
        partial(resnet, (2, 2, 2, 2), False), (128, 3, 32, 32), partial(resnet, (1, 1), False, 4), IMAGES
    ),
    "ResNet-50, batch 64": Workload(
        partial(resnet, (3, 4, 6, 3), True), (64, 3, 32, 32), partial(resnet, (1, 1), True, 4), IMAGES
    ),
    "ViT-S, batch 64": Workload(vit, (64, 3, 32, 32), partial(vit, 12, 1, 2, 4, 8), IMAGES),
}

# -- methods ----------------------------------------------------------------------------------------------------------


def composed(model, x, y, fisher, solver, period, backend="torch", fused=False):
    """curvlib with products in TensorFloat-32 where torch makes them; norm layers exactly."""
    solvers = {"*": solver}
    if not solver.exact:
        norms = [name for name, module in model.named_modules() if isinstance(module, NORMS)]
        solvers = {**dict.fromkeys(norms, Woodbury()), **solvers}
    optimizer = curvlib.compose(
        model, fisher=fisher, solver=solvers, damping=DAMPING, refresh=period, lr=LR, fused=fused, backend=backend,
        matmul_precision="high" if backend == "torch" else "highest", transforms=[curvlib.Momentum(MOMENTUM)],
    )  # fmt: skip
    return ordinary(model, x, y, optimizer)


SAMPLED, EMPIRICAL = curvlib.Sampled(curvlib.Categorical()), curvlib.Empirical()
SOLVERS = {
    "TENGraD": (SAMPLED, Woodbury(), 1),
    "TENGraD, refresh 10": (SAMPLED, Woodbury(), 10),
    "KFAC, refresh 10": (SAMPLED, KFAC(), 10),
    "EKFAC, refresh 10": (SAMPLED, EKFAC(), 10),
}


def methods(device):
    """Name to method: SGD, curvlib in torch and in CuPy (NumPy on a CPU), and the peers."""
    own = {REFERENCE: METHODS[REFERENCE]}
    fresh = partial(composed, fisher=EMPIRICAL, solver=Woodbury(), period=1, fused=True)
    own["curvlib TENGraD, empirical, fused"] = Method(fresh)
    for name, (fisher, solver, period) in SOLVERS.items():
        for backend in ("torch", "cupy" if device.type == "cuda" else "numpy"):
            build = partial(composed, fisher=fisher, solver=solver, period=period, backend=backend)
            own[f"curvlib {name}, {backend}"] = Method(build, period)
    return own | {name: method for name, method in METHODS.items() if method.package and method.installed}


# -- measuring --------------------------------------------------------------------------------------------------------


def measured(workload, method, device, rounds, smoke):
    """Time over SGD's in turns with it, and peak memory, of one method on one workload."""
    on_gpu = device.type == "cuda"

    def clock():
        if on_gpu:
            torch.cuda.synchronize()
        return perf_counter()

    reference = METHODS[REFERENCE].build(*workload.problem(device, smoke))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    build = {"it": (method.period, lambda: method.build(*workload.problem(device, smoke)))}
    window, most = (0.0, 1) if smoke else (0.3, 20)
    timed = interleaved(reference, build, rounds, window, most, clock=clock)["it"]
    result = timed.summary()
    if on_gpu and not timed.error:
        result["megabytes"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    del reference, timed
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
    return result


def chosen(patterns, names):
    """Names that match one of the patterns, which a semicolon separates."""
    return [name for name in names if any(fnmatch(name, pattern.strip()) for pattern in patterns.split(";"))]


def run(device, rounds, workloads, wanted, smoke, say):
    """Measure everything: workload to method to its summary."""
    available = methods(device)
    results = {}
    for name in chosen(workloads, WORKLOADS):
        results[name] = {}
        for method in chosen(wanted, available):
            results[name][method] = measured(WORKLOADS[name], available[method], device, rounds, smoke)
            say(f"{name}: {method}: {entry(results[name][method])}")
    return results


def entry(summary):
    """One cell of the table."""
    if "error" in summary:
        return f"— ({summary['error']})"
    memory = f", {summary['megabytes']:.0f} MiB" if "megabytes" in summary else ""
    return f"{summary['ms']:.2f} ms, {summary['ratio']:.2f} ×{memory}"


def report(measurement):
    """Markdown of a measurement: a table for each workload."""
    where, lines = measurement["environment"], [f"# Step times on {measurement['environment']['device']}", ""]
    lines.append(
        f"torch {where['torch']}, CUDA {where['cuda']}, CuPy {where['cupy']}, curvlib at {where['commit']}, float32. "
        "Median of windows in turns with SGD's: milliseconds a step, multiple of SGD's step, and the most memory that "
        "the method, its model and SGD's beside it took. Products of SGD and of curvlib in torch in TensorFloat-32."
    )
    if measurement["smoke"]:
        lines += ["", "**Tiny sizes: this shows that everything runs, and says nothing about speed.**"]
    for workload, results in measurement["results"].items():
        rows, failed = [], []
        for name, summary in results.items():
            if "error" in summary:
                failed.append(f"- {name}: {summary['error']}")
            else:
                memory = f"{summary['megabytes']:.0f}" if "megabytes" in summary else "—"
                rows.append([name, f"{summary['ms']:.2f}", f"{summary['ratio']:.2f}", memory])
        lines += ["", f"## {workload}", "", table(["method", "ms a step", "× SGD", "MiB"], rows).rstrip()]
        lines += ["", "Not measured:", "", *failed] if failed else []
    return "\n".join(lines) + "\n"


def environment(device):
    """Versions and hardware, with what is peculiar to GPUs."""
    cupy = None
    if find_spec("cupy") is not None:
        cupy = __import__("cupy").__version__
    return {**describe_environment(device), "cuda": torch.version.cuda, "cupy": cupy, "commit": commit()}


def missing_extra():
    """Extra of curvlib that brings the CuPy for this torch; empty where it is there, or torch has no CUDA."""
    if torch.version.cuda is None or find_spec("cupy") is not None:
        return ""
    return f"cupy-cuda{torch.version.cuda.split('.')[0]}"


def main(arguments=None, say=print):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try it out")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the report")
    parser.add_argument("--workloads", default="*", help="patterns of names, with semicolons between")
    parser.add_argument("--methods", default="*", help="patterns of names, with semicolons between")
    parser.add_argument("--rounds", type=int, default=5, help="windows of each method")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one step a window")
    parser.add_argument("--missing", action="store_true", help="print the extra that would bring CuPy, and stop")
    given = parser.parse_args(arguments)
    if given.missing:
        say(missing_extra())
        return 0
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        say("no CUDA device here: nothing to measure (--device cpu --smoke shows that it runs)")
        return 0
    device = torch.device(given.device)
    torch.set_float32_matmul_precision("high")  # the network's own products, SGD's too
    results = run(device, given.rounds, given.workloads, given.methods, given.smoke, say)
    measurement = {"environment": environment(device), "smoke": given.smoke, "results": results}
    name = re.sub(r"[^a-z0-9]+", "-", str(measurement["environment"]["device"]).lower()).strip("-")
    write(given.out / f"gpu-{name}.json", measurement)
    (given.out / f"gpu-{name}.md").write_text(report(measurement), encoding="utf-8")
    say(f"written: {given.out / f'gpu-{name}'}.json and .md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
