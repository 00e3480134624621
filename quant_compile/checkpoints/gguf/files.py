"""A GGUF model's tensors as ``Files`` hands them over: blocks as bytes, and what converters have changed undone as they are loaded.

Reads the head of every split, and one tensor at a time through a map of its own, so that no more than that is resident beside the planes.
Blocks of a row stay in one piece: rows may change places, columns never do.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from quant_compile.checkpoints.errors import cut
from quant_compile.checkpoints.files import Files, Part, TensorInfo
from quant_compile.checkpoints.gguf.container import Container, Entry, fail, read
from quant_compile.ir.ggml.decode import PLAIN_DTYPES
from quant_compile.ir.ggml.types import PLAIN, BlockType

_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
MOST_SPLITS = 9999
Undo = Callable[[Tensor], Tensor]


@dataclass
class GgufFiles(Files):
    """All tensors of a GGUF model by the names that the file gives them; ``folder`` is the file.

    Attributes:
        head: of the first split, which has the metadata.
        types: of every tensor.
        undo: what a tensor goes through when it is loaded, by name.
    """

    head: Container = field(kw_only=True)
    types: dict[str, BlockType] = field(default_factory=dict[str, BlockType])
    undo: dict[str, Undo] = field(default_factory=dict[str, Undo])
    _one: tuple[str, Tensor] | None = None
    on_disk: ClassVar[bool] = True

    @property
    def config_file(self) -> Path:
        """What says how the model is made."""
        return self.folder

    def get(self, name: str) -> Tensor:
        """A tensor, memory-mapped by itself: its pages go when nobody holds it."""
        if self._one is None or self._one[0] != name:
            self._one = None
            self._one = name, _mapped(self.tensors[name])
        return self._one[1]

    def load(self, part: Part, device: str | torch.device, *, copy: bool = True) -> Tensor:
        """As ``Files.load``, with what a converter has changed undone."""
        undo = self.undo.get(part.name)
        found = super().load(part, device, copy=copy and undo is None)
        return found if undo is None else undo(found)

    def close(self) -> None:
        """Let go of the tensor that was mapped last."""
        self._one = None


def open_files(path: str | Path) -> GgufFiles:
    """The tensors of a file, or of all splits where it is the first of several; heads are checked, no tensor is read.

    Raises:
        CheckpointError: a head that cannot be true, a split that is missing or of another model.
    """
    path = Path(path)
    head = read(path)
    out = GgufFiles(path, {}, head=head)
    _add(out, head)
    for split in _others(path, head):
        part = read(split)
        if part.get("split.no", int) is None or part.get("split.count", int) != head.get("split.count", int):
            fail(split, f"is no split of {path.name}, by its metadata", "Fix: download the splits of one model.")
        _add(out, part)
    promised = head.get("split.tensors.count", int)
    if promised is not None and promised != len(out.tensors):
        fail(path, f"promises {promised} tensors, and its splits have {len(out.tensors)}")
    return out


def _add(files: GgufFiles, head: Container) -> None:
    for entry in head.entries:
        if entry.name in files.tensors:
            fail(f"{head.file}: {entry.name}", f"is also in {files.tensors[entry.name].file.name}")
        files.tensors[entry.name] = _info(head.file, entry)
        files.types[entry.name] = entry.block


def _info(file: Path, entry: Entry) -> TensorInfo:
    """Numbers as they are, blocks as bytes."""
    block, dtype, shape = entry.block, PLAIN_DTYPES.get(entry.block.name, torch.uint8), entry.shape
    if block.name not in PLAIN:
        shape = (*shape[:-1], shape[-1] // block.size * block.nbytes)
    return TensorInfo(entry.name, file, dtype, shape, entry.start, entry.nbytes)


def _others(path: Path, head: Container) -> list[Path]:
    """The splits after the first."""
    count = head.get("split.count", int, 0)
    found = _SPLIT.fullmatch(path.name)
    if count <= 1 and (found is None or int(found[3]) <= 1):
        return []
    if found is None or count != int(found[3]) or count > MOST_SPLITS:
        what = f"says that it is one of {count} splits, which its name does not"
        fail(path, what, "Fix: name it <model>-00001-of-<count>.gguf.")
    if head.get("split.no", int, 0) != 0 or int(found[2]) != 1:
        first = f"{cut(found[1])}-00001-of-{found[3]}.gguf"
        fail(path, "is not the first of its splits, which has the metadata", f"Fix: load {first}.")
    splits = [path.with_name(f"{found[1]}-{i:05d}-of-{found[3]}.gguf") for i in range(2, count + 1)]
    missing = [split.name for split in splits if not split.is_file()]
    if missing:
        fail(path, f"needs {len(missing)} splits that are not there, {missing[0]} first", "Fix: download the rest.")
    return splits


def _mapped(info: TensorInfo) -> Tensor:
    """A tensor in a map of its bytes; writing to it changes no file."""
    begin = info.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    length = info.start + info.nbytes - begin
    with info.file.open("rb") as opened:
        try:
            data = mmap.mmap(opened.fileno(), length, access=mmap.ACCESS_COPY, offset=begin)
        except ValueError:
            fail(info.where, "the file has become shorter since it was opened")
    flat = torch.frombuffer(data, dtype=torch.uint8, count=info.nbytes, offset=info.start - begin)
    return flat.view(info.dtype).reshape(info.shape)


def rows_of_heads(heads: int) -> Undo:
    """Undo the order that llama.cpp's converter gives the rows of q and k: of each head the two halves alternate there."""

    def undo(x: Tensor) -> Tensor:
        return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    return undo


def less_one(x: Tensor) -> Tensor:
    """Undo the 1 that converters add to weights of norms that transformers adds as it multiplies."""
    return x.float() - 1
