"""Compile variants of one Dynamo graph: one for each assignment of schemes that its weights turn out to have.

Reads decisions; runs the passes on a copy of the graph and gives the result to Inductor, while Dynamo traces or later,
at a call, under Dynamo's fake mode and with its symbolic sizes. Knows no planes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch.nn import Parameter

from quant_compile.ir.errors import GraphError, OptionError
from quant_compile.ir.family import Reject
from quant_compile.ir.graph import Ref, copy_graph, fake_mode_of, prepare_for_inductor
from quant_compile.lowering import collectives
from quant_compile.lowering.attention import choose_attention
from quant_compile.lowering.latent import choose_latent
from quant_compile.lowering.sides import without_guards
from quant_compile.lowering.target import Target
from quant_compile.lowering.weights import STORE
from quant_compile.model.ledger import Sessions
from quant_compile.options import Options, PolicySource
from quant_compile.passes import PIPELINE
from quant_compile.passes.plan import PassReport, Plan, SiteDecision
from quant_compile.runtime.decide import Choosers, Found, add_time
from quant_compile.runtime.progress import Choosing
from quant_compile.runtime.views import Views

Compile = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


@dataclass(frozen=True, eq=False)
class Variant:
    """The graph compiled for one assignment of schemes.

    Attributes:
        graph: what Inductor was given, and may have changed.
        lowered: the same before that.
        function: compiled.
        arguments: positions of Dynamo's arguments that it takes; ``refs``: the planes that come behind them.
        reports: of the passes.
        views: what it does at each product.
    """

    graph: fx.GraphModule
    lowered: fx.GraphModule
    function: Callable[..., Any]
    arguments: tuple[int, ...]
    refs: tuple[Ref, ...]
    reports: tuple[PassReport, ...]
    views: Views


class Variants:
    """The variants of one graph, compiled when they are first asked for."""

    def __init__(
        self,
        pristine: fx.GraphModule,
        found: Found,
        inputs: Sequence[Any],
        parameters: Mapping[int, Parameter],
        source: PolicySource,
        options: Options,
        compile_graph: Compile,
        choosers: Choosers,
        target: Target,
    ) -> None:
        self.pristine, self.found = pristine, found
        self.source, self.options, self.target = source, options, target
        self._compile, self._choosers = compile_graph, choosers
        # Dynamo passes Python floats as 0-d tensors whose value only the real tensor still has when it is traced again.
        self._scalars = {i: value for i, value in enumerate(inputs) if _is_scalar(value)}
        self._slots = frozenset(parameters)
        self._guards = 0
        self._made: dict[Any, Variant] = {}

    def traced(self) -> None:
        """Dynamo is done: later variants may rely on no other conditions on sizes than those that it checks now."""
        self._guards = _guard_count(self.pristine)

    def get(
        self,
        parameters: Mapping[int, Parameter],
        sessions: Sessions,
        decisions: Mapping[str, SiteDecision],
        late: bool,
        as_written: bool = False,
    ) -> Variant:
        """The variant for these decisions.

        Args:
            late: compiled at a call, not while Dynamo traces.
            as_written: attention stays as the model wrote it, whatever the options say.
        """
        specs = tuple(tuple(p.scheme.spec if p.scheme else None for p in d.parts) for d in decisions.values())
        classes, factors = self._scale_classes(parameters, decisions), self._factor_classes(parameters, decisions)
        fuse, request = self.source.policy.fuse, self.options.request(self.source.policy)
        alike = tuple(tuple(sorted(shared.items())) for shared in (classes, factors))
        attends = self.options.attends(self.source.policy) and not as_written
        key = (specs, alike, fuse, self.source.policy.all_reduce, request, attends)
        found = self._made.get(key)
        if found is None:
            found = self._build(decisions, classes, factors, sessions, late, attends)
            self._made[key] = found
        return found

    def _scale_classes(
        self, parameters: Mapping[int, Parameter], decisions: Mapping[str, SiteDecision]
    ) -> dict[int, int]:
        """Slots of static sites -> the first slot with the same scale: only those may share a quantization."""
        first: dict[float, int] = {}
        classes: dict[int, int] = {}
        for slot, decision in self.found.decided(decisions):
            scheme = decision.scheme
            if scheme is not None and scheme.static:
                scale = STORE.entry(parameters[slot]).input_scale
                classes[slot] = first.setdefault(float(scale) if scale is not None else 0.0, slot)
        return classes

    def _factor_classes(
        self, parameters: Mapping[int, Parameter], decisions: Mapping[str, SiteDecision]
    ) -> dict[int, int]:
        """Slots of weights whose inputs have factors -> the first slot with the same: these share a multiplication."""
        first: dict[str, int] = {}
        classes: dict[int, int] = {}
        for slot, decision in self.found.decided(decisions):
            factor = STORE.entry(parameters[slot]).rounding.factor
            if decision.scheme is not None and factor is not None:
                classes[slot] = first.setdefault(factor.name, slot)
        return classes

    def _build(
        self,
        decisions: Mapping[str, SiteDecision],
        classes: dict[int, int],
        factors: dict[int, int],
        sessions: Sessions,
        late: bool,
        attends: bool,
    ) -> Variant:
        gm = copy_graph(self.pristine)
        found = self.found.moved(dict(zip(self.pristine.graph.nodes, gm.graph.nodes, strict=True)))
        fuse = self.source.policy.fuse
        choosing = Choosing(len(found.linears) + len(found.blocks) + len(found.batched))
        plan = Plan(
            found.linears,
            decisions,
            _timed(sessions, self._choosers.linear, choosing),
            self._slots.__contains__,
            classes,
            fuse.share_quant,
            fuse.merge_siblings,
            found.blocks,
            found.batched,
            _timed(sessions, self._choosers.moe, choosing),
            _timed(sessions, self._choosers.rows, choosing),
            # A kernel takes a norm's eps as a number. Dynamo makes one of a float that is an input, but not once it is done.
            None if late and self._scalars else self.target,
            found.attention,
            found.attention_misses,
            (lambda problem, rows: choose_attention(problem, self.target, rows)) if attends else None,
            partial(choose_latent, target=self.target) if attends else None,
            factor_class=factors,
            sums=self._sums(),
            coded=None if self.options.verifies(self.source.policy) else self.source.policy.all_reduce,
        )
        with choosing, without_guards() if late else nullcontext():
            gm, reports = _rewritten(gm, plan, sessions)
        prepare_for_inductor(gm)
        placeholders = gm.graph.find_nodes(op="placeholder")
        arguments = tuple(node.meta["argument"] for node in placeholders if "plane" not in node.meta)
        refs = tuple(node.meta["plane"] for node in placeholders if "plane" in node.meta)
        lowered = copy_graph(gm)
        views = Views(self.pristine.graph, self.found, decisions, lowered.graph, reports, self.target, self._level())
        started = time.perf_counter()
        scalars = {} if late else self._scalars
        inputs = [scalars.get(node.meta.get("argument"), node.meta["example_value"]) for node in placeholders]
        function = self._compile_late(gm, inputs) if late else self._compile(gm, inputs)
        add_time(sessions, "inductor", time.perf_counter() - started)
        return Variant(gm, lowered, function, arguments, refs, tuple(reports), views)

    def _sums(self) -> Callable[[Tensor, str], Reject | None] | None:
        """Which sums over ranks are one kernel, or why none is."""
        policy = self.source.policy
        if self.options.verifies(policy) and (policy.fuse.all_reduce or policy.all_reduce):
            return lambda part, group: Reject("`verify` replays products, and leaves sums over ranks as they are")
        return collectives.fits if policy.fuse.all_reduce else None

    def _level(self) -> str:
        """Of the tuner."""
        return self.options.request(self.source.policy).tune

    def _compile_late(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile at call time, under Dynamo's fake mode, so that dynamic sizes stay dynamic."""
        mode = fake_mode_of(gm.graph)
        # Without no_grad, inference_mode(False) would turn gradients on and AOTAutograd would trace a backward.
        with (
            torch.inference_mode(torch.is_inference_mode_enabled()),
            torch.no_grad(),
            tracing(TracingContext(mode)),
            without_guards(),
        ):
            function = self._compile(gm, inputs)
        if mode.shape_env and len(mode.shape_env.guards) > self._guards:
            fresh = list(mode.shape_env.guards[self._guards :])
            raise OptionError(
                "this policy gives a layer that shares its graph another scheme, and compiling that scheme put new conditions on "
                f"sizes that the shared graph does not check: {', '.join(str(g.expr) for g in fresh)}.\n"
                "Fix: compile the whole model instead of single layers, or mark the sizes static (dynamic=False)."
            )
        return function


