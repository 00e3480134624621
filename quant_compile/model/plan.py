"""The plan: what a policy decides for every linear weight of a model, before anything is traced or packed.

Reads names, shapes and dtypes only, so that a model on the meta device will do. Bytes after are computed from the
planes that the scheme declares. The graph may hold fewer linears and expert blocks than the modules suggest (the ledger of
a compiled model tells).
"""

from __future__ import annotations

import difflib
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError, safe_open
from torch import nn

from quant_compile.ir.errors import PolicyError, PolicyWarning
from quant_compile.ir.family import family_of
from quant_compile.ir.moe import may_differ
from quant_compile.ir.numerics import dtype_name
from quant_compile.ir.scheme import Scheme
from quant_compile.model.places import parameters_of
from quant_compile.model.weights import Weight, linear_weights, possible_weights
from quant_compile.rules import TWO_SCHEMES, Decides, Decision, Rule, one_refuses, scale_key, strict_error

SHOWN = 8  # names in one sentence


@dataclass(frozen=True)
class PlanEntry:
    """One weight and what becomes of it.

    Attributes:
        names: all names of the Parameter; the first is the one to show.
        kind: ``linear`` or ``moe``.
        shape: of the Parameter.
        n: output features.
        k: input features.
        dtype: of the Parameter, e.g. ``bfloat16``.
        decision: scheme or reason.
        bytes_before: of the Parameter.
        bytes_after: of its planes; of the Parameter too where an embedding goes on using it.
        has_bias: the module adds a bias.
        block: name of its expert block, empty for a linear.
    """

    names: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    n: int
    k: int
    dtype: str
    decision: Decision
    bytes_before: int
    bytes_after: int
    has_bias: bool
    block: str = ""

    @property
    def scheme(self) -> str:
        """The scheme's spec, or ``keep``."""
        return self.decision.scheme.spec if self.decision.scheme else "keep"


@dataclass(frozen=True)
class UnusedRule:
    """A rule that decides nothing in this model.

    Attributes:
        index: into ``Policy.rules``.
        rule: the rule.
        matched: weights that it matches but that earlier rules decide.
        hint: what might have been meant, or empty.
    """

    index: int
    rule: Rule
    matched: int
    hint: str

    @property
    def text(self) -> str:
        """The finding in one sentence."""
        line = f" (line {self.rule.line})" if self.rule.line is not None else ""
        head = f"rule {self.index + 1}{line}, {self.rule.selector},"
        if self.matched:
            return f"{head} decides nothing: earlier rules take all {self.matched} weights that it matches"
        return f"{head} matches no weight{self.hint}"


