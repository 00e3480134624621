"""A policy file as a person would write it: few rules, one for all layers that agree, with what each costs as a comment."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from quant_compile.ir.scheme import PRESETS, Scheme
from quant_compile.rules import matcher

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)|(?<=\.)\d+$|^\d+$")


@dataclass(frozen=True)
class Decided:
    """One weight and what was chosen for it.

    Attributes:
        name: the weight's.
        block: of its expert block, or empty.
        scheme: None keeps it.
        error, bytes, ms: its part of its group's.
    """

    name: str
    block: str
    scheme: Scheme | None
    error: float = 0.0
    bytes: int = 0
    elements: int = 1
    ms: float = 0.0


@dataclass
class _Unit:
    """Weights that differ in the first number of their names alone, and others beside them with the same choices."""

    before: str
    after: list[str]
    schemes: dict[str, Scheme | None]
    members: dict[str, list[Decided]] = field(default_factory=dict)


@dataclass(frozen=True)
class Ruled:
    """A rule, or the default (``match`` empty), and the weights that it decides."""

    match: str
    scheme: Scheme | None
    members: tuple[Decided, ...]


def rules_of(decided: Sequence[Decided], others: Iterable[str] = ()) -> list[Ruled]:
    """The default, then rules in their order; the first that matches decides.

    Args:
        decided: all weights that a rule or the default may decide.
        others: names that no rule may match.
    """
    names = list(others)
    made: list[Ruled] = []
    for style in (_easy, _exact):
        made = _rules(decided, style)
        if _is_right(made, decided, names):
            break
    return made


def _is_right(rules: Sequence[Ruled], decided: Iterable[Decided], others: Iterable[str]) -> bool:
    """Whether each weight gets its scheme, and nothing else is matched."""
    default, *matching = rules
    tests = [(matcher(rule.match), rule.scheme) for rule in matching]

    def found(names: Sequence[str]) -> list[Scheme | None]:
        return [scheme for hits, scheme in tests if any(map(hits, names))]

    for weight in decided:
        names = [weight.name, weight.block] if weight.block else [weight.name]
        if [*found(names), default.scheme][0] != weight.scheme:
            return False
    return not any(found([name]) for name in others)


Style = Callable[["_Unit", "Sequence[str] | None"], str]


def _rules(decided: Sequence[Decided], pattern: Style) -> list[Ruled]:
    counts: Counter[Scheme | None] = Counter()
    for weight in decided:
        counts[weight.scheme] += weight.elements
    default = counts.most_common(1)[0][0] if counts else None
    exceptions: list[Ruled] = []
    general: list[Ruled] = []
    plain: list[Decided] = []
    for unit in _units(decided):
        found = Counter(unit.schemes.values())
        usual = default if found[default] * 2 >= sum(found.values()) else found.most_common(1)[0][0]
        for scheme in sorted(found, key=_spec):
            layers = [layer for layer, own in unit.schemes.items() if own == scheme]
            members = tuple(member for layer in layers for member in unit.members[layer])
            if scheme == usual == default:
                plain += members
            elif scheme == usual:
                general.append(Ruled(pattern(unit, None), scheme, members))
            else:
                exceptions.append(Ruled(pattern(unit, layers), scheme, members))
    return [Ruled("", default, tuple(plain)), *exceptions, *general]


def _spec(scheme: Scheme | None) -> str:
    return scheme.spec if scheme else ""


def _units(decided: Iterable[Decided]) -> list[_Unit]:
    """Weights by their names around the first number, those of one module with the same choices together."""
    by_name: dict[tuple[str, str], _Unit] = {}
    named = [(_around(weight.name), weight) for weight in _by_blocks(decided)]
    # Further numbers are one, where weights that differ in them alone agree.
    schemes: dict[tuple[str, str, str], set[Scheme | None]] = {}
    for (before, layer, after), weight in named:
        schemes.setdefault((before, layer, _NUMBER.sub("#", after)), set()).add(weight.scheme)
    apart = {(before, after) for (before, _, after), found in schemes.items() if len(found) > 1}
    for (before, layer, after), weight in named:
        folded = _NUMBER.sub("#", after)
        after = after if (before, folded) in apart else folded
        unit = by_name.setdefault((before, after), _Unit(before, [after], {}))
        unit.schemes[layer] = weight.scheme
        unit.members.setdefault(layer, []).extend(weight.of)
    joined: dict[object, _Unit] = {}
    for (before, after), unit in by_name.items():
        parent = after.rpartition(".")[0] if "" not in unit.schemes else object()
        key = (before, parent, tuple(unit.schemes.items()))
        known = joined.get(key)
        if known is None:
            joined[key] = unit
            continue
        known.after += unit.after
        for layer, members in unit.members.items():
            known.members[layer] += members
    return list(joined.values())


def _around(name: str) -> tuple[str, str, str]:
    """A name before its first number, the number, and the rest; without a number the whole name comes before."""
    found = _NUMBER.search(name)
    return (name[: found.start()], found[0], name[found.end() :]) if found else (name, "", "")


@dataclass(frozen=True)
class _Named:
    name: str
    scheme: Scheme | None
    of: tuple[Decided, ...]


def _by_blocks(decided: Iterable[Decided]) -> list[_Named]:
    """Weights, those of an expert block under the block's name."""
    out: dict[str, list[Decided]] = {}
    for weight in decided:
        out.setdefault(weight.block or weight.name, []).append(weight)
    return [_Named(name, members[0].scheme, tuple(members)) for name, members in out.items()]


