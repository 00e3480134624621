"""What becomes of each site of one graph: the policy's decision, whether the device serves it, and what the ledger hears of it.

Reads the graph's sites, the Parameters of a call and the policy; writes decisions, misses and notes to the ledger, and
calibrated input scales to the store. Compiles and packs nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import fx
from torch.nn import Parameter

from quant_compile.ir.account import Read, Use, account
from quant_compile.ir.attention import AttentionMiss, AttentionSite, find_attention
from quant_compile.ir.batched import BatchedSite, find_batched
from quant_compile.ir.errors import MissingScalesError, PolicyError, PolicyWarning
from quant_compile.ir.experts import MoeMiss, MoeSite, find_experts
from quant_compile.ir.moe import MoeProblem, may_differ
from quant_compile.ir.numerics import dtype_name
from quant_compile.ir.routers import routers
from quant_compile.ir.scheme import Scheme
from quant_compile.ir.sites import LinearSite, Miss, find_sites
from quant_compile.ir.subclasses import of_subclasses
from quant_compile.ir.transforms import transformed
from quant_compile.ir.writes import Writes
from quant_compile.lowering.moe import MoeDispatch
from quant_compile.lowering.registry import Problem
from quant_compile.lowering.select import Dispatch, fallback_of
from quant_compile.lowering.shards import refusal, whole_shape
from quant_compile.lowering.target import Target
from quant_compile.lowering.weights import STORE
from quant_compile.model.ledger import LEDGER, Session, Sessions
from quant_compile.model.names import Names, Owners
from quant_compile.model.weights import expert_site, linear_weights
from quant_compile.options import Options, PolicySource
from quant_compile.passes.plan import SiteDecision
from quant_compile.rules import ROUTER, TWO_SCHEMES, Decision, SiteInfo, one_refuses, strict_error
from quant_compile.runtime.guard import Compare, Guard, uncompared
from quant_compile.runtime.merges import notice

FACTOR_INSIDE = (
    "the policy's planes belong to inputs with factors, and these inputs are made inside of the experts' kernels"
)
SLICED_OUTSIDE = "a slice of the weight is taken outside of the compiled graph that multiplies by it"


@dataclass(frozen=True)
class Choosers:
    """How kernels are chosen: ``(problem, name) -> dispatch`` for linears, expert blocks, and products over row-form planes.

    ``serves`` tells, without measuring, whether a device has kernels for a linear or a block; ``compare`` what 16 bits and a
    quantized chain are measured to take. ``ahead`` is told at first which products a graph will have, each with its m where that is
    known.
    """

    linear: Callable[[Problem, str], Dispatch]
    moe: Callable[[MoeProblem, str], MoeDispatch]
    rows: Callable[[Problem, str], Dispatch]
    serves: Callable[[Problem | MoeProblem], bool]
    compare: Compare = uncompared
    ahead: Callable[[Mapping[Problem, int | None]], None] = lambda problems: None


@dataclass(frozen=True, eq=False)
class Found:
    """All that one graph has: blocks, products with all experts, linears, and what is none of them, with the reason; attention."""

    blocks: tuple[MoeSite, ...]
    batched: tuple[BatchedSite, ...]
    linears: tuple[LinearSite, ...]
    misses: tuple[Miss | MoeMiss, ...]
    reads: tuple[Read, ...] = ()
    routers: frozenset[int] = frozenset()
    attention: tuple[AttentionSite, ...] = ()
    attention_misses: tuple[AttentionMiss, ...] = ()

    @staticmethod
    def of(gm: fx.GraphModule, parameters: Mapping[int, Any]) -> Found:
        """Look through a copied Dynamo graph."""
        writes = Writes(gm.graph)
        blocks, unknown = find_experts(gm, parameters, writes=writes)
        taken = {node for block in blocks for node in block.nodes}
        batched = find_batched(gm, parameters, taken, writes)
        taken |= {site.node for site in batched}
        linears, misses = find_sites(gm, parameters, taken, writes)
        done = {site.slot for site in (*batched, *linears)}
        unknown = [miss for miss in unknown if not done.issuperset(miss.slots)]
        explained = {slot for miss in unknown for slot in miss.slots}
        misses = [miss for miss in misses if not explained.issuperset(miss.slots)]
        sites = [(site.node, site.slot) for site in (*linears, *batched)]
        inside = taken - {site.node for site in batched}
        reads = account(gm, parameters, sites, inside, {slot for block in blocks for slot in block.slots})
        said = {slot for miss in (*misses, *unknown) for slot in miss.slots}
        misses += [Miss(r.node, (r.slot,), r.reason) for r in reads if r.use.multiplies and r.slot not in said]
        others = tuple(read for read in reads if not read.use.multiplies)
        gates = routers(gm, linears, misses)
        attention, unlike = find_attention(gm, inside)
        everything = Found(
            tuple(blocks), tuple(batched), tuple(linears), (*misses, *unknown), others, gates, tuple(attention), tuple(unlike)
        )  # fmt: skip
        return everything.outside_of(transformed(gm.graph) | of_subclasses(gm.graph, parameters))

    def moved(self, copies: Mapping[fx.Node, fx.Node]) -> Found:
        """The same in a copy of the graph: node -> its copy."""
        return cast(Found, _moved(self, copies))

    def outside_of(self, reasons: Mapping[fx.Node, str]) -> Found:
        """What is left where nodes must stay as they are, for ``reasons``; sites there are misses."""
        if not reasons:
            return self
        missed = [Miss(block.node, block.slots, _reason_in(block.nodes, reasons)) for block in self.blocks]
        missed += [Miss(site.node, (site.slot,), reasons.get(site.node, "")) for site in (*self.batched, *self.linears)]
        return replace(
            self,
            blocks=tuple(block for block in self.blocks if not _reason_in(block.nodes, reasons)),
            batched=tuple(site for site in self.batched if site.node not in reasons),
            linears=tuple(site for site in self.linears if site.node not in reasons),
            misses=(*self.misses, *(miss for miss in missed if miss.reason)),
            attention=tuple(site for site in self.attention if not _reason_in(site.nodes, reasons)),
            attention_misses=(
                *self.attention_misses,
                *(AttentionMiss(s.node, why) for s in self.attention if (why := _reason_in(s.nodes, reasons))),
            ),
        )

    def decided(self, decisions: Mapping[str, SiteDecision]) -> list[tuple[int, SiteDecision]]:
        """(slot, decision) of every weight that a site multiplies by."""
        single = [(site.slot, decisions[site.node.name]) for site in (*self.linears, *self.batched)]
        blocks = [zip(block.slots, decisions[block.node.name].parts, strict=True) for block in self.blocks]
        return single + [part for parts in blocks for part in parts]

    @property
    def read(self) -> list[int]:
        """The slot of every weight that a site multiplies by."""
        single = [site.slot for site in (*self.linears, *self.batched)]
        return single + [slot for block in self.blocks for slot in block.slots]


def _moved(value: Any, copies: Mapping[fx.Node, fx.Node]) -> Any:
    """A value with each node in it, however deep, replaced by its copy."""
    if is_dataclass(value):
        moved = {field.name: _moved(getattr(value, field.name), copies) for field in fields(value)}
        return replace(cast(Any, value), **moved)
    if isinstance(value, tuple | list | frozenset | set):
        return type(value)(_moved(each, copies) for each in cast(Any, value))
    if isinstance(value, dict):
        return {_moved(key, copies): _moved(each, copies) for key, each in cast(Any, value).items()}
    return fx.map_arg(value, copies.__getitem__)


def _reason_in(nodes: Collection[fx.Node], reasons: Mapping[fx.Node, str]) -> str:
    return next((reasons[node] for node in nodes if node in reasons), "")


class Decider:
    """Decides the sites of one graph for the Parameters of a call."""

    def __init__(
        self, found: Found, source: PolicySource, options: Options, choosers: Choosers, target: Target
    ) -> None:
        self.found, self.source, self.target = found, source, target
        self._choosers, self._options = choosers, options
        self.guard = Guard(found.linears, (*found.blocks, *found.batched), source, options, choosers.compare)

    def decide(
        self, parameters: Mapping[int, Parameter], late: bool = False
    ) -> tuple[Sessions, dict[str, SiteDecision]]:
        """The sessions of the graph's models, and node name of each site -> its decision.

        Args:
            late: at a call, not while Dynamo traces.

        Raises:
            PolicyError: the policy is strict and a weight cannot have its scheme.
            MissingScalesError: a static scheme has no calibrated scale.
        """
        owners = Owners.of(parameters.values())
        notice(parameters.values(), owners)
        policy, sessions = self.source.policy, self._sessions(owners)
        names = {id(p): known for p in parameters.values() if (known := owners.names(p)) is not None}
        if self.source.is_default:
            sessions.note(f"no policy was given: {policy.name} is the default on this device")
        if any(id(parameters[slot]) not in names for slot in self.found.read):
            self._no_owner()
        decisions: dict[str, SiteDecision] = {}
        for site in self.found.linears:
            parameter = parameters[site.slot]
            known = names.get(id(parameter))
            full = known.full if known else (_source_name(site.weight),)
            info = SiteInfo(
                known.rules if known else tuple(name.removesuffix(".weight") for name in full),
                "linear",
                known.module_class if known else site.module_class,
                *_whole_sizes(site, parameter),
                known.is_output_embedding if known else False,
                role=self._role(site.slot, known),
            )
            decision = self._served(policy.decide(info), partial(_linear_problem, site))
            decision = self._in_range(_uncut(decision, parameter, site.transposed), parameter, full[0])
            decisions[site.node.name] = SiteDecision(decision.scheme, decision.reason, full[0], decision.refused)
            self._prepare(parameter, full, decision.scheme)
        for block in self.found.blocks:
            decisions[block.node.name] = self._decide_block(block, parameters, names)
        for site in self.found.batched:
            decisions[site.node.name] = self._decide_experts(
                site.weight,
                parameters[site.slot],
                site.transposed,
                names,
                site.module_class,
                partial(_rows_problem, site),
            )
        for miss in self.found.misses:
            for slot in miss.slots:
                known = names.get(id(parameters[slot]))
                self._record_miss(slot, parameters[slot], known, miss.reason)
        others = self._record_reads(owners, parameters, names)
        self._enforce(parameters, names, decisions, others)
        if not late:
            self._choosers.ahead(self.guard.products(decisions, parameters))
        return sessions, self.guard.applied(decisions, parameters, sessions, late)

    @property
    def _verifies(self) -> bool:
        return self._options.verifies(self.source.policy)

    def check_rules(self, parameters: Mapping[int, Parameter]) -> None:
        """Once per model and policy: rules without effect are a warning and a note, an error when the policy is strict.

        Of several models in one graph, each has its own notes; what a rule does for any of them is an effect.
        """
        owners = Owners.of(parameters.values())
        for model in owners.models:
            session = LEDGER.session(model, self.source.policy, self.target.label)
            if not session.checked:
                beside = (*owners.models, *owners.beside)
                session.notes |= dict.fromkeys(self.source.policy.resolve(model, beside).problems)
                session.checked = True

    def _sessions(self, owners: Owners) -> Sessions:
        policy, label = self.source.policy, self.target.label
        return Sessions(tuple(LEDGER.session(m, policy, label) for m in owners.models) or (Session(policy, label),))

    def _role(self, slot: int, known: Names | None) -> str:
        """What a matrix is that keeps its precision by convention, by its modules or by what the graph does with it."""
        return (known.role if known else "") or (ROUTER if slot in self.found.routers else "")

    def _no_owner(self) -> None:
        """Rules go by names; without a model there are none, so rules would be ignored in silence."""
        text = (
            "cannot tell which model some of these weights belong to, so rules and conventions by name (lm_head) have no effect.\n"
            "Fix: quant_compile.compile(model, policy), or compile the module itself instead of a function around it."
        )
        if self.source.policy.rules or self.source.policy.strict:
            raise PolicyError(text)
        warnings.warn(text, PolicyWarning, stacklevel=2)

    def _enforce(
        self,
        parameters: Mapping[int, Parameter],
        names: Mapping[int, Names],
        decisions: Mapping[str, SiteDecision],
        others: Sequence[Read],
    ) -> None:
        """A strict policy's weights have their schemes in every graph, wherever it reads them."""
        if not self.source.policy.strict:
            return
        found = [f"{decision.name}: {decision.reason}" for decision in decisions.values() if decision.refused]
        missed = [(slot, miss.reason) for miss in self.found.misses for slot in miss.slots]
        for slot, reason in [*missed, *((read.slot, read.reason) for read in others)]:
            known, record = names.get(id(parameters[slot])), LEDGER.peek(parameters[slot])
            if known is not None and record is not None and record.named:
                found.append(f"{known.full[0]}: {reason.splitlines()[0]}")
        self._refuse(found)

    def _refuse(self, found: Sequence[str]) -> None:
        if found:
            fix = "give them `keep` in a rule, or set strict: false."
            raise strict_error(self.source.policy, ", and weights cannot have their schemes", found, fix)

    def _decide_block(
        self, block: MoeSite, parameters: Mapping[int, Parameter], names: Mapping[int, Names]
    ) -> SiteDecision:
        """Both weights of a block, each of which rules may name: one scheme, or two that may differ and have kernels together."""
        parts = zip((block.w13, block.w2), block.slots, block.transposed, strict=True)
        found = [
            self._decide_experts(
                node, parameters[slot], transposed, names, block.module_class, partial(_block_problem, block)
            )
            for node, slot, transposed in parts
        ]
        first, second = found
        name = first.name.rpartition(".")[0] or first.name
        inside = STORE.entry(parameters[block.slots[1]])
        if found[1].scheme is not None and inside.rounding.factor is not None:
            return SiteDecision(None, f"{found[1].name}: {FACTOR_INSIDE}", name, refused=True)
        refused = next((part for part in found if part.refused), None)
        if refused is not None:
            return SiteDecision(None, one_refuses(refused.name, refused.reason), name, refused=True)
        if first.scheme is not None and second.scheme is not None and may_differ(first.scheme, second.scheme):
            problem = _block_problem(block, first.scheme, second.scheme)
            needs = _unusual(problem)
            if needs and not self._choosers.serves(problem):
                return SiteDecision(None, f"no kernel here multiplies {needs} under {problem.spec}", name, refused=True)
        elif first.scheme != second.scheme:
            return SiteDecision(None, TWO_SCHEMES, name, refused=True)
        return SiteDecision(first.scheme, first.reason, name, second=replace(second, name=name))

    def _decide_experts(
        self,
        node: fx.Node,
        parameter: Parameter,
        transposed: bool,
        names: Mapping[int, Names],
        module_class: str | None,
        problem: Callable[[Scheme], Problem | MoeProblem],
    ) -> SiteDecision:
        known = names.get(id(parameter))
        full = known.full if known else (_source_name(node),)
        info = expert_site(
            known.rules if known else full, known.module_class if known else module_class, parameter, transposed
        )
        decision = _uncut(self._served(self.source.policy.decide(info), problem), parameter, transposed)
        decision = self._in_range(decision, parameter, full[0])
        self._prepare(parameter, full, decision.scheme)
        return SiteDecision(decision.scheme, decision.reason, full[0], decision.refused)

    def _served(self, decision: Decision, problem: Callable[[Scheme], Problem | MoeProblem]) -> Decision:
        """The decision, or what the policy's fallback puts in its place where only that has kernels here."""
        scheme = decision.scheme
        other = fallback_of(scheme, self.source.policy.fallback) if scheme is not None else None
        if scheme is None or other is None or self._choosers.serves(problem(scheme)):
            return decision
        if not self._choosers.serves(problem(other)):
            return decision
        reason = f"{decision.reason}; {other.spec} by the policy's fallback: no kernel here multiplies {scheme.spec}"
        return replace(decision, scheme=other, reason=reason)

    def _in_range(self, decision: Decision, parameter: Parameter, name: str) -> Decision:
        """The decision, or why the weight's values cannot have its scheme, or what was made of them was refused; with a warning."""
        known, scheme = LEDGER.peek(parameter), decision.scheme
        if scheme is not None and known is not None and scheme.spec in known.refusals and self._verifies:
            return replace(decision, scheme=None, reason=known.refusals[scheme.spec], refused=True)
        refusal = None if scheme is None else STORE.refusal(parameter, scheme)
        if refusal is None:
            return decision
        text = f"{name} stays {dtype_name(parameter.dtype)}: {refusal.reason}"
        warnings.warn(f"{self.source.policy.source or self.source.policy.name}: {text}", PolicyWarning, stacklevel=2)
        return replace(decision, scheme=None, reason=refusal.reason, refused=True)

    def _record_reads(
        self, owners: Owners, parameters: Mapping[int, Parameter], names: Mapping[int, Names]
    ) -> list[Read]:
        """Notes what reads weights without multiplying; returns those of linears, which no policy meant to be read so."""
        models = owners.models if self.found.reads else ()
        weights = {id(weight.parameter): weight for model in models for weight in linear_weights(model)}
        against: list[Read] = []
        for read in self.found.reads:
            parameter = parameters[read.slot]
            weight = weights.get(id(parameter))
            if weight is not None and not weight.in_embedding and (weight.certain or read.use is Use.RETURNED):
                self._record_miss(read.slot, parameter, names.get(id(parameter)), read.reason)
                against.append(read)
            else:
                LEDGER.record(parameter).uses[read.reason] = None
        return against

    def note_slices(self, weights: Sequence[Parameter]) -> None:
        """Misses for weights that reach a graph only as slices, which is no way to know which planes it needs."""
        owners, against = Owners.of(weights), list[str]()
        self._sessions(owners)  # the report names the policy, though no other graph may know this model
        for weight in weights:
            known = owners.names(weight)
            self._record_miss(-1, weight, known, SLICED_OUTSIDE)
            if known is not None and LEDGER.record(weight).named:
                against.append(f"{known.full[0]}: {SLICED_OUTSIDE}")
        if self.source.policy.strict:
            self._refuse(against)

    def _record_miss(self, slot: int, parameter: Parameter, known: Names | None, reason: str) -> None:
        record = LEDGER.record(parameter)
        record.misses[reason] = None
        if known is None or parameter.dim() < 2:
            return
        if parameter.dim() == 2:
            n, k = parameter.shape
            role = self._role(slot, known)
            info = SiteInfo(known.rules, "linear", known.module_class, n, k, known.is_output_embedding, role=role)
        else:
            info = expert_site(known.rules, known.module_class, parameter)
        decision = self.source.policy.decide(info)
        record.named = decision.scheme is not None or decision.refused
        if decision.scheme is None:
            record.reason = decision.reason

    def _prepare(self, parameter: Parameter, names: tuple[str, ...], scheme: Scheme | None) -> None:
        """Tell the store what planes of a weight are made by besides its values."""
        if scheme is None:
            return
        if scheme.static:
            self._load_scale(parameter, names)
        STORE.round_by(parameter, self.source.rounding(names))

    def _load_scale(self, parameter: Parameter, names: tuple[str, ...]) -> None:
        entry = STORE.entry(parameter)
        value = self.source.input_scale(names)
        if value is not None:
            if entry.input_scale is None or not torch.equal(entry.input_scale.cpu(), value):
                entry.input_scale = value
            return
        if entry.source and entry.input_scale is not None:
            return  # the checkpoint's own
        raise MissingScalesError(
            f"{names[0]} has a static scheme and no calibrated input scale in {self.source.policy.scales or 'the policy'}.\n"
            "Fix: policy = quant_compile.calibrate(model, batches, policy), or use a dynamic scheme."
        )


