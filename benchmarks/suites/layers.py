"""What the rows of one layer cost: the exact fallback against plain `torch.func`, closed forms against the fallback."""

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from curvlib.layers import Call, adapter_for, fallback

from . import blocks

N = 64
LAYERS = {
    "LayerNorm 256, sequence 64": (lambda: nn.LayerNorm(256), (64, 256)),
    "Linear 256": (lambda: nn.Linear(256, 256), (256,)),
    "Linear 64, sequence 16": (lambda: nn.Linear(64, 64), (16, 64)),
    "Conv2d 16, 16x16": (lambda: nn.Conv2d(16, 16, 3, padding=1), (16, 16, 16)),
}


class Rows:
    """Per-sample rows of 64 samples and one column, float32."""

    params = (list(LAYERS),)
    param_names = ("layer",)
    timeout = 120

    def setup(self, name):
        blocks.pin()
        build, shape = LAYERS[name]
        self.layer, self.x = build(), torch.randn(N, *shape)
        self.g = torch.randn_like(self.layer(self.x)).detach()
        self.parameters = {key: p.detach() for key, p in self.layer.named_parameters()}

        def inner(parameters, x, g):
            return (functional_call(self.layer, parameters, (x[None],))[0] * g).sum()

        self.plain = vmap(grad(inner), in_dims=(None, 0, 0))
        self.adapter = adapter_for(type(self.layer))
        for run in (self.time_fallback, self.time_torch_func, self.time_closed_form):
            run(name)  # what torch imports at its first use is none of a layer's cost

    def time_fallback(self, name):
        return fallback(self.layer, Call((self.x,), {}, N), (self.g,))

    def time_torch_func(self, name):
        return self.plain(self.parameters, self.x, self.g)

    def time_closed_form(self, name):
        with torch.no_grad():
            return self.adapter.function(self.layer, self.x, self.g.unsqueeze(1))

    def time_closed_form_gram(self, name):
        return self.time_closed_form(name).gram()

    def time_fallback_gram(self, name):
        return self.time_fallback(name).gram()

    def track_fallback_to_torch_func(self, name):
        """At most 1.5 is asked for."""
        mine, plain = blocks.in_turns(lambda: self.time_fallback(name), lambda: self.time_torch_func(name))
        return mine / plain

    def track_gram_closed_form_to_fallback(self, name):
        closed, mine = blocks.in_turns(lambda: self.time_closed_form_gram(name), lambda: self.time_fallback_gram(name))
        return closed / mine


Rows.track_fallback_to_torch_func.unit = "ratio"
Rows.track_gram_closed_form_to_fallback.unit = "ratio"
