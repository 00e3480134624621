"""Memory that the ranks of one host share, for sums over ranks by a kernel: whether there is some, and one workspace for each size of rows.

Whether a group has such memory is agreed by all of its ranks, once, while they compile their first graph that would use it.
"""

from __future__ import annotations

import socket
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from quant_compile.ir.errors import GraphError
from quant_compile.ir.family import Reject

MOST_ROWS = 64  # of one sum; a workspace has room for so many
FLAG_BYTES = 4


@dataclass(frozen=True, eq=False)
class Workspace:
    """What sums of rows of one size need on this rank.

    Attributes:
        rank, world: of the process group.
        bases: addresses of all ranks' buffers, as this rank reaches them: ``[MOST_ROWS, 2, k]`` values, ``[MOST_ROWS, world]`` flags.
        counts: [MOST_ROWS] int32: in how many sums this rank had each row.
        flags_at: bytes before the flags.
        limit_ns: how long a kernel waits for another rank before it ends with an error; 0: for ever.
        held: what keeps the buffers alive.
    """

    rank: int
    world: int
    bases: tuple[int, ...]
    counts: Tensor
    flags_at: int
    limit_ns: int
    held: tuple[Any, ...] = ()


def group_of(name: str) -> Any:
    """The process group of a graph's collective.

    Raises:
        GraphError: this process has none of that name.
    """
    from torch.distributed.distributed_c10d import _resolve_process_group

    try:
        return _resolve_process_group(name)  # pyright: ignore[reportArgumentType]
    except (RuntimeError, ValueError) as error:
        raise GraphError(
            f"a graph sums over the process group {name!r}, which this process does not have: {error}\n"
            "Fix: call torch.distributed.init_process_group, as the process did that compiled it."
        ) from error


@dataclass
class Group:
    """What is known of a process group.

    Attributes:
        group: the object, since a name may be used again.
        reason: why its ranks share no memory; None: they do.
        spaces: by bytes of a row.
    """

    group: Any
    reason: str | None
    spaces: dict[int, Workspace] = field(default_factory=dict)


