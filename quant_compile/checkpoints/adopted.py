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
from quant_compile.model.weights import Weight, linear_weights
from quant_compile.policy import Policy
from quant_compile.rules import Rule

OWN = "checkpoint"
"""How the name of a policy begins that is a checkpoint's own."""


def policy_of(
    model: nn.Module,
    outcomes: Sequence[Outcome],
    description: Description,
    given: Policy | None,
    fallback: str | None = None,
) -> Policy:
    """The policy under which a filled model is compiled; ``fallback`` is that of a model without ``given``.

    Raises:
        PolicyError: a rule of the user's gives a weight another scheme than the checkpoint has it in, and does not say ``requantize``.
    """
    by_name = {outcome.name.removesuffix(".weight"): outcome for outcome in outcomes if outcome.quantized}
    weights = [(weight, _outcome(weight, by_name)) for weight in linear_weights(model)]
    if given is None:
        name = f"{OWN} ({description.method})"
        return Policy(None, tuple(_rules(weights)), name=name, release_weights=True, fallback=fallback)
    _check(given, weights, description)
    decided = [given.decide(weight.site) for weight, _ in weights]
    own = [o is not None and o.by_policy and d.rule is not None for (_, o), d in zip(weights, decided, strict=True)]
    rules = tuple(_rules([(w, None if by_rule else o) for (w, o), by_rule in zip(weights, own, strict=True)]))
    users = list(given.rules)
    for (_, outcome), decision, by_rule in zip(weights, decided, own, strict=True):
        if by_rule and outcome is not None and outcome.scheme is None and decision.rule is not None:
            users[decision.rule] = _told(users[decision.rule], f"dequantized from {outcome.was}")
    name = f"{description.method} checkpoint, {given.name}"
    return replace(given, rules=(*rules, *users), name=name)


def _told(rule: Rule, what: str) -> Rule:
    """A rule of the user's whose reason says what became of the weights that stay in 16 bits: they have no planes to say so."""
    said = rule.reason.split("; ") if rule.reason else []
    return rule if what in said else replace(rule, reason="; ".join([*said, what]))


def _outcome(weight: Weight, by_name: dict[str, Outcome]) -> Outcome | None:
    return next((by_name[name] for name in weight.site.names if name in by_name), None)


def _rules(weights: Sequence[tuple[Weight, Outcome | None]]) -> Iterable[Rule]:
    outcomes = {weight.site.names[0]: outcome for weight, outcome in weights}
    values = {n: None if o is None else (o.scheme, o.was, o.notes if o.was else ()) for n, o in outcomes.items()}
    for pattern, name in alike(values):
        if outcomes[name] is not None:
            yield _rule(f"re:{pattern}" if re.search(r"\d", name) else name, outcomes[name])


def _rule(match: str, outcome: Outcome | None) -> Rule:
    assert outcome is not None
    how = ["as the checkpoint has it"] if outcome.scheme is not None else []
    if outcome.was:
        changed = "dequantized" if outcome.scheme is None else "requantized"
        how = [f"{changed} from {outcome.was}", *(["default of the policy"] if outcome.by_policy else [])]
    return Rule(match, outcome.scheme, reason="; ".join((*how, *outcome.notes)))


def _check(given: Policy, weights: Sequence[tuple[Weight, Outcome | None]], description: Description) -> None:
    for weight, outcome in weights:
        decision = given.decide(weight.site)
        if outcome is None or decision.origin != "rule" or outcome.by_policy:
            continue
        stored = outcome.was or (outcome.scheme.spec if outcome.scheme is not None else outcome.source)
        wanted = "keep" if decision.scheme is None else decision.scheme.spec
        if wanted == stored or decision.scheme == outcome.scheme:
            continue
        fix = (
            "give the weights of its expert block one scheme, all with `requantize: true`"
            if decision.requantize
            else "add `requantize: true` to the rule, take this weight out of it, or load a checkpoint that has it in 16 bits"
        )
        raise PolicyError(
            f"{weight.site.names[0]}: {given.source or given.name} says {wanted} ({decision.reason}), and "
            f"{description.where} has it in {stored}.\nFix: {fix}."
        )
