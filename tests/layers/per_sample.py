"""Truth for the rows of any block: autograd on each sample alone."""

import torch

import curvlib

FISHERS = (curvlib.Exact(curvlib.Gaussian()), curvlib.Sampled(curvlib.Gaussian(), samples=1))


def generator():
    return torch.Generator().manual_seed(3)


def assert_exact(model, *inputs, rest=None, alone=None, blocks=None):
    """Every block's rows, Gram and Jacobian products equal those of per-sample gradients; returns the Factors.

    `alone(i)` gives the model's inputs for sample i; by default those along the first axis of every input.
    """
    alone = alone or (lambda i: [x[i : i + 1] for x in inputs])
    with torch.no_grad():
        n = len(model(*inputs))
    for fisher in FISHERS:
        taken = curvlib.collect(model, fisher, *inputs, generator=generator(), rest=rest)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if not hasattr(m, "hooked"))
        known = {id(p): name for name, p in model.named_parameters()}
        parts = curvlib.layers.partition(model, bare=rest)
        assert {known[id(p)] for block in parts.blocks for p in block.parameters.values()} == {
            name for name, p in model.named_parameters() if p.requires_grad
        }
        columns = fisher.cotangents(model(*inputs).detach(), generator())
        outputs = [model(*alone(i))[0] for i in range(n)]
        for block in parts.blocks:
            if blocks is not None and block.name not in blocks:
                continue
            names = list(block.parameters)
            rows = [
                torch.cat([
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for p, g in zip(
                        block.parameters.values(),
                        torch.autograd.grad(
                            outputs[i],
                            list(block.parameters.values()),
                            columns[c, i],
                            retain_graph=True,
                            allow_unused=True,
                        ),
                        strict=True,
                    )
                ])
                for i in range(n)
                for c in range(len(columns))
            ]  # fmt: skip
            J = torch.stack(rows)
            assert J.abs().max() > 1e-6, block.name
            factors = taken[block.name]
            assert sorted(factors.shapes) == sorted(names)
            close(matrix(factors.dense().values, names), J)
            close(factors.gram(), J @ J.T)
            vector = torch.cos(torch.arange(J.shape[1], dtype=J.dtype))
            split = vector.split([p.numel() for p in block.parameters.values()])
            v = {name: part.reshape(p.shape) for (name, p), part in zip(block.parameters.items(), split, strict=True)}
            close(factors.matvec(v), J @ vector)
            weights = torch.sin(torch.arange(len(J), dtype=J.dtype))
            back = factors.rmatvec(weights)
            close(torch.cat([back[name].flatten() for name in names]), weights @ J)
            close(factors.compact().gram(), J @ J.T)
    return taken


def matrix(values, names):
    return torch.cat([values[name].flatten(1) for name in names], dim=1)


def close(given, expected):
    torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-11)


def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomized(model, scale=0.7):
    """Every parameter random, those that torch makes zeros or ones included."""
    with torch.no_grad():
        for seed, p in enumerate(model.double().parameters()):
            p.copy_(scale * numbers(*p.shape, seed=seed + 10))
    return model
