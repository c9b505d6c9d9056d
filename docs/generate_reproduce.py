"""Write docs/reproduce.md from the experiments' files and the committed results: python docs/generate_reproduce.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from curvlib.cli.report import markdown
from curvlib.cli.reproduction.experiments import Experiment, experiment_names, load_experiment
from curvlib.cli.reproduction.report import cost_table, headline, outcome_table, target_tables

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results" / "reproduce-fashion-mnist" / "results.json"

TEXT = """# The paper's experiments

<!-- Written by docs/generate_reproduce.py from curvlib/cli/experiments and benchmarks/results; edit those. -->

`curvlib reproduce` runs the experiments of TENGraD ([arXiv 2106.03947](https://arxiv.org/abs/2106.03947)): SGD,
TENGraD, KFAC, EKFAC and K-BFGS, each with the settings that its authors' public scripts give it. With a GPU and the
data, one command does one experiment, or all:

    curvlib reproduce cifar10-vgg16bn --data-dir /path/to/cifar
    curvlib reproduce all --data-dir /path/to/datasets --out runs/reproduce

A run that is killed goes on, bit for bit from the last epoch, with the same command and `--resume`; runs that are done
are not repeated, and more seeds or optimizers join them. CIFAR is read from the binary version's files, MNIST and
Fashion-MNIST from IDX files (Fashion-MNIST also from Debian's `dataset-fashion-mnist`); what is not there is fetched
from OpenML once, and an error says where to get it otherwise.

Without a GPU, or to see whether everything works, `--scale 0.05` takes a twentieth of the images and epochs, and hidden
layers down to the experiment's `narrowest`; `--epochs`, `--seeds` and `--optimizers` choose on their own. A file of
your own (`curvlib reproduce mine.toml`) has the keys of those in `curvlib/cli/experiments`; unknown ones are refused.

The folder of results holds `report.md`, `results.json` with every evaluation of every run, `curves.csv`, `summary.csv`
and plots against time and epochs. Time is that of training steps alone, evaluations left out, all optimizers one after
the other on the same machine, seed by seed. Besides the runs, each method's inversion of all blocks is timed by itself:
from the rows of a batch to the estimate, from the estimate to the damped inverse, from a gradient to the natural one.
The paper's argument rests on exact inversion being cheap, and this is where it shows. Memory is the peak of three
steps: of the GPU, or of a process of its own.

## Experiments

{experiments}

Learning rate, damping and weight decay, in this order (SGD has no damping):

{settings}

## What differs from the paper

Each value that the authors' code does not state is marked as a choice in its file, and the report lists the reasons.
Beyond these:

- Blocks are `[W b]` with the bias, exactly. The authors' code has three versions of this; parameters of batch norms
  move along the gradient in all of them, and so here (`batch_norm = "gradient"`).
- TENGraD's curvature is renewed every 100 steps; the authors count from the start of each epoch.
- KFAC and EKFAC decay weights from the start; the authors' begin after 400 steps.
- K-BFGS stands in for K-BFGS(L), the authors' version with a limited memory; statistics of batch norms see the second
  pass over a batch.
- The whole test set counts (the authors drop its last incomplete batch), losses are measured in evaluation mode on the
  first {samples} images, and images are normalised by the training set's own deviation of each channel.
- MobileNetV2 has dense 3x3 convolutions over half the expansion, as the authors trained it; their DenseNet of depth 19
  has two bottlenecks a block.
- Seeds are fixed: initial weights, order, augmentation and sampled labels depend on the seed alone.

## Results at reduced size

{results}
"""

NONE = (
    "None are committed yet. `make reproduce` makes them: the ConvNet on Fashion-MNIST, three seeds, in minutes on two "
    "cores; their tables then stand here."
)


def experiment_table(experiments: list[Experiment]) -> str:
    """Return the table of all experiments."""
    rows = []
    for one in experiments:
        steps = f"×{one.decay:g} after {', '.join(map(str, one.milestones))}" if one.milestones else "constant"
        size = [str(one.batch_size), str(one.epochs), steps, str(one.seeds)]
        rows.append([f"`{one.name}`", f"`{one.model}`", one.data, *size])
    return markdown((["experiment", "network", "data", "batch", "epochs", "learning rate", "seeds"], rows))


def settings_table(experiments: list[Experiment]) -> str:
    """Return the hyperparameters that differ between the experiments."""
    names = list(dict.fromkeys(name for one in experiments for name in one.optimizers))
    rows = []
    for one in experiments:
        cells = []
        for name in names:
            own = one.optimizers[name]
            cells.append(" / ".join(f"{own[key]:g}" for key in ("lr", "damping", "weight_decay") if key in own))
        rows.append([f"`{one.name}`", *cells])
    return markdown((["experiment", *names], rows))


def result_text(results: dict[str, Any]) -> str:
    """Return the tables of a committed experiment."""
    environment = results["environment"]
    seconds, epochs = target_tables(results)
    provisional = " **Provisional: measured on a busy machine.**" if environment.get("provisional") else ""
    measured = (
        f"`make reproduce`, measured on {environment['date']}, commit {environment['commit']}: "
        f"{environment['threads']} threads of {environment['cpu']}, torch {environment['torch']}.{provisional} The "
        "whole report is `benchmarks/results/reproduce-fashion-mnist/report.md`."
    )
    cost = "Milliseconds to invert all blocks from the rows of one batch, and peak memory:"
    parts = [headline(results), measured, markdown(outcome_table(results)), markdown(seconds), markdown(epochs), cost]
    return "\n\n".join([*parts, markdown(cost_table(results))])


def text() -> str:
    """Return the whole page."""
    experiments = [load_experiment(name) for name in experiment_names()]
    results = result_text(json.loads(RESULTS.read_text(encoding="utf-8"))) if RESULTS.exists() else NONE
    (samples,) = {one.evaluation_samples for one in experiments}
    return TEXT.format(
        experiments=experiment_table(experiments),
        settings=settings_table(experiments),
        samples=f"{samples:,}",
        results=results,
    )


if __name__ == "__main__":
    (HERE / "reproduce.md").write_text(text(), encoding="utf-8")
