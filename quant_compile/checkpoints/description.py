"""What a checkpoint's config says of its modules, whatever library wrote it: data, and the matching of names.

Knows no format and no file; each format's ``describe`` makes one of its config.
"""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any, NoReturn, cast

import regex  # as ``re``, which cannot be interrupted

from quant_compile.checkpoints.errors import CheckpointError, cut
from quant_compile.ir.kv import CacheScheme
from quant_compile.ir.scheme import QuantArgs

PACKED = "sglquant"  # quant_method of the format that ``packed`` reads
AGAIN = "Fix: write the checkpoint again, or correct this key."
LONGEST_MATCH = 0.2  # seconds; a pattern that is meant well takes microseconds
LONGEST_PATTERN = 4096
MOST_REPEATS = 4096  # by counts in braces, which compiling writes out
_COUNTS = re.compile(r"\{(\d*),?(\d*)\}")


@dataclass(frozen=True)
class Stored:
    """How the weights of some modules are stored.

    Attributes:
        format: key of the reader.
        bits: of a code.
        group: inputs that share a scale; None: a scale per row, tensor or block, as the tensors' shapes tell.
        symmetric: no zero points are meant.
        inputs: what the module's input becomes; None keeps it in 16 bits.
        variant: what else a format's reader must know, in its own words.
    """

    format: str
    bits: int
    group: int | None = None
    symmetric: bool = True
    inputs: QuantArgs | None = None
    variant: str = ""

    @property
    def text(self) -> str:
        """In one line, for people: ``gptq, 4 bits, groups of 128``."""
        parts = [self.format, f"{self.bits} bits"]
        parts += [f"groups of {self.group}"] if self.group else []
        parts += [] if self.symmetric else ["with zero points"]
        parts += [f"inputs {self.inputs.spec}"] if self.inputs else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Target:
    """Modules that are stored alike: ``patterns`` as compressed-tensors writes them, all modules if there are none."""

    stored: Stored | None
    patterns: tuple[str, ...] = ()

    def holds(self, name: str, where: str = "") -> bool:
        """Whether a module is one of these; ``where`` as in ``matches``."""
        return not self.patterns or any(matches(pattern, name, where) for pattern in self.patterns)


@dataclass(frozen=True)
class CacheStored:
    """What a config says of the KV cache.

    Attributes:
        text: its words, for people.
        where: the file and key.
        scheme: how the cache is kept; None: it cannot be kept so.
        reason: why not.
    """

    text: str
    where: str
    scheme: CacheScheme | None = None
    reason: str = ""


@dataclass(frozen=True)
class Description:
    """What the configs of a checkpoint say.

    Attributes:
        method: ``quant_method``, empty for a checkpoint that is not quantized.
        where: the file (and key) that says so.
        targets: the first that holds a module decides.
        ignored: patterns of modules that stay as they are; they come before the targets.
        kv_cache: what the config says of the KV cache; None: nothing.
        notes: unknown keys and the like.
    """

    method: str = ""
    where: str = ""
    targets: tuple[Target, ...] = ()
    ignored: tuple[str, ...] = ()
    kv_cache: CacheStored | None = None
    notes: tuple[str, ...] = ()

    def ignores(self, name: str) -> bool:
        """Whether the config says that this module is not quantized."""
        return any(matches(pattern, name, self.where) for pattern in self.ignored)

    def stored(self, name: str) -> Stored | None:
        """How a module that is quantized is stored; None where nothing of the config applies to it."""
        return next((target.stored for target in self.targets if target.holds(name, self.where)), None)

    @property
    def text(self) -> str:
        """In one line."""
        if not self.method:
            return "not quantized"
        if self.method == PACKED:
            return "packed by sglquant"
        kinds = dict.fromkeys(target.stored.text for target in self.targets if target.stored is not None)
        return f"{self.method}: {'; '.join(kinds)}"


# Class names that stand for every linear; a checkpoint's names tell which modules have quantized tensors.
_EVERY = ("Linear", "LinearBase", "FusedMoE")


