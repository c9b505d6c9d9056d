"""Every class of `torch.nn`: those with parameters pass the kit; a class in no table is a failure, not a gap."""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import curvlib
from curvlib.factors import Route
from curvlib.testing import check_adapter

CLASSES = {
    name: kind
    for name, kind in vars(nn).items()
    if inspect.isclass(kind) and issubclass(kind, nn.Module) and not name.startswith("_")
}


@dataclass
class Case:
    """How to make a module, what to call it with, and what else `check_adapter` needs to know."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple]
    options: dict = field(default_factory=dict)
    skipped: tuple[str, ...] = ()  # variants that torch itself cannot run


def numbers(*shapes):
    return lambda: tuple(torch.randn(*shape) for shape in shapes)


def indices(below, *shape):
    return lambda: (torch.randint(below, shape),)


def first(returned):
    return returned[0]


def states(returned):
    """Output and last states of a recurrent layer of shape (batch, time, width), samples first."""
    output, last = returned
    last = last if isinstance(last, tuple) else (last,)
    return [output, *(state.transpose(0, 1) for state in last)]


def adapted(build, **options):
    """Fill in the parameters of a lazy module."""

    def materialised():
        module = build()
        with torch.no_grad():
            module(*options["inputs"]())
        return module

    return Case(materialised, options["inputs"], {k: v for k, v in options.items() if k != "inputs"})


class Packed(nn.Module):
    """A recurrent layer on sequences of different lengths."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        last = self.layer(packed)[1]
        return last[0] if isinstance(last, tuple) else last


