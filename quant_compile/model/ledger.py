"""What this process remembers of every Parameter that a compiled graph has read, and the report made of it.

Graphs write here when they are compiled and when they meet new Parameters; ``report(model)`` reads. Parameters and models
are held weakly.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import nn

from quant_compile.ir.numerics import dtype_name
from quant_compile.ir.report import AttentionLine, Report, WeightLine
from quant_compile.ir.scheme import parse
from quant_compile.lowering.identity import Anchor, anchor_of, identity_of, peek_anchor, shard_of
from quant_compile.lowering.weights import STORE, Entry
from quant_compile.model.names import Names, names_in
from quant_compile.model.offload import adopt
from quant_compile.model.places import parameters_of, unwrap
from quant_compile.model.weights import Weight, linear_weights, possible_weights
from quant_compile.page.views import SiteView
from quant_compile.rules import Decides

MORE_COPIES = "packed more than once: graphs join it with different siblings, and its layout cannot be cut"


@dataclass(eq=False)
class Record:
    """What graphs said of one Parameter.

    Attributes:
        misses: products that read it unquantized; readers: other reads beside a quantized one; uses: of a weight that is none of a linear.
        guarded: both times of every graph that reads it in 16 bits since these are faster there; the others have ``kernels``.
        guards: the graphs were compiled with the guard on.
        views: what graphs do with it, one for each way; drawn when they are called.
        verified: the largest error of what graphs do with it, where ``verify: true`` has replayed that.
        refusals: by a scheme's spec, why ``verify: true`` refuses it.
    """

    ref: weakref.ref[Anchor]
    scheme: str | None = None
    named: bool = False
    reason: str = ""
    kernels: dict[str, None] = field(default_factory=dict)
    layout: str = ""
    misses: dict[str, None] = field(default_factory=dict)
    readers: dict[str, None] = field(default_factory=dict)
    uses: dict[str, None] = field(default_factory=dict)
    guarded: dict[str, None] = field(default_factory=dict)
    guards: bool = False
    views: dict[Callable[[], SiteView], None] = field(default_factory=dict)
    verified: float | None = None
    refusals: dict[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class Session:
    """What is remembered of one model (or of calls whose model is unknown)."""

    policy: Decides
    target: str
    notes: dict[str, None] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    checked: bool = False
    attention: dict[AttentionLine, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Sessions:
    """The sessions of all models whose weights one graph reads; what is said of the graph is said to each."""

    each: tuple[Session, ...]

    def note(self, text: str) -> None:
        """Add a note once."""
        for session in self.each:
            session.notes[text] = None

    def attend(self, lines: Iterable[AttentionLine]) -> None:
        """Count the attention of a graph; a kind that several graphs have counts as often as in that which has most."""
        for line, count in Counter(lines).items():
            for session in self.each:
                session.attention[line] = max(count, session.attention.get(line, 0))

    def seconds(self, key: str) -> float:
        """Spent on ``key`` so far, by the first model's account."""
        return self.each[0].timings.get(key, 0.0)


