"""singd: whole training runs of its optimizer, against the same composed of curvlib's parts.

Known differences:

- Its momentum and weight decay are those of `Momentum` after `WeightDecay`: decay is averaged too.
- Of its structures curvlib has the dense and the diagonal ones.
- Grouped convolutions are left out: inputs are averaged over groups there, which is not the block's factor.
"""

import pytest
from twins import NETS, batch, trained_side_by_side

import curvlib
from curvlib import Momentum, WeightDecay

singd = pytest.importorskip("singd.optim.optimizer", reason="make peers installs singd")

STEPS = 5
LR, DAMPING, RATE = 0.05, 0.1, 0.2

CONFIGURATIONS = {
    "IKFAC": {"kfac_like": True},
    "IKFAC, reduce": {"kfac_like": True, "sharing": "reduce"},
    "IKFAC, normalized": {"kfac_like": True, "normalized": True},
    "SINGD without momentum": {"momentum": 0.0},
    "SINGD": {"momentum": 0.5},
    "SINGD, reduce": {"momentum": 0.5, "sharing": "reduce"},
    "SINGD, normalized": {"momentum": 0.5, "normalized": True},
    "SINGD, diagonal inputs": {"momentum": 0.5, "inputs": "diagonal"},
    "SINGD, diagonal cotangents": {"momentum": 0.5, "cotangents": "diagonal"},
    "SINGD, diagonal": {"momentum": 0.5, "inputs": "diagonal", "cotangents": "diagonal", "normalized": True},
}


def both(configuration, momentum=0.0, decay=0.0, refresh=1):
    """Makers of curvlib's optimizer and of what is called for a step of singd's."""
    solver = curvlib.solvers.SINGD(DAMPING, RATE, **configuration)
    transforms = [WeightDecay(decay), Momentum(momentum)]

    def ours(model):
        return curvlib.compose(
            model, fisher=curvlib.Empirical(), solver=solver, refresh=refresh, transforms=transforms, lr=LR,
            damping=1.0,  # what acts is the solver's own
        )  # fmt: skip

    def theirs(model):
        optimizer = singd.SINGD(
            model, lr=LR, momentum=momentum, weight_decay=decay, T=refresh,
            damping=solver.damping, lr_cov=solver.rate, kfac_like=solver.kfac_like,
            alpha1=0.0 if solver.kfac_like else solver.momentum,
            structures=(solver.inputs, solver.cotangents),
            normalize_lr_cov=solver.normalized, kfac_approx=solver.sharing,
        )  # fmt: skip
        return optimizer.step

    return ours, theirs


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_training_is_the_same(name, net):
    trained_side_by_side(NETS[net][0](), *both(CONFIGURATIONS[name]), [batch(net, seed=s) for s in range(STEPS)])


@pytest.mark.parametrize("net", NETS)
def test_with_momentum_weight_decay_and_a_stale_preconditioner(net):
    pair = both({"momentum": 0.5}, momentum=0.9, decay=0.01, refresh=2)
    trained_side_by_side(NETS[net][0](), *pair, [batch(net, seed=s) for s in range(STEPS)])
