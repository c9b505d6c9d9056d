"""Rows of other libraries, each as its documentation says it is to be used; imported only when a step is built."""

import torch
from torch import nn
from torch.nn import functional

from benchmarks.peers.methods import DAMPING, LR, MOMENTUM, momentum, ordinary, row

LAYERS = (nn.Linear, nn.Conv2d)


@row("kfac-pytorch, inverse", 1, 10, package="kfac", method="inverse")
@row("kfac-pytorch, eigen", 1, 10, package="kfac", method="eigen")
def kfac_pytorch(model, x, y, period, method):
    from kfac.preconditioner import KFACPreconditioner

    preconditioner = KFACPreconditioner(
        model, factor_update_steps=period, inv_update_steps=period, compute_method=method, damping=DAMPING, lr=LR,
        loglevel=0,
    )  # fmt: skip
    return ordinary(model, x, y, momentum(model), between=preconditioner.step)


@row("singd, IKFAC", 1, package="singd", kfac_like=True)
@row("singd, dense", 1, 10, package="singd", kfac_like=False)
def singd(model, x, y, period, kfac_like):
    from singd.optim.optimizer import SINGD

    return ordinary(
        model, x, y,
        SINGD(
            model, lr=LR, momentum=MOMENTUM, damping=DAMPING, T=period, kfac_like=kfac_like, warn_unsupported=False,
            alpha1=0.0 if kfac_like else 0.5,
        ),
    )  # fmt: skip


@row("curvlinops, EKFAC", 1, 10, package="curvlinops", kind="EKFACLinearOperator", damping={"use_exact_damping": True})
@row("curvlinops, KFAC", 1, 10, package="curvlinops", kind="KFACLinearOperator", damping={})
def curvlinops(model, x, y, period, kind, damping):
    """Its operators do a forward and backward pass of their own at each refresh; labels are sampled."""
    import curvlinops

    loss = nn.CrossEntropyLoss()
    parameters = [p for module in model.modules() if isinstance(module, LAYERS) for p in module.parameters()]
    held = {"count": 0}

    def precondition():
        if held["count"] % period == 0:
            operator = getattr(curvlinops, kind)(
                model, loss, parameters, [(x, y)], check_deterministic=False, separate_weight_and_bias=False
            )
            held["inverse"] = curvlinops.KFACInverseLinearOperator(operator, damping=DAMPING, **damping)
        held["count"] += 1
        # Its factors are computed at the first product, and need autograd.
        for p, direction in zip(parameters, held["inverse"] @ [p.grad for p in parameters], strict=True):
            p.grad.copy_(direction.detach())

    return ordinary(model, x, y, momentum(model), between=precondition)


@row("BackPACK, per-sample gradients + Gram", 1, 10, package="backpack")
def backpack(model, x, y, period):
    """Exact layer-wise Woodbury from its `BatchGrad`, the empirical Fisher; convolutions and linear layers alone."""
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    layers = [extend(module) for module in model.modules() if isinstance(module, LAYERS)]
    loss, optimizer, n = extend(nn.CrossEntropyLoss()), momentum(model), len(x)
    held = {"count": 0, "rows": {}}

    def step():
        optimizer.zero_grad()
        if held["count"] % period == 0:
            with backpack(BatchGrad()):
                value = loss(model(x), y)
                value.backward()
            for layer in layers:
                rows = torch.cat([n * p.grad_batch.flatten(1) for p in layer.parameters()], dim=1)
                kernel = rows @ rows.T / n + DAMPING * torch.eye(n)
                held["rows"][layer] = rows, torch.linalg.cholesky(kernel)
                for p in layer.parameters():
                    del p.grad_batch
        else:
            value = functional.cross_entropy(model(x), y)
            value.backward()
        held["count"] += 1
        with torch.no_grad():
            for layer in layers:
                rows, factor = held["rows"][layer]
                gradient = torch.cat([p.grad.flatten() for p in layer.parameters()])
                weights = torch.cholesky_solve((rows @ gradient)[:, None], factor)[:, 0]
                natural = (gradient - weights @ rows / n) / DAMPING
                sizes = [p.numel() for p in layer.parameters()]
                for p, direction in zip(layer.parameters(), natural.split(sizes), strict=True):
                    p.grad.copy_(direction.view_as(p))
        optimizer.step()
        return value.detach()

    return step


@row("heavyball, SOAP", 1, 10, package="heavyball")
def heavyball(model, x, y, period):
    import heavyball

    heavyball.utils.compile_mode = None
    optimizer = heavyball.SOAP(model.parameters(), lr=LR, weight_decay=0.0, precondition_frequency=period)
    return ordinary(model, x, y, optimizer)


@row("asdl, SKFAC, empirical", 1, package="asdl", swift=True)
@row("asdl, KFAC, empirical", 1, 10, package="asdl", swift=False)
def asdl_kfac(model, x, y, period, swift):
    from asdl.precondition import KfacGradientMaker, PreconditioningConfig

    config = PreconditioningConfig(data_size=len(x), damping=DAMPING, preconditioner_upd_interval=period)
    return _asdl(model, x, y, KfacGradientMaker(model, config, fisher_type="fisher_emp", swift=swift))


@row("asdl, Woodbury of the whole network, empirical", 1, package="asdl")
def asdl_smw(model, x, y, period):
    """Its Gram of convolutions is approximate (9.5 % off the dense solve)."""
    from asdl.precondition import SmwEmpNaturalGradientConfig, SmwEmpNaturalGradientMaker

    return _asdl(model, x, y, SmwEmpNaturalGradientMaker(model, SmwEmpNaturalGradientConfig(len(x), DAMPING)))


def _asdl(model, x, y, maker):
    optimizer = momentum(model)

    def step():
        optimizer.zero_grad()
        outputs = maker.setup_model_call(model, x)
        maker.setup_loss_call(functional.cross_entropy, outputs, y)
        _, loss = maker.forward_and_backward()
        optimizer.step()
        return loss.detach()

    return step
