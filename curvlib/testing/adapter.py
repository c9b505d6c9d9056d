"""Any module's adapter against per-sample autograd, in every situation that it has to be right in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from curvlib.capture import collect
from curvlib.errors import ConfigurationError
from curvlib.factors import Factors, Plan
from curvlib.fisher import Empirical
from curvlib.layers import partition
from curvlib.testing.comparison import Comparison, ConformanceError, numbers
from curvlib.testing.factors import check_factors, check_kronecker
from curvlib.testing.truth import FixedCotangents, Probe, cotangents_for, per_sample_rows, prepared
from curvlib.testing.variants import Inputs, Variant, variants_of

__all__ = ["AdapterReport", "check_adapter"]

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class AdapterReport:
    """What `check_adapter` did.

    Parameters
    ----------
    checked
        Names of the variants that passed.
    skipped
        Name of a variant that torch itself cannot run for this module, and torch's reason.
    adapters
        Block name to the name of its adapter.
    """

    checked: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)


def check_adapter(
    module: nn.Module,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    output: Callable[[Any], Any] | None = None,
    sample_axis: int | Sequence[int | None] = 0,
    output_axis: int | None = None,
    coupled: bool = False,
    variants: Sequence[str] | None = None,
    tolerances: Mapping[torch.dtype, float] | None = None,
    plan: Plan | None = None,
) -> AdapterReport:
    """Check that the rows of `module`, by its adapter or the fallback, are its per-sample Jacobian.

    The truth is one call of autograd for every sample and column, in float64, from the same rounded numbers. The rows,
    their sum, Gram, J v, Jᵀ w, diagonal and (where the kind has one) Kronecker pair are compared.

    Parameters
    ----------
    module
        What is checked, with everything inside it; it is copied and left as it is. Its parameters are moved a little
        off their values in the copy, since ones and zeros hide errors.
    *inputs, kwargs
        What it is called with: a few samples.
    output
        Picks or makes the tensors to differentiate out of what the module returns; all that need a gradient by
        default.
    sample_axis
        Where the samples are in the inputs: one axis for every tensor that has as many elements there as the first,
        or a sequence with an entry for every input tensor, None for a tensor that samples share.
    output_axis
        Where they are in the outputs; as in the inputs by default.
    coupled
        Whether the outputs of a sample depend on the others (batch statistics). Rows are then those of the outputs of
        each sample, within the batch; otherwise it is also checked that they do not depend. Check such a module alone:
        the rows of a layer in front of it are shares of the gradient, which no output of one sample tells.
    variants
        Which of `curvlib.testing.VARIANTS` to run; all by default.
    tolerances
        Largest error of a dtype, relative to the largest entry of the block's quantity; by default 1e-9, 1e-4 and 1e-1
        for float64, float32 and bfloat16.
    plan
        Routes that the rows take, as for `curvlib.collect`; by default those of the cost model.

    Returns
    -------
    AdapterReport
        What was checked, and what torch itself cannot run.

    Raises
    ------
    ConformanceError
        An AssertionError that says which quantity is wrong, by how much, and where.
    ConfigurationError
        If the samples cannot be found in the inputs or outputs.

    Examples
    --------
    >>> import torch, curvlib
    >>> report = curvlib.testing.check_adapter(torch.nn.Linear(3, 2), torch.ones(4, 3))
    >>> report.skipped
    {}
    """
    given = Inputs.of(inputs, kwargs or {}, sample_axis)
    if output_axis is None:
        output_axis = sample_axis if isinstance(sample_axis, int) else 0
    report = AdapterReport()
    for variant in variants_of(module, given, variants):
        check = _Check(module, given, variant, output, output_axis, coupled, {**TOLERANCES, **(tolerances or {})}, plan)
        reason = check.impossible()
        if reason is not None:
            if variant.group == "float64":
                raise ConformanceError(f"{type(module).__name__} itself cannot be run on these inputs: {reason}")
            report.skipped[variant.name] = reason
            continue
        report.adapters.update(check.run())
        report.checked.append(variant.name)
    return report


class _Check:
    """One variant of one module."""

    def __init__(
        self,
        module: nn.Module,
        inputs: Inputs,
        variant: Variant,
        output: Callable[[Any], Any] | None,
        axis: int,
        coupled: bool,
        tolerances: Mapping[torch.dtype, float],
        plan: Plan | None,
    ) -> None:
        if variant.batch is not None:
            inputs = inputs.pick([sample % inputs.samples for sample in range(variant.batch)])
        self.module, self.variant, self.output, self.axis, self.coupled = module, variant, output, axis, coupled
        self.inputs, self.plan = inputs.to(torch.float64).to(variant.dtype), plan
        self.compare = Comparison(type(module).__name__, tolerances[variant.dtype], f"variant {variant.name!r}")

    def run(self) -> dict[str, str]:
        """Compare everything; return the adapters' names."""
        inputs, wide = self.inputs, self.inputs.to(torch.float64)
        truth_model = self._probe(wide).double()
        outputs = truth_model(*wide.args, **wide.kwargs)
        if self.variant.group == "float64":
            self._check_premises(wide, outputs.detach())
        parameters = {name: p for name, p in truth_model.named_parameters() if p.requires_grad}
        cotangents = cotangents_for(outputs.detach(), self.variant.columns)
        truth = per_sample_rows(outputs, parameters, cotangents)

        inputs = inputs.laid_out(self.variant.layout)
        model = self._probe(inputs)
        names = {id(p): name for name, p in model.named_parameters()}
        parts = partition(model)
        if parts.rest:
            raise self.compare.fail("partition", f"leaves the parameters {sorted(parts.rest)} outside every block")
        given = self._collect(model, inputs, cotangents)
        for block in parts.blocks:
            uses = ", ".join(dict.fromkeys(use.adapter.name for use in block.uses))
            compare = self.compare.where(f"block {block.name.removeprefix('module.')!r}, adapter {uses!r}")
            expected = {name: truth[names[id(p)]] for name, p in block.parameters.items()}
            if block.name not in given:
                compare.close_vectors("rows", {name: torch.zeros_like(v) for name, v in expected.items()}, expected)
                continue
            self._compare_block(given[block.name], expected, compare)
        return {block.name.removeprefix("module."): block.uses[0].adapter.name for block in parts.blocks}

    def impossible(self) -> str | None:
        """Torch's reason why the module cannot be run and differentiated in this situation, None if it can."""
        # As inside a network: torch crashes in a few backward passes that leave out the input's gradient.
        inputs = self.inputs.laid_out(self.variant.layout).map(lambda t, _: t.requires_grad_(t.is_floating_point()))
        try:
            model = self._probe(inputs)
            outputs = model(*inputs.args, **inputs.kwargs)
            wanted = [t for t in (*model.parameters(), *inputs.tensors) if t.requires_grad]
            torch.autograd.grad(outputs.sum(), wanted, allow_unused=True)
        except ConfigurationError:
            raise
        except (RuntimeError, ValueError, TypeError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    def _probe(self, inputs: Inputs) -> Probe:
        """Wrap a fresh copy: modules such as spectral norms change at every call."""
        second = inputs.other() if self.variant.twice else None
        module = prepared(self.module, self.variant)
        if self.variant.layout == "channels_last":
            spatial = {leaf.ndim for leaf in inputs.tensors}
            memory_format = torch.channels_last if 4 in spatial else torch.channels_last_3d
            module = module.to(memory_format=memory_format)  # type: ignore[call-overload]  # missing in torch's stubs
        strided = self.variant.layout == "non-contiguous"
        return Probe(module, inputs.samples, self.axis, self.output, second, strided)

    def _check_premises(self, inputs: Inputs, outputs: Tensor) -> None:
        again = self._probe(inputs)(*inputs.args, **inputs.kwargs)
        if not torch.equal(again, outputs):
            raise self.compare.fail("output", "differs from call to call: switch dropout off, or put it in eval mode")
        for sample in range(inputs.samples if not self.coupled else 0):
            alone = inputs.pick([sample])
            compare = self.compare.where("pass coupled=True if samples are meant to depend on each other")
            quantity = f"output of sample {sample}, run alone,"
            try:
                result = self._probe(alone)(*alone.args, **alone.kwargs)
            except (RuntimeError, ValueError) as error:
                raise compare.fail(quantity, f"does not exist: {type(error).__name__}: {error}") from error
            compare.close(quantity, result[0], outputs[sample])

    def _collect(self, model: Probe, inputs: Inputs, cotangents: Tensor) -> dict[str, Factors]:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        hooks = _hooks(model)
        loss: Callable[[Any], Tensor] | None = None
        fisher: FixedCotangents | Empirical = FixedCotangents(cotangents)
        if self.variant.reduction is not None:
            fisher = Empirical(reduction=self.variant.reduction)
            observations = inputs.samples if self.variant.reduction == "mean" else 1

            def loss(result: Any) -> Tensor:
                return (result * cotangents[0].to(result)).sum() / observations  # type: ignore[no-any-return]

        # The check of the first pass is left to one variant: what is compared here says more.
        verify = self.variant.group == "batch 7"
        try:
            given = collect(model, fisher, *inputs.args, loss=loss, kwargs=inputs.kwargs, verify=verify, plan=self.plan)
        except Exception as error:  # whatever a user's adapter raises becomes one readable failure
            raise self.compare.fail("capture", f"raises {type(error).__name__}: {error}") from error
        self.compare.equal("number of hooks left behind", _hooks(model) - hooks, 0)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None or not torch.equal(parameter, before[name]):
                raise self.compare.fail(f"parameter {name!r}", "or its .grad was changed by the capture")
        return given

    def _compare_block(self, factors: Factors, truth: dict[str, Tensor], compare: Comparison) -> None:
        n, columns = self.inputs.samples, self.variant.columns
        compare.equal("parameters and their shapes", factors.shapes, {k: tuple(v.shape[1:]) for k, v in truth.items()})
        compare.equal("normalizer", factors.normalizer, n)
        compare.equal("number of rows", len(factors), n * columns)
        compare.close_vectors(f"rows (sample-major, {n} samples × {columns} columns)", factors.dense().values, truth)
        ones = factors.row_weights(1.0)
        compare.close_vectors(
            "gradient (sum of the rows)", factors.rmatvec(ones), {k: v.sum(0) for k, v in truth.items()}
        )
        J = torch.cat([truth[name].flatten(1) for name in factors.shapes], dim=1)
        compare.close("Gram J Jᵀ", factors.gram(), J @ J.T)
        vector = {name: _wave(rows.shape[1:]).to(ones) for name, rows in truth.items()}
        flat = torch.cat([numbers(vector[name]).reshape(-1) for name in factors.shapes])
        compare.close("J v", factors.matvec(vector), J @ flat)
        weights = _wave((len(J),)).to(ones)
        weighted = {name: torch.tensordot(numbers(weights), rows, 1) for name, rows in truth.items()}
        compare.close_vectors("Jᵀ w", factors.rmatvec(weights), weighted)
        compare.close_vectors("diagonal of JᵀJ", factors.diagonal(), {k: v.square().sum(0) for k, v in truth.items()})
        if self.variant.group == "float64" and len(factors) > 1:
            try:
                check_factors(factors, compare.tolerance)
            except ConformanceError as error:
                raise ConformanceError(f"{compare.subject} ({compare.situation}): {error}") from error
        else:
            check_kronecker(factors, compare)


def _hooks(model: nn.Module) -> int:
    """Count the hooks of all modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def _wave(shape: Sequence[int]) -> Tensor:
    pattern = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64)
    return torch.cos(pattern * pattern * 0.23 + 0.5).reshape(tuple(shape))
