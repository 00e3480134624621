"""Which kernels a problem gets on each target: no GPU is needed, a target is data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quant_compile  # noqa: F401  (registers the schemes)
from quant_compile.ir.errors import NoKernelError, OptionError
from quant_compile.ir.family import Reject
from quant_compile.ir.moe import Activation, MoeProblem
from quant_compile.ir.scheme import PRESETS, parse
from quant_compile.lowering.kernels.gguf import triton_gguf
from quant_compile.lowering.moe import choose_moe, serves
from quant_compile.lowering.registry import Kernel, Problem, kernels, layouts
from quant_compile.lowering.select import BUCKETS, Dispatch, Request, bucket_of, choose, fits, parse_dispatch
from quant_compile.lowering.target import FAKE_OPS, FAKE_SM_COUNT, Target, default_policy
from quant_compile.options import Options
from quant_compile.policy import Policy

GPUS = tuple(f"sm{arch}" for arch in FAKE_SM_COUNT)
SIZES = ((6144, 4096), (33, 51), (1, 1), (128, 200))
"""A real layer, and sizes that no tile and no alignment likes."""
CUSTOM = ("int4.group64+16", "int4.group32.asym+16", "int4.channel+16")
SPECS = (*PRESETS, *CUSTOM)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def problem(
    spec: str, n: int = 6144, k: int = 4096, dtype: torch.dtype = torch.bfloat16, bias: bool = False
) -> Problem:
    return Problem(parse(spec), n, k, dtype, bias)


def unserved(spec: str, target: str) -> bool:
    """No kernel of this GPU multiplies such weights by such inputs: 8-bit floats below sm89, FP4 inputs below sm100, GGUF's NVFP4."""
    scheme = parse(spec)
    if scheme.weights.type == "gguf":
        return target != "cpu" and scheme.weights.format == "nvfp4"
    arch = 999 if target == "cpu" else int(target.removeprefix("sm"))
    args = [a for a in (scheme.weights, scheme.input_activations) if a is not None and a.type == "float"]
    a = scheme.input_activations
    fp4_inputs = a is not None and a.num_bits == 4
    return (arch < 89 and any(a.num_bits == 8 for a in args)) or (arch < 100 and fp4_inputs)


SERVED = tuple(spec for spec in SPECS if not unserved(spec, "sm90"))


def check(dispatch: Dispatch, asked: Problem, target: Target, request: Request | None = None) -> None:
    """Every kernel of a dispatch reads its layout and says itself that it fits; the table is ascending and complete."""
    assert dispatch.problem == asked and dispatch.layout in layouts()
    bounds = [bound for bound, _ in dispatch.table]
    assert bounds == sorted(set(bounds)) and bounds[-1] == BUCKETS[-1]
    for m in (*BUCKETS, 3, 5000, 100_000):
        kernel = dispatch.kernel_for(m)
        assert kernel.layout == dispatch.layout
        answer = kernel.fit(asked, bucket_of(m), target)
        assert not isinstance(answer, Reject), f"{kernel.name} refuses m={m}: {answer}"
    assert dispatch.column_scales == any(kernels()[name].column_scales for _, name in dispatch.table)
    packed = layouts()[dispatch.layout].planes(asked)
    assert all(size > 0 for spec in packed for size in spec.shape)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("target", ["cpu", *GPUS])
def test_every_scheme_has_kernels_or_an_error_with_every_reason(target: str, spec: str, size: tuple[int, int]) -> None:
    device = Target.fake(target)
    for dtype in DTYPES[:2]:
        asked = problem(spec, *size, dtype)
        if unserved(spec, target):
            with pytest.raises(NoKernelError) as error:
                choose(asked, device, site="model.layers.0.q_proj")
            assert set(error.value.reasons) == set(kernels())
            assert all(error.value.reasons.values())
        else:
            check(choose(asked, device), asked, device)


@pytest.mark.parametrize("spec", SPECS)
def test_f32_models_run_on_cpu(spec: str) -> None:
    asked = problem(spec, 33, 51, torch.float32, bias=True)
    check(choose(asked, Target.fake("cpu")), asked, Target.fake("cpu"))


