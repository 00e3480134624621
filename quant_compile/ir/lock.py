"""A lock: what every weight of a model got, under which policy, versions and GPU, as a text file that is read strictly.

The file is YAML with one line a weight, in the order of names; the reader takes only what the writer writes, and names the line of
anything else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from quant_compile.ir.errors import LockError
from quant_compile.page.files import written_whole

VERSION = 1
IN_16_BITS = "16 bits"
_KEYS = ("scheme", "layout", "kernels", "joined", "shape")  # shape came later: files without are read as well
_SITE = re.compile(r'  ("(?:[^"\\]|\\.)*"): (\{.*\})')
_HEAD = re.compile(r"(\w+): (.+)")


@dataclass(frozen=True)
class LockedSite:
    """What a weight got.

    Attributes:
        scheme: its spec; None: kept.
        layout: of its planes; empty where it is kept.
        kernels: for each way that graphs multiply by it, the kernels by m; IN_16_BITS where a graph reads it so.
        joined: what was fused or merged around it.
        shape: of the Parameter; empty in files that were written without.
    """

    scheme: str | None
    layout: str = ""
    kernels: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()

    def also(self, other: LockedSite) -> LockedSite:
        """With what another graph does."""
        kernels = tuple(sorted({*self.kernels, *other.kernels}))
        joined = tuple(sorted({*self.joined, *other.joined}))
        return LockedSite(other.scheme, other.layout or self.layout, kernels, joined, other.shape or self.shape)

    def differs(self, now: LockedSite) -> tuple[str, ...]:
        """What a graph does now that is not in this: ``scheme``, ``kernel``, ``layout``, ``fusion``, ``shape``."""
        found = {
            "scheme": now.scheme != self.scheme,
            "kernel": not set(now.kernels) <= set(self.kernels),
            "layout": bool(now.layout) and now.layout != self.layout,
            "fusion": not set(now.joined) <= set(self.joined),
            "shape": bool(now.shape and self.shape) and now.shape != self.shape,
        }
        return tuple(what for what, changed in found.items() if changed)


@dataclass(frozen=True)
class Lock:
    """What a model got.

    Attributes:
        policy: its name.
        policy_hash: of all that decides what it computes.
        device: ``sm90`` and the like.
        gpu: the vendor's name.
        versions: of libraries.
        sites: name of a weight -> what it got.
    """

    policy: str
    policy_hash: str
    device: str
    gpu: str
    versions: Mapping[str, str]
    sites: Mapping[str, LockedSite] = field(default_factory=dict[str, LockedSite])

    def text(self) -> str:
        """The file's text."""
        lines = [
            f"lock: {VERSION}",
            f"policy: {_json({'name': self.policy, 'hash': self.policy_hash})}",
            f"target: {_json({'device': self.device, 'gpu': self.gpu})}",
            f"versions: {_json(dict(sorted(self.versions.items())))}",
            "sites:",
        ]
        for name in sorted(self.sites, key=_natural):
            site = self.sites[name]
            lines.append(f"  {_json(name)}: {_json({key: getattr(site, key) for key in _KEYS})}")
        return "\n".join(lines) + "\n"

    def save(self, path: Path) -> Path:
        """Write the file, whole or not at all.

        Raises:
            LockError: it cannot be written.
        """
        try:
            return written_whole(path, self.text())
        except OSError as error:
            raise LockError(
                f"the lock {path} cannot be written: {error.strerror}. Fix: name a file in a folder that is there."
            ) from None

    @staticmethod
    def load(path: Path) -> Lock:
        """Read a file that ``save`` has written.

        Raises:
            LockError: there is none, or a line is not one that ``save`` writes; names the line.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LockError(f"the lock {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
        return Lock.parse(text, str(path))

    @staticmethod
    def parse(text: str, label: str) -> Lock:
        """Inverse of ``text``; ``label`` is what errors begin with.

        Raises:
            LockError: a line is not one that ``text`` gives; names it.
        """
        lines = _Lines(text.replace("\r\n", "\n").removesuffix("\n").split("\n"), label)
        if (version := lines.head("lock", int)) != VERSION:
            lines.fail(1, f"is of version {version}, and this sglquant reads version {VERSION}")
        policy = lines.head("policy", _words("name", "hash"))
        target = lines.head("target", _words("device", "gpu"))
        versions = lines.head("versions", _words())
        sites = lines.sites()
        return Lock(policy["name"], policy["hash"], target["device"], target["gpu"], versions, sites)

    def environment(self, now: Lock) -> tuple[str, ...]:
        """What differs around the kernels: the device and versions of libraries, ``torch 2.13.0 → 2.15.0``."""
        pairs = [("device", self.device, now.device), ("GPU", self.gpu, now.gpu)]
        names = dict.fromkeys((*self.versions, *now.versions))
        pairs += [(name, self.versions.get(name, "none"), now.versions.get(name, "none")) for name in names]
        return tuple(f"{name} {old} → {new}" for name, old, new in pairs if old != new)


def _json(value: Any) -> str:
    """On one line, whatever the text is: half of a surrogate pair, which no encoding has, is escaped as other letters are not."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(value)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts ``layers.2`` before ``layers.10``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _words(*keys: str) -> Callable[[str], dict[str, str]]:
    """Reads an object of texts with exactly these keys; none: any."""

    def read(text: str) -> dict[str, str]:
        found = _object(text)
        if not all(isinstance(value, str) for value in found.values()):
            raise ValueError("has a value that is no text")
        if keys and tuple(found) != keys:
            raise ValueError(f"must have the keys {', '.join(keys)}, and has {', '.join(found) or 'none'}")
        return found

    return read


