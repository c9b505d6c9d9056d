"""Steps that fail, for what looks at them one step later."""

import math

from small_net import backward

from curvlib import Momentum, WeightDecay

MOVING = [WeightDecay(1e-2), Momentum(0.5)]


def spoil(model, value=math.nan):
    model[2].weight.grad[0, 0] = value


def bad_step(model, optimizer, value=math.nan):
    optimizer.zero_grad()
    backward(model)
    spoil(model, value)
    optimizer.step()