class Ledger:
    """Records by Parameter, sessions by model."""

    def __init__(self) -> None:
        self._records: dict[int, Record] = {}
        self._sessions: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()

    def record(self, parameter: nn.Parameter) -> Record:
        """The record of a Parameter, made on first sight."""
        anchor = anchor_of(parameter)
        identity = anchor.identity
        found = self._records.get(identity)
        if found is not None and found.ref() is anchor:
            return found

        def forget(dead: weakref.ref[Anchor]) -> None:
            current = self._records.get(identity)
            if current is not None and current.ref is dead:
                del self._records[identity]

        made = Record(weakref.ref(anchor, forget))
        self._records[identity] = made
        return made

    @contextmanager
    def aside(self, model: nn.Module) -> Generator[None]:
        """Inside, nothing is known of a model; afterwards what was known before, whatever is written meanwhile."""
        identities = [anchor_of(parameter).identity for parameter in parameters_of(model)]
        records = {identity: self._records.pop(identity) for identity in identities if identity in self._records}
        session = self._sessions.pop(model, None)
        try:
            yield
        finally:
            for identity in identities:
                self._records.pop(identity, None)
            self._records |= records
            self._sessions.pop(model, None)
            if session is not None:
                self._sessions[model] = session

    def forget(self, model: nn.Module) -> None:
        """A model is not compiled any more: what is known of it alone goes."""
        self._sessions.pop(model, None)
        others = {id(p) for other in list(self._sessions) for p in parameters_of(other)}
        for parameter in parameters_of(model):
            anchor = peek_anchor(parameter)
            if anchor is not None and id(parameter) not in others:
                self._records.pop(anchor.identity, None)

    def peek(self, parameter: nn.Parameter) -> Record | None:
        """The record of a Parameter if there is one."""
        anchor = peek_anchor(parameter)
        found = self._records.get(anchor.identity) if anchor is not None else None
        return found if found is not None and found.ref() is anchor else None

    def forget_refusals(self, model: nn.Module) -> None:
        """A model is compiled anew: what ``verify: true`` has refused is tried again, and what it has proven is not proven yet."""
        for parameter in parameters_of(model):
            record = self.peek(parameter)
            if record is not None:
                record.refusals.clear()
                record.verified = None

    def session(self, model: nn.Module, policy: Decides, target: str) -> Session:
        """The session of a model; a new policy starts a new one."""
        found = self._sessions.get(model)
        if found is None or (found.policy is not policy and found.policy.content_hash != policy.content_hash):
            found = self._sessions[model] = Session(policy, target)
        return found

    def report(self, model: nn.Module) -> Report:
        """The ledger of a model; see ``quant_compile.report``."""
        model = unwrap(model)
        adopt(model)
        session = self._session_of(model)
        # Of those that no graph has read, a class token or the like is no matrix.
        possible = [weight for weight in possible_weights(model) if min(weight.parameter.shape[-2:]) > 1]
        weights = {id(weight.parameter): weight for weight in [*possible, *linear_weights(model)]}
        names = names_in(model)
        lines: list[WeightLine] = []
        views: dict[SiteView, int] = {}
        misses: list[tuple[str, str]] = []
        for parameter in parameters_of(model):
            record = self.peek(parameter)
            known = names[id(parameter)]
            name = known.full
            line = self._line(known, parameter, record, STORE.peek(parameter), weights.get(id(parameter)), session)
            own = dict.fromkeys(view() for view in (record.views if record is not None else ()))
            seen = tuple(views.setdefault(view, len(views)) for view in own)
            shape, dtype, shard = tuple(parameter.shape), dtype_name(parameter.dtype), shard_of(parameter)
            verified = record.verified if record is not None and line.scheme else None
            line = replace(line, views=seen, shape=shape, dtype=dtype, verified=verified)
            if shard is not None:
                line = replace(line, shard=shard.placements, copies=shard.copies)
            lines.append(line)
            if record is not None and not line.named:
                misses += [(name[0], reason) for reason in record.misses]
        notes = [
            *(session.notes if session else {}),
            *([] if session else ["no compiled graph has read this model yet"]),
        ]
        timings = dict(session.timings) if session else {}
        policy, target = (session.policy.name, session.target) if session else ("none", "none")
        found = session.attention if session else {}
        attention = tuple(replace(line, count=count) for line, count in found.items())
        return Report(policy, target, tuple(lines), tuple(notes), tuple(misses), timings, attention, tuple(views))

    def policy_of(self, model: nn.Module) -> Decides | None:
        """The policy that a model was compiled with last; None: it was not compiled."""
        session = self._session_of(unwrap(model))
        return session.policy if session is not None else None

    def has_graphs(self, model: nn.Module) -> bool:
        """Whether any graph was made under the policy that a model was compiled with last."""
        session = self._session_of(unwrap(model))
        return session is not None and bool(session.timings)

    def _session_of(self, model: nn.Module) -> Session | None:
        found = self._sessions.get(model)
        if found is not None:
            return found
        inside = [self._sessions[m] for m in model.modules() if m in self._sessions]
        if inside:
            return inside[0]
        wanted = set(map(id, parameters_of(model)))
        around = (s for m, s in list(self._sessions.items()) if wanted and wanted <= set(map(id, parameters_of(m))))
        return next(around, None)

    def _line(
        self,
        known: Names,
        parameter: nn.Parameter,
        record: Record | None,
        entry: Entry | None,
        weight: Weight | None,
        session: Session | None,
    ) -> WeightLine:
        names, size = known.full, parameter.numel() * parameter.element_size()
        after = packed_bytes(parameter, entry)
        guarded = "; ".join(record.guarded) if record is not None else ""
        if record is not None and record.scheme is not None and after and (record.kernels or not guarded):
            copies = [MORE_COPIES] if entry is not None and entry.further else []
            missed = [f"unquantized in some graph: {miss.splitlines()[0]}" for miss in record.misses]
            adopted = [f"planes from {entry.source}"] if entry is not None and entry.source else []
            if entry is not None and not adopted and (label := entry.rounding.label(parse(record.scheme), parameter)):
                adopted = [label]
            reason = "; ".join([record.reason, *adopted, *record.guarded, *record.readers, *copies, *missed])
            if record.readers or guarded:
                after += size
            kernels = " / ".join(record.kernels)
            released = entry is not None and entry.released
            return WeightLine(
                names, size, after, record.scheme, record.layout, kernels, reason, True, released, bool(missed), guarded
            )
        named, reason = self._kept(known, record, weight, session)
        missed = bool(guarded and record is not None and record.misses)
        return WeightLine(names, size, size, None, "", "", reason, named, missed=missed, guarded=guarded)

    @staticmethod
    def _kept(known: Names, record: Record | None, weight: Weight | None, session: Session | None) -> tuple[bool, str]:
        if record is not None and record.scheme is not None and record.guarded and not record.kernels:
            return True, "; ".join([record.reason, *record.guarded, *record.misses])
        if record is not None and record.scheme is not None:
            return True, f"{record.scheme}: to be packed at the next call"
        if record is not None and (record.reason or record.misses):
            return record.named, "; ".join([*([record.reason] if record.reason else []), *record.misses])
        if record is not None and record.uses and not known.role and (weight is None or not weight.certain):
            return False, "; ".join(record.uses)
        if weight is None:
            return False, known.kept
        if session is None:
            return False, "not compiled yet"
        decision = session.policy.decide(weight.site)
        if decision.scheme is None:
            return decision.refused, decision.reason
        return True, f"{decision.scheme.spec} by the policy, but no compiled graph has read it as a linear"


def packed_bytes(parameter: nn.Parameter, entry: Entry | None) -> int:
    """Bytes of a Parameter's share of all its packed planes."""
    if entry is None:
        return 0
    total = 0
    for slab in entry.slabs():
        rows = dict(zip(slab.members, slab.rows, strict=True))
        size = sum(plane.numel() * plane.element_size() for plane in slab.planes)
        total += size * rows[identity_of(parameter)] // max(1, sum(slab.rows))
    if entry.input_scale is not None:
        total += entry.input_scale.numel() * entry.input_scale.element_size()
    return total


LEDGER = Ledger()
