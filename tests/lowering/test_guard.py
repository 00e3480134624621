"""The comparison of a quantized chain with linears in 16 bits, from times that a test gives; and the times that a CPU takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import quant_compile  # noqa: F401  (registers the schemes)
from quant_compile.ir.family import Reject
from quant_compile.ir.scheme import parse
from quant_compile.lowering import tune, tune_guard
from quant_compile.lowering.expand import recorded_for
from quant_compile.lowering.guard import (
    LAUNCHES,
    MARGIN,
    PASSES,
    Chain,
    Job,
    Plain,
    Product,
    Quantize,
    Rows,
    Verdict,
    compare,
)
from quant_compile.lowering.registry import Problem
from quant_compile.lowering.select import Dispatch, choose
from quant_compile.lowering.target import Target

SM90 = Target.fake("sm90")
FP8 = parse("FP8_DYNAMIC")


def chain(*sizes: int, merged: bool = True) -> Chain:
    plain = tuple(Plain(n, 4096, torch.bfloat16, False) for n in sizes)
    products = (Problem(FP8, sum(sizes), 4096, torch.bfloat16, False, len(sizes)),)
    if not merged:
        products = tuple(Problem(FP8, n, 4096, torch.bfloat16) for n in sizes)
    return Chain(plain, products, Quantize(FP8, 4096, torch.bfloat16, False))


def compared(what: Chain, rows: Rows, time: Callable[[Job, int], float | Reject]) -> Verdict | Reject:
    return compare(what, [choose(problem, SM90) for problem in what.products], rows, SM90, time)


def test_siblings_are_one_chain_with_one_quantization() -> None:
    times = {Plain: 3.0, Quantize: 2.0, Product: 5.0}
    for merged, quantized in ((True, 7.0), (False, 12.0)):
        verdict = compared(chain(4096, 1024, merged=merged), Rows(8), lambda job, m: times[type(job)])
        assert isinstance(verdict, Verdict) and verdict.plain == pytest.approx(6.0)
        assert verdict.quantized == pytest.approx(quantized) and verdict.keeps
        text = f"guard: bf16 6.0 µs, FP8_DYNAMIC {quantized:.1f} µs at m = 8, 2 linears of one input"
        assert verdict.text == text


@pytest.mark.parametrize(
    ("share", "keeps"), [(-0.01, False), (0.0, False), (MARGIN * 0.9, False), (MARGIN * 1.1, True)]
)
def test_16_bits_win_by_more_than_the_margin(share: float, keeps: bool) -> None:
    times = {Plain: 10.0, Quantize: 0.0, Product: 10.0 * (1 + share)}
    verdict = compared(chain(4096), Rows(8), lambda job, m: times[type(job)])
    assert isinstance(verdict, Verdict) and verdict.keeps is keeps


def test_a_quantization_is_measured_only_where_it_may_decide() -> None:
    """It takes Inductor a second to compile one. 40 µs for 32 MiB at m = 1: inputs of m rows of 8 KiB take m / 34 µs at most."""

    def time_of(job: Job, m: int) -> float:
        asked.append(job)
        return {Plain: 40.0, Quantize: 0.5, Product: product}[type(job)]

    for product, measured in ((20.0, False), (33.0, False), (35.0, True), (60.0, True)):
        asked: list[Job] = []
        verdict = compared(chain(4096), Rows(8), time_of)
        assert isinstance(verdict, Verdict) and verdict.keeps is (product > 41)
        assert any(isinstance(job, Quantize) for job in asked) is measured, product
        assert verdict.quantized == pytest.approx(
            product + (0.5 if measured else LAUNCHES + PASSES * 8 / 102.4), rel=1e-2
        )


def test_on_a_cpu_nothing_is_known_of_a_quantization_but_its_time() -> None:
    asked: list[type] = []

    def time_of(job: Job, m: int) -> float:
        asked.append(type(job))
        return 40.0 if isinstance(job, Plain) else 1.0

    cpu = Target.of("cpu")
    dispatches = [choose(problem, cpu) for problem in chain(4096).products]
    verdict = compare(chain(4096), dispatches, Rows(8), cpu, time_of)
    assert isinstance(verdict, Verdict) and verdict.quantized == pytest.approx(2.0) and asked.count(Quantize) == 1


def test_a_symbol_is_judged_on_its_side_of_1024_by_the_weights_of_selection() -> None:
    asked: set[int] = set()

    def time_of(job: Job, m: int) -> float:
        asked.add(m)
        return 2.0 if isinstance(job, Plain) or m != 16 else 8.0

    low = compared(Chain(chain(4096).plain, chain(4096).products, None), Rows(None, False), time_of)
    assert asked == {16, 32, 64, 128, 256, 512, 1024}
    # m = 16 has two of 6.5 shares.
    assert isinstance(low, Verdict) and low.quantized == pytest.approx(2.0 * 4.0 ** (2 / 6.5))
    assert low.text.endswith("at m <= 1024")
    asked.clear()
    high = compared(chain(4096), Rows(None, True), time_of)
    assert asked == {1, 2048, 4096} and isinstance(high, Verdict) and high.text.endswith("at m > 1024")


def test_a_symbols_recorded_kernel_is_the_one_that_is_timed() -> None:
    """Selection has other kernels for single m, which such a graph does not run."""
    problem = chain(4096).products[0]
    table = ((16, "triton_scaled_mm"), (1024, "sgl_fp8"), (4096, "triton_scaled_mm"))
    dispatch, seen = Dispatch(problem, "rows", table), set[str]()

    def time_of(job: Job, m: int) -> float:
        seen.update([job.kernel] if isinstance(job, Product) else [])
        return 1.0

    recorded = recorded_for(dispatch, False, SM90)
    compare(chain(4096), [dispatch], Rows(None, False), SM90, time_of)
    assert recorded is not None and seen == {recorded.kernel} == {"sgl_fp8"}
    compare(chain(4096), [dispatch], Rows(16), SM90, time_of)
    assert seen == {"sgl_fp8", "triton_scaled_mm"}


@pytest.mark.parametrize("kind", [Plain, Quantize, Product])
def test_a_time_that_is_not_known_is_a_refusal_with_its_reason(kind: type) -> None:
    answer = compared(chain(4096), Rows(8), lambda job, m: Reject(f"no {kind}") if isinstance(job, kind) else 1.0)
    assert answer == Reject(f"no {kind}")


# --- times ---


def test_what_a_norm_hides_costs_little_and_not_nothing(known: tune.Timings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise may make the norm alone the slower one; between two sizes, times are interpolated by logarithms."""
    monkeypatch.setattr(tune_guard, "clock", lambda call, device: 7.0)
    time_of = tune_guard.guard_times(Target.of("cpu"), "quick", CPU)
    assert not isinstance(time_of, Reject)
    for m in (1, 4, 2048):
        assert 0 < time_of(Quantize(parse("W8A8"), 64, torch.bfloat16, True), m) < 0.1  # type: ignore[operator]


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tune.Timings:
    made = tune.Timings(tmp_path / "kernels.json")
    monkeypatch.setattr(tune, "timings", lambda name, level: made)
    return made


