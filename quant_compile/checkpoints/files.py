"""A checkpoint's safetensors files: headers checked before anything is mapped, tensors mapped one at a time.

Reads file sizes, headers and the index. A header is checked more strictly than safetensors does, since what it promises decides what
is allocated later. Never opens a path that is not directly in the checkpoint's folder, and never unpickles.
"""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import isfinite, prod
from pathlib import Path
from typing import Any, ClassVar, NoReturn, cast

import torch
from torch import Tensor

from quant_compile.checkpoints.errors import CheckpointError, cut
from quant_compile.ir.shards import Runs, take

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
LONGEST_HEADER = 100_000_000  # safetensors' own limit
LONGEST_INDEX = 100_000_000
MOST_DIMENSIONS = 8
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
AGAIN = "Fix: download or write the checkpoint again."


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file, as its header promises and its size allows.

    Attributes:
        name: of the tensor.
        file: that holds it.
        dtype: of the values.
        shape: of the tensor.
        start: its first byte, from the start of the file.
        nbytes: its length.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def where(self) -> str:
        """File and tensor, for messages."""
        return f"{self.file}: {cut(self.name)}"

    def cut(self, index: int) -> TensorInfo:
        """One item of the first dimension.

        Raises:
            IndexError: there is no such item.
        """
        if not 0 <= index < self.shape[0]:
            raise IndexError(f"{self.where} has {self.shape[0]} items, and item {index} is asked for")
        nbytes = prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, shape=self.shape[1:], start=self.start + index * nbytes, nbytes=nbytes)

    def rows(self, first: int, last: int) -> TensorInfo:
        """The items ``first`` to ``last`` of the first dimension, as slices have them."""
        first, last = min(first, self.shape[0]), min(last, self.shape[0])
        row, count = prod(self.shape[1:]) * self.dtype.itemsize, max(0, last - first)
        return replace(self, shape=(count, *self.shape[1:]), start=self.start + first * row, nbytes=count * row)


