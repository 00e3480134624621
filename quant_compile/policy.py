"""Policies: which weight gets which scheme, and why; read from presets, YAML files and dicts.

A policy is a default scheme and ordered rules; the first rule that matches a weight decides. Between the user's rules
and the default stand the conventions (output heads and MoE router gates keep their precision), which rules override.
Reads the policy's file and, for the content hash, its scales file; knows nothing of graphs.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
import yaml

import quant_compile.lowering.schemes  # noqa: F401  # pyright: ignore[reportUnusedImport]  registers the presets
from quant_compile.ir.errors import PolicyError, SchemeError
from quant_compile.ir.family import family_of
from quant_compile.ir.kv import NAMES, CacheScheme, parse_cache
from quant_compile.ir.scheme import PRESETS, QuantArgs, Scheme, parse
from quant_compile.ir.sums import CODES
from quant_compile.lowering.guard import NEVER_SLOWER
from quant_compile.lowering.rounding import recipe
from quant_compile.lowering.select import FALLBACKS
from quant_compile.model.plan import Plan
from quant_compile.rules import (
    CONVENTIONS,
    CacheRule,
    CacheRules,
    Condition,
    Decision,
    Rule,
    SiteInfo,
    conventional,
    matcher,
    rule_reason,
)
from quant_compile.yaml_lines import Document, KeyPath, read_yaml

__all__ = ["CONVENTIONS", "KEEP", "Condition", "Decision", "Fuse", "Policy", "Rule", "SiteInfo", "shipped_policies"]

VERSION = 1
KEEP = "keep"
AUTO = "auto"
ATTENTION = (AUTO, KEEP)
KINDS = ("linear", "moe")
SHIPPED = Path(__file__).parent / "policies"
_CONDITION = re.compile(r"\s*(>=|<=|==|>|<|%)\s*(\d+)\s*")
_POLICY_KEYS = (
    "version", "name", "default", "rules", "requantize", "strict", "verify", "allow_reference", "fallback", "guard",
    "fuse", "attention", "all_reduce", "kv_cache", "release_weights", "scales", "rounding", "method", "planes",
)  # fmt: skip
_RULE_KEYS = ("match", "scheme", "kind", "module", "where", "reason", "requantize")
_CACHE_KEYS, _CACHE_RULE_KEYS = ("scheme", "rules"), ("match", "scheme", "reason")
_SCHEME_KEYS = ("weights", "input_activations")
_ARG_TYPES: dict[str, tuple[type, str]] = {
    "num_bits": (int, "a whole number"),
    "type": (str, "int, float or gguf"),
    "strategy": (str, "text"),
    "symmetric": (bool, "true or false"),
    "dynamic": (bool, "true or false"),
    "group_size": (int, "a whole number"),
    "block_structure": (list, "a list [rows, columns]"),
    "format": (str, "text"),
}


@dataclass(frozen=True)
class Fuse:
    """Switches of the graph rewrites that fuse: one input quantization for several linears, one GEMM for siblings, one kernel for a small
    sum over ranks and what follows it."""

    share_quant: bool = True
    merge_siblings: bool = True
    all_reduce: bool = False


@dataclass(frozen=True)
class Policy:
    """Default scheme, ordered rules and switches. ``name`` and ``source`` are labels and do not take part in equality.

    Attributes:
        default: scheme of weights that no rule and no convention claims; None keeps them.
        rules: the user's rules; the first that matches decides.
        requantize: the default, and rules that do not say otherwise, hold for weights that a checkpoint has quantized as well.
        strict: a rule without effect or a weight that cannot have its scheme is an error instead of a warning.
        verify: every rewrite is replayed on the inputs of a graph's first call against the unfused reference; what is outside of its
            tolerance stays in 16 bits, and is an error under ``strict``.
        allow_reference: the slow torch reference may serve on a GPU.
        fallback: ``weight_only``: where no kernel of the device multiplies a scheme's quantized inputs, its weights serve under
            16-bit inputs; ``fp8``: where none serves 4-bit floats, they become FP8_DYNAMIC; None: that is an error.
        guard: ``never_slower``: a linear stays in 16 bits at every m at which its quantized chain is measured to be slower; None: no.
        fuse: rewrites that fuse.
        attention: ``auto``: kernels that read a cache once serve attention where they are faster; ``keep``: all as the model wrote it.
        all_reduce: codes that ranks send of what they add, ``FP8`` or ``INT8``; None: 16 bits.
        kv_cache: how layers keep K and V in ``generate``; None: in 16 bits.
        release_weights: free the original weights after packing; None leaves it to the backend's option.
        rounding: ``nearest``; ``search``: of each group the scale of least error, where the scheme's scales can be chosen; ``auto``:
            search, or on a CPU by the size of a weight: ``compensate``, search, nearest.
        scales: safetensors file of calibrated input scales; in a policy file, relative to that file's folder.
        method: how ``calibrate`` makes planes by example batches: ``search`` (scales of least error, weighted by E[x^2]), ``gptq``,
            ``gptaq`` (gptq over what the quantized weights before leave of inputs), or ``awq`` or ``smoothquant`` (the weight over
            factors of its inputs) before one of these, as in ``awq+gptq``.
        planes: safetensors file of what it made; in a policy file, relative to that file's folder.
        name: label in reports.
        source: file it came from.
        version: of the file format.
    """

    default: Scheme | None
    rules: tuple[Rule, ...] = ()
    requantize: bool = False
    strict: bool = False
    allow_reference: bool = False
    fallback: str | None = None
    guard: str | None = None
    fuse: Fuse = field(default_factory=Fuse)
    attention: str = AUTO
    all_reduce: str | None = None
    kv_cache: CacheRules | None = None
    release_weights: bool | None = None
    scales: Path | None = None
    rounding: str = field(default_factory=lambda: recipe.DEFAULT)
    method: str | None = None
    planes: Path | None = None
    verify: bool = False
    name: str = field(default="policy", compare=False)
    source: str | None = field(default=None, compare=False)
    version: int = VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "all_reduce", codes_of_sums(self.all_reduce))
        if isinstance(self.kv_cache, str):
            object.__setattr__(
                self, "kv_cache", CacheRules(None if self.kv_cache.lower() == KEEP else parse_cache(self.kv_cache))
            )

    @staticmethod
    def load(source: str | Path | Mapping[str, Any] | Policy) -> Policy:
        """A policy from a preset's name (any case), a shipped policy's name, a YAML path or a dict of the same keys.

        A Policy is returned as it is. Names win over files; write ``./llama3`` for a file of that name.

        Raises:
            PolicyError: unknown name, unreadable file, or a wrong key or value, with file, line and fix.
        """
        if isinstance(source, Policy):
            return source
        if isinstance(source, Mapping):
            return _Reader(Document(dict(source), "policy"), Path(), "policy", None).policy()
        if not isinstance(source, (str, Path)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PolicyError(f"a policy is a name, a path, a dict or a Policy, got {type(source).__name__}")
        if isinstance(source, str):
            if source.upper() in PRESETS:
                return Policy(PRESETS[source.upper()], name=source.upper())
            shipped = shipped_policies().get(source.lower())
            if shipped is not None:
                return _read_file(shipped)
            if not _looks_like_path(source):
                raise PolicyError(_unknown_name(source))
        return _read_file(Path(source))

    def save(self, path: str | Path) -> Path:
        """Write the policy as YAML; ``Policy.load`` of it equals this policy. Returns the path.

        A scales file is named relative to the policy's folder when it lies inside it.
        """
        path = Path(path)
        content = self.to_dict()
        for key, file in (("scales", self.scales), ("planes", self.planes)):
            if file is not None:
                content[key] = _relative_to(file, path.parent)
        path.write_text(yaml.safe_dump(content, sort_keys=False, width=120), encoding="utf-8")
        return path

    def to_dict(self) -> dict[str, Any]:
        """The keys of a policy file, without switches at their defaults."""
        out: dict[str, Any] = {"version": self.version, "name": self.name, "default": _scheme_value(self.default)}
        if self.rules:
            out["rules"] = [_rule_dict(rule) for rule in self.rules]
        for key in ("requantize", "strict", "verify", "allow_reference"):
            if getattr(self, key):
                out[key] = True
        out |= {key: getattr(self, key) for key in ("fallback", "guard") if getattr(self, key) is not None}
        if self.fuse != Fuse():
            out["fuse"] = {f.name: getattr(self.fuse, f.name) for f in fields(Fuse)}
        if self.attention != AUTO:
            out["attention"] = self.attention
        if self.all_reduce is not None:
            out["all_reduce"] = self.all_reduce
        if self.kv_cache is not None:
            out["kv_cache"] = _cache_value(self.kv_cache)
        if self.release_weights is not None:
            out["release_weights"] = self.release_weights
        if self.rounding != recipe.DEFAULT:
            out["rounding"] = self.rounding
        rest = (("scales", self.scales), ("method", self.method), ("planes", self.planes))
        return out | {key: str(value) for key, value in rest if value is not None}

    @property
    def content_hash(self) -> str:
        """sha256 over everything that decides what is computed, with the scales file's bytes in place of its path."""
        content = self.to_dict()
        del content["name"]
        content["schemes"] = [s.to_fields() if s else None for s in (self.default, *(r.scheme for r in self.rules))]
        if self.scales is not None:
            present = self.scales.is_file()
            content["scales"] = hashlib.sha256(self.scales.read_bytes()).hexdigest() if present else "absent"
        if self.planes is not None:
            content["planes"] = recipe.token_of(self.planes)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Every scheme that the policy can give, each once, the default's first."""
        named = (self.default, *(rule.scheme for rule in self.rules))
        return tuple(dict.fromkeys(scheme for scheme in named if scheme is not None))

    def decide(self, site: SiteInfo) -> Decision:
        """What ``site`` gets: the first matching rule's scheme, else a convention's, else the default.

        A weight without elements is kept: it has no values, and reductions over none of them have no result. One whose size the
        scheme cannot have is kept too, which is a refusal.
        """
        found = self._decide(site)
        if found.scheme is None:
            return found
        if not site.n * site.k:
            return replace(found, scheme=None, reason=f"kept: {site.n} x {site.k} has no elements to quantize")
        refusal = family_of(found.scheme).takes_size(found.scheme, site.n, site.k)
        return found if refusal is None else replace(found, scheme=None, reason=refusal.reason, refused=True)

    def _decide(self, site: SiteInfo) -> Decision:
        for index, rule in enumerate(self.rules):
            if rule.matches(site):
                again = self.requantize if rule.requantize is None else rule.requantize
                return Decision(rule.scheme, rule_reason(index, rule), "rule", index, rule.line, requantize=again)
        what = conventional(site)
        if what is not None:
            return Decision(None, f"kept by convention: {what}", "convention")
        return Decision(self.default, "default of the policy", "default", requantize=self.requantize)

    def resolve(self, model: torch.nn.Module, beside: Iterable[torch.nn.Module] = ()) -> Plan:
        """The plan for every linear weight of ``model`` (on any device, meta too).

        Args:
            model: the model.
            beside: other models that the policy is for; a rule that has an effect in one of them is no finding.

        Warns:
            PolicyWarning: a rule has no effect, or a weight cannot have its scheme.
        Raises:
            PolicyError: the same, when the policy is strict.
        """
        return Plan.of(self, model, beside).enforce()


