"""What the rows of one layer cost: the fallback against plain `torch.func`, closed forms, routes of a convolution."""

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from curvlib.errors import ConfigurationError
from curvlib.factors import Plan, Route
from curvlib.layers import Call, adapter_for, fallback

from . import blocks

N = 64
LAYERS = {
    "LayerNorm 256, sequence 64": (lambda: nn.LayerNorm(256), (64, 256)),
    "Linear 256": (lambda: nn.Linear(256, 256), (256,)),
    "Linear 64, sequence 16": (lambda: nn.Linear(64, 64), (16, 64)),
    "Conv2d 16, 16x16": (lambda: nn.Conv2d(16, 16, 3, padding=1), (16, 16, 16)),
}
CONVOLUTIONS = {
    "3 to 32, 3x3, 32x32": (lambda: nn.Conv2d(3, 32, 3, padding=1), (3, 32, 32)),
    "16 to 16, 3x3, 32x32": (lambda: nn.Conv2d(16, 16, 3, padding=1), (16, 32, 32)),
    "16 to 32, 3x3, 32x32, stride 2": (lambda: nn.Conv2d(16, 32, 3, 2, 1), (16, 32, 32)),
    "32 to 32, 3x3, 16x16": (lambda: nn.Conv2d(32, 32, 3, padding=1), (32, 16, 16)),
    "32 to 64, 3x3, 16x16": (lambda: nn.Conv2d(32, 64, 3, padding=1), (32, 16, 16)),
    "64 to 64, 3x3, 8x8": (lambda: nn.Conv2d(64, 64, 3, padding=1), (64, 8, 8)),
    "64 to 128, 3x3, 8x8": (lambda: nn.Conv2d(64, 128, 3, padding=1), (64, 8, 8)),
    "32 depthwise, 3x3, 16x16": (lambda: nn.Conv2d(32, 32, 3, padding=1, groups=32), (32, 16, 16)),
    "64 to 64, 1x1, 16x16": (lambda: nn.Conv2d(64, 64, 1), (64, 16, 16)),
    "1 to 6, 5x5, 28x28": (lambda: nn.Conv2d(1, 6, 5, padding=2), (1, 28, 28)),
    "3 to 64, 7x7, 64x64, stride 2": (lambda: nn.Conv2d(3, 64, 7, 2, 3), (3, 64, 64)),
    "16 to 16, 7x7, 16x16": (lambda: nn.Conv2d(16, 16, 7, padding=3), (16, 16, 16)),
    "1 to 16, 9, 512": (lambda: nn.Conv1d(1, 16, 9, padding=4), (1, 512)),
    "1 to 16, 9, 4096": (lambda: nn.Conv1d(1, 16, 9, padding=4), (1, 4096)),
    "16 to 32, 5, 256": (lambda: nn.Conv1d(16, 32, 5, padding=2), (16, 256)),
    "4 to 8, 3x3x3, 8x8x8": (lambda: nn.Conv3d(4, 8, 3, padding=1), (4, 8, 8, 8)),
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


class ConvolutionRows:
    """Explicit rows of a convolution by each of the routes to them, one column, float32."""

    params = (list(CONVOLUTIONS), ["grouped", "unfold", "forward", "shifted"], [32, 128], ["cpu", "cuda"])
    param_names = ("convolution", "route", "batch", "device")
    timeout = 120

    def setup(self, convolution, route, batch, device):
        blocks.device_of(f"torch {device}")
        blocks.pin()
        self.place = f"torch {device}"
        try:
            plan = Plan(routes={"*": Route(rows=route)})
        except ConfigurationError:
            raise NotImplementedError(f"this commit has no route {route!r}") from None
        build, shape = CONVOLUTIONS[convolution]
        layer, x = build().to(device), blocks.draw((batch, *shape), place=self.place)
        with torch.no_grad():
            g = torch.randn_like(layer(x))
            self.rows = adapter_for(type(layer)).function(layer, x, g.unsqueeze(1)).planned(plan.of(""))
        self.time_rows()

    def time_rows(self, *_):
        self.rows.dense()
        blocks.synchronize(self.place)
