"""The container of GGUF, versions 2 and 3: header, metadata and where tensors are. Own code; the ``gguf`` package is not needed to read.

Reads a file's head through a memory map and checks every count, length and offset against the size of the file before anything of that
size is made. Texts and arrays of the metadata are decoded when they are asked for. Source: the GGUF specification of ggml.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NoReturn, cast

from quant_compile.checkpoints.errors import CheckpointError, cut
from quant_compile.ir.ggml.types import BY_NUMBER, BlockType

MAGIC = b"GGUF"
MARK = "sglq_gguf"
"""Attribute of a model that was loaded from a file: its ``Container``."""
VERSIONS = (2, 3)
ALIGNMENT = 32
MOST_DIMENSIONS = 4
LONGEST_NAME = 128  # of a tensor; llama.cpp takes 63
LONGEST_KEY = 1 << 16
LARGEST_ALIGNMENT = 1 << 20
AGAIN = "Fix: download or write the file again."
SCALARS: Mapping[int, str] = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
# Least bytes of a key with its value, and of a tensor's entry.
_LEAST_PAIR, _LEAST_TENSOR = 8 + 1 + 4 + 1, 8 + 1 + 4 + 8 + 4 + 8
# Numbers that other types have, for a message.
_OTHERS: Mapping[int, str] = {
    9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 41: "Q1_0",
    4: "Q4_2, removed from the format", 5: "Q4_3, removed from the format", 31: "Q4_0_4_4, removed from the format",
    32: "Q4_0_4_8, removed from the format", 33: "Q4_0_8_8, removed from the format",
}  # fmt: skip


@dataclass(frozen=True)
class Value:
    """A value of the metadata, where it is in the file.

    Attributes:
        kind: of the value, or of an array's items.
        start: its first byte, or that of the array's first item.
        end: the byte after it.
        count: items of an array; None: it is none.
    """

    kind: int
    start: int
    end: int
    count: int | None = None


@dataclass(frozen=True)
class Entry:
    """A tensor as the file has it.

    Attributes:
        name: of the tensor.
        block: its type.
        shape: outermost first, in numbers.
        start: its first byte in the file.
        nbytes: its length.
    """

    name: str
    block: BlockType
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass
class Container:
    """An open file's head.

    Attributes:
        file: that it is.
        values: of the metadata, by key.
        entries: tensors in the order of the file.
        alignment: of tensors.
    """

    file: Path
    values: Mapping[str, Value]
    entries: tuple[Entry, ...]
    alignment: int
    _data: Any = field(repr=False)
    _known: dict[str, Any] = field(default_factory=dict[str, Any], repr=False)

    def head(self, data: bytes) -> None:
        """Read values from these bytes from now on."""
        self._data = data

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A value of the metadata; an array is a list.

        Raises:
            CheckpointError: it has another type, or is no valid text.
        """
        if key not in self.values:
            return default
        if key not in self._known:
            self._known[key] = self._decode(key, self.values[key])
        found = self._known[key]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if float in kinds and type(found) is int:
            return float(found)
        if not isinstance(found, kinds) or (isinstance(found, bool) and not {bool, object} & set(kinds)):
            wanted = " or ".join(k.__name__ for k in kinds)
            fail(self.file, f"{cut(key)} must be {wanted}, is {type(found).__name__}")
        return found

    def need(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """As ``get``, of a key that must be there.

        Raises:
            CheckpointError: it is not.
        """
        if key not in self.values:
            fail(self.file, f"has no {cut(key)} among its metadata")
        return self.get(key, kind)

    def raw(self, key: str) -> Any:
        """A value of whatever type, as Python has it; None where it is absent."""
        return self.get(key, object) if key in self.values else None

    def encoded(self, key: str) -> bytes:
        """A value as the file has it, with its type before it."""
        value = self.values[key]
        array = b"" if value.count is None else struct.pack("<I", ARRAY)
        count = b"" if value.count is None else struct.pack("<Q", value.count)
        return array + struct.pack("<I", value.kind) + count + self._data[value.start : value.end]

    def _decode(self, key: str, value: Value) -> Any:
        if value.count is None:
            return self._text(key, value.start) if value.kind == TEXT else self._numbers(value, 1)[0]
        return list(self._texts(key, value)) if value.kind == TEXT else list(self._numbers(value, value.count))

    def _numbers(self, value: Value, count: int) -> tuple[Any, ...]:
        return struct.unpack_from(f"<{count}{SCALARS[value.kind]}", self._data, value.start)

    def _texts(self, key: str, value: Value) -> Iterator[str]:
        at = value.start
        for _ in range(cast(int, value.count)):
            yield self._text(key, at)
            at += 8 + struct.unpack_from("<Q", self._data, at)[0]

    def _text(self, key: str, at: int) -> str:
        (length,) = struct.unpack_from("<Q", self._data, at)
        try:
            return self._data[at + 8 : at + 8 + length].decode("utf-8")
        except UnicodeDecodeError:
            fail(self.file, f"{cut(key)} holds a text that is no UTF-8")


def is_gguf(path: Path) -> bool:
    """Whether a path is meant as a GGUF file: by its name, or by its first bytes."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        if path.suffix == ".gguf":
            return True
        with path.open("rb") as opened:
            return opened.read(4) == MAGIC
    except (OSError, ValueError):
        return False


def read(file: Path) -> Container:
    """A file's head.

    Raises:
        CheckpointError: it is no such file, is cut off, or says what cannot be true.
    """
    try:
        with file.open("rb") as opened:
            found = os.fstat(opened.fileno())
            if not stat.S_ISREG(found.st_mode):
                fail(file, "is no regular file", "Fix: name the model's file.")
            if found.st_size < 24:
                fail(file, f"has {found.st_size} bytes, too few for a GGUF header")
            data: Any = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        fail(file, f"cannot be read: {error}", "Fix: check the path and its permissions.")
    with data:
        return _Head(file, data).container()


class _Head:
    """Walks a file's head."""

    def __init__(self, file: Path, data: Any) -> None:
        self.file, self.data, self.size, self.at = file, data, len(data), 4

    def container(self) -> Container:
        self._check_version()
        tensors, pairs = self._number("Q"), self._number("Q")
        if pairs * _LEAST_PAIR > self.left:
            self._fail(f"promises {pairs} values of metadata, more than its {self.size} bytes can hold")
        if tensors * _LEAST_TENSOR > self.left:
            self._fail(f"promises {tensors} tensors, more than its {self.size} bytes can hold")
        values: dict[str, Value] = {}
        for _ in range(pairs):
            key = self._name(LONGEST_KEY, "a key of its metadata")
            if key in values:
                self._fail(f"has {cut(key)} twice")
            values[key] = self._value(key)
        out = Container(self.file, values, (), ALIGNMENT, self.data)
        alignment = out.get("general.alignment", int, ALIGNMENT)
        if not 0 < alignment <= LARGEST_ALIGNMENT or alignment & (alignment - 1) or alignment % 8:
            self._fail(f"general.alignment is {alignment}, no power of two from 8 to {LARGEST_ALIGNMENT}")
        entries = [self._entry() for _ in range(tensors)]
        base = -(-self.at // alignment) * alignment
        out.entries, out.alignment = self._placed(entries, base, alignment), alignment
        out.head(self.data[: self.at])  # a copy: the map would end the process if the file were cut while it is open
        return out

    @property
    def left(self) -> int:
        return self.size - self.at

    def _check_version(self) -> None:
        if self.data[:4] != MAGIC:
            self._fail(f"begins with {bytes(self.data[:4])!r}, not with {MAGIC!r}: it is no GGUF file")
        version = self._number("I")
        if version in VERSIONS:
            return
        if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *VERSIONS):
            fail(self.file, "is big-endian", "Fix: write it for a little-endian machine.")
        self._fail(f"has version {version}; read here are {' and '.join(map(str, VERSIONS))}")

    def _number(self, kind: str) -> int:
        start = self._take(struct.calcsize(f"<{kind}"))
        return struct.unpack_from(f"<{kind}", self.data, start)[0]

    def _take(self, nbytes: int) -> int:
        """The place of the next bytes."""
        if nbytes > self.left:
            self._fail(f"is cut off: at byte {self.at} of its head {nbytes} more are needed, and {self.left} are left")
        start = self.at
        self.at += nbytes
        return start

    def _name(self, longest: int, what: str) -> str:
        length = self._number("Q")
        if not 0 < length <= longest:
            self._fail(f"{what} has {length} bytes, must have 1 to {longest}")
        start = self._take(length)
        try:
            name = self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            self._fail(f"{what}, at byte {start}, is no UTF-8")
        if not name.isprintable():
            self._fail(f"{what}, at byte {start}, has letters that cannot be shown")
        return name

    def _value(self, key: str) -> Value:
        kind = self._number("I")
        if kind != ARRAY:
            start = self.at
            self._skip(kind, 1, key)
            return Value(kind, start, self.at)
        kind, count = self._number("I"), self._number("Q")
        if kind == ARRAY:
            self._fail(f"{cut(key)} is an array of arrays, which no reader takes")
        start = self.at
        self._skip(kind, count, key)
        return Value(kind, start, self.at, count)

    def _skip(self, kind: int, count: int, key: str) -> None:
        if kind in SCALARS:
            self._take(count * struct.calcsize(SCALARS[kind]))
        elif kind == TEXT:
            if count * 8 > self.left:
                self._fail(f"{cut(key)} promises {count} texts, more than the {self.left} bytes that are left can hold")
            for _ in range(count):
                self._take(self._number("Q"))
        else:
            self._fail(f"{cut(key)} has a value of type {kind}, which GGUF has not")

    def _entry(self) -> Entry:
        """With ``start`` as the offset that the file has."""
        name = self._name(LONGEST_NAME, "the name of a tensor")
        rank = self._number("I")
        if not 0 < rank <= MOST_DIMENSIONS:
            self._fail(f"{cut(name)} has {rank} dimensions, must have 1 to {MOST_DIMENSIONS}")
        sizes = tuple(self._number("Q") for _ in range(rank))
        number, offset = self._number("I"), self._number("Q")
        block = BY_NUMBER.get(number)
        if block is None:
            known = f" ({_OTHERS[number]})" if number in _OTHERS else ""
            fix = "Fix: quantize the model to types that docs/checkpoints.md lists."
            fail(f"{self.file}: {cut(name)}", f"is of type {number}{known}, which is not read here", fix)
        if 0 in sizes or prod(sizes) >= 1 << 60:
            self._fail(f"{cut(name)} has the shape {'x'.join(map(str, sizes[::-1]))}")
        if sizes[0] % block.size:
            self._fail(f"{cut(name)} has rows of {sizes[0]} numbers, no multiple of the {block.size} of {block.name}")
        nbytes = prod(sizes) // block.size * block.nbytes
        if nbytes > self.size:
            self._fail(f"{cut(name)} takes {nbytes} bytes, and the file has {self.size}: cut off, or a wrong shape")
        return Entry(name, block, sizes[::-1], offset, nbytes)

    def _placed(self, entries: list[Entry], base: int, alignment: int) -> tuple[Entry, ...]:
        """Offsets as places in the file."""
        out: list[Entry] = []
        for entry in entries:
            where = f"{self.file}: {entry.name}"
            if entry.start % alignment:
                fail(where, f"begins at {entry.start}, no multiple of {alignment}")
            start = base + entry.start
            if start + entry.nbytes > self.size:
                fail(where, f"ends {start + entry.nbytes - self.size} bytes past the end of the file, which is cut off")
            out.append(Entry(entry.name, entry.block, entry.shape, start, entry.nbytes))
        out.sort(key=lambda entry: entry.start)
        for before, after in pairwise(out):
            if before.start + before.nbytes > after.start:
                fail(f"{self.file}: {after.name}", f"shares bytes with {before.name}")
        names = {entry.name for entry in out}
        if len(names) < len(out):
            self._fail(f"has {Counter(entry.name for entry in out).most_common(1)[0][0]} twice")
        return tuple(out)

    def _fail(self, what: str) -> NoReturn:
        fail(self.file, what)


def fail(where: str | Path, what: str, fix: str = AGAIN) -> NoReturn:
    """Raise a ``CheckpointError`` about a file."""
    raise CheckpointError(f"{where}: {what}.\n{fix}")