def matches(pattern: str, name: str, where: str = "") -> bool:
    """Whether a pattern of a config names this module: a class of all linears, ``re:``, a glob, a name or a part of one.

    Args:
        where: the config, for messages.

    Raises:
        CheckpointError: a regular expression that takes too long on this name. Names are the checkpoint's as well.
    """
    if pattern in _EVERY:
        return True
    if pattern.startswith("re:"):
        try:
            return _compiled(pattern[3:]).match(name, timeout=LONGEST_MATCH) is not None
        except (TimeoutError, MemoryError):
            text = f"{where}: {pattern[:80]!r} takes too long to compare with {name[:80]!r}"
            raise CheckpointError(f"{text}.\n{AGAIN}") from None
    if any(wildcard in pattern for wildcard in "*?["):
        return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")
    return f".{pattern.strip('.')}." in f".{name}."


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> regex.Pattern[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a later Python may read otherwise
        re.compile(pattern)  # what only ``regex`` understands is no pattern of a config
        return regex.compile(pattern)


def alike(values: Mapping[str, Hashable], fixed: int = 0) -> Iterator[tuple[str, str]]:
    """(regular expression, one of the names that it stands for) for all names, few that say it.

    Names that differ only in numbers share one where their values are equal; else those that differ only after their first
    number, and so on.

    Args:
        values: by name.
        fixed: numbers of a name, from the left, that are not left open.
    """
    kinds: dict[str, list[str]] = {}
    for name in values:
        parts = re.split(r"(\d+)", name)  # every second one is a number
        open_ = range(1 + 2 * fixed, len(parts), 2)
        pattern = "".join(r"\d+" if i in open_ else re.escape(part) for i, part in enumerate(parts))
        kinds.setdefault(pattern, []).append(name)
    for pattern, names in kinds.items():
        if len({values[name] for name in names}) == 1:
            yield pattern, names[0]
        else:
            yield from alike({name: values[name] for name in names}, fixed + 1)


@dataclass
class Keys:
    """Reads the keys of a config with their types, and remembers which were read.

    Args:
        data: the object.
        where: file and key, for messages.
    """

    data: Mapping[str, Any]
    where: str
    read: set[str] = field(default_factory=set)

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A value of this type, or the default where it is absent or null.

        Raises:
            CheckpointError: it has another type.
        """
        self.read.add(key)
        value = self.data.get(key)
        if value is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(k.__name__ for k in kinds)
            self.fail(f"{key} must be {wanted}, got {shown(value)}")
        return value

    def number(self, key: str, default: int | None = None, valid: Sequence[int] = ()) -> int | None:
        """A whole number, one of ``valid`` where that is given."""
        value = self.get(key, int, default)
        if value is not None and valid and value not in valid:
            self.fail(f"{key} must be one of {', '.join(map(str, valid))}, got {shown(value)}")
        return value

    def group(self, key: str = "group_size") -> int | None:
        """A group size; None for a scale per row, which is written -1, 0 or null."""
        value = self.number(key)
        if value is not None and (value < -1 or value > 1 << 20):
            self.fail(f"{key} must be -1 or a positive number, got {shown(value)}")
        return value if value is not None and value > 0 else None

    def block(self, key: str) -> tuple[int, int] | None:
        """Two sizes of a block."""
        value = self.get(key, list)
        if value is None:
            return None
        if len(value) != 2 or not all(type(size) is int and 0 < size <= 1 << 20 for size in value):
            self.fail(f"{key} must be two sizes, got {shown(value)}")
        return value[0], value[1]

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts."""
        value = cast(list[Any], self.get(key, list, []))
        if not all(isinstance(item, str) and len(item) < 4096 for item in value):
            self.fail(f"{key} must be a list of texts, got {shown(value)}")
        for text in cast(list[str], value):
            check_pattern(text, f"{self.where}: {key}")
        return tuple(cast(list[str], value))

    def child(self, key: str) -> Keys | None:
        """An object."""
        value = self.get(key, dict)
        return None if value is None else Keys(cast(dict[str, Any], value), f"{self.where}.{cut(key)}")

    def ignored(self, harmless: Sequence[str] = ()) -> tuple[str, ...]:
        """Notes on keys that nothing read."""
        unknown = sorted(set(self.data) - self.read - set(harmless))
        return (f"{self.where}: ignored {', '.join(map(cut, unknown[:12]))}",) if unknown else ()

    def fail(self, what: str, fix: str = AGAIN) -> NoReturn:
        """Raise a CheckpointError about this config."""
        raise CheckpointError(f"{self.where}: {cut(what, 1000)}.\n{fix}")


def check_pattern(pattern: str, where: str) -> None:
    """Refuse what is no regular expression, and what could take for ever to match.

    Raises:
        CheckpointError: the pattern.
    """
    if not pattern.startswith("re:"):
        return
    start = f"{where}: {pattern[:80]!r}"
    if len(pattern) > LONGEST_PATTERN:
        raise CheckpointError(f"{start} is longer than any pattern needs to be.\n{AGAIN}")
    if re.search(r"[+*}]\)*[+*{]|\)[+*{].*\)[+*{]", pattern[3:].replace("\\", "")):
        raise CheckpointError(f"{start} repeats a repetition, which may never end.\n{AGAIN}")
    counts = [_count(pair) for pair in _COUNTS.findall(pattern)]
    if prod(counts) > MOST_REPEATS:
        raise CheckpointError(f"{start} repeats too often.\n{AGAIN}")
    try:
        _compiled(pattern[3:])
    except (re.error, regex.error, RecursionError, OverflowError, MemoryError, ValueError) as error:
        raise CheckpointError(f"{start} is no regular expression: {str(error)[:200]}.\n{AGAIN}") from None


def _count(texts: tuple[str, ...]) -> int:
    """The larger of ``{2,30}``; what has more than four digits is too large in any case."""
    return max(MOST_REPEATS + 1 if len(text) > 4 else int(text or 1) for text in texts)


def shown(value: object) -> str:
    """A value for a message, cut short."""
    try:
        text = repr(value)
    except RecursionError:
        text = "values nested too deeply"
    return text if len(text) <= 60 else f"{text[:57]}..."