def _rewritten(gm: fx.GraphModule, plan: Plan, sessions: Sessions) -> tuple[fx.GraphModule, list[PassReport]]:
    """The graph after all passes, and what they report."""
    reports: list[PassReport] = []
    for one_pass in PIPELINE:
        started, selecting = time.perf_counter(), sessions.seconds("selection")
        gm, report = one_pass(gm, plan)
        reports.append(report)
        selection = sessions.seconds("selection") - selecting
        add_time(sessions, f"passes.{report.name}", time.perf_counter() - started - selection)
    return gm, reports


def _timed(sessions: Sessions, choose: Callable[[Any, str], Any], choosing: Choosing) -> Callable[[Any, str], Any]:
    def timed(problem: Any, name: str) -> Any:
        started = time.perf_counter()
        choosing.begins()
        try:
            return choose(problem, name)
        finally:
            choosing.ends()
            add_time(sessions, "selection", time.perf_counter() - started)

    return timed


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and not isinstance(value, Parameter)


def _guard_count(gm: fx.GraphModule) -> int:
    """Conditions on sizes that Dynamo knows of when it finishes a graph, and so checks at each call."""
    try:
        env = fake_mode_of(gm.graph).shape_env
    except GraphError:
        return 0
    return len(env.guards) if env else 0
