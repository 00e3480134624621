"""What the backend would do with a model, without compiling or needing weights: graphs before and after, and the ledger.

Dynamo traces the model (on the meta device if its weights are there); the pipeline runs; Inductor does not. A fake target
shows what another GPU would get.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn import Parameter

from quant_compile.ir.family import PlaneSpec
from quant_compile.ir.graph import fill_examples, lines
from quant_compile.ir.moe import MoeProblem
from quant_compile.ir.report import Report, WeightLine
from quant_compile.lowering.moe import MoeDispatch, choose_moe, moe_fits, planes_of, serves
from quant_compile.lowering.registry import Problem, layouts
from quant_compile.lowering.select import Dispatch, choose, fits
from quant_compile.lowering.target import Target, default_policy
from quant_compile.model import names as naming
from quant_compile.model.ledger import LEDGER
from quant_compile.model.places import unwrap
from quant_compile.options import Options, PolicySource
from quant_compile.passes.plan import dispatches_of
from quant_compile.runtime import Choosers, GraphRunner


@dataclass(frozen=True)
class Explanation:
    """What would happen to a model.

    Attributes:
        before: Dynamo's graphs, one line a node.
        after: the rewritten graphs.
        report: the planned ledger.
        rejections: for each distinct problem, kernel -> why it does not serve m = 1 (or its estimated cost).
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    report: Report
    rejections: Mapping[str, Mapping[str, float | str]]


def explain(
    model: nn.Module,
    example: Mapping[str, Any],
    policy: Any = None,
    target: Target | None = None,
    dynamic: bool | None = None,
) -> Explanation:
    """Plan a model on example inputs; nothing is compiled or packed.

    Args:
        model: the model, with weights or on the meta device.
        example: keyword arguments of one call.
        policy: as in ``quant_compile.compile``.
        target: a real or fake target; None: the model's device.
        dynamic: as in torch.compile.
    """
    model = unwrap(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    chosen = target or Target.of("cpu" if device.type == "meta" else device)
    source = PolicySource(policy, default_policy(chosen))
    collector = _Collector(source, chosen)
    naming.register(model)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=collector, dynamic=dynamic)(**example)
    torch._dynamo.reset()
    return collector.explanation(model)


def _uncompiled(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    return gm.forward


class _Collector:
    """A Dynamo backend that plans and runs the original graph."""

    def __init__(self, source: PolicySource, target: Target) -> None:
        self.source, self.target, self.options = source, target, Options(tune="off")
        self.before: list[str] = []
        self.after: list[str] = []
        self.planned: dict[int, tuple[Dispatch | MoeDispatch, int]] = {}
        self.rejections: dict[str, Mapping[str, float | str]] = {}

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        request = self.options.request(self.source.policy)
        choosers = Choosers(
            self._pick,
            self._pick_moe,
            lambda problem, name: self._pick(problem, name, "rows"),
            lambda problem: serves(problem, self.target, request.unpinned),
        )
        runner = GraphRunner(gm, inputs, self.source, self.options, _uncompiled, choosers, self.target)
        variant = runner.prepare()
        self.before += ["graph:", *lines(runner.pristine)]
        fill_examples(variant.graph.graph)
        self.after += ["graph:", *lines(variant.graph)]
        dispatches = dispatches_of(variant.reports)
        for site in runner.found.linears:
            if site.slot in dispatches:
                self._plan(inputs[site.slot], dispatches[site.slot], site.n)
        for site in runner.found.batched:
            if site.slot in dispatches:
                self._plan(inputs[site.slot], dispatches[site.slot], site.n, site.experts)
        for block in runner.found.blocks:
            dispatch = dispatches.get(block.slots[0])
            if isinstance(dispatch, MoeDispatch):
                planes = planes_of(dispatch.layout, dispatch.problem)
                for slot, half, own in zip(block.slots, dispatch.problem.halves, planes, strict=True):
                    self._note(inputs[slot], replace(dispatch, problem=half), own)
        return gm.forward

    def _pick(self, problem: Problem, name: str, only: str | None = None) -> Dispatch:
        request = self.options.request(self.source.policy)
        words = f"{problem.spec} n={problem.n} k={problem.k}"
        self.rejections.setdefault(words, fits(problem, self.target, request, 1))
        return choose(problem, self.target, request, name, only=only)

    def _pick_moe(self, problem: MoeProblem, name: str) -> MoeDispatch:
        request = self.options.request(self.source.policy)
        sizes = f"{problem.experts} experts, hidden {problem.hidden}, intermediate {problem.intermediate}"
        self.rejections.setdefault(f"{problem.spec}, {sizes}", moe_fits(problem, self.target, request, 1))
        return choose_moe(problem, self.target, request, name)

    def _plan(self, parameter: Any, dispatch: Dispatch | MoeDispatch, n: int, times: int = 1) -> None:
        """Note what would run a linear of n rows, which may be merged with others."""
        if isinstance(dispatch, Dispatch):
            planes = layouts()[dispatch.layout].planes(replace(dispatch.problem, n=n))
            self._note(parameter, dispatch, planes, times)

    def _note(
        self, parameter: Any, dispatch: Dispatch | MoeDispatch, planes: Sequence[PlaneSpec], times: int = 1
    ) -> None:
        """Note what would run a weight, and its packed bytes."""
        if isinstance(parameter, Parameter):
            self.planned[id(parameter)] = (dispatch, times * sum(plane.nbytes for plane in planes))

    def explanation(self, model: nn.Module) -> Explanation:
        """All that was collected."""
        ledger = LEDGER.report(model)
        planned = tuple(
            self._line(line, parameter) for line, parameter in zip(ledger.lines, model.parameters(), strict=True)
        )
        report = replace(ledger, lines=planned, target=self.target.label, policy=self.source.policy.name)
        return Explanation(tuple(self.before), tuple(self.after), report, self.rejections)

    def _line(self, line: WeightLine, parameter: Parameter) -> WeightLine:
        found = self.planned.get(id(parameter))
        if found is None:
            return line
        dispatch, size = found
        record = LEDGER.peek(parameter)
        reason = record.reason if record is not None else line.reason
        return replace(
            line,
            scheme=dispatch.problem.scheme.spec,
            layout=dispatch.layout,
            kernels=dispatch.ranges,
            bytes_after=size,
            named=True,
            reason=reason,
        )
