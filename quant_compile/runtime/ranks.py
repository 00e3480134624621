"""A call that fails on one rank: its error names the rank, and what the other ranks then meet in a collective names that error.

Ranks that do not fail wait in their next collective until the process group's timeout. Messages go through the group's own store, so
that nobody needs a collective to hear of them; none is sent while calls go well.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from quant_compile.ir.errors import RankError

KEY = "sglquant/failed"
LONGEST = 4000
_told = False


@contextmanager
def telling() -> Generator[None]:
    """Around a call of a graph whose weights ranks have in parts."""
    global _told
    try:
        yield
    except Exception as error:
        _tell(error)
        raise
    if _told:  # the program went on after a failure: it explains nothing any more
        _told = False
        with suppress(Exception):
            _store().delete_key(f"{KEY}/{dist.get_rank()}")


def in_group() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def together(what: str) -> Generator[dict[str, str]]:
    """Around what every rank does without collectives: where one fails all fail, as soon as all have come to its end.

    Args:
        what: is done, for messages.

    Yields:
        A dict for what must be alike on all ranks: names, and texts that are compared.

    Raises:
        RankError: another rank failed, and this one did not; or something is not alike.
    """
    failure: Exception | None = None
    alike: dict[str, str] = {}
    try:
        yield alike
    except Exception as error:
        failure = error
    rank, answers = dist.get_rank(), list[Any]([None] * dist.get_world_size())
    own = None if failure is None else f"{type(failure).__name__}: {failure}"[:LONGEST]
    dist.all_gather_object(answers, (own, alike))
    texts = [text for text, _ in answers]
    if failure is not None:
        failure.add_note(f"This is rank {rank} of {len(texts)}.")
        raise failure
    failed = {other: text for other, text in enumerate(texts) if text is not None}
    if failed:
        first, text = next(iter(failed.items()))
        raise RankError(
            f"{what} failed on rank {', '.join(map(str, failed))} of {len(texts)}, so nothing is kept here. Rank {first}: {text}"
        )
    for name, text in alike.items():
        other = next((other for other, (_, said) in enumerate(answers) if said.get(name) != text), None)
        if other is not None:
            both = f"here {text[:500]}, there {answers[other][1].get(name)[:500]}"
            raise RankError(
                f"{what}: ranks {rank} and {other} have different values of {name}: {both}.\nFix: the same arguments on every rank."
            )


def _tell(error: Exception) -> None:
    global _told
    if not (dist.is_available() and dist.is_initialized()):
        return
    rank, size = dist.get_rank(), dist.get_world_size()
    found = _of_others(rank, size)
    for other, text in found.items():
        error.add_note(f"Rank {other} of {size} had failed before this, rank {rank}, did:\n{text}")
    if found:
        return
    error.add_note(
        f"This is rank {rank} of {size}. Ranks that do not fail wait for it in their next collective, until the process group's timeout."
    )
    with suppress(Exception):  # the store lives in a process that may be gone
        _store().set(f"{KEY}/{rank}", f"{type(error).__name__}: {error}"[:LONGEST])
        _told = True


def _of_others(rank: int, size: int) -> dict[int, str]:
    found: dict[int, str] = {}
    with suppress(Exception):
        store = _store()
        for other in range(size):
            if other != rank and store.check([f"{KEY}/{other}"]):
                found[other] = store.get(f"{KEY}/{other}").decode()
    return found


def _store() -> Any:
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()