class Groups:
    """All process groups that were asked about."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Group] = {}

    def of(self, name: str, device: torch.device) -> Group:
        """A group; where it is new, a collective that all of its ranks must call alike."""
        key = (name, device.type)  # of torch's default group each kind of device has its own backend
        group, known = group_of(name), self._known.get(key)
        if known is None or known.group is not group:
            with _current(device):
                known = self._known[key] = Group(group, _agreed(group, device))
        return known

    def workspace(self, name: str, k: int, dtype: torch.dtype, device: torch.device) -> Workspace:
        """For rows of k values; where it is new, a collective.

        Raises:
            GraphError: the group has none, or it would be made while a CUDA graph is recorded.
        """
        group, size = self.of(name, device), k * dtype.itemsize
        if group.reason is not None:
            raise GraphError(
                f"the process group {name!r} has no symmetric memory: {group.reason}. Fix: compile without `fuse: {{all_reduce: true}}`."
            )
        if size not in group.spaces:
            if torch.cuda.is_current_stream_capturing():
                raise GraphError(
                    "a sum over ranks meets its first call while a CUDA graph is recorded. Fix: call the model once before."
                )
            with _current(device):
                group.spaces[size] = _allocated(group.group, size, device)
        return group.spaces[size]


GROUPS = Groups()


def unshared(name: str, device: torch.device) -> Reject | None:
    """Why the ranks of a group share no memory on their devices, the same answer on each; a collective where the group is new."""
    reason = GROUPS.of(name, device).reason
    return None if reason is None else Reject(reason)


def buffers(name: str, k: int, dtype: torch.dtype, device: torch.device) -> Reject | None:
    """Make what sums of rows of k values need, or say why the ranks share no memory, the same answer on each.

    A collective where the group or the size is new. A first call would make them in the memory of a CUDA graph, if it is recorded.
    """
    refusal = unshared(name, device)
    if refusal is None:
        GROUPS.workspace(name, k, dtype, device)
    return refusal


@contextmanager
def _current(device: torch.device) -> Generator[None]:
    """Makes a GPU the current one, which collectives of objects use, and tensors real while a graph is traced with fake ones."""
    with unset_fake_temporarily(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield


def _agreed(group: Any, device: torch.device) -> str | None:
    """First what each rank sees on its own, so that nobody waits in a rendezvous for a rank that will not come; then a trial."""
    if device.type != "cuda":
        return f"a {device.type.upper()} has no symmetric memory"
    host = socket.gethostname()
    reason = _first_reason(group, _alone(group), host)
    if reason is not None:
        return reason
    from torch.distributed import _symmetric_memory as symmetric

    failed = ""
    try:
        # One page. It may be made on devices that cannot reach each other, which the rendezvous then says.
        symmetric.rendezvous(symmetric.empty(4096, dtype=torch.uint8, device=device), group)
    except RuntimeError as error:
        failed = f"torch's rendezvous failed: {str(error).splitlines()[0]}"
    return _first_reason(group, failed, host)


def _alone(group: Any) -> str:
    """Why this rank cannot share memory, as far as it knows; empty: nothing stands against it."""
    backend = group._get_backend(torch.device("cuda")).name()
    if backend != "nccl":
        return f"the group's backend is {backend}, not NCCL"
    try:
        from torch.distributed import _symmetric_memory  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        return f"this torch has no symmetric memory: {error}"
    return ""


def _first_reason(group: Any, reason: str, host: str) -> str | None:
    """What the first rank says that has a reason, or that ranks are on several hosts; ranks see all answers, and so agree."""
    import torch.distributed as dist

    answers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, (reason, host), group=group)
    for rank, (said, _) in enumerate(answers):
        if said:
            return f"rank {rank} of the group: {said}"
    hosts = len({each for _, each in answers})
    return None if hosts == 1 else f"its ranks are on {hosts} hosts"


def _allocated(group: Any, size: int, device: torch.device) -> Workspace:
    import torch.distributed as dist
    from torch.distributed import _symmetric_memory as symmetric

    world, flags_at = dist.get_world_size(group), 2 * MOST_ROWS * size
    buffer = symmetric.empty(flags_at + MOST_ROWS * world * FLAG_BYTES, dtype=torch.uint8, device=device)
    buffer.zero_()
    handle = symmetric.rendezvous(buffer, group)
    torch.cuda.synchronize(device)
    dist.barrier(group, device_ids=[buffer.device.index])  # no flag is raised before it is zero everywhere
    counts = torch.zeros(MOST_ROWS, dtype=torch.int32, device=device)
    torch.cuda.synchronize(device)  # other streams may be the first to read them
    limit = _timeout_ns(group, device)
    return Workspace(
        dist.get_rank(group), world, _addresses(handle, buffer, group), counts, flags_at, limit, (buffer, handle)
    )


def _addresses(handle: Any, buffer: Tensor, group: Any) -> tuple[int, ...]:
    """Where this rank reaches each rank's buffer.

    torch cuts buffers out of larger allocations. Where its handle is that of the allocation, ranks tell each other where theirs begin.
    """
    import torch.distributed as dist

    found = [handle.get_buffer(rank, buffer.shape, buffer.dtype).data_ptr() for rank in range(handle.world_size)]
    begins: list[Any] = [None] * handle.world_size
    dist.all_gather_object(begins, buffer.data_ptr() - found[handle.rank], group=group)
    return tuple(address + begin for address, begin in zip(found, begins, strict=True))


def _timeout_ns(group: Any, device: torch.device) -> int:
    """The process group's."""
    options = getattr(group._get_backend(device), "options", None)
    timeout = getattr(options, "_timeout", None)
    return 0 if timeout is None else int(timeout.total_seconds() * 1e9)