@dataclass(frozen=True)
class Part:
    """A tensor of a checkpoint, or the share of one that belongs to a module.

    Attributes:
        name: of the tensor.
        index: of the expert, where the tensor holds all of them.
        transposed: its two last dimensions are swapped.
        rows: the first and last row of what ``index`` left, where gate and up share a tensor.
        cuts: what a rank has of what these left: (dimension, runs of it); none: all.
    """

    name: str
    index: int | None = None
    transposed: bool = False
    rows: tuple[int, int] | None = None
    cuts: tuple[tuple[int, Runs], ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether it is the tensor as it lies in the file."""
        return self.index is None and self.rows is None and not self.transposed and not self.cuts

    def info(self, whole: TensorInfo) -> TensorInfo:
        """What a module sees of the header's entry."""
        if self.is_whole:
            return whole
        shape = whole.shape[1:] if self.index is not None and whole.shape else whole.shape
        if self.transposed and len(shape) > 1:
            shape = (*shape[:-2], shape[-1], shape[-2])
        if self.rows is not None and shape:
            shape = (min(self.rows[1], shape[0]) - self.rows[0], *shape[1:])
        sizes = list(shape)
        for dim, runs in self.cuts:
            sizes[dim] = sum(last - first for first, last in runs)
        return replace(whole, shape=tuple(sizes))

    def of(self, whole: Tensor) -> Tensor:
        """That part of the tensor."""
        found = whole[self.index] if self.index is not None and whole.dim() else whole
        if self.transposed and found.dim() > 1:
            found = found.transpose(-1, -2)
        found = found[self.rows[0] : self.rows[1]] if self.rows is not None and found.dim() else found
        for dim, runs in self.cuts:
            found = take(found, dim, runs)
        return found

    def cut(self, dim: int, runs: Runs) -> Part:
        """The part of it that lies in these runs of a dimension; one run of rows in a file stays one run of bytes."""
        if dim == 0 and len(runs) == 1 and not self.transposed and not self.cuts:
            start = 0 if self.rows is None else self.rows[0]
            return replace(self, rows=(start + runs[0][0], start + runs[0][1]))
        return replace(self, cuts=(*self.cuts, (dim, runs)))

    def nbytes(self, whole: TensorInfo) -> int:
        """Bytes of it in the file."""
        return prod(self.info(whole).shape) * whole.dtype.itemsize

    def span(self, whole: TensorInfo) -> TensorInfo:
        """The bytes that it is in: an expert's, and of these the rows, unless they are columns in the file."""
        found = whole
        if self.index is not None and whole.shape:
            found = whole.cut(self.index)
        return found.rows(*self.rows) if self._rows_in_file(found) and self.rows is not None else found

    def of_span(self, found: Tensor) -> Tensor:
        """That part of what ``span`` names."""
        assert not self.cuts  # whose bytes are no neighbours
        whole = replace(self, index=None, rows=None) if self._rows_in_file(found) else replace(self, index=None)
        part = whole.of(found)
        return part if part.numel() == found.numel() else part.clone()  # so that the rest can go

    def _rows_in_file(self, stored: TensorInfo | Tensor) -> bool:
        return self.rows is not None and bool(stored.shape) and not (self.transposed and len(stored.shape) > 1)


@dataclass
class Files:
    """All tensors of a checkpoint by name.

    Attributes:
        folder: of the checkpoint.
        tensors: name -> where it is.
        metadata: of each file, joined.
        staged: the device that tensors are on their way to, and what hands them over; None: they are copied when they are asked for.
        notes: what was to be said while they were read, one sentence each.
        taken: bytes of tensors that ``load`` has handed over.
    """

    folder: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    staged: tuple[torch.device, Callable[[TensorInfo], Tensor]] | None = None
    notes: list[str] = field(default_factory=list[str])
    taken: int = 0
    _mapped: tuple[Path, Tensor] | None = None
    on_disk: ClassVar[bool] = True

    @staticmethod
    def open(path: str | Path) -> Files:
        """The files of a folder, or one safetensors file; every header is checked, no tensor is read.

        Raises:
            CheckpointError: no safetensors, pickled files, a missing shard, or a header that cannot be true.
        """
        path = Path(path)
        if _is_file(path):
            _refuse_others(path)
            shards, index, folder = [path], None, path.parent
        else:
            (shards, index), folder = _shards(path), path
        out = Files(folder, {})
        for shard in shards:
            infos, metadata = read_header(shard)
            for info in infos:
                if info.name in out.tensors:
                    _fail(info.where, f"is also in {out.tensors[info.name].file.name}", AGAIN)
                out.tensors[info.name] = info
            out.metadata |= metadata
        for name, shard in (index or {}).items():
            if name not in out.tensors or out.tensors[name].file.name != shard:
                _fail(
                    out.folder / shard, f"the index promises {cut(name)} in this file, which has no such tensor", AGAIN
                )
        return out

    def get(self, name: str) -> Tensor:
        """A tensor, memory-mapped: its values are read from the file when they are used, and writing to it changes no file."""
        info = self.tensors[name]
        if self._mapped is None or self._mapped[0] != info.file:
            size = info.file.stat().st_size
            self._mapped = (info.file, torch.from_file(str(info.file), shared=False, size=size, dtype=torch.uint8))
        whole = self._mapped[1]
        if info.start + info.nbytes > whole.numel():
            _fail(info.where, "the file has become shorter since it was opened", AGAIN)
        data = whole[info.start : info.start + info.nbytes]
        if info.start % max(1, info.dtype.itemsize):
            data = data.clone()  # views of wider dtypes must be aligned
        return data.view(info.dtype).reshape(info.shape)

    def load(self, part: Part, device: str | torch.device, *, copy: bool = True) -> Tensor:
        """A tensor, or a share of one, on a device: the one way of values to there.

        Args:
            copy: on the device of the files, it must not share memory with them.

        Raises:
            CheckpointError: the file is shorter than it was, or cannot be read.
        """
        self.taken += part.nbytes(self.tensors[part.name])
        if self.staged is not None and self.staged[0] == torch.device(device) and not part.cuts:
            return part.of_span(self.staged[1](part.span(self.tensors[part.name])))
        return part.of(self.get(part.name)).to(device, copy=copy)

    def close(self) -> None:
        """Let go of the mapped file; tensors that are still held keep their part of it."""
        self._mapped = None

    @property
    def config_file(self) -> Path:
        """What says how the model is made."""
        return self.folder / "config.json"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())


