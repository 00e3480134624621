"""Tensors to safetensors shards, one job at a time, and a folder that is replaced whole or not at all.

A shard's header has its place reserved, tensors are streamed behind it, and the header is written last. A folder is filled beside its
place, flushed, and exchanged with what is there in one step of the file system. Knows nothing of models or formats.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from quant_compile.checkpoints.errors import SaveError
from quant_compile.checkpoints.files import DTYPES

CODES = {dtype: code for code, dtype in DTYPES.items()}
LARGEST_SHARD = 5_000_000_000
ALIGNMENT = 8
# What a folder of a checkpoint may hold; anything else would be lost if the folder were replaced.
REPLACEABLE = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".md", ".yaml", ".yml")
_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of renameat2(2)


@dataclass(frozen=True)
class Item:
    """A tensor to come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Job:
    """Tensors that are made together.

    Attributes:
        items: what they will be; a dtype may turn out wider, never a shape different.
        make: makes them, by name.
    """

    items: tuple[Item, ...]
    make: Callable[[], Mapping[str, Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(item.nbytes for item in self.items)


@dataclass(frozen=True)
class Shard:
    """Jobs of one file."""

    name: str
    jobs: tuple[Job, ...]


def shards_of(jobs: Sequence[Job], largest: int = LARGEST_SHARD) -> list[Shard]:
    """Jobs in files of at most ``largest`` bytes each, unless one job is larger."""
    groups: list[list[Job]] = [[]]
    size = 0
    for job in jobs:
        if groups[-1] and size + job.nbytes > largest:
            groups.append([])
            size = 0
        groups[-1].append(job)
        size += job.nbytes
    if len(groups) == 1:
        return [Shard("model.safetensors", tuple(groups[0]))]
    count = len(groups)
    return [Shard(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(group)) for i, group in enumerate(groups, 1)]


def write_shards(folder: Path, shards: Sequence[Shard]) -> int:
    """Write shards, and the index of several; returns the bytes of their tensors."""
    where: dict[str, str] = {}
    total = 0
    for shard in shards:
        total += write_shard(folder / shard.name, shard.jobs)
        where |= {item.name: shard.name for job in shard.jobs for item in job.items}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def write_shard(file: Path, jobs: Iterable[Job]) -> int:
    """Write one safetensors file; returns the bytes of its tensors."""
    jobs = list(jobs)
    reserved = _reserved(jobs)
    with file.open("wb") as opened:
        opened.write(bytes(8 + reserved))
        stream = _Stream(opened)
        for job in jobs:
            made = job.make()
            for item in job.items:
                stream.put(item.name, made[item.name])
        stream.finish()
        header = json.dumps({"__metadata__": {"format": "pt"}, **stream.header}).encode()
        opened.seek(0)
        opened.write(reserved.to_bytes(8, "little") + header.ljust(reserved))
    return stream.size


def _reserved(jobs: Sequence[Job]) -> int:
    """Bytes that a header may need: with offsets of as many digits as there can be, and dtypes of the longest names."""
    size = sum(job.nbytes for job in jobs) * 2 + 64
    longest = max(CODES.values(), key=len)
    entries = {
        item.name: {"dtype": longest, "shape": item.shape, "data_offsets": [size, size]}
        for job in jobs
        for item in job.items
    }
    length = len(json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode())
    return -(-length // ALIGNMENT) * ALIGNMENT


@dataclass
class _Stream:
    """Appends tensors; those that would leave the next one unaligned wait for the end, the widest dtype first."""

    file: BinaryIO
    size: int = 0
    header: dict[str, object] = field(default_factory=dict)
    waiting: list[tuple[str, Tensor]] = field(default_factory=list)

    def put(self, name: str, tensor: Tensor) -> None:
        if tensor.numel() * tensor.element_size() % ALIGNMENT:
            self.waiting.append((name, tensor.detach().cpu()))
        else:
            self._append(name, tensor)

    def finish(self) -> None:
        for name, tensor in sorted(self.waiting, key=lambda pair: -pair[1].element_size()):
            self._append(name, tensor)

    def _append(self, name: str, tensor: Tensor) -> None:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        nbytes = flat.numel() * flat.element_size()
        if nbytes:
            self.file.write(flat.view(torch.uint8).numpy().data)
        entry = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape)}
        self.header[name] = {**entry, "data_offsets": [self.size, self.size + nbytes]}
        self.size += nbytes


# --- folders ---


def check_target(folder: Path) -> None:
    """Refuse a place that a checkpoint cannot take.

    Raises:
        SaveError: a file is there, or a folder with something that is of no checkpoint.
    """
    if folder.is_symlink():
        raise SaveError(f"{folder} is a link.\nFix: name the folder that it leads to.")
    if folder.exists() and not folder.is_dir():
        raise SaveError(f"{folder} is a file.\nFix: name a folder; it is made if it is not there.")
    if not folder.is_dir():
        return
    strange = [entry.name for entry in folder.iterdir() if not entry.is_file() or entry.suffix not in REPLACEABLE]
    if strange or (any(folder.iterdir()) and not (folder / "config.json").is_file()):
        what = f"it holds {sorted(strange)[0]}" if strange else "it has files and no config.json"
        raise SaveError(
            f"{folder} is not replaced, since it is no checkpoint that this could have written: {what}.\n"
            "Fix: name a new folder, or remove this one."
        )


def check_space(folder: Path, needed: int) -> None:
    """Refuse to begin what will not fit.

    Raises:
        SaveError: with the bytes needed and free.
    """
    place = next(parent for parent in folder.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise SaveError(
            f"{folder} needs {needed:,} bytes, and {free:,} are free there.\n"
            "Fix: make room, or save to another disk. An old folder of that name is kept until the new one is whole."
        )


@contextmanager
def replacing(folder: Path) -> Generator[Path]:
    """A new folder beside ``folder``, which takes its place when the block ends without an error.

    Until then, and if the process is killed at any moment, ``folder`` is what it was; what was left beside it is called
    ``.<name>.saving-*`` and may be removed. On file systems that cannot exchange two folders the old one is moved away first: between
    two renames it is beside its place.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.saving-", dir=folder.parent))
    try:
        made.chmod(folder.stat().st_mode & 0o7777 if folder.is_dir() else 0o777 & ~_umask())
        yield made
        for file in made.iterdir():
            _flush(file)
        _flush(made)
        _take_place(made, folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(made, ignore_errors=True)  # an unfinished folder, or the old one after an exchange


def _take_place(made: Path, folder: Path) -> None:
    if not folder.exists():
        made.rename(folder)
    elif not _exchange(made, folder):
        old = made.with_name(f"{made.name}.old")
        folder.rename(old)
        try:
            made.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where the system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _umask() -> int:
    found = os.umask(0o022)
    os.umask(found)
    return found
