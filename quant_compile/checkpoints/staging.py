"""Tensors from files to a GPU: threads read into pinned buffers, from which a stream of its own copies, ahead of who asks.

Copying from memory-mapped files takes a page fault for every few kilobytes and the driver's own staging, in one thread. Here readers fill
pinned buffers, and bytes go on while the tensor before is being quantized. Knows byte ranges and the order in which they will be
asked for, nothing of formats; what it does on a device goes through a ``Link``. Reads files; nothing of it is left when it is closed.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.checkpoints.files import AGAIN, Files, TensorInfo


@dataclass(frozen=True)
class Sizes:
    """How much is under way at once.

    Attributes:
        readers: threads, each with two buffers, so that it reads into one while the other is being copied.
        buffer: bytes of each.
        ahead: bytes of tensors on the device that nobody has asked for yet; one tensor may be larger.
        pieces: tensors, or parts of them, that share a buffer at most.
        worth: bytes of a load for which buffers are not worth making.
    """

    readers: int = 4
    buffer: int = 16 << 20
    ahead: int = 256 << 20
    pieces: int = 256
    worth: int = 32 << 20


SIZES = Sizes()


class Link(Protocol):
    """What a device does for a ``Stager``. ``copy`` and ``wait`` are called by its threads, all else by the one that loads."""

    def pinned(self, nbytes: int) -> Tensor:
        """u8 [nbytes] on the host, which the device can read by itself.

        Raises:
            RuntimeError: there is no such memory.
        """
        ...

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory on the device, in the order of the caller's stream."""
        ...

    def mark(self) -> Any:
        """An event: all that the caller's stream was told so far."""
        ...

    def thread(self) -> AbstractContextManager[Any]:
        """What a reader runs in."""
        ...

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any) -> Any:
        """Copy to the first of each pair from the second, once ``after`` has happened; an event: it has ended."""
        ...

    def wait(self, event: Any) -> None:
        """Let the thread wait for an event."""
        ...

    def follow(self, event: Any) -> None:
        """Let the caller's stream wait for an event."""
        ...

    def close(self) -> None:
        """Wait until every copy has ended."""
        ...

    def give_back(self) -> None:
        """Free pinned memory that nobody holds."""
        ...


class CudaLink:
    """A CUDA device, with a stream for the copies."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def pinned(self, nbytes: int) -> Tensor:
        """As ``Link``."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As ``Link``."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def mark(self) -> torch.cuda.Event:
        """As ``Link``."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def thread(self) -> AbstractContextManager[Any]:
        """As ``Link``."""
        return torch.cuda.stream(self.stream)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: torch.cuda.Event) -> torch.cuda.Event:
        """As ``Link``."""
        self.stream.wait_event(after)
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
        event = torch.cuda.Event(blocking=True)
        event.record(self.stream)
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        """As ``Link``."""
        event.synchronize()

    def follow(self, event: torch.cuda.Event) -> None:
        """As ``Link``."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def close(self) -> None:
        """As ``Link``."""
        self.stream.synchronize()

    @staticmethod
    def give_back() -> None:
        """As ``Link``; torch would keep what nobody holds for the rest of the process."""
        empty = getattr(torch._C, "_host_emptyCache", None) or getattr(torch._C, "_accelerator_emptyHostCache", None)
        if empty is not None:
            empty()


def link_of(device: torch.device) -> Link | None:
    """How to stage for a device; None: its tensors are mapped."""
    return CudaLink(device) if device.type == "cuda" and hasattr(os, "preadv") else None


@contextmanager
def staged(
    files: Files, groups: Iterable[Sequence[TensorInfo]], device: torch.device, sizes: Sizes | None = None
) -> Generator[None]:
    """Let ``files.load`` hand over tensors that are read ahead, where that is worth it.

    Args:
        groups: what will be asked for, as for ``Stager``.
    """
    groups, sizes = list(groups), sizes or SIZES
    worth = files.on_disk and sum(info.nbytes for group in groups for info in group) >= sizes.worth
    link = link_of(device) if worth else None
    stager = _stager(link, groups, sizes, files) if link is not None else None
    if stager is None or link is None:
        yield
        return
    files.staged = device, stager.take
    try:
        yield
    finally:
        files.staged = None
        stager.close()
        del stager
        link.give_back()


def _stager(link: Link, groups: Sequence[Sequence[TensorInfo]], sizes: Sizes, files: Files) -> Stager | None:
    """None, with a note, where there is no pinned memory."""
    try:
        return Stager(link, groups, sizes)
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        files.notes.append(f"there is no pinned memory, and loading is slower: {reason}")
        return None


