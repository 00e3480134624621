"""The call path of one Dynamo graph: look up each weight's planes by identity, pick the graph variant, run it.

Dynamo lets one graph serve many weights (other instances, other layers, replaced Parameters) and guards none of them. So
nothing about a weight is baked in: each call identifies its Parameters (fast path: the same objects as in an earlier
call, unchanged), and weights whose policy gives them other schemes than the traced ones get another variant of the graph,
compiled from the same Dynamo graph with the same symbolic shapes.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import Parameter

from quant_compile.ir.graph import (
    BiasRef,
    ExpertBiasRef,
    ExpertRef,
    FactorRef,
    Ref,
    ScaleRef,
    copy_graph,
    forget_tensors,
    slots_of,
)
from quant_compile.ir.inline import inline
from quant_compile.ir.moe import gates_first
from quant_compile.ir.shards import localize
from quant_compile.lowering.identity import identity_of, local_of, peek_anchor
from quant_compile.lowering.shards import shares_scale
from quant_compile.lowering.target import Target
from quant_compile.lowering.weights import STORE, Key
from quant_compile.model.ledger import Sessions
from quant_compile.model.names import Owners, walked_once
from quant_compile.model.offload import Lent, adopt, adopt_at
from quant_compile.options import Options, PolicySource
from quant_compile.passes.insert_moe import weight_names
from quant_compile.passes.plan import SiteDecision
from quant_compile.runtime.decide import Choosers, Decider, Found, add_time, multiplied_slices
from quant_compile.runtime.locked import keeper_of, sites_of
from quant_compile.runtime.merges import Merges
from quant_compile.runtime.profiling import unprofiled
from quant_compile.runtime.ranks import telling
from quant_compile.runtime.record import claim_weights, record, refuse_released, release_packed
from quant_compile.runtime.variant import Compile, Variant, Variants
from quant_compile.runtime.verified import Verifier
from quant_compile.runtime.watch import Lendings, Looks, Pick, Watched, picker


@dataclass(frozen=True, eq=False)
class Whole:
    """Arguments of a call, and behind them this rank's local tensor of each distributed weight.

    Attributes:
        positions: of a distributed weight among the arguments -> of its local tensor behind them.
    """

    positions: Mapping[int, int]

    @staticmethod
    def of(inputs: Sequence[Any]) -> Whole:
        """For a graph with these example inputs."""
        held = [i for i, value in enumerate(inputs) if isinstance(value, Parameter) and local_of(value) is not value]
        return Whole({position: len(inputs) + i for i, position in enumerate(held)})

    def __call__(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """All of them."""
        args = tuple(args)
        return args + tuple(local_of(args[i]) for i in self.positions) if self.positions else args


@dataclass(frozen=True, eq=False)
class Binding:
    """A variant bound to the planes of particular Parameters, whose ``identities`` it has; holds no Parameter."""

    identities: frozenset[int]
    variant: Variant
    pick_arguments: Pick
    planes: tuple[Tensor, ...]
    watched: Watched | Lendings
    merges: Merges
    epoch: int
    generation: int

    def run(self, args: tuple[Any, ...]) -> Any:
        """Call the compiled function; ``args`` are the graph's."""
        return self.variant.function(*(self.pick_arguments(args) + self.planes))


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
        self.source, self.options, self._target = source, options, target
        self.pristine = inline(copy_graph(gm))
        self._whole = Whole.of(inputs)
        own, inputs = inputs, self._whole(inputs)
        localize(self.pristine, self._whole.positions)
        local = self._whole.positions.values()
        self._parameters = {i: v for i, v in enumerate(inputs) if i in local or isinstance(v, Parameter)}
        self._slots = tuple(self._parameters)
        self._pick = picker(self._slots)
        self.found = Found.of(self.pristine, self._parameters)
        self._decider = Decider(self.found, source, options, choosers, target)
        self._verifier = Verifier(self.pristine, self.found, source, options)
        self._slices = multiplied_slices(self.pristine, own)
        self._noted = set[int]()
        self._note_slices(own)
        self._variants = Variants(
            self.pristine,
            self.found,
            inputs,
            self._parameters,
            source,
            options,
            compile_graph,
            choosers,
            target,
        )
        self._lock = threading.RLock()
        self._looks: Looks | None = None  # chosen at the first call, so that all bindings have one kind of key
        self._bindings: dict[Hashable, Binding] = {}
        self._places: weakref.WeakValueDictionary[int, Lent] = weakref.WeakValueDictionary()
        STORE.on_forget(self._forget)

    def prepare(self) -> Variant:
        """Compile the variant of the traced Parameters; called once, inside Dynamo's tracing context."""
        parameters, self._parameters = self._parameters, {}
        self._adopt(tuple(parameters.values()))
        session, decisions = self._decider.decide(parameters)
        self._decider.check_rules(parameters)
        if self.options.releases(self.source.policy):
            claim_weights(self.found, self.source.policy, parameters)
        variant = self._variants.get(parameters, session, decisions, late=False)
        record(self.found, parameters, session, decisions, variant, self._decider.guard.asked)
        if not self._verifier.asked:  # else the first call decides
            self._keep_lock(parameters, session, decisions, variant)
        self._variants.traced()
        return variant

    def __call__(self, *args: Any) -> Any:
        if not self._whole.positions:
            return self._called(args)
        with telling():
            return self._called(args)

    def _called(self, args: tuple[Any, ...]) -> Any:
        args = self._whole(args)
        binding = self._bound(args)
        if binding is None:
            with unprofiled():  # binding, and what the graph's first call sets up
                with walked_once():
                    binding = self.bind(self._pick(args), args)
                return binding.run(args)
        return binding.run(args)

    def bound(self, args: tuple[Any, ...]) -> Binding | None:
        """What a call with these arguments would run; None if it had to be bound anew."""
        return self._bound(self._whole(args))

    def _bound(self, args: tuple[Any, ...]) -> Binding | None:
        """The same, of arguments with local tensors behind them."""
        parameters = self._pick(args)
        if self._slices:
            self._note_slices(args)
        self.source.reload_if_changed()
        if self._looks is None:
            return None
        binding = self._bindings.get(self._looks.identities(parameters))
        return binding if binding is not None and self._is_current(binding, parameters) else None

    def _note_slices(self, args: Sequence[Any]) -> None:
        """Name the weights of which this graph multiplies a slice that was taken outside of it."""
        found = [
            base for i in self._slices if isinstance(base := args[i]._base, Parameter) and id(base) not in self._noted
        ]
        if found:
            self._noted |= set(map(id, found))
            self._decider.note_slices(found)

    def _is_current(self, binding: Binding, parameters: tuple[Any, ...]) -> bool:
        if binding.epoch != STORE.epoch or binding.generation != self.source.generation:
            return False
        return binding.watched.unchanged(parameters) and binding.merges.unchanged()

    def _forget(self, identity: int) -> None:
        for key in [key for key, binding in self._bindings.copy().items() if identity in binding.identities]:
            self._bindings.pop(key, None)

    def _adopt(self, values: tuple[Any, ...]) -> bool:
        """Whether some Parameters are lent; those that are new have got the identity of their weights."""
        if not adopt_at(self._places.values(), values):
            for model in Owners.of(values).models:
                adopt(model)
        lent = [anchor for value in values if isinstance(anchor := peek_anchor(value), Lent)]
        self._places.update((anchor.identity, anchor) for anchor in lent)
        return bool(lent)

    def bind(self, values: tuple[Any, ...], args: Sequence[Any] | None = None) -> Binding:
        """The variant for a graph's Parameters, in the order of its arguments, and their planes, packed now if they are not there.

        Args:
            values: the Parameters.
            args: all arguments of the call; ``verify: true`` replays it. None: nothing is replayed.

        Raises:
            VerifyError: a rewrite is not what it stands for, and the policy is strict or it cannot be taken back.
        """
        with self._lock:
            lent = self._adopt(values)
            looks = self._looks = self._looks or Looks.best()
            identities = tuple(map(identity_of if lent else id, values))
            called = identities if lent else looks.identities(values)
            found = self._bindings.get(called) if lent else None
            if found is not None and self._is_current(found, values):
                return found
            forget_tensors(self.pristine.graph)
            parameters: dict[int, Parameter] = dict(zip(self._slots, values, strict=True))
            generation = self.source.generation
            merges = Merges.of(values)
            session, decisions, variant, planes = self._packed(parameters)
            while args is not None and not self._verifier.holds(variant, decisions, parameters, args, planes, session):
                session, decisions, variant, planes = self._packed(parameters)
            settled = args is None or self._verifier.settled
            record(self.found, parameters, session, decisions, variant, self._decider.guard.asked)
            if settled:  # else the next call may refuse it, which must find the weights' values
                self._keep_lock(parameters, session, decisions, variant)
                if self.options.releases(self.source.policy):
                    release_packed(parameters, variant)
            packed = {slot for ref in variant.refs for slot in slots_of(ref)}
            positions = [i for i, slot in enumerate(self._slots) if slot in packed and _watchable(parameters[slot])]
            for key in [key for key, binding in self._bindings.copy().items() if binding.epoch != STORE.epoch]:
                self._bindings.pop(key, None)
            # Until no other thread changed any planes in between. Bounded: a graph with more groups of one weight than the store
            # keeps slabs for packs anew each time; its binding is then out of date and is made again at the next call.
            watch = Lendings.of if lent else partial(Watched.of, looks=looks)
            epoch, watched = -1, watch(values, positions)
            for _ in range(3):
                epoch, watched = STORE.epoch, watch(values, positions)
                planes = self._planes(variant, parameters, decisions)
                if epoch == STORE.epoch:
                    break
            pick = picker(variant.arguments)
            binding = Binding(frozenset(identities), variant, pick, planes, watched, merges, epoch, generation)
            if settled:
                self._bindings[called] = binding
            return binding

    def _packed(
        self, parameters: Mapping[int, Parameter]
    ) -> tuple[Sessions, dict[str, SiteDecision], Variant, tuple[Tensor, ...]]:
        """What is decided now for the weights of a call, the variant for that, and its planes."""
        session, decisions = self._decider.decide(parameters, late=True)
        variant = self._variants.get(parameters, session, decisions, True, self._verifier.as_written)
        refuse_released(parameters, variant)
        started, before = time.perf_counter(), STORE.packed
        if self._whole.positions:
            STORE.agree(self._distributed(parameters, decisions))
        planes = self._planes(variant, parameters, decisions)
        if before != STORE.packed:
            add_time(session, "packing", time.perf_counter() - started)
        return session, decisions, variant, planes

    def _keep_lock(
        self,
        parameters: Mapping[int, Parameter],
        sessions: Sessions,
        decisions: Mapping[str, SiteDecision],
        variant: Variant,
    ) -> None:
        keeper = keeper_of(self.options, parameters.values()) if parameters else None  # a graph between two others
        if keeper is not None:
            sites = sites_of(self.found, parameters, decisions, variant)
            keeper.keep(self.source.policy, self._target, sites, sessions)

    def _distributed(
        self, parameters: Mapping[int, Parameter], decisions: Mapping[str, SiteDecision]
    ) -> list[tuple[str, Parameter]]:
        """Weights that ranks have in parts and whose scales are of all parts; the guard's answer, which ranks measure, is not asked."""
        found = [(decision, parameters[slot]) for slot, decision in self.found.decided(decisions)]
        asked = [(d.name, p) for d, p in found if d.asked is not None and shares_scale(p, d.asked)]
        return list({id(p): (name, p) for name, p in asked}.values())

    def _planes(
        self,
        variant: Variant,
        parameters: Mapping[int, Parameter],
        decisions: Mapping[str, SiteDecision],
    ) -> tuple[Tensor, ...]:
        names = {slot: decision.name for slot, decision in self.found.decided(decisions)}  # for errors
        for block in self.found.blocks:
            names |= dict(zip(block.slots, weight_names(decisions[block.node.name].name, block), strict=True))
        return tuple(_resolve(ref, parameters, names) for ref in variant.refs)


