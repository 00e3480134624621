"""The call path of one Dynamo graph: look up each weight's planes by identity, pick the graph variant, run it.

Dynamo lets one graph serve many weights (other instances, other layers, replaced Parameters) and guards none of them. So
nothing about a weight is baked in: each call identifies its Parameters (fast path: the same objects as in an earlier
call, unchanged), and weights whose policy gives them other schemes than the traced ones get another variant of the graph,
compiled from the same Dynamo graph with the same symbolic shapes.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch.nn import Parameter

from quant_compile.inspect import naming
from quant_compile.inspect.ledger import LEDGER, Session
from quant_compile.inspect.weights import expert_site, linear_weights
from quant_compile.ir.batched import BatchedSite, find_batched
from quant_compile.ir.errors import (
    GraphError,
    MissingScalesError,
    OptionError,
    PolicyError,
    PolicyWarning,
    ReleasedWeightError,
)
from quant_compile.ir.experts import MoeMiss, MoeSite, Verdicts, find_experts
from quant_compile.ir.graph import (
    BiasRef,
    ExpertBiasRef,
    ExpertRef,
    PlaneRef,
    Ref,
    ScaleRef,
    copy_graph,
    fake_mode_of,
    prepare_for_inductor,
)
from quant_compile.ir.moe import MoeProblem
from quant_compile.ir.scheme import Scheme
from quant_compile.ir.sites import LinearSite, Miss, find_sites
from quant_compile.lowering.moe import MoeDispatch
from quant_compile.lowering.registry import Problem
from quant_compile.lowering.select import Dispatch
from quant_compile.lowering.target import Target
from quant_compile.lowering.weights import STORE, Key, claim
from quant_compile.options import Options, PolicySource
from quant_compile.passes import PIPELINE
from quant_compile.passes.insert_moe import weight_names
from quant_compile.passes.plan import PassReport, Plan, SiteDecision
from quant_compile.policy import TWO_SCHEMES, Decision, SiteInfo, scale_key

Compile = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
_VERSION = attrgetter("_version")
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # below it a reciprocal is inf
ALSO_PLAIN = "also read unquantized (tied embedding or another use)"


@dataclass(frozen=True)
class Choosers:
    """How kernels are chosen: ``(problem, name) -> dispatch`` for linears, expert blocks, and products over row-form planes.

    ``serves`` tells, without measuring, whether a device has kernels for a linear or a block.
    """

    linear: Callable[[Problem, str], Dispatch]
    moe: Callable[[MoeProblem, str], MoeDispatch]
    rows: Callable[[Problem, str], Dispatch]
    serves: Callable[[Problem | MoeProblem], bool]


@dataclass(frozen=True, eq=False)
class Found:
    """All that one graph has: blocks, products with all experts, linears, and what is none of them, with the reason."""

    blocks: tuple[MoeSite, ...]
    batched: tuple[BatchedSite, ...]
    linears: tuple[LinearSite, ...]
    misses: tuple[Miss | MoeMiss, ...]

    @staticmethod
    def of(gm: fx.GraphModule, parameters: Mapping[int, Any], verdicts: Verdicts) -> Found:
        """Look through a copied Dynamo graph."""
        blocks, unknown = find_experts(gm, parameters, verdicts)
        taken = {node for block in blocks for node in block.nodes}
        batched = find_batched(gm, parameters, taken)
        taken |= {site.node for site in batched}
        linears, misses = find_sites(gm, parameters, taken)
        done = {site.slot for site in batched}
        unknown = [miss for miss in unknown if not done.issuperset(miss.slots)]
        explained = {slot for miss in unknown for slot in miss.slots}
        misses = [miss for miss in misses if not explained.issuperset(miss.slots)]
        return Found(tuple(blocks), tuple(batched), tuple(linears), (*misses, *unknown))

    @property
    def readers(self) -> list[tuple[str, int]]:
        """(node name, slot) of every weight that a site multiplies by."""
        single = [(site.node.name, site.slot) for site in (*self.linears, *self.batched)]
        return single + [(block.node.name, slot) for block in self.blocks for slot in block.slots]


@dataclass(frozen=True, eq=False)
class Variant:
    """The graph compiled for one assignment of schemes."""

    graph: fx.GraphModule
    function: Callable[..., Any]
    arguments: tuple[int, ...]
    refs: tuple[Ref, ...]
    reports: tuple[PassReport, ...]


@dataclass(frozen=True, eq=False)
class Binding:
    """A variant bound to the planes of particular Parameters; holds no Parameter."""

    variant: Variant
    pick_arguments: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    planes: tuple[Tensor, ...]
    pick_watched: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    stamp: tuple[int, ...]
    epoch: int
    generation: int


class GraphRunner:
    """What the backend returns to Dynamo for one graph."""

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        source: PolicySource,
        options: Options,
        compile_graph: Compile,
        choosers: Choosers,
        target: Target,
    ) -> None:
        self.source, self.options, self.target = source, options, target
        self._compile, self._choosers = compile_graph, choosers
        self.pristine = copy_graph(gm)
        # Dynamo passes Python floats as 0-d tensors whose value only the real tensor still has when it is traced again.
        self._scalars = {i: value for i, value in enumerate(inputs) if _is_scalar(value)}
        self._parameters = {i: value for i, value in enumerate(inputs) if isinstance(value, Parameter)}
        self._slots = tuple(self._parameters)
        self._pick = _picker(self._slots)
        self._verdicts = Verdicts()
        self.found = Found.of(self.pristine, self._parameters, self._verdicts)
        self.sites, self.blocks, self.batched = self.found.linears, self.found.blocks, self.found.batched
        self.misses = self.found.misses
        self._shape_only = {i: _Shaped(value) for i, value in self._parameters.items()}
        self._lock = threading.RLock()
        self._variants: dict[Any, Variant] = {}
        self._bindings: dict[tuple[int, ...], Binding] = {}
        STORE.on_forget(self._forget)

    def prepare(self) -> Variant:
        """Compile the variant of the traced Parameters; called once, inside Dynamo's tracing context."""
        parameters, self._parameters = self._parameters, {}
        session, decisions = self._decide(parameters)
        self._check_rules(parameters, session)
        if self.options.releases(self.source.policy):
            self._claim(parameters)
        variant = self._variant(parameters, session, decisions, late=False)
        self._record(parameters, session, decisions, variant)
        self._guards = _guard_count(self.pristine)
        return variant

    def _check_rules(self, parameters: Mapping[int, Parameter], session: Session) -> None:
        """Once per model and policy: rules without effect are a warning and a note, an error when the policy is strict."""
        owner = naming.owner_of(parameters.values())
        if owner is None or session.checked:
            return
        for problem in self.source.policy.resolve(owner).problems:
            session.notes[problem] = None
        session.checked = True

    def _no_owner(self) -> None:
        """Rules go by names; without a model there are none, so rules would be ignored in silence."""
        text = (
            "cannot tell which model these weights belong to, so rules and conventions by name (lm_head) have no effect.\n"
            "Fix: quant_compile.compile(model, policy), or compile the module itself instead of a function around it."
        )
        if self.source.policy.rules or self.source.policy.strict:
            raise PolicyError(text)
        warnings.warn(text, PolicyWarning, stacklevel=2)

    # -- calls ---------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any) -> Any:
        parameters = self._pick(args)
        self.source.reload_if_changed()
        binding = self._bindings.get(tuple(map(id, parameters)))
        if binding is None or not self._is_current(binding, parameters):
            binding = self._bind(parameters)
        return binding.variant.function(*binding.pick_arguments(args), *binding.planes)

    def _is_current(self, binding: Binding, parameters: tuple[Any, ...]) -> bool:
        if binding.epoch != STORE.epoch or binding.generation != self.source.generation:
            return False
        return binding.stamp == _stamp(binding.pick_watched(parameters))

    def _forget(self, identity: int) -> None:
        for key in [key for key in list(self._bindings) if identity in key]:
            self._bindings.pop(key, None)

    # -- slow path -----------------------------------------------------------------------------------------------------

    def _bind(self, values: tuple[Any, ...]) -> Binding:
        with self._lock:
            parameters: dict[int, Parameter] = dict(zip(self._slots, values, strict=True))
            generation = self.source.generation
            session, decisions = self._decide(parameters)
            variant = self._variant(parameters, session, decisions, late=True)
            self._refuse_released(parameters, variant)
            started, before = time.perf_counter(), STORE.packed
            planes = self._planes(variant, parameters, decisions)
            if before != STORE.packed:
                _add_time(session, "packing", time.perf_counter() - started)
            self._record(parameters, session, decisions, variant)
            self._release(parameters, variant)
            watched = tuple(i for i, slot in enumerate(self._slots) if _watchable(parameters[slot]))
            pick_watched = _picker(watched)
            for key in [key for key, binding in list(self._bindings.items()) if binding.epoch != STORE.epoch]:
                self._bindings.pop(key, None)
            # Until no other thread changed any planes in between. Bounded: a graph with more groups of one weight than the store
            # keeps slabs for packs anew each time; its binding is then out of date and is made again at the next call.
            epoch, stamp = -1, ()
            for _ in range(3):
                epoch, stamp = STORE.epoch, _stamp(pick_watched(values))
                planes = self._planes(variant, parameters, decisions)
                if epoch == STORE.epoch:
                    break
            binding = Binding(variant, _picker(variant.arguments), planes, pick_watched, stamp, epoch, generation)
            self._bindings[tuple(map(id, values))] = binding
            return binding

    def _planes(
        self,
        variant: Variant,
        parameters: Mapping[int, Parameter],
        decisions: Mapping[str, SiteDecision],
    ) -> tuple[Tensor, ...]:
        names = {slot: decisions[name].name for name, slot in self.found.readers}  # for errors
        for block in self.blocks:
            names |= dict(zip(block.slots, weight_names(decisions[block.node.name].name, block), strict=True))
        return tuple(_resolve(ref, parameters, names) for ref in variant.refs)

    def _decide(self, parameters: Mapping[int, Parameter]) -> tuple[Session, dict[str, SiteDecision]]:
        owner = naming.owner_of(parameters.values())
        names = naming.names_in(owner)
        policy = self.source.policy
        label = self.target.label
        session = LEDGER.session(owner, policy, label) if owner is not None else Session(policy, label)
        if self.source.is_default:
            session.notes[f"no policy was given: {policy.name} is the default on this device"] = None
        if owner is None and self.found.readers:
            self._no_owner()
        decisions: dict[str, SiteDecision] = {}
        for site in self.sites:
            parameter = parameters[site.slot]
            known = names.get(id(parameter))
            full = known.full if known else (_source_name(site.weight),)
            info = SiteInfo(
                tuple(name.removesuffix(".weight") for name in full),
                "linear",
                known.module_class if known else site.module_class,
                site.n,
                site.k,
                known.is_output_embedding if known else False,
            )
            decision = self._served(policy.decide(info), partial(_linear_problem, site))
            decisions[site.node.name] = SiteDecision(decision.scheme, decision.reason, full[0])
            if decision.scheme is not None and decision.scheme.static:
                self._load_scale(parameter, full)
        for block in self.blocks:
            decisions[block.node.name] = self._decide_block(block, parameters, names)
        for site in self.batched:
            decisions[site.node.name] = self._decide_experts(
                site.weight,
                parameters[site.slot],
                site.transposed,
                names,
                site.module_class,
                partial(_rows_problem, site),
            )
        for miss in self.misses:
            for slot in miss.slots:
                known = names.get(id(parameters[slot]))
                self._record_miss(parameters[slot], known, miss.reason, session)
        self._enforce(parameters, names, decisions)
        return session, decisions

    def _enforce(
        self,
        parameters: Mapping[int, Parameter],
        names: Mapping[int, naming.Names],
        decisions: Mapping[str, SiteDecision],
    ) -> None:
        """A strict policy's weights have their schemes in every graph."""
        if not self.source.policy.strict:
            return
        found = [f"{decision.name}: {decision.reason}" for decision in decisions.values() if decision.refused]
        for miss in self.misses:
            for slot in miss.slots:
                known, record = names.get(id(parameters[slot])), LEDGER.peek(parameters[slot])
                if known is not None and record is not None and record.named:
                    found.append(f"{known.full[0]}: {miss.reason.splitlines()[0]}")
        if found:
            origin = self.source.policy.source or self.source.policy.name
            listed = "\n".join(f"  {text}" for text in dict.fromkeys(found))
            fix = "Fix: give them `keep` in a rule, or set strict: false."
            raise PolicyError(
                f"{origin}: the policy is strict, and weights cannot have their schemes:\n{listed}\n{fix}"
            )

    def _decide_block(
        self, block: MoeSite, parameters: Mapping[int, Parameter], names: Mapping[int, naming.Names]
    ) -> SiteDecision:
        """One scheme for both weights of a block, each of which rules may name."""
        parts = zip((block.w13, block.w2), block.slots, block.transposed, strict=True)
        found = [
            self._decide_experts(
                node, parameters[slot], transposed, names, block.module_class, partial(_block_problem, block)
            )
            for node, slot, transposed in parts
        ]
        first, second = found
        name = first.name.rpartition(".")[0] or first.name
        if first.scheme != second.scheme:
            return SiteDecision(None, TWO_SCHEMES, name, refused=True)
        return SiteDecision(first.scheme, first.reason, name)

    def _decide_experts(
        self,
        node: fx.Node,
        parameter: Parameter,
        transposed: bool,
        names: Mapping[int, naming.Names],
        module_class: str | None,
        problem: Callable[[Scheme], Problem | MoeProblem],
    ) -> SiteDecision:
        known = names.get(id(parameter))
        full = known.full if known else (_source_name(node),)
        info = expert_site(full, known.module_class if known else module_class, parameter, transposed)
        decision = self._served(self.source.policy.decide(info), problem)
        if decision.scheme is not None and decision.scheme.static:
            self._load_scale(parameter, full)
        return SiteDecision(decision.scheme, decision.reason, full[0])

    def _served(self, decision: Decision, problem: Callable[[Scheme], Problem | MoeProblem]) -> Decision:
        """The decision, or its weights under 16-bit inputs where the policy allows that and only that has kernels here."""
        scheme = decision.scheme
        if self.source.policy.fallback is None or scheme is None or scheme.input_activations is None:
            return decision
        alone = Scheme(scheme.weights)
        if self._choosers.serves(problem(scheme)) or not self._choosers.serves(problem(alone)):
            return decision
        reason = f"{decision.reason}; {alone.spec} by the policy's fallback: no kernel here multiplies {scheme.spec}"
        return replace(decision, scheme=alone, reason=reason)

    def _record_miss(self, parameter: Parameter, known: naming.Names | None, reason: str, session: Session) -> None:
        record = LEDGER.record(parameter)
        record.misses[reason] = None
        if known is None or parameter.dim() < 2:
            return
        if parameter.dim() == 2:
            n, k = parameter.shape
            info = SiteInfo(known.rules, "linear", None, n, k, known.is_output_embedding)
        else:
            info = expert_site(known.full, known.module_class, parameter)
        decision = session.policy.decide(info)
        record.named = decision.scheme is not None
        if not record.named:
            record.reason = decision.reason

    def _load_scale(self, parameter: Parameter, names: tuple[str, ...]) -> None:
        entry = STORE.entry(parameter)
        for name in names:
            value = self.source.scales.get(scale_key(name))
            if value is not None:
                if value.numel() != 1 or not SMALLEST_SCALE <= float(value.to(torch.float32)) < float("inf"):
                    shown = float(value) if value.numel() == 1 else f"{value.numel()} numbers"
                    raise MissingScalesError(
                        f"the input scale of {name} in {self.source.policy.scales} is {shown}, not a positive number.\n"
                        "Fix: policy = quant_compile.calibrate(model, batches, policy) with inputs that are not all zeros or NaN."
                    )
                if entry.input_scale is None or not torch.equal(entry.input_scale.cpu(), value.reshape(1)):
                    entry.input_scale = value.reshape(1).to(torch.float32)
                return
        raise MissingScalesError(
            f"{names[0]} has a static scheme and no calibrated input scale in {self.source.policy.scales or 'the policy'}.\n"
            "Fix: policy = quant_compile.calibrate(model, batches, policy), or use a dynamic scheme."
        )

    def _variant(
        self,
        parameters: Mapping[int, Parameter],
        session: Session,
        decisions: Mapping[str, SiteDecision],
        late: bool,
    ) -> Variant:
        specs = tuple(d.scheme.spec if d.scheme else None for d in decisions.values())
        classes = self._scale_classes(parameters, decisions)
        fuse, request = self.source.policy.fuse, self.options.request(self.source.policy)
        key = (specs, tuple(sorted(classes.items())), fuse, request)
        found = self._variants.get(key)
        if found is None:
            found = self._build(decisions, classes, session, late)
            self._variants[key] = found
        return found

    def _scale_classes(
        self, parameters: Mapping[int, Parameter], decisions: Mapping[str, SiteDecision]
    ) -> dict[int, int]:
        """Slots of static sites -> the first slot with the same scale: only those may share a quantization."""
        first: dict[float, int] = {}
        classes: dict[int, int] = {}
        for name, slot in self.found.readers:
            scheme = decisions[name].scheme
            if scheme is not None and scheme.static:
                scale = STORE.entry(parameters[slot]).input_scale
                classes[slot] = first.setdefault(float(scale) if scale is not None else 0.0, slot)
        return classes

    def _build(
        self,
        decisions: Mapping[str, SiteDecision],
        classes: dict[int, int],
        session: Session,
        late: bool,
    ) -> Variant:
        gm = copy_graph(self.pristine)
        found = Found.of(gm, self._shape_only, self._verdicts)
        fuse = self.source.policy.fuse
        plan = Plan(
            found.linears,
            decisions,
            self._timed(session, self._choosers.linear),
            lambda slot: slot in self._shape_only,
            classes,
            fuse.share_quant,
            fuse.merge_siblings,
            found.blocks,
            found.batched,
            self._timed(session, self._choosers.moe),
            self._timed(session, self._choosers.rows),
            # A kernel takes a norm's eps as a number. Dynamo makes one of a float that is an input, but not once it is done.
            None if late and self._scalars else self.target,
        )
        reports: list[PassReport] = []
        for one_pass in PIPELINE:
            started, selecting = time.perf_counter(), session.timings.get("selection", 0.0)
            gm, report = one_pass(gm, plan)
            reports.append(report)
            selection = session.timings.get("selection", 0.0) - selecting
            _add_time(session, f"passes.{report.name}", time.perf_counter() - started - selection)
        prepare_for_inductor(gm)
        placeholders = gm.graph.find_nodes(op="placeholder")
        arguments = tuple(node.meta["argument"] for node in placeholders if "plane" not in node.meta)
        refs = tuple(node.meta["plane"] for node in placeholders if "plane" in node.meta)
        started = time.perf_counter()
        scalars = {} if late else self._scalars
        inputs = [scalars.get(node.meta.get("argument"), node.meta["example_value"]) for node in placeholders]
        function = self._compile_late(gm, inputs) if late else self._compile(gm, inputs)
        _add_time(session, "inductor", time.perf_counter() - started)
        return Variant(gm, function, arguments, refs, tuple(reports))

    def _compile_late(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile at call time, under Dynamo's fake mode, so that dynamic sizes stay dynamic."""
        mode = fake_mode_of(gm.graph)
        # Without no_grad, inference_mode(False) would turn gradients on and AOTAutograd would trace a backward.
        with torch.inference_mode(torch.is_inference_mode_enabled()), torch.no_grad(), tracing(TracingContext(mode)):
            function = self._compile(gm, inputs)
        if mode.shape_env and len(mode.shape_env.guards) > self._guards:
            fresh = list(mode.shape_env.guards[self._guards :])
            raise OptionError(
                "this policy gives a layer that shares its graph another scheme, and compiling that scheme put new conditions on "
                f"sizes that the shared graph does not check: {', '.join(str(g.expr) for g in fresh)}.\n"
                "Fix: compile the whole model instead of single layers, or mark the sizes static (dynamic=False)."
            )
        return function

    @staticmethod
    def _timed(session: Session, choose: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
        def timed(problem: Any, name: str) -> Any:
            started = time.perf_counter()
            try:
                return choose(problem, name)
            finally:
                _add_time(session, "selection", time.perf_counter() - started)

        return timed

    # -- ledger and release --------------------------------------------------------------------------------------------

    def _record(
        self,
        parameters: Mapping[int, Parameter],
        session: Session,
        decisions: Mapping[str, SiteDecision],
        variant: Variant,
    ) -> None:
        dispatch_of = {
            slot: d for report in variant.reports for slots, d in report.dispatches.items() for slot in slots
        }
        for name, slot in self.found.readers:
            decision = decisions[name]
            parameter = parameters[slot]
            record = LEDGER.record(parameter)
            record.named = decision.scheme is not None or decision.refused
            record.reason = decision.reason
            spec = decision.scheme.spec if decision.scheme else None
            if spec != record.scheme:
                record.kernels.clear()
                record.readers.clear()
                STORE.entry(parameter).plain_readers.clear()
                record.scheme = spec
            STORE.keep_only(parameter, spec)
            if spec is not None:
                dispatch = dispatch_of[slot]
                record.layout = dispatch.layout
                record.kernels[dispatch.ranges] = None
        for slot in variant.arguments:
            parameter = parameters.get(slot)
            if parameter is not None and parameter.dim() > 1:
                LEDGER.record(parameter).readers[ALSO_PLAIN] = None
                STORE.entry(parameter).plain_readers.add(ALSO_PLAIN)
        for report in variant.reports:
            if report.name == "merge_siblings":
                for refusal in report.refused:
                    session.notes[f"not merged: {refusal}"] = None

    def _claim(self, parameters: Mapping[int, Parameter]) -> None:
        """Every weight of the model that the policy names becomes releasable now, before guards over its class exist."""
        owner = naming.owner_of(parameters.values())
        policy = self.source.policy
        if owner is not None:
            for weight in linear_weights(owner):
                if not weight.in_embedding and policy.decide(weight.site).scheme is not None:
                    claim(weight.parameter)
        for _, slot in self.found.readers:
            claim(parameters[slot])

    def _release(self, parameters: Mapping[int, Parameter], variant: Variant) -> None:
        if not self.options.releases(self.source.policy):
            return
        owner = naming.owner_of(parameters.values())
        embedded = (
            {id(w.parameter) for w in linear_weights(owner) if w.in_embedding} if owner is not None else set[int]()
        )
        for ref in variant.refs:
            if isinstance(ref, PlaneRef | ExpertRef) and ref.index == 0:
                for slot in ref.slots if isinstance(ref, PlaneRef) else (ref.slot,):
                    if slot not in variant.arguments and id(parameters[slot]) not in embedded:
                        STORE.release(parameters[slot])

    def _refuse_released(self, parameters: Mapping[int, Parameter], variant: Variant) -> None:
        for slot in variant.arguments:
            parameter = parameters.get(slot)
            entry = STORE.peek(parameter) if parameter is not None else None
            if entry is not None and entry.released:
                raise ReleasedWeightError(
                    f"a graph reads a weight of shape {tuple(parameter.shape)} unquantized, but its original values were released.\n"  # type: ignore[union-attr]
                    "Fix: quant_compile.restore(model, source), or give this weight one scheme in every graph."
                )


class _Shaped:
    """Shape and dtype of a Parameter, so that a runner need not keep the Parameter alive."""

    def __init__(self, parameter: Parameter) -> None:
        self.shape, self.dtype = parameter.shape, parameter.dtype

    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)


def _picker(positions: Sequence[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Tuple of the values at ``positions``, at C speed where possible."""
    if len(positions) == 0:
        return lambda values: ()
    if len(positions) == 1:
        only = positions[0]
        return lambda values: (values[only],)
    return itemgetter(*positions)


def _stamp(watched: tuple[Any, ...]) -> tuple[int, ...]:
    """What shows an update in place (version) or a swap of storage (address)."""
    return (*map(_VERSION, watched), *map(Tensor.data_ptr, watched))


def _watchable(parameter: Parameter) -> bool:
    entry = STORE.peek(parameter)
    released = entry is not None and entry.released
    return parameter.dim() > 0 and not released and not parameter.is_inference()


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and not isinstance(value, Parameter)


def _resolve(ref: Ref, parameters: Mapping[int, Parameter], names: Mapping[int, str]) -> Tensor:
    if isinstance(ref, BiasRef):
        return _joined_bias(ref, parameters)
    if isinstance(ref, ExpertBiasRef):
        return _expert_bias(ref, parameters)
    if isinstance(ref, ExpertRef):
        key = Key(ref.spec, ref.layout, ref.transposed, ref.dtype, ref.interleaved)
        return STORE.expert_planes(parameters[ref.slot], key, ref.problem, names.get(ref.slot, "a weight"))[ref.index]
    weights, called = (
        tuple(parameters[slot] for slot in ref.slots),
        tuple(names.get(slot, "a weight") for slot in ref.slots),
    )
    if isinstance(ref, ScaleRef):
        return STORE.input_scale(weights, called)
    keys = tuple(Key(ref.spec, ref.layout, flag, ref.dtype) for flag in ref.transposed)
    return STORE.planes(weights, keys, called)[ref.index]


def _joined_bias(ref: BiasRef, parameters: Mapping[int, Parameter]) -> Tensor:
    device = next(parameters[slot].device for slot in ref.slots if slot is not None)
    with torch.inference_mode(False), torch.no_grad():
        parts = [
            torch.zeros(size, dtype=ref.dtype, device=device) if slot is None else parameters[slot].detach()
            for slot, size in zip(ref.slots, ref.sizes, strict=True)
        ]
        return torch.cat(parts)


def _expert_bias(ref: ExpertBiasRef, parameters: Mapping[int, Parameter]) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        bias = parameters[ref.slot].detach()
        if ref.interleaved:
            bias = torch.cat((bias[:, 0::2], bias[:, 1::2]), 1)
        return bias.to(ref.dtype).contiguous()


def _linear_problem(site: LinearSite, scheme: Scheme) -> Problem:
    return Problem(scheme, site.n, site.k, site.dtype, site.bias is not None)


def _rows_problem(site: BatchedSite, scheme: Scheme) -> Problem:
    return Problem(scheme, site.n, site.k, site.weight.meta["example_value"].dtype)


def _block_problem(block: MoeSite, scheme: Scheme) -> MoeProblem:
    sizes = (block.experts, block.hidden, block.intermediate, block.top_k)
    has_bias = block.b13 is not None or block.b2 is not None
    dtype = block.x.meta["example_value"].dtype
    return MoeProblem(scheme, *sizes, block.activation, dtype, has_bias, block.weights is not None)


def _guard_count(gm: fx.GraphModule) -> int:
    """Conditions on sizes that Dynamo knows of when it finishes a graph, and so checks at each call."""
    try:
        env = fake_mode_of(gm.graph).shape_env
    except GraphError:
        return 0
    return len(env.guards) if env else 0


def _add_time(session: Session, key: str, seconds: float) -> None:
    session.timings[key] = session.timings.get(key, 0.0) + seconds


def _source_name(weight: fx.Node) -> str:
    source = getattr(weight, "_dynamo_source", None)
    return source.name if source is not None else weight.name


__all__ = ["Binding", "GraphRunner", "LinearSite", "Variant"]
