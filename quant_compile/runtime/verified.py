"""``verify: true``: a graph's rewrites are replayed on the inputs of its first call, and what is not what it stands for is refused.

The replay comes at the call and not while Dynamo traces, since there neither inputs nor planes have values; the compiled graph has not
run then. Reads graphs, planes and inputs; writes refusals and errors to the ledger, from which the next decision takes them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import groupby
from typing import Any

from torch import Tensor, fx
from torch.nn import Parameter

from quant_compile.ir.errors import VerifyError
from quant_compile.ir.graph import slots_of
from quant_compile.lowering.identity import identity_of, signature_of
from quant_compile.lowering.latent import AbsorbedDispatch
from quant_compile.lowering.weights import STORE
from quant_compile.model.ledger import LEDGER, Sessions
from quant_compile.options import Options, PolicySource
from quant_compile.passes.plan import SiteDecision, dispatches_of
from quant_compile.runtime.decide import Found, add_time
from quant_compile.runtime.replay import Comparison, replay
from quant_compile.runtime.truth import truths
from quant_compile.runtime.variant import Variant

# Calls whose results are zeros, or no numbers, prove nothing: so many are replayed before the graph runs unproven.
TRIES = 4
STAYS = "attention stays as the model wrote it"


class Verifier:
    """What proves the variants of one graph."""

    def __init__(self, pristine: fx.GraphModule, found: Found, source: PolicySource, options: Options) -> None:
        self.pristine, self.found, self.source, self.options = pristine, found, source, options
        self._proven = set[Hashable]()
        self._tries: Counter[Hashable] = Counter()
        self.settled = True  # after ``holds``: the next call of this variant need not ask
        self.as_written = False  # attention was refused

    @property
    def asked(self) -> bool:
        """Whether the options or the policy ask for it."""
        return self.options.verifies(self.source.policy)

    def holds(
        self,
        variant: Variant,
        decisions: Mapping[str, SiteDecision],
        parameters: Mapping[int, Parameter],
        arguments: Sequence[Any],
        planes: Sequence[Tensor],
        sessions: Sessions,
    ) -> bool:
        """Whether every rewrite of a variant is what it stands for; else the ledger has what is not, and another decision is due.

        Args:
            variant: lowered and compiled.
            decisions: that it was made for.
            parameters: the weights of this call, by slot.
            arguments: of this call.
            planes: of the weights.

        Raises:
            VerifyError: the policy is strict, or what is wrong cannot stay as the model wrote it.
        """
        self.settled = True
        if not self.asked:
            return True
        packed = sorted({slot for ref in variant.refs for slot in slots_of(ref)})
        key = (id(variant), *((identity_of(parameters[i]), signature_of(parameters[i])) for i in packed))
        if key in self._proven:
            return True
        started = time.perf_counter()
        found = list(self._replayed(variant, decisions, parameters, arguments, planes))
        add_time(sessions, "verify", time.perf_counter() - started)
        wrong = [comparison for comparison in found if not comparison.holds]
        if not wrong:
            self._tries[key] += 1
            silent = [comparison for comparison in found if not comparison.telling]
            self.settled = not silent or self._tries[key] >= TRIES
            if self.settled:
                self._proven.add(key)
            self._record([comparison for comparison in found if comparison.telling], decisions, parameters)
            if silent and self.settled:
                sessions.note(f"verify: not proven, as {TRIES} calls gave zeros or no numbers: {silent[0].what}")
            return True
        self._refuse(wrong, decisions, parameters, sessions)
        return False

    def _replayed(
        self,
        variant: Variant,
        decisions: Mapping[str, SiteDecision],
        parameters: Mapping[int, Parameter],
        arguments: Sequence[Any],
        planes: Sequence[Tensor],
    ) -> Any:
        dispatches = dispatches_of(variant.reports)
        absorbed = frozenset(slot for slot, one in dispatches.items() if isinstance(one, AbsorbedDispatch))
        blocks = [block for block in self.found.blocks if decisions[block.node.name].schemes is not None]
        inside = frozenset(node for block in blocks for node in block.nodes if node is not block.node)
        wanted = truths(self.found, decisions, parameters, absorbed)
        return replay(self.pristine, variant.lowered, wanted, inside, arguments, planes)

    def _sites(self, decisions: Mapping[str, SiteDecision]) -> dict[str, tuple[int, ...]]:
        """Name of each site's node, and of its weight, -> slots."""
        found: list[tuple[str, tuple[int, ...]]] = [
            (site.node.name, (site.slot,)) for site in (*self.found.linears, *self.found.batched)
        ]
        found += [(block.node.name, block.slots) for block in self.found.blocks]
        found = [(node, slots) for node, slots in found if decisions[node].scheme is not None]
        return dict(found) | {decisions[node].name: slots for node, slots in found}

    def _record(
        self, found: Sequence[Comparison], decisions: Mapping[str, SiteDecision], parameters: Mapping[int, Parameter]
    ) -> None:
        sites = self._sites(decisions)
        for comparison in found:
            for slot in sites.get(comparison.original, ()):
                record = LEDGER.record(parameters[slot])
                record.verified = max(record.verified or 0.0, comparison.error)

    def _refuse(
        self,
        wrong: Sequence[Comparison],
        decisions: Mapping[str, SiteDecision],
        parameters: Mapping[int, Parameter],
        sessions: Sessions,
    ) -> None:
        """Note what is wrong where the next decision finds it.

        Raises:
            VerifyError: as ``holds``.
        """
        sites, named = self._sites(decisions), {slot: d.name for slot, d in self.found.decided(decisions)}
        stuck: list[str] = []
        refused: list[tuple[int, str]] = []
        for comparison in wrong:
            slots = sites.get(comparison.original, ())
            if not slots:
                slots = tuple(s for name in comparison.names or comparison.readers for s in sites.get(name, ()))
            text = f"verify: {comparison.text}"
            released = [named[slot] for slot in slots if STORE.entry(parameters[slot]).released]
            if released:
                stuck.append(f"{', '.join(released)}: {text}; its original values are released")
            elif slots:
                refused += [(slot, text) for slot in slots]
            elif not comparison.attention or self.as_written:
                stuck.append(f"{comparison.original}: {text}")
        if stuck or self.source.policy.strict:  # nothing is noted, so that the next call says the same
            raise VerifyError(_message(stuck or [f"{_where(c, named, sites)}: {c.text}" for c in wrong], bool(stuck)))
        for slot, text in refused:
            LEDGER.record(parameters[slot]).refusals.setdefault(_spec(slot, self.found, decisions), text)
        attention = [comparison for comparison in wrong if comparison.attention]
        if attention and not self.as_written:
            self.as_written = True
            more = f", and {len(attention) - 1} more" if len(attention) > 1 else ""
            sessions.note(f"{STAYS}: verify: {attention[0].text}{more}")


def _where(comparison: Comparison, named: Mapping[int, str], sites: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(named[slot] for slot in sites.get(comparison.original, ())) or comparison.original


def _message(found: Sequence[str], stuck: bool) -> str:
    lines = [text for text, _ in groupby(found)]
    shown = [f"  {line}" for line in lines[:20]] + ([f"  and {len(lines) - 20} more"] if len(lines) > 20 else [])
    why = "and cannot be taken back" if stuck else "and the policy is strict"
    fix = "release_weights: false" if stuck else "strict: false keeps these weights in 16 bits"
    return "\n".join(
        [
            f"verify: {'1 rewrite is' if len(lines) == 1 else f'{len(lines)} rewrites are'} not what the model wrote, {why}:",
            *shown,
            f"Fix: {fix}; or pin another kernel (kernels=), turn the rewrite off (fuse:, attention: keep), and report it.",
        ]
    )


def _spec(slot: int, found: Found, decisions: Mapping[str, SiteDecision]) -> str:
    return next(d.scheme.spec for s, d in found.decided(decisions) if s == slot and d.scheme is not None)
