"""What a user's policy and the device make of a checkpoint's weights: a scheme for those in 16 bits, another for those that are quantized.

Reads names and sizes of the model, the policy and what kernels answer; touches no tensor. Of a policy's fallbacks only ``fp8`` is met here,
since it needs other codes; under ``weight_only`` codes stay, and graphs tell what they serve as.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import nn

from quant_compile.checkpoints.names import Slot
from quant_compile.ir.errors import NoKernelError
from quant_compile.ir.moe import Activation, MoeProblem, spec_of
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.moe import serves
from quant_compile.lowering.registry import Problem
from quant_compile.lowering.rounding.recipe import TO_NEAREST, Rounding
from quant_compile.lowering.select import FALLBACKS, Request, choose, fallback_of
from quant_compile.lowering.target import Target
from quant_compile.model.plan import Plan, PlanEntry
from quant_compile.model.weights import Weight, linear_weights
from quant_compile.options import PolicySource
from quant_compile.policy import Policy
from quant_compile.rules import Decision

ProblemOf = Callable[[Scheme], Problem | MoeProblem]
_T = TypeVar("_T")
LOOKED_UP = "rows are looked up in it (embedding), which is done in values"
_WITHOUT = " for experts without a gate"


@dataclass(frozen=True)
class Again:
    """What a weight becomes that the checkpoint has quantized otherwise.

    Attributes:
        scheme: None: values.
        by_policy: a rule or the default says so, and not what the device has kernels for.
        reason: in words.
    """

    scheme: Scheme | None
    by_policy: bool
    reason: str


@dataclass(frozen=True)
class Wishes:
    """Answers for every weight.

    Attributes:
        decisions: of the user's policy, by name; weights that an embedding reads have none.
        problems: of linears and of experts, by name.
        fallback: of the policy.
        target: that the model will run on; None: any that has all kernels.
        request: pins and permissions.
        source: what knows how planes are made of values.
    """

    decisions: Mapping[str, Decision] = field(default_factory=dict[str, Decision])
    problems: Mapping[str, ProblemOf] = field(default_factory=dict[str, ProblemOf])
    fallback: str | None = None
    target: Target | None = None
    request: Request = field(default_factory=Request)
    source: PolicySource | None = None
    _known: dict[Problem | MoeProblem, bool] = field(default_factory=dict[Problem | MoeProblem, bool])

    @staticmethod
    def of(model: nn.Module, given: Policy | None, fallback: str | None, target: Target, request: Request) -> Wishes:
        """Those of a policy (None: of none) for a model on a device."""
        weights = linear_weights(model)
        embedded = {weight.site.names for weight in weights if weight.in_embedding}
        entries = Plan.of(given, model).entries if given is not None else ()
        decisions = {n: e.decision for e in entries if e.names not in embedded for n in e.names}
        source = None if given is None else PolicySource(given, "")
        wishes = Wishes(decisions, _problems(weights), fallback, target, request, source)
        return replace(wishes, decisions={**decisions, **wishes._kept(entries)})

    def rounding(self, slot: Slot) -> Rounding:
        """How planes of a weight are made of its values."""
        names = (name.removesuffix(".weight") for name in slot.names)
        return TO_NEAREST if self.source is None else self.source.rounding(names)

    def plain(self, slot: Slot) -> Scheme | None:
        """The scheme of a weight that the checkpoint has in 16 bits; None: it stays so."""
        decision = _found(self.decisions, slot)
        return None if decision is None or decision.scheme is None else self._served(slot, decision.scheme)

    def again(self, slot: Slot, scheme: Scheme | None) -> Again | None:
        """What a quantized weight becomes instead of ``scheme`` (None: of values, since no scheme takes its form)."""
        if scheme is not None and any(isinstance(module, nn.Embedding) for module, _ in slot.places):
            return Again(None, False, LOOKED_UP)
        decision = _found(self.decisions, slot)
        if decision is not None and decision.requantize and not decision.refused and decision.origin != "convention":
            wanted = None if decision.scheme is None else self._served(slot, decision.scheme)
            return None if wanted == scheme else Again(wanted, True, decision.reason)
        served = None if scheme is None else self._served(slot, scheme)
        if scheme is None or served == scheme:
            return None
        where = self.target.label if self.target is not None else "this device"
        way = "" if served is None else f"{served.spec} by fallback {self.fallback}: "
        return Again(served, False, f"{way}no kernel on {where} multiplies {scheme.spec}{_WITHOUT * (served is None)}")

    def serving(self, name: str, scheme: Scheme) -> Scheme:
        """What a weight of this scheme will run as on the device: the scheme, or what a fallback that leaves its codes makes of it.

        Raises:
            NoKernelError: nothing serves a linear; names the fallbacks that would do. Of experts, their graph knows more.
        """
        make = self.problems.get(name.removesuffix(".weight"))
        if make is None or self.target is None or self._serves(make(scheme)):
            return scheme
        others = {way: other for way in FALLBACKS if (other := fallback_of(scheme, way)) is not None}
        ways = {way: other for way, other in others.items() if self._serves(make(other))}
        if self.fallback in ways:
            return ways[self.fallback]
        problem = make(scheme)
        try:
            if isinstance(problem, Problem):
                choose(problem, self.target, self.request, name)
        except NoKernelError as error:
            texts = [f'fallback="{way}" of load serves it as {other.spec} here' for way, other in ways.items()]
            texts.append("a rule of a policy with `requantize: true` gives it another scheme.")
            raise NoKernelError(error.problem, error.reasons, "; ".join(texts)) from None
        return scheme

    def unserved(self, up: str, first: Scheme, second: Scheme) -> str:
        """Why the device cannot multiply a block of two schemes, of its first weight, which is called ``up``, and its second; or empty."""
        make = self.problems.get(up.removesuffix(".weight"))
        problem = make(first) if make is not None else None
        if not isinstance(problem, MoeProblem) or self._serves(replace(problem, scheme2=second)):
            return ""
        where = self.target.label if self.target is not None else "this device"
        return f"no kernel on {where} multiplies experts of two types under {spec_of((first, second))}"

    def _kept(self, entries: Iterable[PlanEntry]) -> dict[str, Decision]:
        """By name, decisions of blocks whose two schemes have no kernel together: their graph will keep them."""
        blocks: dict[str, list[PlanEntry]] = {}
        for entry in entries:
            if entry.block and entry.decision.scheme is not None:
                blocks.setdefault(entry.block, []).append(entry)
        out: dict[str, Decision] = {}
        for pair in blocks.values():
            up, down = sorted((pair[0], pair[-1]), key=lambda entry: "down" in entry.names[0].rpartition(".")[2])
            if up.decision.scheme is None or down.decision.scheme is None:
                continue
            reason = self.unserved(up.names[0], up.decision.scheme, down.decision.scheme)
            for entry in pair if reason else ():
                kept = replace(entry.decision, scheme=None, reason=reason, refused=True)
                out |= dict.fromkeys(entry.names, kept)
        return out

    def _served(self, slot: Slot, scheme: Scheme) -> Scheme | None:
        """The scheme, or what the fallback makes of its weights where only that has kernels.

        None for experts without a gate that nothing serves: in 16 bits they run as the model's own code.
        """
        make = _found(self.problems, slot)
        if make is None or self._serves(make(scheme)):
            return scheme
        other = fallback_of(scheme, self.fallback)
        if other is not None and self._serves(make(other)):
            return other if self.fallback == "fp8" else scheme
        problem = make(scheme)
        return scheme if isinstance(problem, Problem) or problem.activation.gated else None

    def _serves(self, problem: Problem | MoeProblem) -> bool:
        if self.target is None:
            return True
        if problem not in self._known:
            self._known[problem] = serves(problem, self.target, self.request)
        return self._known[problem]


def _found(by_name: Mapping[str, _T], slot: Slot) -> _T | None:
    return next((by_name[name] for full in slot.names if (name := full.removesuffix(".weight")) in by_name), None)


def _problems(weights: list[Weight]) -> dict[str, ProblemOf]:
    out: dict[str, ProblemOf] = {}
    blocks: dict[str, list[Weight]] = {}
    for weight in weights:
        if weight.site.kind == "linear":
            out |= dict.fromkeys(weight.site.names, _linear_problem(weight))
        else:
            blocks.setdefault(weight.site.blocks[0], []).append(weight)
    for pair in blocks.values():
        made = _block_problem(pair) if len(pair) == 2 else None
        if made is not None:
            out |= dict.fromkeys([name for weight in pair for name in weight.site.names], made)
    return out


def _linear_problem(weight: Weight) -> ProblemOf:
    n, k, dtype = weight.site.n, weight.site.k, weight.parameter.dtype
    return lambda scheme: Problem(scheme, n, k, dtype, weight.has_bias)


def _block_problem(pair: list[Weight]) -> ProblemOf | None:
    """Of a block, by sizes alone: which activation and how many experts a token has, a graph tells later."""
    down = next((w for w in pair if "down" in w.site.names[0].rpartition(".")[2]), pair[1])
    up = pair[0] if down is pair[1] else pair[1]
    hidden, inner = up.site.k, down.site.k
    if down.site.n != hidden or up.site.n not in (inner, 2 * inner):
        return None
    gated = up.site.n == 2 * inner
    activation = Activation("silu" if gated else "relu2", gated=gated)
    count, dtype = up.parameter.shape[0], up.parameter.dtype
    return lambda scheme: MoeProblem(scheme, count, hidden, inner, min(2, count), activation, dtype, up.has_bias)