def test_error_names_the_weight_the_problem_and_the_fix() -> None:
    with pytest.raises(NoKernelError) as error:
        choose(problem("FP8_DYNAMIC", 11008, 4100), Target.fake("sm80"), site="model.layers.0.mlp.up_proj")
    text = str(error.value)
    assert "no kernel for model.layers.0.mlp.up_proj (FP8_DYNAMIC, n=11008 k=4100" in text and "sm80" in text
    assert "  triton_scaled_mm: fp8 needs sm89" in text
    assert "Fix: " in text.splitlines()[-1] and "allow_reference" in text.splitlines()[-1]


def test_the_fix_is_to_leave_inputs_alone_where_only_they_have_no_kernel() -> None:
    """Told where `fallback: weight_only` would help, for linears and blocks, and nowhere else."""
    words = "Fix: set `fallback: weight_only` in the policy, which serves it as {} here; or map"
    fp8 = "or `fallback: fp8` in the policy, which serves it as FP8_DYNAMIC here; or map"
    for spec in ("NVFP4", "MXFP4", "NVFP4_STATIC"):
        with pytest.raises(NoKernelError) as caught:
            choose(Problem(parse(spec), 256, 512, torch.bfloat16), Target.fake("sm90"))
        assert "`fallback: weight_only`" in str(caught.value) and fp8 in str(caught.value)
    for spec, target, alone in (
        ("NVFP4", "sm80", "NVFP4A16"),
        ("MXFP4", "sm80", "MXFP4A16"),
        ("W4AFP8", "sm80", "W4A16"),
        ("FP8_DYNAMIC", "sm80", "fp8e4m3.channel+16"),
    ):
        with pytest.raises(NoKernelError) as caught:
            choose(Problem(parse(spec), 256, 512, torch.bfloat16), Target.fake(target))
        assert words.format(alone) in str(caught.value)
    block = MoeProblem(parse("W4AFP8"), 8, 256, 512, 2, Activation("silu"), torch.bfloat16)
    with pytest.raises(NoKernelError) as caught:
        choose_moe(block, Target.fake("sm80"))
    assert words.format("W4A16") in str(caught.value)
    for spec, target in (("FP8_BLOCK", "sm80"), ("W8A16", "cpu")):
        request = Request(((spec, "sgl_fp8"),)) if target == "cpu" else Request()
        with pytest.raises(NoKernelError) as caught:
            choose(Problem(parse(spec), 256, 512, torch.bfloat16), Target.fake(target), request)
        assert "fallback" not in str(caught.value)


def by_triton(spec: str) -> bool:
    """Not the rarer GGUF types: sgl-kernel or torch decode them."""
    return not spec.startswith("GGUF") or parse(spec).weights.format in (*triton_gguf.FORMS, "mxfp4")


@pytest.mark.parametrize("target", ["sm89", "sm90", "sm100", "sm120"])
@pytest.mark.parametrize("spec", filter(by_triton, SPECS))
def test_triton_serves_where_libraries_are_missing(target: str, spec: str) -> None:
    if unserved(spec, target):
        pytest.skip("a GPU of this kind has no kernel for it, with or without libraries")
    device = Target.fake(target, frozenset({"triton"}))
    for size in SIZES:
        dispatch = choose(problem(spec, *size), device)
        check(dispatch, problem(spec, *size), device)
        names = {name for _, name in dispatch.table}
        assert not {name for name in names if name.startswith(("sgl", "humming", "deep"))}
        assert any(name.startswith("triton") for name in names)


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("spec", SPECS)
def test_without_any_library_torch_serves_or_the_error_says_what_is_missing(target: str, spec: str) -> None:
    device = Target.fake(target, frozenset())
    try:
        dispatch = choose(problem(spec), device)
    except NoKernelError as error:
        assert any("triton" in reason.lower() for reason in error.reasons.values())
    else:
        check(dispatch, problem(spec), device)
        assert all(name.startswith("torch") for _, name in dispatch.table)