def _object(text: str) -> dict[str, Any]:
    """A JSON object whose keys are all different."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("has a key twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not readable: {error.msg}, column {error.colno}") from None
    if not isinstance(value, dict):
        raise ValueError("must be in braces")
    return value


def _site(text: str) -> LockedSite:
    found = _object(text)
    if tuple(found) not in (_KEYS, _KEYS[:-1]):
        raise ValueError(f"must have the keys {', '.join(_KEYS)}, and has {', '.join(found) or 'none'}")
    scheme, layout, kernels, joined, shape = *found.values(), *([] if "shape" in found else [[]])
    if not isinstance(scheme, str | None) or not isinstance(layout, str):
        raise ValueError("has a scheme or layout that is no text")
    if not _all_text(kernels) or not _all_text(joined):
        raise ValueError("has kernels or joined that are no list of texts")
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise ValueError("has a shape that is no list of whole numbers")
    return LockedSite(scheme, layout, tuple(kernels), tuple(joined), tuple(shape))


def _all_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


class _Lines:
    """The lines of a lock, taken one after the other."""

    def __init__(self, lines: list[str], label: str) -> None:
        self._lines, self._label, self._at = lines, label, 0

    def fail(self, line: int, reason: str) -> NoReturn:
        """Refuse a line, counted from 1."""
        raise LockError(
            f"{self._label}:{line}: {reason}.\n"
            "Fix: restore the file, or write it anew with quant_compile.compile(model, policy, lock=..., lock_update=True)."
        )

    def head(self, key: str, read: Callable[[str], Any]) -> Any:
        """The value of the next line, which must be ``key``'s."""
        self._at += 1
        text = self._lines[self._at - 1] if self._at <= len(self._lines) else ""
        found = _HEAD.fullmatch(text)
        if found is None or found[1] != key:
            self.fail(self._at, f"`{key}: ...` is expected, got {text[:60]!r}")
        try:
            return read(found[2])
        except ValueError as error:
            self.fail(self._at, f"{key} {error}")

    def sites(self) -> dict[str, LockedSite]:
        """All lines that are left."""
        self._at += 1
        if self._at > len(self._lines) or self._lines[self._at - 1] != "sites:":
            self.fail(self._at, "`sites:` is expected")
        out: dict[str, LockedSite] = {}
        for number, text in enumerate(self._lines[self._at :], self._at + 1):
            found = _SITE.fullmatch(text)
            if found is None:
                self.fail(number, f'`  "name": {{...}}` is expected, got {text[:60]!r}')
            name: str = json.loads(found[1])
            if name in out:
                self.fail(number, f"{name} is given twice")
            try:
                out[name] = _site(found[2])
            except ValueError as error:
                self.fail(number, f"{name} {error}")
        return out


def shown(names: Iterable[str], most: int = 8) -> str:
    """Some names, and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
