"""Things that take seconds are made once each, in the background where that was foreseen."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from quant_compile.ir.scheme import parse
from quant_compile.lowering.ahead import Prepared, once
from quant_compile.lowering.registry import Problem

CPU = torch.device("cpu")


def problem(n: int = 64, bias: bool = False) -> Problem:
    return Problem(parse("W4A16"), n, 128, torch.bfloat16, bias)


def test_who_asks_while_another_makes_it_waits() -> None:
    begun, go, calls = threading.Event(), threading.Event(), list[int]()

    @once
    def make(key: int) -> object:
        calls.append(key)
        begun.set()
        assert go.wait(10)
        return object()

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(make, 1)
        assert begun.wait(10)
        others = [pool.submit(make, 1) for _ in range(3)]
        go.set()
        assert len({id(future.result()) for future in (first, *others)}) == 1
    assert calls == [1]


def test_an_error_reaches_all_who_wait_and_is_not_kept() -> None:
    calls = list[int]()

    @once
    def make(key: int) -> int:
        calls.append(key)
        if len(calls) == 1:
            raise ValueError("no compiler")
        return key

    with pytest.raises(ValueError, match="no compiler"):
        make(3)
    assert make(3) == 3 == make(3)
    assert calls == [3, 3]


class Maker:
    """Notes what is made, and in which thread."""

    def __init__(self) -> None:
        self.made: dict[tuple[int, int], str] = {}
        self.changed = threading.Condition()
        self.prepared = Prepared(self.make, lambda m: 16 if m <= 16 else 64)

    def make(self, asked: Problem, top: int, device: torch.device) -> tuple[int, int]:
        with self.changed:
            assert (asked.n, top) not in self.made, "made twice"
            self.made[asked.n, top] = threading.current_thread().name
            self.changed.notify_all()
        return asked.n, top

    def wait(self, *keys: tuple[int, int]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: set(keys) <= set(self.made), 10)


def test_what_was_begun_is_not_made_again_when_asked_for() -> None:
    maker, main = Maker(), threading.current_thread().name
    maker.prepared.begin(problem(), 20, CPU)
    maker.wait((64, 64))
    assert maker.prepared(problem(), 64, CPU) == maker.prepared(problem(), 17, CPU) == (64, 64)
    assert maker.made[64, 64] != main
    assert maker.prepared(problem(), 3, CPU) == (64, 16)
    assert maker.made[64, 16] == main


def test_problems_that_serve_are_begun_together_and_others_are_not() -> None:
    maker = Maker()
    for n in (64, 128, 192):
        maker.prepared.serve(problem(n), CPU)
    assert maker.prepared(problem(256), 8, CPU) == (256, 16)  # only measured: it begins nothing
    assert set(maker.made) == {(256, 16)}
    assert maker.prepared(problem(64), 40, CPU) == (64, 64)
    maker.wait((64, 64), (128, 64), (192, 64))
    assert set(maker.made) == {(256, 16), (64, 64), (128, 64), (192, 64)}
    assert maker.prepared(problem(192), 30, CPU) == (192, 64)


def test_an_error_in_the_background_comes_when_it_is_asked_for() -> None:
    calls = list[int]()
    ended = threading.Event()

    def make(asked: Problem, top: int, device: torch.device) -> int:
        calls.append(top)
        if len(calls) == 1:
            try:
                raise RuntimeError("no nvcc")
            finally:
                ended.set()
        return top

    prepared = Prepared(make, lambda m: m)
    prepared.begin(problem(), 4, CPU)
    assert ended.wait(10)
    try:
        assert prepared(problem(), 4, CPU) == 4
    except RuntimeError:  # asked for while it failed
        assert prepared(problem(), 4, CPU) == 4


def test_what_does_not_matter_of_a_problem_makes_no_second_one() -> None:
    calls = list[Problem]()

    def make(asked: Problem, top: int, device: torch.device) -> int:
        calls.append(asked)
        return len(calls)

    prepared = Prepared(make, lambda m: m, lambda p: Problem(p.scheme, p.n, p.k, p.dtype, False))
    assert prepared(problem(bias=True), 4, CPU) == prepared(problem(), 4, CPU) == 1
    assert calls == [problem()]