@pytest.mark.parametrize("missing", sorted(FAKE_OPS - {"triton"}))
def test_each_library_is_optional(missing: str) -> None:
    device = Target.fake("sm90", FAKE_OPS - {missing})
    for spec in SERVED:
        if missing == "sgl_kernel::ggml_dequantize" and spec.startswith("GGUF_IQ"):
            continue  # types of tables and codebooks, which nothing else decodes on a GPU
        check(choose(problem(spec), device), problem(spec), device)


def test_libraries_are_used_where_they_are() -> None:
    """Otherwise the tests above would pass with kernels that never serve."""
    served = {
        name for target in GPUS for spec in SPECS if not unserved(spec, target)
        for _, name in choose(problem(spec), Target.fake(target)).table
    }  # fmt: skip
    assert {"sgl_fp8", "sgl_int8", "deep_gemm", "humming_w4a16"} <= served
    assert any(name.startswith("triton") for name in served)


class Asked(frozenset[str]):
    """Libraries that are here, and which of them were asked for."""

    names: set[str]

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return super().__contains__(name)


COMMON = ("FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W8A16", "W4A16", "MXFP4A16", "NVFP4A16", "GGUF_Q4_K", "GGUF_Q8_0")


@pytest.mark.parametrize("spec", COMMON)
def test_what_tritons_kernels_serve_asks_no_library(spec: str) -> None:
    """A library's answer is an import, and on a GPU a trial: a second or more, while a checkpoint waits to be read."""
    block = MoeProblem(parse(spec), 128, 2048, 768, 8, Activation("silu"), torch.bfloat16)
    serves.cache_clear()  # this target is equal to any other sm90
    for asked in (problem(spec), block):
        ops = Asked(FAKE_OPS)
        ops.names = set()
        assert serves(asked, replace(Target.fake("sm90"), ops=ops), Request())
        assert ops.names == {"triton"}, ops.names


@pytest.mark.parametrize("target", ("cpu", "sm80", "sm90", "sm100"))
@pytest.mark.parametrize(
    "kernel", (None, "sgl_fp8", "humming_w4a16", "sgl_grouped_fp8_moe", "triton_moe_decode", "triton_moe")
)
def test_what_is_served_can_be_chosen(target: str, kernel: str | None) -> None:
    """With and without libraries, for odd sizes too, and where a library's kernel is pinned."""

    def chosen(asked: Any, of: Target, request: Request) -> bool:
        try:
            (choose_moe if isinstance(asked, MoeProblem) else choose)(asked, of, request)
        except NoKernelError:
            return False
        return True

    request = Request() if kernel is None else Request(kernels=(("*", kernel),))
    for of in (Target.fake(target), Target.fake(target, frozenset({"triton"}))):
        for i, spec in enumerate(SPECS):
            sizes = (problem(spec), MoeProblem(parse(spec), 8, 96, 51, 2, Activation("silu"), torch.bfloat16))
            odd = (problem(spec, 33, 51), MoeProblem(parse(spec), 8, 512, 256, 2, Activation("silu"), torch.bfloat16))
            for asked in odd if i % 2 else sizes:
                assert serves(asked, of, request) == chosen(asked, of, request), (asked, of.label)


def test_no_cpu_kernel_serves_a_gpu_and_none_of_a_gpu_the_cpu() -> None:
    for spec in SERVED:
        on_cpu = {name for _, name in choose(problem(spec), Target.fake("cpu")).table}
        assert all(name.startswith(("torch_cpu", "reference")) for name in on_cpu)
        on_gpu = {name for _, name in choose(problem(spec), Target.fake("sm90")).table}
        assert not {name for name in on_gpu if name.startswith(("torch_cpu", "reference"))}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("target", GPUS)
def test_reference_on_a_gpu_only_when_allowed(target: str, spec: str) -> None:
    device = Target.fake(target, frozenset())
    answers = fits(problem(spec), device, Request(), 1)
    assert "allow_reference" in str(answers["reference"])
    allowed = Request(allow_reference=True)
    check(choose(problem(spec), device, allowed), problem(spec), device)
    assert isinstance(fits(problem(spec), device, allowed, 1)["reference"], float)
    if unserved(spec, target):
        dispatch = choose(problem(spec), Target.fake(target), allowed)
        assert dispatch.table == ((BUCKETS[-1], "reference"),)