def _watchable(parameter: Parameter) -> bool:
    entry = STORE.peek(parameter)
    released = entry is not None and entry.released
    return parameter.dim() > 0 and not released


def _resolve(ref: Ref, parameters: Mapping[int, Parameter], names: Mapping[int, str]) -> Tensor:
    if isinstance(ref, BiasRef):
        return _joined_bias(ref, parameters)
    if isinstance(ref, ExpertBiasRef):
        return _expert_bias(ref, parameters)
    if isinstance(ref, ExpertRef):
        key = Key(ref.spec, ref.layout, ref.transposed, ref.dtype, ref.interleaved, ref.view)
        return STORE.expert_planes(parameters[ref.slot], key, ref.problem, names.get(ref.slot, "a weight"))[ref.index]
    weights, called = (
        tuple(parameters[slot] for slot in ref.slots),
        tuple(names.get(slot, "a weight") for slot in ref.slots),
    )
    if isinstance(ref, ScaleRef):
        return STORE.input_scale(weights, called)
    if isinstance(ref, FactorRef):
        return STORE.input_factor(weights[0], ref.dtype)
    keys = tuple(Key(ref.spec, ref.layout, flag, ref.dtype, view=view) for flag, view in ref.stored)
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
            bias = gates_first(bias, 1)
        return bias.to(ref.dtype).contiguous()
