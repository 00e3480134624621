"""What a bound variant means for the model: lines in the ledger, weights that may be released, and those that may not.

Reads decisions, variants and the options; writes to the ledger and, where the user asks for it, releases originals.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch.nn import Parameter

from quant_compile.ir.errors import ReleasedWeightError
from quant_compile.ir.graph import ExpertRef, PlaneRef
from quant_compile.lowering.weights import STORE, claim
from quant_compile.model.ledger import LEDGER, Record, Sessions
from quant_compile.model.names import Owners
from quant_compile.model.weights import linear_weights
from quant_compile.passes.fuse_all_reduce import sums_in_words
from quant_compile.passes.plan import PassReport, SiteDecision, dispatches_of
from quant_compile.rules import Decides
from quant_compile.runtime.decide import Found
from quant_compile.runtime.variant import Variant

ALSO_PLAIN = "also read unquantized (tied embedding or another use)"

GUARDED = "read in 16 bits by the guard"


def record(
    found: Found,
    parameters: Mapping[int, Parameter],
    sessions: Sessions,
    decisions: Mapping[str, SiteDecision],
    variant: Variant,
    guards: bool = False,
) -> None:
    """Write what became of every weight of a graph to the ledger.

    Args:
        guards: ``guard: never_slower`` is on.
    """
    dispatch_of = dispatches_of(variant.reports)
    kept = set[int]()
    for slot, decision in found.decided(decisions):
        parameter = parameters[slot]
        record = LEDGER.record(parameter)
        _begin(record, parameter, decision, guards)
        if decision.guard:
            record.guarded[decision.guard] = None
            kept.add(slot)
        elif decision.scheme is not None:
            dispatch = dispatch_of[slot]
            record.layout = dispatch.layout
            record.kernels[dispatch.ranges] = None
    _show(variant, parameters)
    for slot in variant.arguments:
        parameter = parameters.get(slot)
        if slot in kept:
            STORE.entry(parameters[slot]).plain_readers.add(GUARDED)
        elif parameter is not None and parameter.dim() > 1:
            LEDGER.record(parameter).readers[ALSO_PLAIN] = None
            STORE.entry(parameter).plain_readers.add(ALSO_PLAIN)
    for report in variant.reports:
        sessions.attend(report.attention)
        for note in _notes(report):
            sessions.note(note)


def _notes(report: PassReport) -> list[str]:
    """What the user should know of a pass."""
    if report.name == "merge_siblings":
        return [f"not merged: {refusal}" for refusal in report.refused]
    return sums_in_words(report) if report.name == "fuse_all_reduce" else []


def _show(variant: Variant, parameters: Mapping[int, Parameter]) -> None:
    """What the variant does with each weight, for the report; after ``_begin``, which forgets what another scheme's did."""
    for slot, view in variant.views.of_weights().items():
        LEDGER.record(parameters[slot]).views[view] = None


def _begin(record: Record, parameter: Parameter, decision: SiteDecision, guards: bool) -> None:
    """A decision of a weight, which other graphs share; what was written under another is forgotten."""
    record.named = decision.asked is not None or decision.refused
    record.reason = decision.reason
    spec = decision.asked.spec if decision.asked else None
    if spec != record.scheme:
        record.views.clear()
        record.verified = None
        record.kernels.clear()
        record.readers.clear()
        STORE.entry(parameter).plain_readers.clear()
    if (spec, guards) != (record.scheme, record.guards):
        record.kernels.clear()
        record.guarded.clear()
        STORE.entry(parameter).plain_readers.discard(GUARDED)
    record.scheme, record.guards = spec, guards
    STORE.keep_only(parameter, spec)


def claim_weights(found: Found, policy: Decides, parameters: Mapping[int, Parameter]) -> None:
    """Every weight of the model that the policy names becomes releasable now, before guards over its class exist."""
    for model in Owners.of(parameters.values()).models:
        for weight in linear_weights(model):
            if not weight.in_embedding and policy.decide(weight.site).scheme is not None:
                claim(weight.parameter)
    for slot in found.read:
        claim(parameters[slot])


def release_packed(parameters: Mapping[int, Parameter], variant: Variant) -> None:
    """Release the originals of a bound variant's weights that nothing else reads."""
    models = Owners.of(parameters.values()).models
    embedded = {id(w.parameter) for model in models for w in linear_weights(model) if w.in_embedding}
    for ref in variant.refs:
        if isinstance(ref, PlaneRef | ExpertRef) and ref.index == 0:
            for slot in ref.slots if isinstance(ref, PlaneRef) else (ref.slot,):
                if slot not in variant.arguments and id(parameters[slot]) not in embedded:
                    STORE.release(parameters[slot])


def refuse_released(parameters: Mapping[int, Parameter], variant: Variant) -> None:
    """Raise where a variant reads a weight whose values are gone.

    Raises:
        ReleasedWeightError: with the weight's shape and the fix.
    """
    for slot in variant.arguments:
        parameter = parameters.get(slot)
        entry = STORE.peek(parameter) if parameter is not None else None
        if entry is not None and entry.released:
            raise ReleasedWeightError(
                f"a graph reads a weight of shape {tuple(parameter.shape)} unquantized, but its original values were released.\n"  # type: ignore[union-attr]
                "Fix: quant_compile.restore(model, source), or give this weight one scheme in every graph."
            )