@pytest.mark.parametrize("target", ["cpu", "sm80", "sm90"])
def test_kernels_reference_means_the_reference_everywhere(target: str) -> None:
    for spec in SPECS:
        dispatch = choose(problem(spec), Target.fake(target), Request(kernels="reference"))
        assert dispatch.layout == "rows" and dispatch.table == ((BUCKETS[-1], "reference"),)


def test_pins_hold_for_their_scheme_only() -> None:
    device = Target.fake("sm90")
    request = Request(kernels=(("FP8_DYNAMIC", "triton_scaled_mm"),))
    pinned = choose(problem("FP8_DYNAMIC"), device, request)
    assert {name for _, name in pinned.table} == {"triton_scaled_mm"}
    free = choose(problem("W8A8"), device, request)
    assert free == choose(problem("W8A8"), device)


def test_pin_of_everything_yields_to_a_pin_of_one_scheme() -> None:
    request = Request(kernels=(("*", "triton_scaled_mm"), ("W8A8", "sgl_int8")))
    pins = {spec: request.pin_for(spec, kernels()) for spec in ("W8A8", "FP8_DYNAMIC")}
    assert pins == {"W8A8": "sgl_int8", "FP8_DYNAMIC": "triton_scaled_mm"}


def test_pins_hold_for_what_their_kernels_serve() -> None:
    """One of linears leaves expert blocks alone and the other way round; a list pins both."""
    device = Target.fake("sm90")
    block = MoeProblem(parse("FP8_DYNAMIC"), 8, 256, 128, 2, Activation("silu"), torch.bfloat16)
    policy = Policy.load("FP8_DYNAMIC")

    def chosen(pins: Any) -> tuple[set[str], set[str]]:
        request = Options.of({"kernels": pins, "tune": "off"}).request(policy)
        linear, moe = choose(problem("FP8_DYNAMIC"), device, request), choose_moe(block, device, request)
        return {name for _, name in linear.table}, {name for _, name in moe.table}

    free = chosen("auto")
    assert chosen({"FP8_DYNAMIC": "triton_scaled_mm"}) == ({"triton_scaled_mm"}, free[1])
    assert chosen({"*": "triton_moe"}) == (free[0], {"triton_moe"}) and free[1] != {"triton_moe"}
    assert chosen({"FP8_DYNAMIC": ["triton_scaled_mm", "triton_moe"]}) == ({"triton_scaled_mm"}, {"triton_moe"})
    assert chosen({"*": "triton_moe", "FP8_DYNAMIC": "triton_scaled_mm"}) == ({"triton_scaled_mm"}, {"triton_moe"})
    with pytest.raises(OptionError, match="at most one kernel of linears"):
        chosen({"FP8_DYNAMIC": ["triton_scaled_mm", "sgl_fp8"]})


def test_pin_that_cannot_serve_is_an_error_with_its_own_reason() -> None:
    with pytest.raises(NoKernelError) as error:
        choose(problem("FP8_DYNAMIC"), Target.fake("sm80"), Request(kernels=(("FP8_DYNAMIC", "sgl_fp8"),)))
    assert "sm89" in error.value.reasons["sgl_fp8"]
    assert "pin FP8_DYNAMIC to sgl_fp8" in error.value.reasons["triton_scaled_mm"]


def test_unknown_pin_lists_the_kernels() -> None:
    with pytest.raises(OptionError, match=r"triton_scaled_mm.*triton_moe"):
        Options.of({"kernels": {"*": ["magic"]}})


@given(
    st.sampled_from(SPECS),
    st.integers(1, 1 << 20),
    st.integers(1, 1 << 20),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.lists(st.sampled_from(sorted(kernels())), min_size=1, max_size=6),
    st.booleans(),
    st.integers(1, 4),
)
@settings(deadline=None, derandomize=True)
def test_text_round_trip(
    spec: str, n: int, k: int, dtype: torch.dtype, bias: bool, names: list[str], columns: bool, siblings: int
) -> None:
    table = tuple(zip(BUCKETS, names, strict=False))
    dispatch = Dispatch(replace(problem(spec, n, k, dtype, bias), siblings=siblings), "rows", table, columns)
    assert parse_dispatch(dispatch.text) == dispatch
    assert " " not in dispatch.text