def read_json(path: Path, longest: int = LONGEST_INDEX) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: unreadable, too long, not JSON, no object, or a key twice.
    """
    try:
        size = _size(path)
        if size > longest:
            _fail(path, f"has {size} bytes, more than any config or index needs", AGAIN)
        data = path.read_bytes()
    except OSError as error:
        _fail(path, f"cannot be read: {error.strerror or error}", "Fix: check the path and its permissions.")
    return _parse(data, str(path))


def _parse(data: bytes, where: str, constants: bool = True) -> dict[str, Any]:
    """A JSON object; of a repeated key the first would be lost without a word. ``constants``: NaN and Infinity, as Python writes them."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            _fail(where, f"{cut(twice)!r} is there twice", AGAIN)
        return found

    try:
        found = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=once,
            parse_float=_finite,
            parse_constant=float if constants else _finite,
        )
        if rb"\u" in data:
            json.dumps(found, ensure_ascii=False).encode(
                "utf-8"
            )  # half a surrogate is in no text that can be shown or named
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        _fail(where, f"is no JSON: {reason}", AGAIN)
    if not isinstance(found, dict):
        _fail(where, f"must hold an object {{...}}, holds a {type(found).__name__}", AGAIN)
    return cast(dict[str, Any], found)


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError(f"number out of range: {cut(text, 20)}")
    return number


def read_header(file: Path) -> tuple[tuple[TensorInfo, ...], dict[str, str]]:
    """Tensors and metadata of one file.

    Raises:
        CheckpointError: a header that is cut off, too long, no JSON, or that promises what the file cannot hold.
    """
    try:
        size = _size(file)
        with file.open("rb") as opened:
            head = opened.read(8)
            if len(head) < 8:
                _fail(file, f"has {size} bytes, too few for a safetensors header", AGAIN)
            length = int.from_bytes(head, "little")
            if length > min(LONGEST_HEADER, size - 8):
                _fail(
                    file,
                    f"promises a header of {length} bytes and has {size} in all: cut off, or no safetensors",
                    AGAIN,
                )
            data = opened.read(length)
    except OSError as error:
        _fail(file, f"cannot be read: {error.strerror or error}", "Fix: check the path and its permissions.")
    if len(data) < length:
        _fail(file, "is cut off inside of its header", AGAIN)
    header = _parse(data, str(file), constants=False)
    if not data.startswith(b"{"):
        _fail(file, "has blanks before its header, which safetensors does not read", AGAIN)
    metadata = _metadata(header.pop("__metadata__", {}), file)
    infos = [_tensor(name, entry, file, 8 + length) for name, entry in header.items()]
    _check_ranges(infos, file, 8 + length, size)
    return tuple(infos), metadata


def _metadata(value: Any, file: Path) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(text, str) for text in value.values()):
        _fail(file, "__metadata__ must be texts by name", AGAIN)
    return dict(cast(Mapping[str, str], value))


def _tensor(name: str, entry: Any, file: Path, base: int) -> TensorInfo:
    where = f"{file}: {cut(name)}"
    if not isinstance(entry, Mapping):
        _fail(where, "its header entry is no object", AGAIN)
    values = cast(Mapping[str, Any], entry)
    dtype = DTYPES.get(values["dtype"]) if isinstance(values.get("dtype"), str) else None
    if dtype is None:
        _fail(where, f"has dtype {str(values.get('dtype'))[:40]!r}; known are {', '.join(DTYPES)}", AGAIN)
    shape, span = values.get("shape"), values.get("data_offsets")
    if not _naturals(shape) or len(cast(list[int], shape)) > MOST_DIMENSIONS:
        _fail(where, f"has the shape {str(shape)[:60]}, no list of at most {MOST_DIMENSIONS} sizes", AGAIN)
    if prod(size or 1 for size in cast(list[int], shape)) >= 1 << 60:  # beside a size of 0, which would hide it
        _fail(where, f"has the shape {str(shape)[:60]}, larger than any tensor", AGAIN)
    if not _naturals(span) or len(cast(list[int], span)) != 2:
        _fail(where, f"has the data_offsets {str(span)[:60]}, not [first, last]", AGAIN)
    first, last = cast(list[int], span)
    nbytes = prod(cast(list[int], shape)) * dtype.itemsize
    if last - first != nbytes:
        sizes = "x".join(map(str, cast(list[int], shape)))[:80]
        _fail(where, f"has {last - first} bytes, and its shape {sizes} in {values['dtype']} takes {nbytes}", AGAIN)
    return TensorInfo(name, file, dtype, tuple(cast(list[int], shape)), base + first, nbytes)


def _naturals(value: Any) -> bool:
    """Whether it is a list of whole numbers from 0 to 2**62."""
    if not isinstance(value, list):
        return False
    return all(type(item) is int and 0 <= item < 1 << 62 for item in cast(list[Any], value))