def _easy(unit: _Unit, layers: Sequence[str] | None) -> str:
    """What matches some layers of a unit, or all of them for None; as it is easy to read."""
    if "" in unit.schemes:
        return unit.before
    if len(unit.after) == 1 and "#" not in unit.after[0]:
        if layers is None:
            return f"{unit.before}*{unit.after[0]}"
        if len(layers) == 1:
            return f"{unit.before}{layers[0]}{unit.after[0]}"
    return _exact(unit, layers)


def _exact(unit: _Unit, layers: Sequence[str] | None) -> str:
    """The same as a regular expression of the whole name: names that end alike, and stars that go too far, do not matter."""
    if "" in unit.schemes:
        return f"re:{re.escape(unit.before)}"
    number = r"\d+" if layers is None else layers[0] if len(layers) == 1 else f"({'|'.join(layers)})"
    return f"re:{re.escape(unit.before)}{number}{_ends(unit.after)}"


def _ends(after: Sequence[str]) -> str:
    """A regular expression for some ends of names: ``\\.self_attn\\.(q|k|v)_proj``."""

    def plain(text: str) -> str:
        return re.escape(text).replace(r"\#", r"\d+")

    if len(after) == 1:
        return plain(after[0])
    parent = after[0].rpartition(".")[0]
    last = [text.rpartition(".")[2] for text in after]
    common = last[0][last[0].find("_") :] if "_" in last[0] else ""
    if not common or not all(text.endswith(common) and len(text) > len(common) for text in last):
        common = ""
    parts = "|".join(plain(text[: len(text) - len(common)]) for text in last)
    return rf"{plain(parent)}\.({parts}){plain(common)}"


def text_of(rules: Sequence[Ruled], name: str, head: Sequence[str], cost: Callable[[Sequence[Decided]], str]) -> str:
    """The file.

    Args:
        rules: the default first.
        name: of the policy.
        head: lines of the comment above all.
        cost: what some weights cost, in words.
    """
    default, *others = rules
    lines = [*(f"# {line}".rstrip() for line in head), "version: 1", f"name: {name}"]
    if default.members:
        lines.append(f"# {cost(default.members)}")
    lines.append(f"default: {scheme_text(default.scheme)}")
    lines += ["rules:"] if others else []
    for rule in others:
        if rule.members:
            lines.append(f"  # {cost(rule.members)}")
        lines += [f"  - match: {_quoted(rule.match)}", f"    scheme: {scheme_text(rule.scheme)}"]
    return "\n".join(lines) + "\n"


def scheme_text(scheme: Scheme | None) -> str:
    """As it stands in a policy file: a name, or its fields on one line."""
    if scheme is None:
        return "keep"
    return scheme.spec if scheme.spec in PRESETS else _flow(scheme.to_fields())


def _flow(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _quoted(text: str) -> str:
    """In single quotes where YAML would read more than text."""
    return text if re.fullmatch(r"[A-Za-z_][\w.]*", text) else "'" + text.replace("'", "''") + "'"
