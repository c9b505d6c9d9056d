"""A plain loop, which the frameworks are compared with."""

from inside import X, Y, composed, network, plain_loop
from torch.nn import functional


def test_it_learns():
    model = network()
    before = float(functional.cross_entropy(model(X), Y).detach())
    plain_loop(model, composed(model), epochs=4, clip=1.0)
    assert float(functional.cross_entropy(model(X), Y).detach()) < 0.7 * before