def _check_ranges(infos: list[TensorInfo], file: Path, base: int, size: int) -> None:
    ordered = sorted(infos, key=lambda info: (info.start, info.nbytes))
    for info in ordered:
        if info.start + info.nbytes > size:
            missing = info.start + info.nbytes - size
            _fail(info.where, f"ends {missing} bytes past the end of the file, which is cut off", AGAIN)
    for before, after in pairwise(ordered):
        if before.start + before.nbytes > after.start:
            _fail(after.where, f"shares bytes with {cut(before.name)}", AGAIN)
        if before.start + before.nbytes < after.start:
            _fail(
                after.where,
                f"begins {after.start - before.start - before.nbytes} bytes after the end of {cut(before.name)}",
                AGAIN,
            )
    end = ordered[-1].start + ordered[-1].nbytes if ordered else base
    if ordered and ordered[0].start != base:
        _fail(ordered[0].where, "does not begin where the header ends", AGAIN)
    if end != size:
        _fail(file, f"has {size - end} bytes after its last tensor", AGAIN)


def _shards(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a folder, by its index where it has one."""
    fix = "Fix: name the folder that holds config.json and the weights."
    try:
        entries = sorted(folder.iterdir())
    except (NotADirectoryError, FileNotFoundError):
        _fail(folder, "is no folder and no safetensors file", fix)
    except (OSError, ValueError) as error:
        _fail(folder, f"cannot be read: {error}", "Fix: check the path and its permissions.")
    indexes = [entry for entry in entries if entry.name.endswith(".safetensors.index.json")]
    single = folder / "model.safetensors"
    if _is_file(single) and not _is_file(folder / "model.safetensors.index.json"):
        return [single], None
    if len(indexes) > 1:
        names = ", ".join(index.name for index in indexes)
        _fail(folder, f"has several indexes: {names}", "Fix: keep the one of the weights to load.")
    if indexes:
        return _indexed(indexes[0])
    files = [entry for entry in entries if entry.suffix == ".safetensors"]
    if not files:
        for file in entries:
            _refuse_others(file)
        _fail(folder, "has no safetensors files", fix)
    return files, None


def _indexed(index: Path) -> tuple[list[Path], dict[str, str]]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, Mapping) or not where:
        _fail(index, "has no weight_map of tensor names and files", AGAIN)
    for name, shard in cast(Mapping[str, Any], where).items():
        if not isinstance(shard, str) or not _plain(shard) or not shard.endswith(".safetensors"):
            text = f"says that {cut(name)} is in {str(shard)[:80]!r}, which is no safetensors file of this folder"
            _fail(index, text, "Fix: an index names files beside itself, without folders.")
    shards = [index.parent / shard for shard in sorted(set(cast(Mapping[str, str], where).values()))]
    missing = [shard.name for shard in shards if not _is_file(shard)]
    if missing:
        names = ", ".join(map(cut, missing[:4]))
        _fail(index, f"needs {len(missing)} files that are not there: {names}", "Fix: download the rest.")
    return shards, dict(cast(Mapping[str, str], where))


def _is_file(path: Path) -> bool:
    """Whether a regular file is there; no for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _size(path: Path) -> int:
    """Bytes of a regular file; a pipe would keep its reader waiting.

    Raises:
        OSError: it is something else, or not there.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is no regular file")
    return found.st_size


def _plain(name: str) -> bool:
    """Whether it names a file directly in a folder, on any system."""
    return bool(name) and not set(name) & set("/\\:\0") and name not in (".", "..")


def _refuse_others(file: Path) -> None:
    if file.suffix in PICKLED:
        _fail(
            file,
            "is pickled, and unpickling runs whatever code is in it",
            "Fix: on a machine that you can lose, `AutoModelForCausalLM.from_pretrained(dir).save_pretrained(new_dir)` of transformers "
            "writes safetensors; load new_dir.",
        )
    if file.suffix == ".gguf":
        _fail(file, "is a GGUF file, and a folder of safetensors is asked for", "Fix: name the file itself.")


def _fail(where: str | Path, what: str, fix: str) -> NoReturn:
    raise CheckpointError(f"{where}: {what}.\n{fix}")


def names_of(files: Files) -> Iterator[str]:
    """Tensor names in the order of the files, so that each file is mapped once."""
    ordered = sorted(files.tensors.values(), key=lambda info: (info.file, info.start))
    return (info.name for info in ordered)
