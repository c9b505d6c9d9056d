"""A natural-gradient optimizer written out plainly, and a model of the loop around it: no curvlib anywhere.

Per-sample derivatives by `torch.func`, explicit matrices, an explicit damped solve, heavy-ball momentum. It is told of
every action that the real loop takes, and says what the parameters must then be.
"""

import copy
from dataclasses import dataclass, field

import torch
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn import functional

LAYERS = ("0", "2", "4")


@dataclass
class Reference:
    """Parameters, gradients, passes and curvature of one training run."""

    net: torch.nn.Module
    parameters: dict
    empirical: bool
    every: int
    momentum: float
    decay: float
    lr: dict
    damping: float
    members: set  # layers that the optimizer has
    gradients: dict = field(default_factory=dict)
    frozen: set = field(default_factory=set)  # as the user has it
    asleep: set = field(default_factory=set)  # as the last pass found it
    passes: list = field(default_factory=list)  # those that a backward followed
    curvature: dict = field(default_factory=dict)  # as it was last taken, by layer
    averages: dict = field(default_factory=dict)
    steps: int = 0
    due: bool = True
    wanting: set = field(default_factory=set)  # layers that take the next rows, due or not
    lives: dict = field(default_factory=lambda: dict.fromkeys(LAYERS, 0))  # how often each layer was woken

    def mine(self):
        return [name for name in self.parameters if layer_of(name) in self.members]

    def awake(self):
        return [layer for layer in LAYERS if layer in self.members and layer not in self.asleep]

    # -- passes -------------------------------------------------------------------------------------------------------

    def looked_at(self):
        """What is frozen, unfrozen or new is seen to be so."""
        now = self.frozen & self.members
        for layer in now - self.asleep:
            self.curvature.pop(layer, None)
            self.wanting.discard(layer)
        for layer in self.asleep - now:
            self.woken(layer)
        self.asleep = set(now)

    def woken(self, layer):
        self.wanting.add(layer)
        self.lives[layer] += 1

    def forward(self, x):
        """Return what a backward pass later needs to know of this forward pass."""
        self.looked_at()
        if all(self.gradients.get(name) is None for name in self.mine()):
            self.passes = []
        armed = self.due or bool(self.wanting)
        seen = {layer: self.lives[layer] for layer in self.awake()}
        return {"x": x, "at": dict(self.parameters), "armed": armed, "seen": seen, "frozen": set(self.frozen)}

    def backward(self, passed, y, share):
        """The gradient of ``share · mean loss`` arrived."""
        x, at = passed["x"], passed["at"]

        def loss(parameters, xi, yi):
            return functional.cross_entropy(functional_call(self.net, parameters, (xi[None],)), yi[None])

        rows = vmap(grad(loss), in_dims=(None, 0, 0))(at, x, y)
        for name in self.parameters:
            if layer_of(name) not in passed["frozen"] | self.frozen:
                new, old = share * rows[name].mean(0), self.gradients.get(name)
                self.gradients[name] = new if old is None else old + new
        if passed["armed"]:
            parts = self.outer_gradients(rows, share, x) if self.empirical else self.gauss_newton(at, x)
            kept = {layer: (life, parts[layer]) for layer, life in passed["seen"].items()}
            self.passes.append((len(x), kept))

    def outer_gradients(self, rows, share, x):
        """Rows as backward makes them; what scales them to samples is known at the step."""
        flat = {name: share / len(x) * rows[name].flatten(1) for name in rows}
        return {layer: torch.cat([flat[f"{layer}.weight"], flat[f"{layer}.bias"]], 1) for layer in LAYERS}

    def gauss_newton(self, at, x):
        def outputs(parameters, xi):
            return functional_call(self.net, parameters, (xi[None],))[0]

        jacobian = vmap(jacrev(outputs), in_dims=(None, 0))(at, x)
        p = vmap(outputs, in_dims=(None, 0))(at, x).softmax(1)
        hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        parts = {}
        for layer in LAYERS:
            J = torch.cat([jacobian[f"{layer}.weight"].flatten(2), jacobian[f"{layer}.bias"]], 2)
            parts[layer] = torch.einsum("nop,noq,nqr->pr", J, hessian, J)
        return parts

    # -- what the user does -------------------------------------------------------------------------------------------

    def zero_grad(self):
        for name in self.mine():
            self.gradients[name] = None
        self.passes = []

    def add(self, layer, lr):
        self.looked_at()
        self.members.add(layer)
        self.lr[layer] = lr
        if layer in self.frozen:
            self.asleep.add(layer)
        else:
            self.woken(layer)

    def step(self):
        """Return whether a step is possible, and take it if it is."""
        self.looked_at()
        passes, self.passes = self.passes, []
        given = [name for name in self.mine() if self.gradients.get(name) is not None]
        active = [name for name in given if layer_of(name) in self.awake()]
        stale = any(self.lives[layer] != life for _, kept in passes for layer, (life, _) in kept.items()
                    if layer in self.awake())  # fmt: skip
        if not given or stale:
            return False
        samples = sum(size for size, _ in passes)
        fresh, seen = {}, False
        for layer in self.awake():
            parts = [kept[layer][1] for _, kept in passes if layer in kept]
            seen = seen or bool(parts)
            if parts and (self.due or layer in self.wanting):
                # A step's rows are those of its whole batch: of the mean over all samples.
                J = torch.cat(parts) * samples
                fresh[layer] = J.T @ J / samples if self.empirical else sum(parts) / samples
        known = {**self.curvature, **fresh}
        if any(layer_of(name) not in known for name in active):
            return False
        self.curvature = known
        for layer in dict.fromkeys(map(layer_of, active)):
            self.move(layer)
        self.steps += 1
        self.wanting -= fresh.keys()
        self.due = self.steps % self.every == 0 or (self.due and not seen)
        return True

    def move(self, layer):
        names = [f"{layer}.weight", f"{layer}.bias"]
        F = self.curvature[layer]
        flat = torch.cat([self.gradients[name].reshape(-1) for name in names])
        natural = torch.linalg.solve(F + self.damping * torch.eye(len(F), dtype=F.dtype), flat)
        for name, part in zip(names, natural.split([self.parameters[name].numel() for name in names]), strict=True):
            p, before = self.parameters[name], self.averages.get(name)
            part = part.view_as(p)
            self.averages[name] = part if before is None else self.momentum * before + part
            self.parameters[name] = p - self.lr[layer] * (self.averages[name] + self.decay * p)

    def saved(self):
        keys = "parameters curvature averages steps due wanting lr damping asleep members lives"
        return {key: copy.deepcopy(getattr(self, key)) for key in keys.split()}

    def loaded(self, saved):
        for key, value in copy.deepcopy(saved).items():
            setattr(self, key, value)
        self.frozen = set(self.asleep) | (self.frozen - self.members)
        self.passes = []


def layer_of(name):
    return name.split(".")[0]