CPU, SMALL = torch.device("cpu"), Problem(parse("W8A8"), 32, 64, torch.bfloat16)


def test_a_cpu_measures_what_is_asked_for_once_and_the_file_keeps_it(
    known: tune.Timings, monkeypatch: pytest.MonkeyPatch
) -> None:
    time_of = tune_guard.guard_times(Target.of("cpu"), "quick", CPU)
    assert not isinstance(time_of, Reject)
    jobs: list[Job] = [Plain(32, 64, torch.bfloat16, True), Product("torch_cpu_int_mm", SMALL)]
    jobs += [Quantize(parse(spec), 64, torch.bfloat16, True) for spec in ("W8A8", "NVFP4", "W8A8_STATIC")]
    jobs += [Quantize(parse(spec), 64, torch.bfloat16, False) for spec in ("W8A8", "NVFP4", "W8A8_STATIC")]
    first = [time_of(job, m) for job in jobs for m in (1, 4)]
    assert all(not isinstance(found, Reject) and found > 0 for found in first)
    again = tune.Timings(known.path)
    assert again.get(jobs[0], "guard", 1) == first[0] and again.get(jobs[0], "guard", 1024) is None  # type: ignore[arg-type]
    monkeypatch.setattr(tune_guard, "clock", lambda call, device: pytest.fail("measured again"))
    monkeypatch.setattr(tune, "timings", lambda name, level: again)
    later = tune_guard.guard_times(Target.of("cpu"), "quick", CPU)
    assert not isinstance(later, Reject) and [later(job, m) for job in jobs for m in (1, 4)] == first


def test_a_time_of_selection_is_used_and_one_that_was_not_worth_it_is_taken(
    known: tune.Timings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a name of its own, so that selection answers as before in the next process."""
    monkeypatch.setattr(tune_guard, "clock", lambda call, device: 7.0)
    known.put(SMALL, {"torch_cpu_int_mm@1": 3.0, "torch_cpu_int_mm@16": tune.FAILED})
    time_of = tune_guard.guard_times(Target.of("cpu"), "quick", CPU)
    assert not isinstance(time_of, Reject)
    job = Product("torch_cpu_int_mm", SMALL)
    assert time_of(job, 1) == 3.0 and time_of(job, 16) == 7.0 and 3.0 < time_of(job, 4) < 7.0  # type: ignore[operator]
    assert known.get(SMALL, "torch_cpu_int_mm", 16) == tune.FAILED


@pytest.mark.parametrize("error", [RuntimeError("no"), torch.OutOfMemoryError("no")])
def test_what_cannot_be_measured_is_a_refusal(
    known: tune.Timings, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(call: object, device: object) -> float:
        raise error

    monkeypatch.setattr(tune_guard, "clock", broken)
    time_of = tune_guard.guard_times(Target.of("cpu"), "quick", CPU)
    assert not isinstance(time_of, Reject)
    answer = time_of(Plain(32, 64, torch.bfloat16, False), 1)
    assert isinstance(answer, Reject) and "the linear in 16 bits, k=64, could not be measured at m = 1" in answer.reason
    remembered = tune.Timings(known.path).get(Plain(32, 64, torch.bfloat16, False), "guard", 1)
    assert remembered == (None if isinstance(error, torch.OutOfMemoryError) else tune.RAISED)


@pytest.mark.parametrize(("target", "level", "words"), [
    (SM90, "quick", "which is not here"), (Target.of("cpu"), "off", "tune is off"),
])  # fmt: skip
def test_no_measuring_without_a_device_or_against_the_users_word(target: Target, level: str, words: str) -> None:
    answer = tune_guard.guard_times(target, level, CPU)
    assert isinstance(answer, Reject) and words in answer.reason
