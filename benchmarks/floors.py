"""The least that a step can cost with the kernels at hand: ``python -m benchmarks.floors --out DIRECTORY``.

A floor is the sum of what no library around the kernels can save: the passes of the model (without weight gradients
where the gradient is taken as rows), explicit rows, the products, factorisations and solves of all blocks with the
update of the parameters, each measured alone, in turns with a step of SGD. Hooks, checks and the composition of a step
count nothing.
"""

import argparse
import os
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch.nn import functional

import curvlib
from benchmarks.peers.methods import DAMPING, LR, METHODS, MOMENTUM, left_out
from benchmarks.peers.workloads import WORKLOADS, problem
from benchmarks.record import circumstances, write
from benchmarks.suites.blocks import in_turns
from curvlib.arrays import in_pieces
from curvlib.factors import Dense, Plan, Scaled
from curvlib.layers import adapter_for
from curvlib.precond import Context
from curvlib.solvers import EKFAC, KFAC, Woodbury

PERIOD = 10
SOLVERS = {"TENGraD": Woodbury(), "KFAC": KFAC(), "EKFAC": EKFAC()}


class Passes:
    """Forward and backward of a workload without weight gradients, and the update of its parameters."""

    def __init__(self, workload):
        self.model, self.x, self.y = problem(workload)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=MOMENTUM)
        self.parameters = list(self.model.parameters())
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
            p.requires_grad_(False)
        # Nothing before the output of the first layer needs a gradient, as in an ordinary pass.
        first = next(module for module in self.model.modules() if list(module.parameters(recurse=False)))
        first.register_forward_hook(lambda module, args, output: output.requires_grad_())

    def passes(self, backwards=1):
        loss = functional.cross_entropy(self.model(self.x), self.y)
        for left in reversed(range(backwards)):
            loss.backward(retain_graph=left > 0)

    def both(self):
        self.passes(backwards=2)

    def update(self):
        self.optimizer.step()


class Blocks:
    """Explicit rows, products, factorisations and solves of all blocks of a workload."""

    def __init__(self, workload, solver):
        model, x, y = problem(workload)
        exact = left_out(model, solver)
        calls = _calls(model)
        self.plan = Plan()
        rows = curvlib.collect(
            model,
            curvlib.Empirical(),
            x,
            loss=lambda outputs: functional.cross_entropy(outputs, y),
            rest="freeze",
            plan=self.plan,
        )
        calls.clear()
        functional.cross_entropy(model(x), y).backward()
        parameters = dict(model.named_parameters())
        # Rows that an adapter makes explicitly; those of other kinds become explicit when a solver takes them.
        explicit = [name for name, one in rows.items() if type(one.base if type(one) is Scaled else one) is Dense]
        self.explicit = [_adapted(model.get_submodule(name), *calls[name]) for name in explicit]
        self.places = [(name, inner) for name, one in rows.items() for inner in one.shapes]
        self.parameters = [parameters[f"{name}.{inner}"].detach() for name, inner in self.places]
        self.momenta = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.parts = []
        for own, names in ((Woodbury(), exact), (solver, [name for name in rows if name not in exact])):
            factors = [rows[name] for name in names]
            gradients = [
                factor
                if not solver.exact and own.gains_from_rows(factor, same=False)
                else {inner: parameters[f"{name}.{inner}"].grad for inner in factor.shapes}
                for name, factor in zip(names, factors, strict=True)
            ]
            self.parts += [_Part(own, names, factors, gradients)] if names else []
        self.from_rows = all(part.from_rows for part in self.parts)

    def refresh(self):
        self._rows()
        for part in self.parts:
            part.refresh()
        self.plan.buffers.trim()

    def sampled(self):
        """Refresh, and a step for the mean of other rows of the same pass: a fresh step of the sampled Fisher."""
        self._rows()
        self._update([part.sampled() for part in self.parts])
        self.plan.buffers.trim()

    def _rows(self):
        with torch.no_grad():
            for rows in self.explicit:
                rows()

    def solve(self):
        """Solve for the gradients, and update the parameters with momentum."""
        self._update([part.solver.solve_lazily(part.inverses, part.gradients) for part in self.parts])

    def solve_own(self):
        """Do so for the mean of the very rows, which is what a fresh step of the empirical Fisher does."""
        self._update([part.solver.solve_lazily(part.inverses, part.own()) for part in self.parts])

    def _update(self, naturals):
        made = {}
        for part, own in zip(self.parts, naturals, strict=True):
            made |= dict(zip(part.names, own, strict=True))
        directions = [made[name][inner] for name, inner in self.places]
        context = Context(self.parameters, self.parameters, [LR] * len(self.parameters), 0)
        moves = curvlib.Momentum(MOMENTUM).apply(directions, context, {"momentum": self.momenta})
        torch._foreach_add_(*in_pieces(self.parameters, moves), alpha=-LR)