def test_text_tells_dispatches_apart() -> None:
    """It is part of Inductor's cache key: anything that changes the numbers must change it."""
    base = Dispatch(problem("W4A16"), "rows", ((4096, "reference"),))
    others = [
        replace(base, problem=problem("int4.group64+16")),
        replace(base, problem=problem("W4A16", n=6145)),
        replace(base, problem=problem("W4A16", k=4097)),
        replace(base, problem=problem("W4A16", dtype=torch.float16)),
        replace(base, problem=problem("W4A16", bias=True)),
        replace(base, layout="w4_tiles"),
        replace(base, table=((16, "triton_w4a16_gemv"), (4096, "reference"))),
        replace(base, column_scales=True),
    ]
    assert len({d.text for d in [base, *others]}) == len(others) + 1


def test_ranges_for_people() -> None:
    one = Dispatch(problem("W4A16"), "rows", ((4096, "reference"),))
    two = Dispatch(problem("W4A16"), "rows", ((16, "a"), (128, "b"), (4096, "c")))
    assert one.ranges == "reference"
    assert two.ranges == "m<=16: a, m<=128: b, m>128: c"


def test_measured_costs_decide_by_m() -> None:
    """Costs given from outside replace the kernels' own estimates, for each range of M apart."""
    device = Target.fake("sm90")

    def cost(kernel: Kernel, asked: Problem, m: int) -> float:
        return {"sgl_fp8": 10.0, "triton_scaled_mm": 5.0 if m > 64 else 20.0}.get(kernel.name, 100.0)

    dispatch = choose(problem("FP8_DYNAMIC"), device, cost=cost)
    assert dispatch.table == ((64, "sgl_fp8"), (4096, "triton_scaled_mm"))
    assert [dispatch.kernel_for(m).name for m in (1, 64, 65, 9999)] == ["sgl_fp8", "sgl_fp8", *["triton_scaled_mm"] * 2]


def test_one_layout_serves_decode_and_prefill() -> None:
    """The layout is chosen for all M together: what is best at one M only does not win."""
    device = Target.fake("sm90")
    chosen = choose(problem("W4A16"), device)
    assert {kernels()[name].layout for _, name in chosen.table} == {chosen.layout}
    others = {
        kernel.layout
        for kernel in kernels().values()
        if not isinstance(kernel.fit(chosen.problem, 256, device), Reject)
    }
    assert len(others) > 1, "W4A16 has more than one layout to choose from"

    def cost(kernel: Kernel, asked: Problem, m: int) -> float:
        if kernel.layout == chosen.layout:
            return 10.0
        return 1.0 if m == 256 else 1000.0

    assert choose(problem("W4A16"), device, cost=cost).layout == chosen.layout


@pytest.mark.parametrize(
    ("m", "bucket"), [(0, 1), (1, 1), (2, 2), (3, 4), (17, 32), (4096, 4096), (4097, 4096), (10**6, 4096)]
)
def test_bucket_of(m: int, bucket: int) -> None:
    assert bucket_of(m) == bucket


@pytest.mark.parametrize(
    ("target", "policy"),
    [("cpu", "W8A16"), ("sm80", "W8A8"), *((target, "FP8_DYNAMIC") for target in GPUS if target != "sm80")],
)
def test_default_policy_runs_on_its_target(target: str, policy: str) -> None:
    device = Target.fake(target)
    assert default_policy(device) == policy
    check(choose(problem(policy), device), problem(policy), device)


def test_unknown_target_lists_the_known() -> None:
    with pytest.raises(OptionError, match="sm80"):
        Target.fake("sm75")


def test_dispatch_does_not_depend_on_order_or_chance() -> None:
    for target in ("cpu", "sm90"):
        first = [choose(problem(spec), Target.fake(target)).text for spec in SERVED]
        assert first == [choose(problem(spec), Target.fake(target)).text for spec in reversed(SERVED)][::-1]
