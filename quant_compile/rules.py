"""Rules: which weights they match, what they decide, and the conventions that stand behind the user's own.

Reads names, module classes and sizes of weights; knows neither files nor models.
"""

from __future__ import annotations

import fnmatch
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from quant_compile.ir.errors import PolicyError
from quant_compile.ir.kv import CacheScheme
from quant_compile.ir.scheme import Scheme

_COMPARE: dict[str, Callable[[int, int], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
    "%": lambda value, number: value % number == 0,
}


@dataclass(frozen=True)
class SiteInfo:
    """What rules see of one weight.

    Attributes:
        names: every qualified name of the Parameter without its ``.weight``: ``("model.embed_tokens", "lm_head")``.
        kind: ``linear`` or ``moe`` (an expert parameter with a leading expert dimension).
        module_class: class name of the module that holds it, None when unknown.
        n: output features.
        k: input features.
        is_output_embedding: it is what ``model.get_output_embeddings()`` multiplies by.
        blocks: names of the expert blocks that it belongs to; rules may name these as well.
        role: what it was found to be that keeps its precision by convention (``LoRA adapter``), or empty.
    """

    names: tuple[str, ...]
    kind: str
    module_class: str | None
    n: int
    k: int
    is_output_embedding: bool = False
    blocks: tuple[str, ...] = ()
    role: str = ""


@dataclass(frozen=True)
class Condition:
    """One shape condition: ``k >= 4096``, or ``k % 128`` for "k is a multiple of 128"."""

    dim: str
    op: str
    value: int

    def holds(self, site: SiteInfo) -> bool:
        """Whether the site's n or k meets it."""
        return _COMPARE[self.op](site.n if self.dim == "n" else site.k, self.value)

    @property
    def text(self) -> str:
        """As it is written in a policy: ``>=4096``."""
        return f"{self.op}{self.value}"


@dataclass(frozen=True)
class Rule:
    """One rule: which weights, and their scheme.

    Attributes:
        match: a glob, ``re:`` and a regular expression, or a plain name that also matches as the end of a dotted name.
        scheme: None keeps the weight as it is.
        kind: only sites of this kind.
        module: only weights of modules whose class name is this (a glob is allowed).
        where: shape conditions that must all hold.
        reason: the author's words, shown in plans and ledgers.
        line: line in the policy file.
        convention: a built-in rule, not the user's.
        requantize: also weights that a checkpoint has quantized; None: as the policy says.
    """

    match: str
    scheme: Scheme | None = None
    kind: str | None = None
    module: str | None = None
    where: tuple[Condition, ...] = ()
    reason: str | None = None
    line: int | None = field(default=None, compare=False)
    convention: bool = False
    requantize: bool | None = None

    def matches(self, site: SiteInfo) -> bool:
        """Whether the rule applies to ``site``; any alias of the weight may be the one that its pattern hits."""
        if self.kind is not None and self.kind != site.kind:
            return False
        if self.module is not None and not fnmatch.fnmatchcase(site.module_class or "", self.module):
            return False
        hits = matcher(self.match)
        return any(hits(name) for name in (*site.names, *site.blocks)) and all(
            condition.holds(site) for condition in self.where
        )

    @property
    def selector(self) -> str:
        """The rule's conditions in one line, for messages."""
        parts = [f'match "{self.match}"']
        parts += [f"kind {self.kind}"] if self.kind else []
        parts += [f"module {self.module}"] if self.module else []
        parts += [f"{condition.dim} {condition.text}" for condition in self.where]
        return ", ".join(parts)


@lru_cache(maxsize=4096)
def matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a name matches a rule's pattern; ``re.error`` where it is no regular expression."""
    if pattern.startswith("re:"):
        regex = re.compile(pattern[3:])
        return lambda name: regex.fullmatch(name) is not None
    if any(wildcard in pattern for wildcard in "*?["):
        glob = re.compile(fnmatch.translate(pattern))
        return lambda name: glob.match(name) is not None
    return lambda name: name == pattern or name.endswith("." + pattern)


def _convention(match: str, what: str) -> Rule:
    return Rule(match, reason=what, convention=True)


_HEAD, ROUTER, _ADAPTER = "output head", "MoE router gate", "LoRA adapter"
_ROUTER_NAMES = (
    *("mlp.gate", "block_sparse_moe.gate", "shared_expert_gate", "router", "router.layer"),
    *("router.proj", "router.gate", "router.classifier", "gate.wg", "moe.gate"),
)
# A proj_out inside a numbered block (diffusion transformers) is an ordinary linear, so no part of the name is a number.
CONVENTIONS = (
    _convention("lm_head", _HEAD),
    _convention(r"re:(?:[^.\d][^.]*\.)*proj_out", _HEAD),
    _convention("embed_out", _HEAD),
    *(_convention(name, ROUTER) for name in _ROUTER_NAMES),
)
# Beside names: the parts of a router of several layers, the classes that most families have for theirs, hand-written LoRA.
FURTHER_CONVENTIONS = (
    _convention(r"re:(?:.*\.)?mlp\.gate\..*", ROUTER),
    Rule("*", module="*Top[kK]Router", reason=ROUTER, convention=True),
    _convention(r"re:(?:.*\.)?lora_(?:A|B|embedding_A|embedding_B)(?:\..*)?", _ADAPTER),
)


@dataclass(frozen=True)
class CacheRule:
    """One rule of the KV cache: which layers, and how they keep K and V.

    Attributes:
        match: as in ``Rule``, of the name of a decoder's layer (``model.layers.3``).
        scheme: None: in 16 bits.
        reason: the author's words.
        line: line in the policy file.
    """

    match: str
    scheme: CacheScheme | None = None
    reason: str | None = None
    line: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class CacheRules:
    """How a policy lets layers keep K and V; the first rule that matches decides.

    Attributes:
        default: of layers that no rule names; None: 16 bits.
    """

    default: CacheScheme | None
    rules: tuple[CacheRule, ...] = ()

    def of(self, layer: str) -> CacheScheme | None:
        """The scheme of a layer."""
        return next((rule.scheme for rule in self.rules if matcher(rule.match)(layer)), self.default)

    def unused(self, layers: Iterable[str]) -> list[str]:
        """Patterns of rules that name no layer."""
        names = list(layers)
        return [rule.match for rule in self.rules if not any(map(matcher(rule.match), names))]

    @property
    def schemes(self) -> tuple[CacheScheme, ...]:
        """Every scheme that it can give."""
        named = (self.default, *(rule.scheme for rule in self.rules))
        return tuple(dict.fromkeys(scheme for scheme in named if scheme is not None))


def scale_key(name: str) -> str:
    """Where a scales file keeps the input scale of a weight, with or without its ``.weight``."""
    return f"{name.removesuffix('.weight')}.input_scale"


# Where a scales file's metadata say which scheme the scales of each layer's cache are of: JSON, layer -> name.
CACHE_SCHEMES = "kv_cache"


def cache_scale_key(layer: str, side: str) -> str:
    """Where a scales file keeps the fixed scales of a decoder layer's K or V (``side``: ``k`` or ``v``)."""
    return f"{layer}.{side}_scale"


TWO_SCHEMES = "the policy gives its two weights different schemes; an expert block has one, or two GGUF types"


def one_refuses(name: str, reason: str) -> str:
    """Why an expert block is kept one of whose weights cannot have its scheme."""
    return f"{name.rpartition('.')[2]} refuses, and an expert block has one scheme: {reason}"


@dataclass(frozen=True)
class Decision:
    """What a policy says of one weight.

    Attributes:
        scheme: None keeps the weight as it is.
        reason: why, in words for the ledger.
        origin: ``rule``, ``convention`` or ``default``.
        rule: index into ``Policy.rules`` when a rule of the user decided.
        line: line of that rule in the policy file.
        refused: the policy names a scheme but the weight cannot have it; ``scheme`` is None and ``reason`` says why.
        requantize: it holds for a weight that a checkpoint has quantized as well.
    """

    scheme: Scheme | None
    reason: str
    origin: str
    rule: int | None = None
    line: int | None = None
    refused: bool = False
    requantize: bool = False


def conventional(site: SiteInfo) -> str | None:
    """What a weight is that keeps its precision by convention, or None."""
    for rule in (*CONVENTIONS, *FURTHER_CONVENTIONS):
        if rule.matches(site):
            return rule.reason
    return site.role or (_HEAD if site.is_output_embedding else None)


def rule_reason(index: int, rule: Rule) -> str:
    """A rule's selector and its author's words, for ledgers."""
    line = f", line {rule.line}" if rule.line is not None else ""
    author = f": {rule.reason}" if rule.reason else ""
    return f"rule {index + 1} ({rule.selector}{line}){author}"


class Decides(Protocol):
    """A policy as plans and ledgers need it: its labels, and what it says of a weight."""

    @property
    def name(self) -> str:
        """Label in reports."""
        ...

    @property
    def source(self) -> str | None:
        """File it came from."""
        ...

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The user's rules."""
        ...

    @property
    def strict(self) -> bool:
        """A rule without effect is an error."""
        ...

    @property
    def allow_reference(self) -> bool:
        """The slow torch reference may serve on a GPU."""
        ...

    @property
    def fallback(self) -> str | None:
        """What serves where no kernel multiplies a scheme's inputs."""
        ...

    @property
    def scales(self) -> Path | None:
        """File of calibrated input scales."""
        ...

    @property
    def content_hash(self) -> str:
        """Hash over everything that decides what is computed."""
        ...

    def decide(self, site: SiteInfo) -> Decision:
        """What a weight gets."""
        ...


def strict_error(policy: Decides, what: str, found: Iterable[str], fix: str) -> PolicyError:
    """What a strict policy raises.

    Args:
        what: continues "the policy is strict".
        found: one line each; those alike are one.
        fix: a sentence.
    """
    listed = "\n".join(f"  {text}" for text in dict.fromkeys(found))
    return PolicyError(f"{policy.source or policy.name}: the policy is strict{what}:\n{listed}\nFix: {fix}")