def _calls(model):
    """Name of each module to what goes in, is saved of it, and comes back as cotangent, of the pass that follows."""
    calls = {}

    def hook(name, adapter):
        def note(module, args, output):
            calls[name] = [args[0].detach(), () if adapter.saved is None else (adapter.saved(module, output),)]
            if output.requires_grad:
                output.register_hook(calls[name].append)

        return note

    for name, module in model.named_modules():
        adapter = adapter_for(type(module))
        if adapter is not None:
            module.register_forward_hook(hook(name, adapter))
    return calls


def _adapted(module, x, saved, g):
    adapter = adapter_for(type(module))
    return partial(adapter.function, module, x, g[:, None] if adapter.columns else g, *saved)


class _Part:
    def __init__(self, solver, names, factors, gradients):
        self.solver, self.names, self.factors, self.gradients = solver, names, factors, gradients
        self.from_rows = all(isinstance(gradient, curvlib.factors.Factors) for gradient in gradients)
        gains = [solver.gains_from_rows(rows, same=False, together=True) for rows in factors]
        # Rows with the inputs in common, as those of the loss have.
        self.others = [
            rows.scaled(0.5) if one else gradient for rows, one, gradient in zip(factors, gains, gradients, strict=True)
        ]
        self.all_from_rows = all(gains)
        self.refresh()

    def refresh(self):
        self.inverses = self._inverses(self.factors)

    def own(self):
        """Rows that the inverses are of, where they say so."""
        return [getattr(inverse, "factors", rows) for inverse, rows in zip(self.inverses, self.factors, strict=True)]

    def sampled(self):
        return self.solver.solve_lazily(self._inverses([rows.remembering() for rows in self.factors]), self.others)

    def _inverses(self, factors):
        estimates = self.solver.update_all([None] * len(factors), factors)
        return self.solver.factorize_all(estimates, [DAMPING] * len(estimates))


def floors(workload, rounds):
    """Floors of the methods as ratios to SGD's step, and the milliseconds that they are made of."""
    sgd, passes = METHODS["SGD, momentum"].build(*problem(workload)), Passes(workload)
    blocks = {name: Blocks(workload, solver) for name, solver in SOLVERS.items()}
    timed = {"SGD step": sgd, "passes": passes.passes, "second backward": passes.both, "update": passes.update}
    for name, own in blocks.items():
        timed |= {f"{name} refresh": own.refresh, f"{name} solve": own.solve}
    timed["TENGraD solve, own rows"] = blocks["TENGraD"].solve_own
    timed["TENGraD refresh and solve, sampled"] = blocks["TENGraD"].sampled
    ms = {name: 1e3 * value for name, value in zip(timed, in_turns(*timed.values(), rounds=rounds), strict=True)}
    ms["second backward"] -= ms["passes"]
    fresh = ms["passes"] + ms["TENGraD refresh"] + ms["TENGraD solve, own rows"]
    gradient = ms["SGD step"] - ms["update"]
    stale = gradient + ms["TENGraD solve"]
    from_rows = all(part.all_from_rows for part in blocks["TENGraD"].parts)
    bare = (ms["passes"] if from_rows else gradient) + ms["second backward"]
    steps = {
        "TENGraD, fresh": fresh,
        "TENGraD, refresh 10": stale + (fresh - stale) / PERIOD,
        "TENGraD, sampled, fresh": bare + ms["TENGraD refresh and solve, sampled"],
    }
    for name in ("KFAC", "EKFAC"):
        bare = ms["passes"] if blocks[name].from_rows else gradient
        refresh = ms[f"{name} refresh"] + ms["second backward"]
        steps[f"{name}, refresh 10"] = bare + ms[f"{name} solve"] + refresh / PERIOD
    return {"ratios": {name: step / ms["SGD step"] for name, step in steps.items()}, "milliseconds": ms}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="names, separated by commas")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--provisional", action="store_true", help="mark the figures as those of a busy machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {"environment": {**circumstances(args.provisional), "rounds": args.rounds}, "workloads": {}}
    for workload in args.workloads.split(","):
        Console().print(workload)
        results["workloads"][workload] = floors(workload, args.rounds)
    write(args.out / "floors.json", results)


if __name__ == "__main__":
    main()
