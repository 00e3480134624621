"""The policy of a filled model: rules that name what the checkpoint has quantized, then the user's own.

Reads outcomes and the names of the model's weights. A rule stands for all weights whose names differ only in numbers where these have one
scheme, so that a ledger's reason fits a line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from quant_compile.checkpoints.description import Description, alike
from quant_compile.checkpoints.fill import Outcome
from quant_compile.ir.errors import PolicyError
from quant_compile.ir.scheme import Scheme
from quant_compile.model.weights import Weight, linear_weights
from quant_compile.policy import Policy
from quant_compile.rules import Rule

OWN = "checkpoint"
"""How the name of a policy begins that is a checkpoint's own."""


def policy_of(model: nn.Module, outcomes: Sequence[Outcome], description: Description, given: Policy | None) -> Policy:
    """The policy under which a filled model is compiled.

    Raises:
        PolicyError: a rule of the user's gives a weight another scheme than the checkpoint has it in.
    """
    by_name = {outcome.name.removesuffix(".weight"): outcome for outcome in outcomes if outcome.quantized}
    weights = [(weight, _outcome(weight, by_name)) for weight in linear_weights(model)]
    rules = tuple(_rules([(weight, outcome) for weight, outcome in weights]))
    if given is None:
        return Policy(None, rules, name=f"{OWN} ({description.method})", release_weights=True)
    _check(given, weights, description)
    return replace(given, rules=(*rules, *given.rules), name=f"{description.method} checkpoint, {given.name}")


def _outcome(weight: Weight, by_name: dict[str, Outcome]) -> Outcome | None:
    return next((by_name[name] for name in weight.site.names if name in by_name), None)


def _rules(weights: Sequence[tuple[Weight, Outcome | None]]) -> Iterable[Rule]:
    outcomes = {weight.site.names[0]: outcome for weight, outcome in weights}
    for pattern, name in alike({n: None if o is None else (o.scheme,) for n, o in outcomes.items()}):
        if outcomes[name] is not None:
            yield _rule(f"re:{pattern}" if re.search(r"\d", name) else name, outcomes[name])


def _rule(match: str, outcome: Outcome | None) -> Rule:
    assert outcome is not None
    reason = "; ".join(("as the checkpoint has it", *outcome.notes) if outcome.scheme else outcome.notes)
    return Rule(match, outcome.scheme, reason=reason)


def _check(given: Policy, weights: Sequence[tuple[Weight, Outcome | None]], description: Description) -> None:
    for weight, outcome in weights:
        decision = given.decide(weight.site)
        if outcome is None or outcome.scheme is None or decision.origin != "rule" or decision.scheme == outcome.scheme:
            continue
        wanted = "keep" if decision.scheme is None else decision.scheme.spec
        raise PolicyError(
            f"{weight.site.names[0]}: {given.source or given.name} says {wanted} ({decision.reason}), and "
            f"{description.where} has it in {outcome.scheme.spec}.\n"
            "Fix: take this weight out of the rule, or load a checkpoint that has it in 16 bits."
        )


def scheme_by_policy(model: nn.Module, given: Policy | None) -> dict[str, Scheme]:
    """First name of every weight that the user's policy names -> its scheme; those that an embedding reads are left out."""
    from quant_compile.model.plan import Plan

    if given is None:
        return {}
    embedded = {weight.site.names for weight in linear_weights(model) if weight.in_embedding}
    entries = Plan.of(given, model).entries
    return {e.names[0]: e.decision.scheme for e in entries if e.decision.scheme is not None and e.names not in embedded}
