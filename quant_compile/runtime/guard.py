"""``guard: never_slower``: which sites of one graph stay in 16 bits, since their quantized chain is measured to be slower there.

Reads a graph's sites, the decisions made for them and measured times; gives the decisions of kept sites anew and writes notes.
Sites that read one input under one scheme are decided together, as they share a quantization and are merged. A site in 16
bits needs its original, so nothing is kept where originals are released.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.nn import Parameter
from torch.nn import functional as F

from quant_compile.ir.batched import BatchedSite
from quant_compile.ir.experts import MoeSite
from quant_compile.ir.family import Reject, family_of
from quant_compile.ir.graph import is_view
from quant_compile.ir.scheme import Scheme
from quant_compile.ir.sites import MIX_METHODS, MIXES, LinearSite
from quant_compile.lowering.guard import Chain, Plain, Quantize, Rows, Verdict
from quant_compile.lowering.registry import Problem
from quant_compile.lowering.sides import beyond, without_guards
from quant_compile.lowering.weights import STORE
from quant_compile.model.ledger import Sessions
from quant_compile.options import Options, PolicySource
from quant_compile.passes.plan import SiteDecision

Compare = Callable[[Chain, Rows, str], "Verdict | Reject"]
"""(chain, m, name) -> both times, or why they are not known."""

RELEASES = "originals are released (release_weights), and a linear in 16 bits needs its own"
NOT_EXPERTS = "guard: experts are not covered"
# What Inductor makes one kernel of with the quantization behind it.
FUSED: set[Any] = {*MIXES, F.silu, F.gelu, F.relu, F.layer_norm, F.rms_norm, F.dropout}
LOOKS = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"}
FUSED_METHODS = {*MIX_METHODS, "to", "type", "type_as"}


def uncompared(chain: Chain, rows: Rows, name: str) -> Reject:
    """For plans: nothing is measured."""
    return Reject("nothing is measured here")


@dataclass(frozen=True, eq=False)
class _Group:
    """Sites of one input and scheme."""

    sites: tuple[LinearSite, ...]
    chain: Chain


class Guard:
    """The guard of one graph."""

    def __init__(
        self,
        linears: Sequence[LinearSite],
        experts: Sequence[MoeSite | BatchedSite],
        source: PolicySource,
        options: Options,
        compare: Compare,
    ) -> None:
        self.linears, self.experts, self.source, self.options = linears, experts, source, options
        self._compare = compare
        # What Dynamo checks of symbols; asked while it traces, since it can take on no check later.
        self._sides: dict[str, bool | None] = {}
        self._verdicts: dict[tuple[Chain, Rows], Verdict | Reject] = {}
        self._generation = source.generation

    @property
    def asked(self) -> bool:
        """Whether the options or the policy ask for it."""
        return self.options.guards(self.source.policy)

    def applied(
        self, decisions: Mapping[str, SiteDecision], parameters: Mapping[int, Parameter], sessions: Sessions, late: bool
    ) -> dict[str, SiteDecision]:
        """The decisions, with those sites kept whose chain loses at the graph's m.

        Args:
            late: at a call, when Dynamo is done with the graph.
        """
        out = dict(decisions)
        if not self.asked:
            return out
        if self.options.releases(self.source.policy):
            sessions.note(f"guard: never_slower is not applied: {RELEASES}")
            return out
        if self._generation != self.source.generation:
            self._generation = self.source.generation
            self._verdicts.clear()
        with without_guards() if late else nullcontext():
            for group in self._groups(decisions, parameters):
                verdict = self._verdict(group, decisions, parameters)
                for site in group.sites:
                    out[site.node.name] = _decided(decisions[site.node.name], verdict, sessions)
        for site in self.experts:
            first, second = (replace(d, reason=f"{d.reason}; {NOT_EXPERTS}") for d in decisions[site.node.name].parts)
            if first.scheme is not None:
                out[site.node.name] = replace(first, second=second)
        return out

    def products(
        self, decisions: Mapping[str, SiteDecision], parameters: Mapping[int, Parameter]
    ) -> dict[Problem, int | None]:
        """The linears of the graph as kernels will see them, and m: of a size that is a symbol, the one it was traced with."""
        groups = self._groups(decisions, parameters)
        return {problem: _hint(_rows(group.sites[0])) for group in groups for problem in group.chain.products}

    def _verdict(
        self, group: _Group, decisions: Mapping[str, SiteDecision], parameters: Mapping[int, Parameter]
    ) -> Verdict | Reject | None:
        """What was measured for a group; None where the graph runs no rows."""
        entries = [STORE.peek(parameters[site.slot]) for site in group.sites]
        if any(entry is not None and entry.released for entry in entries):
            return Reject("its original, or that of a linear of the same input, is released")
        m = _rows(group.sites[0])
        names = " + ".join(decisions[site.node.name].name for site in group.sites)
        if isinstance(m, int):
            return self._compared(group.chain, Rows(m), names) if m else None
        both = [self._compared(group.chain, Rows(None, many), names) for many in (False, True)]
        keeps = [isinstance(answer, Verdict) and answer.keeps for answer in both]
        if keeps[0] == keeps[1]:
            return both[0]
        side = self._side(group.sites[0], m)
        return Reject("the graph serves every m, and bf16 is faster at some only") if side is None else both[side]

    def _side(self, site: LinearSite, m: Any) -> bool | None:
        """Whether m is above SPLIT in this graph: the first answer is one that Dynamo checks at each call."""
        if self._sides.get(site.node.name) is None:
            self._sides[site.node.name] = beyond(m)
        return self._sides[site.node.name]

    def _compared(self, chain: Chain, rows: Rows, names: str) -> Verdict | Reject:
        key = (chain, rows)
        if key not in self._verdicts:
            self._verdicts[key] = self._compare(chain, rows, names)
        return self._verdicts[key]

    def _groups(self, decisions: Mapping[str, SiteDecision], parameters: Mapping[int, Parameter]) -> Iterable[_Group]:
        groups: dict[Any, list[LinearSite]] = {}
        for site in self.linears:
            scheme = decisions[site.node.name].scheme
            if scheme is not None:
                scale = STORE.entry(parameters[site.slot]).input_scale if scheme.static else None
                key = (site.x, site.before, scheme, site.dtype, None if scale is None else float(scale))
                groups.setdefault(key, []).append(site)
        for key, sites in groups.items():
            yield _Group(tuple(sites), self._chain(sites, key[2]))

    def _chain(self, sites: Sequence[LinearSite], scheme: Scheme) -> Chain:
        first, fuse = sites[0], self.source.policy.fuse
        plain = tuple(Plain(site.n, site.k, site.dtype, site.bias is not None) for site in sites)
        block = family_of(scheme).row_block(scheme)
        apart = len({site.slot for site in sites}) < len(sites) or any(site.n % block for site in sites[:-1])
        if len(sites) > 1 and fuse.merge_siblings and not apart:
            biased = any(site.bias is not None for site in sites)
            rows = sum(site.n for site in sites)
            products = (Problem(scheme, rows, first.k, first.dtype, biased, len(sites)),)
        else:
            products = tuple(Problem(scheme, s.n, s.k, s.dtype, s.bias is not None) for s in sites)
        quantize = None
        if scheme.input_activations is not None:
            quantize = Quantize(scheme, first.k, first.dtype, _is_fused(first.x))
        return Chain(plain, products, quantize)


def _decided(decision: SiteDecision, verdict: Verdict | Reject | None, sessions: Sessions) -> SiteDecision:
    if isinstance(verdict, Reject):
        sessions.note(f"guard: never_slower is not applied to some linears: {verdict.reason}")
        return replace(decision, reason=f"{decision.reason}; guard: not applied, {verdict.reason}")
    if verdict is None or not verdict.keeps:
        return decision
    return replace(decision, scheme=None, guard=verdict.text, instead=decision.scheme)


def _rows(site: LinearSite) -> Any:
    """m of a site: a number, or a symbol."""
    shape = site.x.meta["example_value"].shape
    return math.prod(shape) // site.k if site.before else math.prod(shape[:-1])


def _hint(m: Any) -> int | None:
    """What a size is, or was when it became a symbol."""
    found = m if isinstance(m, int) else getattr(getattr(m, "node", None), "hint", None)
    return found if isinstance(found, int) else None


def _is_fused(x: fx.Node) -> bool:
    """Whether Inductor makes the input and quantizes it in one kernel: a norm, an activation or a sum comes before."""
    while is_view(x) or (x.op == "call_method" and x.target in LOOKS):
        x = x.all_input_nodes[0]
    if x.op == "call_method":
        return x.target in FUSED_METHODS
    return x.op == "call_function" and x.target in FUSED