@dataclass(frozen=True)
class Plan:
    """What a policy decides for a model.

    Attributes:
        policy: the policy.
        entries: one for each weight that a linear or expert block multiplies by.
        unmatched_rules: rules without effect.
        other_bytes: bytes of all other parameters (embeddings, norms, biases).
    """

    policy: Decides
    entries: tuple[PlanEntry, ...]
    unmatched_rules: tuple[UnusedRule, ...]
    other_bytes: int

    @staticmethod
    def of(policy: Decides, model: nn.Module, beside: Iterable[nn.Module] = ()) -> Plan:
        """Decide every linear weight of ``model``; warns of nothing and raises nothing, see ``enforce``.

        A rule has an effect if it decides a weight of ``model`` or of one ``beside`` it.
        """
        weights = linear_weights(model)
        total = sum(p.nbytes for p in parameters_of(model))
        entries = _one_scheme_a_block([_entry(policy, weight) for weight in weights])
        other = total - sum(entry.bytes_before for entry in entries)
        others = [weight for m in (model, *beside) for weight in (*linear_weights(m), *possible_weights(m))]
        return Plan(policy, entries, tuple(_unused(policy, others)), other)

    @property
    def problems(self) -> tuple[str, ...]:
        """Rules without effect, and weights that cannot have the scheme that the policy names, one sentence each."""
        refused = [entry for entry in self.entries if entry.decision.refused]
        return (*(rule.text for rule in self.unmatched_rules), *_refusals(refused))

    @property
    def calibration_note(self) -> str | None:
        """What is missing when static schemes are planned and no scales file is there; else None."""
        static = [e for e in self.entries if e.decision.scheme is not None and e.decision.scheme.static]
        if not static:
            return None
        found = _without_scales(static, self.policy.scales)
        return f"{found}. Fix: run quant_compile.calibrate first." if found else None

    def enforce(self) -> Plan:
        """Warn of ``problems``, or raise them when the policy is strict.

        Raises:
            PolicyError: there are problems and the policy is strict.
        """
        if not self.problems:
            return self
        origin = self.policy.source or self.policy.name
        if self.policy.strict:
            fix = "correct or remove these rules, or set strict: false."
            raise strict_error(self.policy, " and does not fit this model", self.problems, fix)
        for problem in self.problems:
            warnings.warn(f"{origin}: {problem}", PolicyWarning, stacklevel=3)
        return self

    def enforce_quantizers(self) -> None:
        """Refuse schemes that nothing here can quantize to, where weights are in 16 bits.

        Raises:
            PolicyError: there is one; names the first weight.
        """
        for entry in self.entries:
            scheme = entry.decision.scheme
            refusal = None if scheme is None else family_of(scheme).quantizes(scheme)
            if scheme is not None and refusal is not None:
                origin = self.policy.source or self.policy.name
                raise PolicyError(f"{origin}: {_label([entry])} cannot be quantized to {scheme.spec}: {refusal.reason}")

    @property
    def bytes_before(self) -> int:
        """Bytes of all parameters."""
        return self.other_bytes + sum(entry.bytes_before for entry in self.entries)

    @property
    def bytes_after(self) -> int:
        """Bytes of all parameters and planes once the originals of quantized weights are released."""
        return self.other_bytes + sum(entry.bytes_after for entry in self.entries)

    @property
    def share(self) -> float:
        """Bytes of quantized weights / bytes of all parameters, both before."""
        quantized = sum(entry.bytes_before for entry in self.entries if entry.decision.scheme is not None)
        return quantized / max(1, self.bytes_before)

    def table(self, full: bool = False) -> Table:
        """The plan as a rich table; weights that differ only in layer numbers share a row unless ``full``."""
        table = Table(title=f"policy {self.policy.name}", title_justify="left")
        for column in ("weight", "kind", "shape", "scheme", "MB before", "MB after", "why"):
            table.add_column(column, overflow="fold", justify="right" if column.startswith("MB") else "left")
        rows = [[entry] for entry in self.entries] if full else _grouped(self.entries)
        for row in rows:
            table.add_row(*_cells(row))
        table.add_section()
        table.add_row("other parameters", "", "", "keep", *[_mb(self.other_bytes)] * 2, "no linear multiplies by them")
        table.add_row("total", "", "", f"{self.share:.1%}", _mb(self.bytes_before), _mb(self.bytes_after), "")
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain data: totals, entries, problems."""
        return {
            "policy": self.policy.name,
            "content_hash": self.policy.content_hash,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "share": self.share,
            "other_bytes": self.other_bytes,
            "problems": list(self.problems),
            "weights": [_entry_dict(entry) for entry in self.entries],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)


def _entry(policy: Decides, weight: Weight) -> PlanEntry:
    site, parameter = weight.site, weight.parameter
    decision = policy.decide(site)
    refusal = _refusal(weight) if decision.scheme is not None else None
    if refusal is not None:
        decision = replace(decision, scheme=None, reason=refusal, refused=True)
    before = after = parameter.nbytes
    if decision.scheme is not None:
        planes = family_of(decision.scheme).weight_planes(decision.scheme, site.n, site.k, parameter.dtype)
        # A static scheme adds one f32 input scale per weight. A table that an embedding reads stays beside its planes.
        experts = parameter.shape[0] if site.kind == "moe" else 1
        after = (
            experts * sum(plane.nbytes for plane in planes) + 4 * decision.scheme.static + before * weight.in_embedding
        )
    shape, dtype = tuple(parameter.shape), dtype_name(parameter.dtype)
    block = site.blocks[0] if site.blocks else ""
    return PlanEntry(
        site.names, site.kind, shape, site.n, site.k, dtype, decision, before, after, weight.has_bias, block
    )


def _one_scheme_a_block(entries: Sequence[PlanEntry]) -> tuple[PlanEntry, ...]:
    """Entries, those of expert blocks whose weights would have schemes that may not differ kept, as the runtime keeps them."""
    schemes: dict[str, list[Scheme | None]] = {}
    refusals: dict[str, str] = {}
    for entry in entries:
        schemes.setdefault(entry.block, []).append(entry.decision.scheme)
        if entry.decision.refused:
            refusals.setdefault(entry.block, one_refuses(entry.names[0], entry.decision.reason))

    def kept(entry: PlanEntry) -> PlanEntry:
        reason = refusals.get(entry.block, TWO_SCHEMES)
        decision = replace(entry.decision, scheme=None, reason=reason, refused=True)
        return replace(entry, decision=decision, bytes_after=entry.bytes_before)

    apart = {block for block, found in schemes.items() if block and not _go_together(found)}
    return tuple(kept(entry) if entry.block in apart else entry for entry in entries)


def _go_together(schemes: Sequence[Scheme | None]) -> bool:
    first = schemes[0]
    return all(other == first or (first and other and may_differ(first, other)) for other in schemes)


def _without_scales(static: Sequence[PlanEntry], path: Path | None) -> str | None:
    """Which weights of static schemes have no calibrated scale in the policy's file, or None."""
    head = f"{len(static)} weights have static input scales but"
    if path is None:
        return f"{head} the policy names no scales file"
    if not path.is_file():
        return f"{head} the scales file {path} does not exist"
    try:
        with safe_open(str(path), framework="pt") as opened:
            known = set(opened.keys())
    except SafetensorError as error:
        return f"{head} the scales file {path} is not readable as safetensors ({error})"
    missing = [e for e in static if not any(scale_key(name) in known for name in e.names)]
    return f"{head} {path} has no scale of {len(missing)} of them, e.g. {missing[0].names[0]}" if missing else None


