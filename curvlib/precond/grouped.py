"""The optimizer without its step: parameter groups, the blocks of what is trainable, and the whole of its state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, ParamSpec, TypeVar
from weakref import finalize, ref

import torch

from curvlib.capture import Capture, Output
from curvlib.capture.learned import recall
from curvlib.errors import ConfigurationError, CurvatureError
from curvlib.factors import Plan
from curvlib.layers import Block
from curvlib.precond.curvature import BlockState
from curvlib.precond.damping import Constant, Damping, as_damping
from curvlib.precond.division import Division, unchanged
from curvlib.precond.gradients import always, inverted_at_once
from curvlib.precond.groups import Group, assigned, check_options, defaults, of_block, places, resolved
from curvlib.precond.observed import profiled, unobserved
from curvlib.precond.refresh import Refresh
from curvlib.precond.saved import DAMAGED, Saved, complete, read, revived, with_own
from curvlib.precond.transforms import Transform
from curvlib.precond.untouched import Untouched
from curvlib.solvers import Solver

__all__ = ["Grouped"]

P = ParamSpec("P")
R = TypeVar("R")
Self = TypeVar("Self", bound="Grouped")


class Grouped(torch.optim.Optimizer):
    """Which parameters there are, with what options, in which blocks, and what was learned of these.

    `curvlib.precond.NaturalGradient` adds the step; `curvlib.compose` documents the parameters.
    """

    _ready = False

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler tells the optimizer of itself instead of unscaling gradients: so that it is refused."""
        return self._fused

    def __init__(
        self,
        division: Division,
        *,
        damping: Damping,
        transforms: tuple[Transform, ...],
        lr: float,
        groups: Iterable[Group] = (),
        maximize: bool = False,
        output: Output | None = None,
        seed: int = 0,
        verify: bool = True,
        fused: bool = False,
        plan: Plan | None = None,
        deferred: bool | None = None,
    ) -> None:
        territory = division.territory()
        parts = division.divided(territory.values())
        uncovered = list(parts.rest.values()) if division.rest == "adamw" else []
        apart = {id(p) for p in uncovered}
        composed = assigned(groups, {name: p for name, p in territory.items() if id(p) not in apart}, parts.blocks)
        for group in composed:
            check_options(group, transforms)
        self._adamw = torch.optim.AdamW(uncovered, maximize=maximize) if uncovered else None
        others = self._adamw.param_groups if self._adamw is not None else []
        super().__init__([*composed, *others], defaults(lr, damping, transforms, maximize))
        # The first of the hooks, so that those of the user see the whole.
        self.register_state_dict_post_hook(complete)
        for group in others:
            group["rest"] = "adamw"
            for option in ("damping", "solver", "momentum"):
                group.pop(option, None)
        self.model, self.fisher, self.output, self.rest = division.model, division.fisher, output, division.rest
        self.refresh = division.refresh
        self.transforms = transforms
        self.curvature: dict[str, BlockState] = {}
        self.solvers: dict[str, Solver] = {}
        self.steps = 0
        self._damping = damping
        self._division = division
        self._due = True
        self._seed, self._verify, self._fused, self._deferred = seed, verify, fused, deferred
        self._blocks: tuple[Block, ...] = ()
        self._asked: dict[str, Solver] = {}  # what each block's state belongs to, as it was composed
        self._wanted: dict[str, Solver] = {}  # what it shall belong to from its next rows on
        self._wanting: frozenset[str] = frozenset()  # blocks that take the next rows, due or not
        self._untouched = Untouched()
        self._generator = torch.Generator(device=self.param_groups[0]["params"][0].device).manual_seed(seed)
        if plan is None:
            # No cost model knows which GPU it is; a CPU's is counted, so that two runs choose alike.
            plan = Plan(timed=self._generator.device.type == "cuda")
        me = ref(self)

        def before() -> None:
            if (optimizer := me()) is not None:
                optimizer._before_pass()

        self._capture = Capture(
            self.model, (), self.fisher, output, self._generator, check=verify, plan=plan, before=before
        )
        # What is left of an optimizer that is gone must not watch a model that goes on changing.
        finalize(self, self._capture.detach).atexit = False
        try:
            self._divide(strict=True)
        except BaseException:
            self.detach()
            raise
        self._wanting = frozenset()
        self._ready = True
        self._link()

    @staticmethod
    def profile_hook_step(func: Callable[P, R]) -> Callable[P, R]:
        """Wrap `step`, which torch does once for a class, so that profilers and hooks see it."""
        return unobserved(func)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and with them the passes that made them."""
        if profiled() or not set_to_none:
            super().zero_grad(set_to_none)
        else:
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad = None
        self._capture.clear()
        self._untouched.clear()

    def detach(self) -> None:
        """Remove every hook from the model; no further step is possible. Leaving ``with optimizer:`` does it too."""
        self._capture.detach()
        self._untouched.detach()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the model's passes through unseen, such as those of a GAN's other half; gradients are ordinary ones."""
        with self._capture.paused():
            yield

    @property
    def plan(self) -> Plan:
        """Which exact routes Factors take."""
        return self._capture.rows.plan

    @property
    def refresh(self) -> Refresh:  # documented on the class
        return self._refresh

    @refresh.setter
    def refresh(self, refresh: Refresh) -> None:
        self._refresh = refresh
        self._always, self._at_once = always(refresh), inverted_at_once(refresh)
        if self._ready:
            self._tell_forms()
            if not self._always:
                self._capture.keep_gradients(but_with_curvature=self._at_once)

    # -- groups and blocks --------------------------------------------------------------------------------------------

    @property
    def damping(self) -> Damping:  # documented on the class
        return self._damping

    @damping.setter
    def damping(self, damping: Damping | float | Mapping[str, Damping | float]) -> None:
        self._damping = as_damping(damping)
        value = self._damping.value if isinstance(self._damping, Constant) else None
        for options in (self.defaults, *self._own_groups()):
            options["damping"] = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in more parameters of the model: of new modules, or such as ``only`` had left out.

        Blocks are divided anew. Those that are as before keep their curvature; new ones take theirs at the next step.

        Parameters
        ----------
        param_group
            ``params`` (parameters or their names) or ``blocks`` (patterns), and options as in `compose`.

        Raises
        ------
        ConfigurationError
            If a parameter is not the model's or in a group already, an option does not fit, or a block would be split.
        UncoveredParameterError
            If a parameter lies outside every block and `rest` does not say what becomes of it.
        """
        if not self._ready:
            super().add_param_group(param_group)
            return
        self._look()
        taken = {id(p) for group in self.param_groups for p in group["params"]}
        named = {name: p for name, p in self.model.named_parameters() if id(p) not in taken}
        group = resolved(param_group, named, self._division.parts().blocks)
        check_options(group, self.transforms)
        super().add_param_group(group)
        try:
            self._divide()
        except Exception:
            del self.param_groups[-1]
            raise

    def _said(self, option: str) -> dict[str, Any]:
        """Block name to what its group says."""
        return of_block(option, self._places, self.param_groups)

    def _own_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if "rest" not in group]

    def _divide(self, strict: bool = False) -> None:
        """Blocks of what is trainable now; those that are as before keep their state."""
        own = self._own_groups()
        mine = [p for group in own for p in group["params"]]
        parts = self._division.divided(mine)
        if self.rest == "adamw" and parts.rest:
            raise ConfigurationError(
                f"the parameters {list(parts.rest)} lie outside every block; rest='adamw' is for those that were "
                "trainable when the optimizer was composed: give them an optimizer of their own"
            )
        blocks = unchanged(self._blocks, parts.blocks)
        where = places(blocks, self.param_groups)
        wanted = self._division.solvers(blocks, of_block("solver", where, self.param_groups), strict)
        kept = {block.name for block in blocks if any(block is other for other in self._blocks)}
        new = {name: solver for name, solver in wanted.items() if name not in kept}
        made = self._division.at_work(new, blocks)
        self.solvers = {name: self.solvers[name] if name in kept else made[name] for name in wanted}
        self.curvature = {name: self.curvature[name] if name in kept else BlockState() for name in wanted}
        self._asked = {name: self._asked[name] if name in kept else wanted[name] for name in wanted}
        self._wanted = wanted
        self._blocks, self._places = blocks, where
        # By the ids of parameters, which groups keep: a tensor is slow to hash.
        self._block_of = {id(p): block.name for block in blocks for p in block.parameters.values()}
        self._plain = set(map(id, parts.rest.values())) if self.rest == "sgd" else set()
        self._mine, self._trainable = mine, [p.requires_grad for p in mine]
        self._capture.watch(blocks)
        self._tell_forms()
        self._wanting = self._wanting & kept | frozenset(new)
        self._capture.armed = self._capture.armed or bool(self._wanting)
        if self._fused:
            self._untouched.watch(mine)

    def _tell_forms(self) -> None:
        """Say in which form rows are wanted."""
        # A look at fresh rows that may not be used should not cost their compact form.
        looks = self.refresh.tolerance is not None
        rows, solvers = self._capture.rows, self._wanted.items()
        rows.compacting = frozenset(name for name, solver in solvers if solver.keeps_rows and not looks)
        rows.held = frozenset(name for name, solver in solvers if solver.holds_rows)
        self._tell_whether_lasting()

    def _tell_whether_lasting(self) -> None:
        """Say whether states of the coming step are used in the one after it."""
        after = self.steps + 1
        renewed = self.refresh.due(after) and self.refresh.inverse_due(after) and self.refresh.tolerance is None
        self._capture.rows.lasting = not renewed

    def _read_solvers(self) -> None:
        """Take note of solvers that groups ask for by now; they begin with the next rows."""
        asked = self._said("solver")
        if [solver for solver in asked.values() if solver is not None] or self._wanted != self._asked:
            self._wanted = self._division.solvers(self._blocks, asked, strict=False)
            changed = {name for name, solver in self._wanted.items() if solver != self._asked[name]}
            self._wanting = self._wanting | changed
            self._capture.armed = self._capture.armed or bool(changed)
            self._tell_forms()

    def _notice_frozen(self) -> None:
        """Divide anew if parameters were frozen or unfrozen."""
        if [p.requires_grad for p in self._mine] != self._trainable:
            self._look()
            self._divide()

    def _look(self) -> None:
        """Look at a step whose checks were put off; here there is none."""

    def _before_pass(self) -> None:
        self._notice_frozen()
        self._read_solvers()
        # Whoever cleared the gradients, as model.zero_grad() does, threw away the passes that made them.
        if self._capture.waiting and not self._capture.handed_over() and all(p.grad is None for p in self._mine):
            self._capture.clear()

    def _adapts(self) -> bool:
        return self.damping.needs_loss and self.damping.adapts_at(self.steps)

    def _arm(self) -> None:
        self._capture.armed = self._due or self._adapts() or bool(self._wanting)
        self._tell_whether_lasting()

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs: buffers, estimates, inverses, ages, step and label source.

        `torch.load(weights_only=True)` reads it back. Where the checks of the last step are still on the device, they
        are looked at first, and raise what the step would have raised; it is undone then, and another call is good.
        """
        self._look()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, whole or not at all, on the devices and in the precision of the present.

        Learning rates, damping and the other numbers of groups are the saved ones, as for every optimizer of torch.

        Raises
        ------
        CurvatureError
            If it holds no curvature, that of other blocks, solvers or of another version, or is damaged.
        """
        with suppress(CurvatureError):  # a step that failed is undone, and then forgotten with the rest
            self._look()
        self._notice_frozen()
        found: list[Saved] = []

        def check(_: Any, state: dict[str, Any]) -> dict[str, Any]:
            found.append(read(state, self))
            groups = with_own(state["param_groups"], self.param_groups)
            return {**{key: value for key, value in state.items() if key != "curvature"}, "param_groups": groups}

        # After the pre-hooks of the user, which may change what is loaded, and before the post-hooks.
        last = self.register_load_state_dict_pre_hook(check)
        first = self.register_load_state_dict_post_hook(lambda _: self._restore(found[0]), prepend=True)
        try:
            super().load_state_dict(state_dict)
        except CurvatureError:
            raise
        except DAMAGED as error:  # torch's own words about groups, and about what is none
            raise ConfigurationError(
                f"this state cannot be used ({type(error).__name__}: {error}): it has to have the parameter groups of "
                "the optimizer, and to be whole"
            ) from error
        finally:
            last.remove()
            first.remove()

    def _restore(self, saved: Saved) -> None:
        self.curvature = saved.curvature
        self.steps = saved.steps
        if saved.generator is not None:
            self._generator.set_state(saved.generator)
        else:
            self._generator.manual_seed(self._seed + saved.steps)
        if saved.constant is not None and isinstance(self._damping, Constant):
            # Of groups that are added later; those that are there have theirs.
            self._damping = Constant(saved.constant)
            self.defaults["damping"] = saved.constant
        self.damping.restore(saved.damping)
        self._due, self._wanting = saved.due, saved.wanting
        self._capture.clear()
        if self._fused:
            recall(self._capture, saved.capture)
        self._arm()
        self._link()

    def _arguments(self) -> dict[str, Any]:
        """What would compose this optimizer again."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        groups = [
            {"params": [names[id(p)] for p in group["params"]], "solver": group["solver"]}
            for group in self._own_groups()
        ]
        return {
            "division": self._division,
            "damping": self.damping,
            "transforms": self.transforms,
            "lr": self.defaults["lr"],
            "groups": groups,
            "maximize": self.defaults["maximize"],
            "output": self.output,
            "seed": self._seed,
            "verify": self._verify,
            "fused": self._fused,
            "plan": self.plan,
            "deferred": self._deferred,
        }

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return revived, (type(self), self._arguments(), self.state_dict(), self._capture.detached)

    def _link(self) -> None:
        """Let the inner AdamW see the same groups and state, so that schedulers and checkpoints reach it."""
        if self._adamw is not None:
            self._adamw.param_groups = [group for group in self.param_groups if "rest" in group]
            self._adamw.state = self.state