class Bags(nn.Module):
    """An embedding bag whose bags are given by offsets."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.flatten(), torch.arange(0, x.numel(), x.shape[1]))


class Holder(nn.Module):
    """Uses the parameters of a container, which has no forward pass of its own."""

    def __init__(self, container, names):
        super().__init__()
        self.container, self.names = container, names

    def forward(self, x):
        return x * self.container[self.names[0]] + self.container[self.names[1]]


MASK = torch.tensor([[False] * 4, [False] * 3 + [True], [False, False, True, True]])
NO_SINGLE = {"coupled": True, "variants": [v for v in curvlib.testing.VARIANTS if v != "batch 1"]}
CONVOLUTIONS = {1: (4, 9), 2: (4, 7, 6), 3: (4, 4, 3, 4)}


CASES: dict[str, list[Case]] = {
    "Linear": [
        Case(lambda: nn.Linear(4, 3), numbers((5, 4))),
        Case(lambda: nn.Linear(4, 3, bias=False), numbers((5, 2, 3, 4))),
    ],
    "Bilinear": [Case(lambda: nn.Bilinear(3, 4, 2), numbers((5, 3), (5, 4)))],
    "LazyLinear": [adapted(lambda: nn.LazyLinear(3), inputs=numbers((5, 4)))],
    **{
        f"{lazy}Conv{transposed}{d}d": [
            adapted(lambda kind=f"{lazy}Conv{transposed}{d}d", args=args: getattr(nn, kind)(*args, groups=2, dilation=2,
                    stride=2, padding=1, **({"output_padding": 1} if "Transpose" in kind else {})),
                    inputs=numbers((3, *CONVOLUTIONS[d])))
        ]
        for lazy in ("", "Lazy")
        for transposed in ("", "Transpose")
        for d in (1, 2, 3)
        for args in [(6, 2) if lazy else (4, 6, 2)]
    },
    "Embedding": [
        Case(lambda: nn.Embedding(7, 3), indices(7, 5, 4)),
        Case(lambda: nn.Embedding(7, 3, padding_idx=2), indices(7, 5)),
    ],
    "EmbeddingBag": [
        *(Case(lambda mode=mode: nn.EmbeddingBag(7, 3, mode=mode), indices(7, 5, 4)) for mode in ("sum", "mean")),
        Case(lambda: Bags(nn.EmbeddingBag(7, 3, mode="mean", padding_idx=2)), indices(7, 5, 4)),
    ],
    "LayerNorm": [Case(lambda: nn.LayerNorm((3, 4)), numbers((5, 2, 3, 4)))],
    "RMSNorm": [Case(lambda: nn.RMSNorm(4), numbers((5, 3, 4)))],
    "GroupNorm": [Case(lambda: nn.GroupNorm(2, 4), numbers((5, 4, 3, 2)))],
    **{
        f"{lazy}InstanceNorm{d}d": [
            adapted(lambda kind=f"{lazy}InstanceNorm{d}d", args=args: getattr(nn, kind)(*args, affine=True),
                    inputs=numbers((5, 4, *[3] * d)))
        ]
        for lazy in ("", "Lazy")
        for d in (1, 2, 3)
        for args in [() if lazy else (4,)]
    },
    **{
        f"{lazy}BatchNorm{d}d": [
            adapted(lambda kind=f"{lazy}BatchNorm{d}d", args=args: getattr(nn, kind)(*args),
                    inputs=numbers((5, 4, *[3] * (d - (d == 1)))), **NO_SINGLE),
            adapted(lambda kind=f"{lazy}BatchNorm{d}d", args=args: getattr(nn, kind)(*args).eval(),
                    inputs=numbers((5, 4, *[3] * d))),
        ]
        for lazy in ("", "Lazy")
        for d in (1, 2, 3)
        for args in [() if lazy else (4,)]
    },
    "SyncBatchNorm": [Case(lambda: nn.SyncBatchNorm(4).eval(), numbers((5, 4, 3)))],
    "PReLU": [Case(nn.PReLU, numbers((5, 4))), Case(lambda: nn.PReLU(4), numbers((5, 4, 3, 3)))],
    **{
        name: [
            Case(lambda kind=name: getattr(nn, kind)(3, 2, batch_first=True, num_layers=2, bidirectional=True),
                 numbers((5, 4, 3)), {"output": states}),
            Case(lambda kind=name: getattr(nn, kind)(3, 2), numbers((4, 5, 3)), {"output": first, "sample_axis": 1}),
            Case(lambda kind=name: Packed(getattr(nn, kind)(3, 2, batch_first=True)),
                 lambda: (torch.randn(3, 4, 3), torch.tensor([2, 4, 1])), {"output": lambda h: h[-1]}),
        ]
        for name in ("RNN", "LSTM", "GRU")
    },
    **{name: [Case(lambda kind=name: getattr(nn, kind)(3, 2), numbers((5, 3)))] for name in ("RNNCell", "GRUCell")},
    "LSTMCell": [Case(lambda: nn.LSTMCell(3, 2), numbers((5, 3)))],
    "MultiheadAttention": [
        Case(lambda: nn.MultiheadAttention(4, 2, batch_first=True), numbers(*[(3, 4, 4)] * 3), {"output": first}),
        Case(lambda: nn.MultiheadAttention(4, 2, batch_first=True, kdim=3, vdim=2, add_bias_kv=True),
             numbers((3, 4, 4), (3, 4, 3), (3, 4, 2)), {"output": first, "kwargs": {"key_padding_mask": MASK}}),
        Case(lambda: nn.MultiheadAttention(4, 2), numbers(*[(4, 3, 4)] * 3),
             {"output": first, "sample_axis": 1, "kwargs": {"attn_mask": torch.ones(4, 4).triu(1).bool()}}),
    ],
    "TransformerEncoderLayer": [
        Case(lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True), numbers((3, 4, 4))),
        Case(lambda: nn.TransformerEncoderLayer(4, 2, 5, batch_first=True).eval(), numbers((3, 4, 4)),
             {"kwargs": {"src_key_padding_mask": MASK}}),
    ],
    "TransformerDecoderLayer": [
        Case(lambda: nn.TransformerDecoderLayer(4, 2, 5, dropout=0.0, batch_first=True), numbers((3, 4, 4), (3, 2, 4)))
    ],
    "TransformerEncoder": [
        Case(lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True), 2, nn.LayerNorm(4)), numbers((3, 4, 4)))
    ],
    "TransformerDecoder": [
        Case(lambda: nn.TransformerDecoder(
            nn.TransformerDecoderLayer(4, 2, 5, dropout=0.0, batch_first=True), 2), numbers((3, 4, 4), (3, 2, 4)))
    ],
    "Transformer": [
        Case(lambda: nn.Transformer(4, 2, 1, 1, 5, dropout=0.0, batch_first=True), numbers((3, 4, 4), (3, 2, 4)))
    ],
    "ParameterList": [
        Case(lambda: Holder(nn.ParameterList([torch.ones(4), torch.zeros(4)]), (0, 1)), numbers((5, 4)))
    ],
    "ParameterDict": [
        Case(lambda: Holder(nn.ParameterDict({"a": torch.ones(4), "b": torch.zeros(4)}), "ab"), numbers((5, 4)))
    ],
    "AdaptiveLogSoftmaxWithLoss": [
        Case(lambda: nn.AdaptiveLogSoftmaxWithLoss(6, 9, [3, 5], div_value=2.0, head_bias=True),
             lambda: (torch.randn(5, 6), torch.tensor([0, 4, 8, 2, 5])), {"output": first}),
        Case(lambda: nn.AdaptiveLogSoftmaxWithLoss(6, 9, [3]), lambda: (torch.randn(3, 6), torch.tensor([0, 4, 8])),
             {"output": first})
    ],
    "LinearCrossEntropyLoss": [
        Case(lambda: nn.LinearCrossEntropyLoss(4, 3, bias=True, reduction="none", label_smoothing=0.1),
             lambda: (torch.randn(5, 4), torch.tensor([0, 2, 1, -100, 2]))),
        Case(lambda: nn.LinearCrossEntropyLoss(4, 3, out_features=(2,), reduction="none", weight=torch.arange(1.0, 4)),
             lambda: (torch.randn(5, 4), torch.randint(3, (5, 2)))),
    ],
}  # fmt: skip

# Classes without parameters that need arguments to be made.
WITHOUT: dict[str, tuple] = {
    **{f"Adaptive{kind}Pool{d}d": (2,) for kind in ("Avg", "Max") for d in (1, 2, 3)},
    **{f"{kind}Pool{d}d": (2,) for kind in ("Avg", "Max") for d in (1, 2, 3)},
    **{f"LPPool{d}d": (2, 2) for d in (1, 2, 3)},
    **{f"MaxUnpool{d}d": (2,) for d in (1, 2, 3)},
    **{f"FractionalMaxPool{d}d": (2, 1) for d in (2, 3)},
    **{f"{kind}Pad{d}d": (1,) for kind in ("Circular", "Reflection", "Replication", "Zero") for d in (1, 2, 3)},
    **{f"ConstantPad{d}d": (1, 0.0) for d in (1, 2, 3)},
    "ChannelShuffle": (2,),
    "CrossMapLRN2d": (2,),
    "DataParallel": (nn.Identity(),),
    "Fold": (4, 2),
    "LocalResponseNorm": (2,),
    "PixelShuffle": (2,),
    "PixelUnshuffle": (2,),
    "Threshold": (0.0, 0.0),
    "Unflatten": (1, (2, 2)),
    "Unfold": (2,),
}
# Base classes, which have parameters and no forward pass.
BASES = {"RNNBase": ("LSTM", 3, 2), "RNNCellBase": (3, 2, True, 4)}

PARAMETRISED = [(name, number) for name, cases in CASES.items() for number in range(len(cases))]


@pytest.mark.parametrize("name", CLASSES)
def test_no_class_is_forgotten(name):
    """A class with parameters is in CASES; one that owns none can be made, and does own none."""
    if name in CASES:
        return
    kind = CLASSES[name]
    if name in BASES:
        assert any(True for _ in kind(*BASES[name]).parameters())
        assert kind.forward is nn.Module.forward
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = kind(*WITHOUT.get(name, ()))
    except TypeError as error:
        pytest.fail(f"torch.nn.{name} is in no table of this file, and cannot be made without arguments: {error}")
    owned = [parameter for parameter, _ in module.named_parameters()]
    assert not owned, f"torch.nn.{name} owns the parameters {owned}: add it to CASES"


def test_the_tables_name_no_class_twice_nor_one_that_is_gone():
    assert not set(WITHOUT) & set(CASES)
    # Classes that older or newer releases of torch lack are left out of the parametrised test.
    assert set(CASES) - set(CLASSES) <= {"LinearCrossEntropyLoss"}
    assert set(WITHOUT) <= set(CLASSES)


@pytest.mark.parametrize(("name", "number"), [case for case in PARAMETRISED if case[0] in CLASSES])
def test_every_class_with_parameters_is_exact(name, number):
    torch.manual_seed(number)
    case = CASES[name][number]
    module = case.build()
    assert any(isinstance(inner, CLASSES[name]) or type(inner) in lazy(name) for inner in module.modules())
    report = check_adapter(module, *case.inputs(), **case.options)
    assert set(report.skipped) <= set(case.skipped), report.skipped
    assert not any(inner._forward_hooks or inner._forward_pre_hooks for inner in module.modules())


PLANS = [
    curvlib.Plan(routes={"*": Route(rows, gram, keep)})
    for rows, gram, keep in [
        ("grouped", "pairs", "factored"),
        ("unfold", "rows", "rows"),
        ("forward", "rows", "factored"),
        ("shifted", "pairs", "rows"),
    ]
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: str(plan.routes["*"]))
@pytest.mark.parametrize(("name", "number"), [case for case in PARAMETRISED if case[0] in CLASSES])
def test_every_class_is_exact_by_every_route(name, number, plan):
    torch.manual_seed(number)
    case = CASES[name][number]
    check_adapter(case.build(), *case.inputs(), **{**case.options, "variants": ["float64"]}, plan=plan)


def lazy(name):
    """A lazy class turns into this one when its parameters are there."""
    return [CLASSES[name.removeprefix("Lazy")]] if name.startswith("Lazy") else []
