"""Errors of one rank: which rank it is, and what the others hear of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.distributed as dist

from quant_compile.ir.errors import WeightError
from quant_compile.runtime import ranks
from quant_compile.runtime.ranks import telling

SIZE = 3


@pytest.fixture
def be(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Be one rank of three, which share a store."""
    store = dist.HashStore()
    monkeypatch.setattr(ranks, "_store", lambda: store)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: SIZE)

    def become(rank: int) -> None:
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        monkeypatch.setattr(ranks, "_told", False)

    become(0)
    return become


def fail(error: Exception) -> list[str]:
    with pytest.raises(type(error)) as caught, telling():
        raise error
    return list(getattr(caught.value, "__notes__", ()))


def test_the_rank_that_fails_is_named(be: Callable[[int], None]) -> None:
    be(1)
    (note,) = fail(WeightError("layers.3 has NaN"))
    assert "rank 1 of 3" in note and "timeout" in note


def test_others_hear_what_failed(be: Callable[[int], None]) -> None:
    be(1)
    fail(WeightError("layers.3 has NaN"))
    be(2)
    (note,) = fail(RuntimeError("connection closed by peer"))
    assert "Rank 1 of 3" in note and "WeightError: layers.3 has NaN" in note


def test_a_failure_that_was_overcome_explains_nothing(be: Callable[[int], None]) -> None:
    be(1)
    fail(WeightError("layers.3 has NaN"))
    with telling():
        pass
    be(0)
    (note,) = fail(RuntimeError("another"))
    assert "NaN" not in note and "rank 0 of 3" in note


def test_without_a_store_the_error_stays(be: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> None:
        raise RuntimeError("the process that had the store has ended")

    monkeypatch.setattr(ranks, "_store", gone)
    assert len(fail(WeightError("layers.3 has NaN"))) == 1


def test_one_process_says_nothing() -> None:
    assert fail(WeightError("layers.3 has NaN")) == []
