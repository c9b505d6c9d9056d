"""A step written by hand around the library's kernels, for networks that need nothing else.

It does what a step cannot do without: the passes of the model, with weight gradients where the solver wants them, rows
as soon as their cotangents arrive, products, factorisations, solves, momentum and the update. It checks nothing, knows
one loss, one batch at a time and one learning rate, and has no state that could be saved. What curvlib takes longer is
the price of being a library; what a bare step takes longer than one of SGD is the price of the method.
"""

from functools import partial

import torch
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional

import curvlib
from benchmarks.peers.methods import DAMPING, LR, MOMENTUM, left_out
from curvlib.arrays import in_pieces
from curvlib.capture.loans import apart
from curvlib.factors import Plan
from curvlib.layers import adapter_for
from curvlib.precond import Context
from curvlib.solvers import Woodbury


class BareStep:
    """Steps of natural gradient with momentum; called for one.

    Parameters
    ----------
    model, x, y
        Network whose parameters all belong to modules with an adapter, inputs and labels.
    fisher
        Its rows are those of the loss itself if it needs a backward pass, and else come from one of their own.
    solver
        Of every block but the norm layers of Kronecker methods, which go to an exact one.
    period
        Steps between refreshes.
    """

    def __init__(self, model, x, y, fisher, solver, period=1):
        self.model, self.x, self.y, self.fisher, self.period = model, x, y, fisher, period
        self.steps, self.plan = 0, Plan()
        named = {name: dict(module.named_parameters(recurse=False)) for name, module in model.named_modules()}
        self.blocks = {name: parameters for name, parameters in named.items() if parameters}
        self.modules = {name: model.get_submodule(name) for name in self.blocks}
        self.adapters = {name: adapter_for(type(module)) for name, module in self.modules.items()}
        exact = left_out(model, solver)
        own = [name for name in self.modules if name not in exact]
        self.parts = [_Part(one, names) for one, names in ((Woodbury(), exact), (solver, own)) if names]
        self.solvers = {name: part.solver for part in self.parts for name in part.names}
        # Blocks that give their gradients as rows, in steps that renew the curvature and in others.
        self.handed = {True: frozenset(), False: frozenset()}
        for name, module in self.modules.items():
            module.register_forward_hook(partial(self._called, name))
        self.parameters = [p.detach() for parameters in self.blocks.values() for p in parameters.values()]
        self.momenta = [torch.zeros_like(p) for p in self.parameters]

    def __call__(self):
        self.due = self.steps % self.period == 0
        self.now = self.handed[self.due]
        # Whether the curvature's rows are those of the loss.
        self.own = self.due and self.fisher.needs_backward
        # Input and what an adapter keeps of each call; where its output is in the graph; rows; copies of inputs.
        self.calls, self.edges, self.rows, self.of_loss, self.copies = {}, {}, {}, {}, {}
        loss = self._passes()
        with torch.no_grad():
            if self.due:
                self._renew()
            self._update()
        self.steps += 1
        return loss

    def _passes(self):
        for name, parameters in self.blocks.items():
            for p in parameters.values():
                p.requires_grad_(name not in self.now)
                p.grad = None
        outputs = self.model(self.x)
        if self.due and not self.own:
            columns = self.fisher.cotangents(outputs.detach(), None)
            (column,) = columns  # one, so that there is a row for each sample
            found = list(torch.autograd.grad(outputs, list(self.edges.values()), column, retain_graph=True))
            for name in reversed(self.edges):
                self.rows[name] = self._made(name, found.pop())
        loss = functional.cross_entropy(outputs, self.y)
        loss.backward()
        return loss.detach()

    def _called(self, name, module, args, output):
        for p in self.blocks[name].values():
            p.requires_grad_(True)  # for adapters, which leave out what is frozen
        if not self.due and name not in self.now:
            return
        if not output.requires_grad:
            output.requires_grad_()
        adapter = self.adapters[name]
        self.calls[name] = args[0].detach(), () if adapter.saved is None else (adapter.saved(module, output),)
        if self.due and not self.own:
            self.edges[name] = get_gradient_edge(output)
        if self.own or name in self.now:
            output.register_hook(partial(self._arrived, name))

    def _arrived(self, name, cotangent):
        """Rows of a layer whose cotangent of the mean loss is there; of the single losses, they are n times those."""
        self.of_loss[name] = self._made(name, cotangent.detach()).scaled(float(len(self.y)))
        if self.own:
            self.rows[name] = self.of_loss[name]

    @torch.no_grad()
    def _made(self, name, cotangent):
        adapter, (x, saved) = self.adapters[name], self.calls[name]
        g = cotangent[:, None] if adapter.columns else cotangent
        rows = adapter.function(self.modules[name], x, g, *saved).planned(self.plan.of(name))
        if not self.solvers[name].keeps_rows:
            return rows
        compact = rows.compact()
        if self.due and self.period > 1:
            compact = apart(compact, [x], self.copies)  # a batch does not last, though that of a benchmark would
        if compact is not rows and (self.own or name not in self.now):  # else rows of the loss are to follow
            del self.calls[name]
        return compact

    def _renew(self):
        remembered = {
            name: rows.remembering() if name in self.now and self.of_loss[name] is not rows else rows
            for name, rows in self.rows.items()
        }
        for part in self.parts:
            part.renew([remembered[name] for name in part.names])
        self.plan.buffers.trim()
        if self.steps == 0:
            mine, always = self.fisher.needs_backward, self.period == 1
            self.handed = {
                due: frozenset(
                    name
                    for name, rows in self.rows.items()
                    if self.solvers[name].gains_from_rows(rows, mine and (always or due), always or due)
                )
                for due in (True, False)
            }

    def _update(self):
        naturals = {}
        for part in self.parts:
            gradients = [self._gradient(name) for name in part.names]
            naturals |= zip(part.names, part.solver.solve_lazily(part.inverses, gradients), strict=True)
        directions = [naturals[name][inner] for name, parameters in self.blocks.items() for inner in parameters]
        context = Context(self.parameters, self.parameters, [LR] * len(self.parameters), self.steps)
        moves = curvlib.Momentum(MOMENTUM).apply(directions, context, {"momentum": self.momenta})
        torch._foreach_add_(*in_pieces(self.parameters, moves), alpha=-LR)

    def _gradient(self, name):
        if name in self.now:
            return self.of_loss[name]
        return {inner: p.grad for inner, p in self.blocks[name].items()}


class _Part:
    """Blocks of one solver."""

    def __init__(self, solver, names):
        self.solver, self.names, self.estimates, self.inverses = solver, names, [None] * len(names), []

    def renew(self, rows):
        self.estimates = self.solver.update_all(self.estimates, rows)
        self.inverses = self.solver.factorize_all(self.estimates, [DAMPING] * len(rows))