@dataclass(eq=False)
class _Arrival:
    """A tensor on its way.

    Attributes:
        values: on the device; to be read after ``events`` only.
        missing: bytes for which no copy was begun.
        error: that a reader met.
    """

    info: TensorInfo
    values: Tensor
    missing: int
    events: list[Any] = field(default_factory=list)
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self.bytes = self.values.reshape(-1).view(torch.uint8)


@dataclass(frozen=True)
class _Piece:
    """``nbytes`` of an arrival, from its byte ``first`` on."""

    arrival: _Arrival
    first: int
    nbytes: int

    @property
    def start(self) -> int:
        """In the file."""
        return self.arrival.info.start + self.first


@dataclass(frozen=True)
class _Task:
    """What goes through one buffer; ``after``: the memory that it goes to is free then."""

    pieces: tuple[_Piece, ...]
    after: Any


class Stager:
    """Reads and copies tensors in an order that is known, and hands them over when they are asked for.

    Destinations are allocated by the thread that asks, in its stream, at most ``sizes.ahead`` bytes (or one tensor) before it does.
    What is asked for in another order, again, or without having been announced is read then.
    """

    def __init__(self, link: Link, groups: Iterable[Sequence[TensorInfo]], sizes: Sizes) -> None:
        """Make buffers and begin.

        Args:
            groups: tensors of each step of the load, in order; once a step's tensor is asked for, those of earlier steps are dropped.

        Raises:
            RuntimeError: there is no pinned memory.
        """
        self._link, self._sizes = link, sizes
        self._group: dict[TensorInfo, int] = {}  # of tensors that nobody has asked for
        for number, group in enumerate(groups):
            for info in group:
                self._group.setdefault(info, number)
        self._order = deque(self._group)  # of those that are not under way either
        self._arrivals: dict[TensorInfo, _Arrival] = {}  # under way, in order
        self._ahead = 0  # their bytes
        self._tasks: deque[_Task] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._files: dict[Path, int] = {}
        count = 2 * self._sizes.readers
        buffers = link.pinned(count * self._sizes.buffer).split(self._sizes.buffer)
        self._readers = [
            threading.Thread(target=self._read, args=(pair,), name="sglquant-reader", daemon=True)
            for pair in zip(buffers[::2], buffers[1::2], strict=True)
        ]
        for reader in self._readers:
            reader.start()

    # --- the thread that loads ---

    def take(self, info: TensorInfo) -> Tensor:
        """The tensor on the device, for what the caller's stream does from now on.

        Raises:
            CheckpointError: the file is shorter than it was, or cannot be read.
        """
        arrival, group = self._pop(info), self._group.pop(info, None)
        if group is not None:
            self._drop_before(group)
        if arrival is None:
            arrival = self._allocate(info)
            self._post([arrival, *self._next()])
        else:
            self._post(self._next())
        self._await(arrival)
        if arrival.error is not None:
            raise arrival.error
        return arrival.values

    def _pop(self, info: TensorInfo) -> _Arrival | None:
        found = self._arrivals.pop(info, None)
        self._ahead -= info.nbytes if found is not None else 0
        return found

    def _next(self) -> list[_Arrival]:
        """What to read ahead now; nothing while more than half of it is still under way, so that small tensors go together."""
        found: list[_Arrival] = []
        if self._ahead > self._sizes.ahead // 2:
            return found
        while self._order:
            info = self._order[0]
            if info in self._group:
                if self._ahead and self._ahead + info.nbytes > self._sizes.ahead:
                    break
                try:
                    found.append(self._allocate(info))
                except torch.OutOfMemoryError:  # there may be room when it is asked for
                    break
                self._arrivals[info] = found[-1]
                self._ahead += info.nbytes
            self._order.popleft()
        return found

    def _allocate(self, info: TensorInfo) -> _Arrival:
        self._open(info)
        return _Arrival(info, self._link.empty(info.shape, info.dtype), info.nbytes)

    def _open(self, info: TensorInfo) -> None:
        if info.file in self._files:
            return
        try:
            self._files[info.file] = os.open(info.file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise _unreadable(info, error) from error

    def _post(self, arrivals: Sequence[_Arrival]) -> None:
        """Let tensors be read."""
        if not arrivals:
            return
        after = self._link.mark()
        tasks = [_Task(pieces, after) for pieces in _cut(arrivals, self._sizes)]
        with self._changed:
            self._tasks.extend(tasks)
            self._changed.notify_all()

    def _drop_before(self, group: int) -> None:
        """Let go of tensors of earlier steps, which were not needed."""
        while self._arrivals and self._group[info := next(iter(self._arrivals))] < group:
            arrival = self._pop(info)
            assert arrival is not None
            self._await(arrival)
            del self._group[info]
        while self._order and self._group.get(self._order[0], -1) < group:
            self._group.pop(self._order.popleft(), None)

    def _await(self, arrival: _Arrival) -> None:
        """Until every copy has begun; the stream waits for their ends."""
        with self._changed:
            while arrival.missing and arrival.error is None:
                self._changed.wait()
        for event in arrival.events:
            self._link.follow(event)

    def close(self) -> None:
        """End threads, wait for copies, and let go of buffers and of tensors that nobody took."""
        with self._changed:
            self._closed = True
            self._tasks.clear()
            self._changed.notify_all()
        for reader in self._readers:
            reader.join()
        self._link.close()
        self._readers.clear()
        self._arrivals.clear()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    # --- readers ---

    def _read(self, buffers: tuple[Tensor, Tensor]) -> None:
        """Until closed: a task into one buffer, while the other is being copied."""
        views = [memoryview(cast(Any, buffer.numpy())) for buffer in buffers]
        events: list[Any] = [None, None]
        turn = 0
        with torch.inference_mode(), self._link.thread():  # what is filled may be made in inference mode
            while (task := self._task()) is not None:
                try:
                    if events[turn] is not None:
                        self._link.wait(events[turn])
                        events[turn] = None
                    self._fill(task, views[turn])
                    events[turn] = event = self._copy(task, buffers[turn])
                    self._tell(task, event, None)
                except BaseException as error:
                    self._tell(task, None, error)
                turn = 1 - turn

    def _task(self) -> _Task | None:
        with self._changed:
            while not self._tasks and not self._closed:
                self._changed.wait()
            return None if self._closed else self._tasks.popleft()

    def _fill(self, task: _Task, view: memoryview) -> None:
        """Read pieces one behind the other; neighbours in a file in one call."""
        at = 0
        for run in _runs(task.pieces):
            nbytes = sum(piece.nbytes for piece in run)
            self._read_run(run, view[at : at + nbytes])
            at += nbytes

    def _read_run(self, run: Sequence[_Piece], view: memoryview) -> None:
        first = run[0].arrival.info
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._files[first.file], [view[done:]], run[0].start + done)
            except OSError as error:
                raise _unreadable(first, error) from error
            if not count:
                short = next(piece for piece in run if piece.start + piece.nbytes > run[0].start + done)
                raise CheckpointError(
                    f"{short.arrival.info.where}: the file has become shorter since it was opened.\n{AGAIN}"
                )
            done += count

    def _copy(self, task: _Task, buffer: Tensor) -> Any:
        pairs: list[tuple[Tensor, Tensor]] = []
        at = 0
        for piece in task.pieces:
            pairs.append(
                (piece.arrival.bytes[piece.first : piece.first + piece.nbytes], buffer[at : at + piece.nbytes])
            )
            at += piece.nbytes
        return self._link.copy(pairs, task.after)

    def _tell(self, task: _Task, event: Any, error: BaseException | None) -> None:
        """Whoever waits for a task's tensors."""
        with self._changed:
            for piece in task.pieces:
                if error is None:
                    piece.arrival.missing -= piece.nbytes
                    piece.arrival.events.append(event)
                elif piece.arrival.error is None:
                    piece.arrival.error = error
            self._changed.notify_all()


def _cut(arrivals: Iterable[_Arrival], sizes: Sizes) -> Iterator[tuple[_Piece, ...]]:
    """Bytes of tensors, one behind the other, in parts that fit a buffer."""
    pieces: list[_Piece] = []
    room = sizes.buffer
    for arrival in arrivals:
        first = 0
        while first < arrival.info.nbytes:
            nbytes = min(room, arrival.info.nbytes - first)
            pieces.append(_Piece(arrival, first, nbytes))
            first, room = first + nbytes, room - nbytes
            if not room or len(pieces) == sizes.pieces:
                yield tuple(pieces)
                pieces, room = [], sizes.buffer
    if pieces:
        yield tuple(pieces)


def _runs(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces that are neighbours in one file."""
    run: list[_Piece] = []
    for piece in pieces:
        last = run[-1] if run else None
        if last is not None and (last.arrival.info.file, last.start + last.nbytes) != (
            piece.arrival.info.file,
            piece.start,
        ):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _unreadable(info: TensorInfo, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{info.where}: cannot be read: {error.strerror or error}.\nFix: check the path and its permissions."
    )
