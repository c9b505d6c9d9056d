"""The GPU benchmark runs, at tiny sizes without a GPU; `make gpu` says so where there is none."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from curvlib.cli.environment import describe_environment

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gpu  # noqa: E402  # it is no part of the package

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(autouse=True)
def settings():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")


def test_every_workload_runs_and_is_reported(tmp_path):
    said = []
    methods = ["SGD, momentum", "curvlib TENGraD, torch", "curvlib TENGraD, numpy"]
    options = ["--device", "cpu", "--smoke", "--rounds", "1", "--methods", ";".join(methods), "--out", str(tmp_path)]
    assert gpu.main(options, said.append) == 0
    measured = json.loads((tmp_path / "gpu-cpu.json").read_text(encoding="utf-8"))
    assert list(measured["results"]) == list(gpu.WORKLOADS)
    for workload, results in measured["results"].items():
        assert list(results) == methods
        assert all(summary["ms"] > 0 for summary in results.values()), workload
    report = (tmp_path / "gpu-cpu.md").read_text(encoding="utf-8")
    assert report.count("| SGD, momentum |") == len(gpu.WORKLOADS)
    assert "says nothing about speed" in report
    assert len(said) == len(gpu.WORKLOADS) * len(methods) + 1


def test_the_networks_have_the_sizes_of_their_names():
    sizes = {"ResNet-18, batch 128": 11.17, "ResNet-50, batch 64": 23.52, "ViT-S, batch 64": 21.32}
    for name, millions in sizes.items():
        model = gpu.WORKLOADS[name].build()
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=1e-3)


def test_what_fails_is_reported_with_the_reason(tmp_path):
    summary = {"error": "OutOfMemoryError: CUDA out of memory"}
    where = {**describe_environment(torch.device("cpu")), "cuda": "12.8", "cupy": None, "commit": "abc"}
    report = gpu.report({"environment": where, "smoke": False, "results": {"ViT-S": {"curvlib": summary}}})
    assert "- curvlib: OutOfMemoryError: CUDA out of memory" in report
    assert "tiny" not in report.lower()


def test_the_cupy_that_is_missing_is_named_for_the_makefile(monkeypatch):
    said = []
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    for cuda, extra in ((None, ""), ("12.8", "cupy-cuda12"), ("13.0", "cupy-cuda13")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        gpu.main(["--missing"], said.append)
        assert said.pop() == extra


@no_gpu
def test_without_a_gpu_it_says_so_and_is_content(tmp_path):
    said = []
    assert gpu.main(["--out", str(tmp_path)], said.append) == 0
    assert "no CUDA device here" in said[0]
    assert not list(tmp_path.iterdir())


@no_gpu
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_gpu_without_a_gpu(tmp_path):
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    (tmp_path / ".installed").touch()  # newer than what it is made from: nothing is installed
    done = subprocess.run(
        ["make", "-C", str(ROOT), "gpu", f"VENV={tmp_path}"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, "no CUDA device here" in done.stdout) == (0, True), done.stderr