def multiplied_slices(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[int, ...]:
    """Positions of the inputs that are views of a Parameter and are multiplied by activations."""
    views = {
        i: value
        for i, value in enumerate(inputs)
        if isinstance(value, torch.Tensor) and not isinstance(value, Parameter) and isinstance(value._base, Parameter)
    }
    reads = account(gm, views, (), ()) if views else ()
    return tuple(dict.fromkeys(read.slot for read in reads if read.use.multiplies))


def _whole_sizes(site: LinearSite, parameter: Parameter) -> tuple[int, int]:
    """n and k as rules see them: of a weight that ranks have in parts those of the whole, the same on each."""
    shape = whole_shape(parameter)
    if site.view or shape == tuple(parameter.shape) or len(shape) != 2:
        return site.n, site.k
    return (shape[1], shape[0]) if site.transposed else (shape[0], shape[1])


def _uncut(decision: Decision, parameter: Parameter, transposed: bool) -> Decision:
    """The decision, or why the parts that ranks have of the weight cannot have its scheme."""
    refused = None if decision.scheme is None else refusal(parameter, decision.scheme, transposed)
    return decision if refused is None else replace(decision, scheme=None, reason=refused.reason, refused=True)


def _linear_problem(site: LinearSite, scheme: Scheme) -> Problem:
    return Problem(scheme, site.n, site.k, site.dtype, site.bias is not None)


def _unusual(problem: MoeProblem) -> str:
    """What of a block only some kernels multiply; empty: nothing."""
    if not problem.activation.gated:
        return "experts without a gate"
    return "" if problem.scheme2 is None else "experts of two types"


def _rows_problem(site: BatchedSite, scheme: Scheme) -> Problem:
    return Problem(scheme, site.n, site.k, site.weight.meta["example_value"].dtype)


def _block_problem(block: MoeSite, scheme: Scheme, scheme2: Scheme | None = None) -> MoeProblem:
    sizes = (block.experts, block.hidden, block.intermediate, block.top_k)
    has_bias = block.b13 is not None or block.b2 is not None
    dtype = block.x.meta["example_value"].dtype
    return MoeProblem(scheme, *sizes, block.activation, dtype, has_bias, block.weights is not None, scheme2)


def add_time(sessions: Sessions, key: str, seconds: float) -> None:
    """Seconds spent on ``key``, for the reports."""
    for session in sessions.each:
        session.timings[key] = session.timings.get(key, 0.0) + seconds


def _source_name(weight: fx.Node) -> str:
    source = getattr(weight, "_dynamo_source", None)
    return source.name if source is not None else weight.name