def _refusal(weight: Weight) -> str | None:
    """Why this weight cannot be quantized whatever the scheme, or None."""
    if not weight.parameter.dtype.is_floating_point:
        return f"{dtype_name(weight.parameter.dtype)} weights cannot be quantized; only floating point can"
    if weight.parameter.dtype.itemsize == 1:
        return f"{dtype_name(weight.parameter.dtype)} weights are quantized already"
    return None


def _unused(policy: Decides, weights: Sequence[Weight]) -> Iterable[UnusedRule]:
    sites = [weight.site for weight in weights]
    deciding = {policy.decide(site).rule for site in sites}
    names = [name for site in sites for name in (*site.names, *site.blocks)]
    for index, rule in enumerate(policy.rules):
        if index not in deciding:
            matched = sum(rule.matches(site) for site in sites)
            yield UnusedRule(index, rule, matched, "" if matched else _hint(rule, names))


def _hint(rule: Rule, names: Sequence[str]) -> str:
    """What the author of a rule that matches nothing may have meant."""
    if rule.match.endswith((".weight", r"\.weight")):
        return "; names carry no .weight here"
    if any(replace(rule, kind=None, module=None, where=()).match == name for name in names):
        return "; the name is there, but kind, module or where does not hold"
    last = rule.match.removeprefix("re:").split(".")[-1]
    close = difflib.get_close_matches(last, sorted({name.split(".")[-1] for name in names}), n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close and close[0] != last else ""


def label_of(entries: Sequence[PlanEntry]) -> list[str]:
    """Names of some weights, one text for those that differ only in layer numbers."""
    return [_label(row) for row in _grouped(entries)]


def _grouped(entries: Sequence[PlanEntry]) -> list[list[PlanEntry]]:
    groups: dict[tuple[object, ...], list[PlanEntry]] = {}
    for e in entries:
        pattern = tuple(re.sub(r"\d+", "#", name) for name in e.names)
        groups.setdefault((pattern, e.shape, e.dtype, e.scheme, e.decision.reason), []).append(e)
    return list(groups.values())


def _refusals(entries: Sequence[PlanEntry]) -> list[str]:
    """Which weights stay as they are: a sentence for all whose reasons differ in numbers only."""
    alike: dict[tuple[str, str], list[PlanEntry]] = {}
    for entry in entries:
        alike.setdefault((entry.dtype, re.sub(r"\d+", "#", entry.decision.reason)), []).append(entry)
    texts: list[str] = []
    for (dtype, _), found in alike.items():
        reasons = list(dict.fromkeys(entry.decision.reason for entry in found))
        more = ", and alike with other numbers" if len(reasons) > 1 else ""
        labels = label_of(found)
        named = ", ".join(labels[:SHOWN]) + (f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else "")
        texts.append(f"{named} {'stays' if len(found) == 1 else 'stay'} {dtype}: {reasons[0]}{more}")
    return texts


def _cells(row: Sequence[PlanEntry]) -> list[str]:
    first = row[0]
    shape = "x".join(map(str, first.shape))
    sizes = _mb(sum(e.bytes_before for e in row)), _mb(sum(e.bytes_after for e in row))
    # globs in reasons may hold square brackets, which rich would read as markup
    why = escape(first.decision.reason)
    return [escape(_label(row)), first.kind, f"{shape} {first.dtype}", first.scheme, *sizes, why]


def _label(row: Sequence[PlanEntry]) -> str:
    names = " = ".join(_joined([entry.names[i] for entry in row]) for i in range(len(row[0].names)))
    return names if len(row) == 1 else f"{names} ({len(row)}x)"


def _joined(names: Sequence[str]) -> str:
    """Names that differ only in numbers as one: ``layers.{0-31}.mlp.up_proj``."""
    parts = zip(*(re.split(r"(\d+)", name) for name in names), strict=True)
    return "".join(_span(column) for column in parts)


def _span(column: Sequence[str]) -> str:
    if len(set(column)) == 1:
        return column[0]
    numbers = sorted({int(text) for text in column})
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) + "}"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.2f}"


def _entry_dict(entry: PlanEntry) -> dict[str, Any]:
    return {
        "names": list(entry.names),
        "kind": entry.kind,
        "shape": list(entry.shape),
        "n": entry.n,
        "k": entry.k,
        "dtype": entry.dtype,
        "scheme": entry.scheme,
        "reason": entry.decision.reason,
        "origin": entry.decision.origin,
        "rule": entry.decision.rule,
        "line": entry.decision.line,
        "refused": entry.decision.refused,
        "bytes_before": entry.bytes_before,
        "bytes_after": entry.bytes_after,
    }