def shipped_policies() -> dict[str, Path]:
    """Names of the policies that come with the package -> their files."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def _scheme_value(scheme: Scheme | None) -> Any:
    if scheme is None:
        return KEEP
    return scheme.spec if scheme.spec in PRESETS else scheme.to_fields()


def _rule_dict(rule: Rule) -> dict[str, Any]:
    out: dict[str, Any] = {"match": rule.match}
    for key in ("kind", "module"):
        if getattr(rule, key) is not None:
            out[key] = getattr(rule, key)
    if rule.where:
        where: dict[str, Any] = {}
        for condition in rule.where:
            where.setdefault(condition.dim, []).append(condition.text)
        out["where"] = {dim: texts[0] if len(texts) == 1 else texts for dim, texts in where.items()}
    out["scheme"] = _scheme_value(rule.scheme)
    if rule.reason is not None:
        out["reason"] = rule.reason
    if rule.requantize is not None:
        out["requantize"] = rule.requantize
    return out


def _cache_value(found: CacheRules) -> Any:
    names = [scheme.name if scheme else KEEP for scheme in (found.default, *(rule.scheme for rule in found.rules))]
    if not found.rules:
        return names[0]
    rules = [
        {"match": rule.match, "scheme": name} | ({"reason": rule.reason} if rule.reason is not None else {})
        for rule, name in zip(found.rules, names[1:], strict=True)
    ]
    return {"scheme": names[0], "rules": rules}


def _relative_to(path: Path, folder: Path) -> str:
    absolute, base = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    return str(absolute.relative_to(base)) if absolute.is_relative_to(base) else str(absolute)


def _looks_like_path(source: str) -> bool:
    return source.endswith((".yaml", ".yml")) or "/" in source or os.sep in source or Path(source).is_file()


def _nearest(word: object, valid: Iterable[str]) -> str:
    by_lower = {name.lower(): name for name in valid}
    close = difflib.get_close_matches(str(word).lower(), by_lower, n=1)
    return f" Did you mean {by_lower[close[0]]}?" if close else ""


def _unknown_name(source: str) -> str:
    presets, shipped = sorted(PRESETS), sorted(shipped_policies())
    return (
        f"unknown policy {source!r}.{_nearest(source, [*presets, *shipped])}\n"
        f"  presets: {', '.join(presets)}\n  shipped policies: {', '.join(shipped) or 'none'}\n"
        "Fix: use one of these names, or the path of a .yaml file."
    )


def _read_file(path: Path) -> Policy:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise PolicyError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise PolicyError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    return _Reader(read_yaml(text, str(path)), path.parent, path.stem, str(path)).policy()


def codes_of_sums(value: Any) -> str | None:
    """What ranks send of what they add; None: 16 bits.

    Raises:
        PolicyError: it is no such name.
    """
    if value is None or value is False or (isinstance(value, str) and value.lower() == KEEP):
        return None
    if not isinstance(value, str) or value.upper() not in CODES:
        raise PolicyError(f"all_reduce must be {KEEP}, {' or '.join(CODES)}, got {_shown(value)}")
    return value.upper()


class _Reader:
    """Turns a document into a Policy, checking every key and value."""

    def __init__(self, document: Document, folder: Path, name: str, source: str | None) -> None:
        self.document, self.folder, self.name, self.source = document, folder, name, source
        self.fail = document.fail

    def policy(self) -> Policy:
        data = self._mapping((), self.document.data, _POLICY_KEYS)
        if data.get("version", VERSION) != VERSION or isinstance(data.get("version"), bool):
            self.fail(("version",), f"version must be {VERSION}, got {data['version']!r}")
        if "default" not in data:
            self.fail((), "key 'default' is missing. Fix: add `default: FP8_DYNAMIC` or `default: keep`.")
        return Policy(
            default=self._scheme(("default",), data["default"]),
            rules=self._rules(data.get("rules")),
            requantize=self._boolean(("requantize",), data.get("requantize", False)),
            strict=self._boolean(("strict",), data.get("strict", False)),
            verify=self._boolean(("verify",), data.get("verify", False)),
            allow_reference=self._boolean(("allow_reference",), data.get("allow_reference", False)),
            fallback=self._fallback(data.get("fallback")),
            guard=self._guard(data.get("guard")),
            fuse=self._fuse(data.get("fuse")),
            attention=self._attention(data.get("attention")),
            all_reduce=self._all_reduce(data.get("all_reduce")),
            kv_cache=self._kv_cache(("kv_cache",), data.get("kv_cache")),
            release_weights=self._optional_boolean(("release_weights",), data.get("release_weights")),
            scales=self._file("scales", data.get("scales")),
            rounding=self._rounding(data.get("rounding")),
            method=self._method(data.get("method")),
            planes=self._file("planes", data.get("planes")),
            name=self._text(("name",), data.get("name")) or self.name,
            source=self.source,
        )

    def _fallback(self, value: Any) -> str | None:
        if value is not None and value not in FALLBACKS:
            self.fail(("fallback",), f"fallback must be {' or '.join(FALLBACKS)}, got {_shown(value)}")
        return value

    def _guard(self, value: Any) -> str | None:
        if value is None or value is False:  # YAML reads `off` as false
            return None
        if value != NEVER_SLOWER:
            self.fail(("guard",), f"guard must be {NEVER_SLOWER}, or false for none, got {_shown(value)}")
        return NEVER_SLOWER

    def _rounding(self, value: Any) -> str:
        if value is not None and value not in recipe.ROUNDINGS:
            self.fail(("rounding",), f"rounding must be {' or '.join(recipe.ROUNDINGS)}, got {_shown(value)}")
        return value or recipe.DEFAULT

    def _method(self, value: Any) -> str | None:
        if value is not None and value not in recipe.METHODS:
            self.fail(("method",), f"method must be {' or '.join(recipe.METHODS)}, got {_shown(value)}")
        return value

    def _attention(self, value: Any) -> str:
        if value is not None and value not in ATTENTION:
            self.fail(("attention",), f"attention must be {' or '.join(ATTENTION)}, got {_shown(value)}")
        return value or AUTO

    def _all_reduce(self, value: Any) -> str | None:
        try:
            return codes_of_sums(value)
        except PolicyError as error:
            self.fail(("all_reduce",), str(error))

    def _kv_cache(self, path: KeyPath, value: Any) -> CacheRules | None:
        if value is None or isinstance(value, CacheRules):
            return value
        if not isinstance(value, Mapping):
            return CacheRules(self._cache_scheme(path, value))
        data = self._mapping(path, value, _CACHE_KEYS)
        if "scheme" not in data:
            self.fail(path, "kv_cache needs a scheme. Fix: add `scheme: FP8`, or `scheme: keep` and rules.")
        given = data.get("rules") or []
        if not isinstance(given, (list, tuple)):
            self.fail((*path, "rules"), f"rules must be a list, got {_shown(given)}. Fix: begin each rule with `- `.")
        rules = tuple(self._cache_rule((*path, "rules", i), item) for i, item in enumerate(cast(list[Any], given)))
        return CacheRules(self._cache_scheme((*path, "scheme"), data["scheme"]), rules)

    def _cache_rule(self, path: KeyPath, value: Any) -> CacheRule:
        data = self._mapping(path, value, _CACHE_RULE_KEYS)
        for key in ("match", "scheme"):
            if key not in data:
                self.fail(
                    path, f"a rule of kv_cache needs {key}. Fix: write `match: model.layers.0` and `scheme: keep`."
                )
        return CacheRule(
            self._pattern((*path, "match"), data["match"]),
            self._cache_scheme((*path, "scheme"), data["scheme"]),
            self._text((*path, "reason"), data.get("reason")),
            self.document.line(path),
        )

    def _cache_scheme(self, path: KeyPath, value: Any) -> CacheScheme | None:
        if isinstance(value, CacheScheme):
            return value
        if not isinstance(value, str):
            self.fail(path, f"a scheme of the KV cache is keep or one of {', '.join(NAMES)}, got {_shown(value)}")
        if value.lower() == KEEP:
            return None
        try:
            return parse_cache(value)
        except SchemeError:
            valid = [KEEP, *NAMES]
            self.fail(
                path, f"unknown scheme of the KV cache {value!r}.{_nearest(value, valid)} Valid: {', '.join(valid)}"
            )

    def _rules(self, value: Any) -> tuple[Rule, ...]:
        if value is None:
            return ()
        if not isinstance(value, (list, tuple)):
            self.fail(("rules",), f"rules must be a list, got {_shown(value)}. Fix: begin each rule with `- `.")
        return tuple(self._rule(("rules", index), item) for index, item in enumerate(cast(list[Any], value)))

    def _rule(self, path: KeyPath, value: Any) -> Rule:
        data = self._mapping(path, value, _RULE_KEYS)
        if "scheme" not in data:
            self.fail(path, "a rule needs a scheme. Fix: add `scheme: keep` or a preset's name.")
        if not {"match", "kind", "module", "where"} & set(data):
            self.fail(path, "a rule needs match, kind, module or where. To change every weight, set `default`.")
        kind = self._text((*path, "kind"), data.get("kind"))
        if kind is not None and kind not in KINDS:
            self.fail((*path, "kind"), f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        return Rule(
            match=self._pattern((*path, "match"), data.get("match", "*")),
            scheme=self._scheme((*path, "scheme"), data["scheme"]),
            kind=kind,
            module=self._text((*path, "module"), data.get("module")),
            where=self._where((*path, "where"), data.get("where")),
            reason=self._text((*path, "reason"), data.get("reason")),
            line=self.document.line(path),
            requantize=self._optional_boolean((*path, "requantize"), data.get("requantize")),
        )

    def _pattern(self, path: KeyPath, value: Any) -> str:
        pattern = self._text(path, value)
        if not pattern:
            self.fail(path, "match must be a name, a glob, or re: and a regular expression")
        try:
            matcher(pattern)
        except re.error as error:
            self.fail(path, f"match {pattern!r} is not a regular expression: {error}")
        return pattern

    def _where(self, path: KeyPath, value: Any) -> tuple[Condition, ...]:
        if value is None:
            return ()
        conditions: list[Condition] = []
        for dim, texts in self._mapping(path, value, ("n", "k")).items():
            for text in texts if isinstance(texts, (list, tuple)) else (texts,):
                conditions.append(self._condition((*path, dim), dim, text))
        return tuple(conditions)

    def _condition(self, path: KeyPath, dim: str, value: Any) -> Condition:
        if isinstance(value, int) and not isinstance(value, bool):
            value = f"=={value}"
        found = _CONDITION.fullmatch(value) if isinstance(value, str) else None
        if found is None or (found[1] == "%" and int(found[2]) == 0):
            self.fail(path, f'{dim}: {_shown(value)} is no condition. Fix: write ">=4096", "<512", "==64" or "%128".')
        return Condition(dim, found[1], int(found[2]))

    def _scheme(self, path: KeyPath, value: Any) -> Scheme | None:
        if isinstance(value, Mapping):
            scheme = self._custom_scheme(path, value)
        elif isinstance(value, Scheme):
            scheme = value
        elif not isinstance(value, str):
            self.fail(path, f"a scheme is keep, a preset's name or {{weights: ...}}, got {_shown(value)}")
        elif value.lower() == KEEP:
            return None
        else:
            try:
                scheme = parse(value)
            except SchemeError:
                names = [KEEP, *sorted(PRESETS)]
                self.fail(path, f"unknown scheme {value!r}.{_nearest(value, names)} Valid: {', '.join(names)}")
        try:
            family_of(scheme)
        except SchemeError as error:
            self.fail(path, str(error))
        return scheme

    def _custom_scheme(self, path: KeyPath, value: Any) -> Scheme:
        data = self._mapping(path, value, _SCHEME_KEYS)
        for side in data:
            if data[side] is not None:
                self._check_args((*path, side), data[side])
        try:
            return Scheme.from_fields(data, "scheme")
        except SchemeError as error:
            side = "input_activations" if "scheme.input_activations" in str(error) else "weights"
            self.fail((*path, side), str(error))

    def _check_args(self, path: KeyPath, value: Any) -> None:
        for key, item in self._mapping(path, value, [f.name for f in fields(QuantArgs)]).items():
            expected, words = _ARG_TYPES[key]
            item = list(cast(tuple[Any, ...], item)) if isinstance(item, tuple) else item
            wrong = not isinstance(item, expected) or (expected is int and isinstance(item, bool))
            if item is not None and (wrong or (isinstance(item, list) and not _two_numbers(cast(list[Any], item)))):
                self.fail((*path, key), f"{key} must be {words}, got {_shown(item)}")

    def _fuse(self, value: Any) -> Fuse:
        data = {} if value is None else self._mapping(("fuse",), value, [f.name for f in fields(Fuse)])
        return Fuse(**{key: self._boolean(("fuse", key), item) for key, item in data.items()})

    def _file(self, key: str, value: Any) -> Path | None:
        text = str(value) if isinstance(value, Path) else self._text((key,), value)
        return None if text is None else Path(os.path.abspath(self.folder / text))

    def _mapping(self, path: KeyPath, value: Any, valid: Iterable[str]) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            self.fail(path, f"expected keys and values ({', '.join(valid)}), got {_shown(value)}")
        data = dict(cast(Mapping[str, Any], value))
        for key in data:
            if key not in valid:
                keys = ", ".join(valid)
                self.fail((*path, key), f"unknown key {key!r}.{_nearest(key, valid)} Valid keys: {keys}")
        return data

    def _boolean(self, path: KeyPath, value: Any) -> bool:
        if not isinstance(value, bool):
            self.fail(path, f"{path[-1]} must be true or false, got {_shown(value)}")
        return value

    def _optional_boolean(self, path: KeyPath, value: Any) -> bool | None:
        return None if value is None else self._boolean(path, value)

    def _text(self, path: KeyPath, value: Any) -> str | None:
        if value is not None and not isinstance(value, str):
            self.fail(path, f"{path[-1]} must be text, got {_shown(value)}. Fix: put it in quotes.")
        return value


def _two_numbers(value: list[Any]) -> bool:
    return len(value) == 2 and all(isinstance(item, int) and item > 0 for item in value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
