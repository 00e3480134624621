"""triton_moe: every step against the torch truth in Triton's interpreter, and compiled for every arch it claims."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import quant_compile.lowering.schemes  # noqa: F401
from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.ir.moe import Activation, MoeProblem, moe_reference, parse_spec, stack_planes
from quant_compile.lowering.kernels.experts import _frame, triton_moe4
from quant_compile.lowering.kernels.experts import triton_moe as kernel
from quant_compile.lowering.moe import STACKED, choose_moe, planes_of
from quant_compile.lowering.registry import Rank
from quant_compile.lowering.target import FAKE_OPS, Target
from tests.lowering.triton_support import compile_cubin, needs_triton, run_interpreted

SCHEMES = (
    "FP8_DYNAMIC",
    "FP8",
    "FP8_BLOCK",
    "W8A8",
    "W8A8_STATIC",
    "W8A16",
    "W4A16",
    "W4A16_ASYM",
    "int4.group32.asym+16",
)
SM90 = Target.fake("sm90")
# f16 rounds by 2**-11 of a value, 2.8e-4 of a norm; a hidden value near a tie may fall on the other side.
TOLERANCE = 1e-3


def mend_float8() -> None:
    """Let Triton 3.6's interpreter round to float8 as the hardware does: its own rounding loses carries (125 -> 64)."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    dtypes = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}

    def converted(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if target.name in dtypes and source.name == "fp32":
            codes = torch.from_numpy(data.copy()).to(dtypes[target.name])
            return codes.view(torch.uint8).numpy()
        return convert(data, source, target, rounding)

    interpreter._convert_float = converted


class Case:
    """One block of seeded random data: planes, ids, weights, biases and its problem."""

    def __init__(
        self, spec: str, tokens: int, experts: int, top_k: int, hidden: int, inner: int, *,
        activation: str = "silu", bias: bool = True, weights: bool = True, dtype: torch.dtype = torch.float16,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        g = torch.Generator(device).manual_seed(tokens + 10 * experts + hidden + inner)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=g, device=device) * scale).to(dtype)

        scheme, scheme2 = parse_spec(spec)
        family, family2 = family_of(scheme), family_of(scheme2)
        quantized = scheme.input_activations is not None
        self.problem = MoeProblem(
            scheme, experts, hidden, inner, top_k, Activation.parse(activation), dtype, bias, weights, scheme2
        )
        self.scale2 = torch.tensor([0.01], device=device) if scheme.static else None
        x = draw(tokens, hidden)
        scale = torch.tensor([0.02], device=device) if scheme.static else None
        self.x: Planes = family.quantize_input(x, scheme, scale) if quantized else (x,)
        self.w13 = stack_planes(
            [family.quantize_weight(draw(2 * inner, hidden, scale=hidden**-0.5), scheme) for _ in range(experts)]
        )
        self.w2 = stack_planes(
            [family2.quantize_weight(draw(hidden, inner, scale=inner**-0.5), scheme2) for _ in range(experts)]
        )
        self.b13 = draw(experts, 2 * inner, scale=0.1) if bias else None
        self.b2 = draw(experts, hidden, scale=0.1) if bias else None
        scores = torch.rand(tokens, experts, generator=g, device=device)
        values, self.ids = scores.topk(top_k, -1)
        self.weights = values.to(dtype) if weights else None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What ``run`` takes."""
        return self.x, self.ids, self.weights, self.w13, self.b13, self.w2, self.b2, self.scale2, self.problem

    def expected(self) -> Tensor:
        """The truth, [T, H]."""
        p = self.problem
        return moe_reference(
            self.x, self.ids, self.weights, self.w13, self.b13, self.w2, self.b2, p.scheme, p.activation, p.dtype,
            self.scale2, p.scheme2,
        )  # fmt: skip


def relative(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))


# --- pairs by expert ---


def check_align(tokens: int, top_k: int, experts: int, block_m: int) -> None:
    """Order, blocks and unused blocks against a plain loop; illegal ids of either sign are left out."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-2, experts + 3, (tokens, top_k), generator=generator)
    pairs = _frame.align(ids, experts, block_m)
    flat = ids.flatten().tolist()
    order: list[int] = []
    blocks: list[list[int]] = []
    for expert in range(experts):
        own = [pair for pair, chosen in enumerate(flat) if chosen == expert]
        blocks += [[expert, len(order) + i, min(block_m, len(own) - i)] for i in range(0, len(own), block_m)]
        order += own
    assert pairs.order[: len(order)].tolist() == order
    assert pairs.blocks.t()[: len(blocks)].tolist() == blocks
    assert pairs.blocks[2, len(blocks) :].eq(0).all()


def check_aligns() -> None:
    """Both ways of counting; one expert, experts that are no power of two, blocks that are cut short."""
    for tokens, top_k, experts, block_m in ((1, 1, 1, 16), (5, 2, 7, 16), (40, 8, 128, 16), (60, 4, 3, 32)):
        check_align(tokens, top_k, experts, block_m)
    check_align(1500, 1, 5, 64)
    check_align(700, 2, 200, 16)


# --- the grouped form ---


def check_steps(case: Case, plan: _frame.Plan) -> None:
    """Each step alone, fed with the truth of the step before, then the whole."""
    p = case.problem
    family = family_of(p.scheme)
    quantized = p.scheme.input_activations is not None
    pairs = _frame.align(case.ids, p.experts, plan.first.block_m)
    hidden = kernel.first(case.x, pairs, case.w13, case.b13, case.scale2, p, plan.first)
    legal = [pair for pair, e in enumerate(case.ids.flatten().tolist()) if 0 <= e < p.experts]
    order = pairs.order[: len(legal)].long()
    truth, parts = torch.empty(len(legal), p.intermediate, dtype=p.dtype), torch.empty(len(legal), p.hidden)
    inner: list[Planes] = []
    for i, pair in enumerate(order.tolist()):
        expert, token = int(case.ids.flatten()[pair]), pair // p.top_k
        x = tuple(plane if plane.dim() == 1 else plane[token : token + 1] for plane in case.x)
        b13 = None if case.b13 is None else case.b13[expert]
        b2 = None if case.b2 is None else case.b2[expert]
        wide = family.linear(x, tuple(w[expert] for w in case.w13), b13, p.scheme, p.dtype)
        truth[i] = p.activation(wide)[0]
        planes: Planes = (truth[i : i + 1],)
        inner.append(family.quantize_input(planes[0], p.scheme, case.scale2) if quantized else planes)
        parts[i] = family.linear(inner[-1], tuple(w[expert] for w in case.w2), b2, p.scheme, p.dtype)[0].float()
    stacked = tuple(plane if plane.shape[0] == 1 and p.scheme.static and i else torch.cat([q[i] for q in inner])
                    for i, plane in enumerate(inner[0]))  # fmt: skip
    if len(hidden) == 1:
        assert relative(hidden[0][: len(legal)], truth) <= TOLERANCE
        if quantized:
            codes, scale = kernel.quantize(truth, p)
            assert torch.allclose(scale, stacked[1], rtol=1e-6)
            check_codes(codes, stacked[0])
    else:
        check_codes(hidden[0][: len(legal)], stacked[0])
        if hidden[1].numel() > 1:
            assert relative(hidden[1][: len(legal)], stacked[1]) <= TOLERANCE
    rows = [torch.zeros(pairs.order.numel(), *plane.shape[1:]).to(plane.dtype) for plane in stacked]
    for full, plane in zip(rows, stacked):
        full[: plane.shape[0]] = plane
    if p.scheme.static:
        rows[1] = stacked[1]
    actual = kernel.second(tuple(rows), pairs, case.w2, case.b2, p, plan.second)
    assert relative(actual[order], parts) <= TOLERANCE
    assert relative(kernel.launch(*case.arguments, chosen=plan), case.expected()) <= 3 * TOLERANCE


def check_codes(actual: Tensor, expected: Tensor) -> None:
    """Codes differ at ties only: few, and by one step."""
    wrong = (actual.float() != expected.float()).float().mean()
    assert wrong <= 0.02, f"{wrong:.3f} of the codes differ"
    assert relative(actual, expected) <= 0.01


def check_grouped(spec: str) -> None:
    """Plans of several block sizes over sizes that no tile divides, with illegal ids, empty and crowded experts."""
    mend_float8()
    case = Case(spec, 3, 3, 2, 80, 48)
    case.ids[0, 0], case.ids[-1, 1] = -1, 3
    check_steps(case, kernel.plan(case.problem, 3, SM90))
    case = Case(spec, 20, 2, 2, 144, 272, weights=False)
    check_steps(case, kernel.plan(case.problem, 20, SM90))
    if spec in ("FP8_DYNAMIC", "W4A16"):
        case = Case(spec, 70, 3, 1, 128, 128, bias=False)
        case.ids[:] = 1
        check_steps(case, kernel.plan(case.problem, 4096, SM90))


def check_other_tiles() -> None:
    """Weights through descriptors, and groups that the first product does not quantize itself."""
    mend_float8()
    for spec in ("FP8_BLOCK", "W4A16"):
        case = Case(spec, 5, 3, 2, 256, 144)
        plan = kernel.plan(case.problem, 5, SM90)
        check_steps(case, _frame.Plan(replace(plan.first, block_n=64, tma=True), replace(plan.second, tma=True)))


def check_activations() -> None:
    """Every kind, with all its constants, in both forms; no router weights in one of them."""
    for text in ("silu(1.702,7.0,1.0)", "gelu", "gelu_tanh", "relu"):
        case = Case("W8A16", 2, 2, 1, 48, 48, activation=text)
        expected = case.expected()
        assert relative(kernel.run(*case.arguments), expected) <= TOLERANCE, text
        plan = kernel.decode_plan(case.problem, SM90)
        wide = _frame.DecodePlan(replace(plan.first, block_n=16), replace(plan.second, block_n=16))
        assert relative(kernel.launch_decode(*case.arguments, chosen=wide), expected) <= TOLERANCE, text


def check_nothing_legal() -> None:
    """A token whose experts are all illegal gives zeros, never what memory held."""
    for run in (kernel.run, kernel.run_decode):
        case = Case("W8A8", 2, 2, 2, 16, 16)
        case.ids[1] = torch.tensor([7, -9])
        actual = run(*case.arguments)
        assert actual[1].eq(0).all() and not actual[0].eq(0).all()


# --- the decode form ---


def check_decode(spec: str) -> None:
    """Whole blocks of few tokens, with illegal ids, odd sizes, one expert per token, other activations."""
    mend_float8()
    cases = (
        Case(spec, 1, 3, 2, 144, 48),
        Case(spec, 2, 3, 3, 80, 272, weights=False, bias=False),
        Case(spec, 2, 2, 1, 48, 80, activation="silu(1.702,7.0,1.0)"),
    )
    cases[0].ids[0, 0], cases[1].ids[1] = -1, 3
    for case in cases:
        plan = kernel.decode_plan(case.problem, SM90)
        wide = _frame.DecodePlan(replace(plan.first, block_n=16), replace(plan.second, block_n=16))
        actual = kernel.launch_decode(*case.arguments, chosen=wide)
        expected = case.expected()
        assert expected.abs().max() > 0.1
        assert relative(actual, expected) <= 3 * TOLERANCE, f"{case.problem} {plan}"


@needs_triton
@pytest.mark.parametrize("function", ["check_aligns", "check_other_tiles", "check_activations", "check_nothing_legal"])
def test_in_interpreter(function: str) -> None:
    run_interpreted(__name__, function)


@needs_triton
@pytest.mark.parametrize("spec", SCHEMES)
def test_grouped_in_interpreter(spec: str) -> None:
    run_interpreted(__name__, "check_grouped", spec)


@needs_triton
@pytest.mark.parametrize("spec", SCHEMES)
def test_decode_in_interpreter(spec: str) -> None:
    run_interpreted(__name__, "check_decode", spec)


@needs_triton
def test_interpreted_check_can_fail() -> None:
    """A check that raises in the interpreter's process fails here: the tests above are not vacuous."""
    with pytest.raises(AssertionError, match="unknown scheme"):
        run_interpreted(__name__, "check_decode", "no_such_scheme")


# --- cubins ---


class Recorder:
    """Stands in for a Triton kernel: notes the arguments of its launches."""

    def __init__(self, function: Any, found: list[tuple[Any, dict[str, Any]]]) -> None:
        self.function, self.found = function, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(size <= 65535 for size in grid[1:]), f"{self.function.__name__} cannot launch {grid}"
        return self.note

    def note(self, *arguments: Any, **constants: Any) -> None:
        """One launch."""
        self.found.append((self.function, dict(zip(self.function.arg_names, arguments)) | constants))


TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int8: "i8", torch.uint8: "u8", torch.int32: "i32",
    torch.int64: "i64", torch.int16: "i16", torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5",
}  # fmt: skip
KERNEL_NAMES = {
    "_triton_gguf_moe": ("rows_kernel", "grouped_kernel"),
    "_triton_frame": ("count_kernel", "align_kernel", "sum_kernel"),
    "_triton_moe": ("grouped_kernel", "quantize_kernel", "gated_rows_kernel", "down_rows_kernel"),
    "_triton_moe4": (
        "split_kernel", "quantize_split_kernel", "grouped4_kernel", "gated_rows4_kernel", "down_rows4_kernel",
    ),
}  # fmt: skip


def launches(
    problem: MoeProblem,
    tokens: int,
    plan: Any,
    monkeypatch: pytest.MonkeyPatch,
    module: Any = kernel,
    layout: str = STACKED.name,
) -> list[tuple[Any, dict[str, Any]]]:
    """(kernel, arguments) of everything that a block of ``module`` launches, from tensors without data."""
    found: list[tuple[Any, dict[str, Any]]] = []
    with monkeypatch.context() as patch:
        for source, names in KERNEL_NAMES.items():
            for name in names:
                function = getattr(import_module(f"quant_compile.lowering.kernels.experts.{source}"), name)
                patch.setattr(f"quant_compile.lowering.kernels.experts.{source}.{name}", Recorder(function, found))
        p, scheme = problem, problem.scheme

        def empty(*shape: int, dtype: torch.dtype = p.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        w13, w2 = (tuple(empty(*plane.shape, dtype=plane.dtype) for plane in own) for own in planes_of(layout, p))
        x: Planes = (empty(tokens, p.hidden),)
        a = scheme.input_activations
        if a is not None:
            columns = 1 if a.group_size is None else -(-p.hidden // a.group_size)
            scale = empty(tokens, columns, dtype=torch.float32) if a.dynamic else empty(1, dtype=torch.float32)
            x = (empty(tokens, p.hidden, dtype=_frame.code_of(scheme)[1]), scale)
        scale2 = empty(1, dtype=torch.float32) if scheme.static else None
        ids = empty(tokens, p.top_k, dtype=torch.int64)
        run: Any = module.launch_decode if isinstance(plan, _frame.DecodePlan) else module.launch
        b13, b2 = empty(p.experts, 2 * p.intermediate), empty(p.experts, p.hidden)
        y = run(x, ids, empty(tokens, p.top_k, dtype=torch.float32), w13, b13, w2, b2, scale2, p, plan)
        assert y.shape == (tokens, p.hidden) and y.dtype == p.dtype
    return found


def build(function: Any, arguments: dict[str, Any], arch: int) -> Any:
    """The cubin of one noted launch."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages", "launch_pdl") if name in arguments}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            types[name] = f"*{TYPES[value.dtype]}"
        elif hasattr(value, "block_shape"):
            types[name] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
        elif isinstance(value, int) and name.islower():
            types[name] = "i32"
        else:
            constants[name] = value
    return compile_cubin(function, arch, types, constants, **options)


def problem_of(spec: str, experts: int = 128, hidden: int = 2048, inner: int = 768, top_k: int = 8) -> MoeProblem:
    scheme, scheme2 = parse_spec(spec)
    sizes = (experts, hidden, inner, top_k)
    return MoeProblem(scheme, *sizes, Activation("silu"), torch.bfloat16, True, scheme2=scheme2)


@needs_triton
def test_many_tokens_fit_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA takes 65535 programs along all axes but the first; blocks over all experts at once count E times their tokens."""
    tokens = 1 << 17
    for spec, module in (("FP8_DYNAMIC", kernel), ("W8A8", kernel), ("W4A8", triton_moe4), ("NVFP4A16", triton_moe4)):
        problem = problem_of(spec)
        assert launches(problem, tokens, module.plan(problem, tokens, SM90), monkeypatch, module)


SHARED_LIMIT = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
ARCHES = [
    *[(80, spec) for spec in ("W8A8", "W8A16", "W4A16")],
    *[(90, spec) for spec in (*SCHEMES, "FP8_E5M2_DYNAMIC")],
    *[(arch, spec) for arch in (89, 100, 120) for spec in ("FP8_DYNAMIC", "FP8_BLOCK", "W4A16")],
]


@needs_triton
@pytest.mark.parametrize("arch, spec", ARCHES)
def test_cubin(arch: int, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every plan of a shape compiles for the arch, within its shared memory."""
    target = Target.fake(f"sm{arch}")
    problem = problem_of(spec)
    assert isinstance(kernel.fit(problem, 16, target), Rank) and isinstance(kernel.fit_decode(problem, 1, target), Rank)
    plans = {kernel.plan(problem, tokens, target): tokens for tokens in (2048, 16)}
    seen: set[str] = set()
    for plan, tokens in {kernel.decode_plan(problem, target): 1, **plans}.items():
        for function, arguments in launches(problem, tokens, plan, monkeypatch):
            key = f"{function.__name__} {[v for n, v in arguments.items() if n.isupper() or n.startswith('num')]}"
            if key in seen:
                continue
            seen.add(key)
            built = build(function, arguments, arch)
            assert built.asm["cubin"], key
            assert built.metadata.shared <= SHARED_LIMIT[arch] * 1024, key


@needs_triton
@pytest.mark.parametrize("spec", ["FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W4A16_ASYM"])
def test_cubin_of_odd_sizes(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks instead of whole steps, on every operand; weights through descriptors where rows allow it."""
    problem = problem_of(spec, 7, 208, 144, 3)
    plan = kernel.plan(problem, 100, SM90)
    tma = _frame.Plan(replace(plan.first, tma=True), replace(plan.second, tma=True))
    for chosen in (plan, tma, kernel.decode_plan(problem, SM90)):
        for function, arguments in launches(problem, 5, chosen, monkeypatch):
            assert build(function, arguments, 90).asm["cubin"]


@needs_triton
def test_hopper_uses_its_tensor_cores_and_wide_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plans are made for: wgmma fed by 16-byte copies; 16-byte loads and dp4a in the decode form."""
    ptx = {}
    for spec in ("FP8_DYNAMIC", "W8A8"):
        problem = problem_of(spec)
        plans = ((1, kernel.decode_plan(problem, SM90)), (2048, kernel.plan(problem, 2048, SM90)))
        for tokens, plan in plans:
            for function, arguments in launches(problem, tokens, plan, monkeypatch):
                ptx[spec, function.__name__] = build(function, arguments, 90).asm["ptx"]
    assert "wgmma.mma_async" in ptx["FP8_DYNAMIC", "grouped_kernel"]
    assert "e4m3.e4m3" in ptx["FP8_DYNAMIC", "grouped_kernel"]
    assert "cp.async.cg.shared.global" in ptx["FP8_DYNAMIC", "grouped_kernel"]
    for name in ("gated_rows_kernel", "down_rows_kernel"):
        assert "v4.b32" in ptx["FP8_DYNAMIC", name] and "cvt.rn.f16x2.e4m3x2" in ptx["FP8_DYNAMIC", name]
        assert "dp4a.s32.s32" in ptx["W8A8", name]


# --- fit ---


@pytest.mark.parametrize(
    "problem, target, reason",
    [
        (problem_of("FP8_DYNAMIC"), Target.fake("cpu"), "needs a CUDA GPU"),
        (problem_of("FP8_DYNAMIC"), Target.fake("sm90", FAKE_OPS - {"triton"}), "triton is not installed"),
        (problem_of("FP8_DYNAMIC"), Target.fake("sm80"), "fp8 needs sm89 or newer, this is sm80"),
        (problem_of("FP8_TENSOR_DYNAMIC"), SM90, "one dynamic scale for all tokens"),
        (problem_of("fp8e4m3.channel+16"), SM90, "16-bit inputs are not multiplied by 8-bit floats"),
        (problem_of("fp8e4m3.block128x48+fp8e4m3.group48.dynamic"), SM90, "groups must have 32, 64 or a multiple of 128"),
        (problem_of("W8A8", hidden=2040), SM90, "hidden size must be a multiple of 16, got 2040"),
        (problem_of("W8A8", inner=100), SM90, "intermediate size must be a multiple of 16, got 100"),
        (replace(problem_of("W8A8"), dtype=torch.float32), SM90, "dtype must be bfloat16 or float16, got torch.float32"),
    ],
)  # fmt: skip
def test_refusals(problem: MoeProblem, target: Target, reason: str) -> None:
    for fit in (kernel.fit, kernel.fit_decode):
        answer = fit(problem, 1, target)
        assert isinstance(answer, Reject) and reason in answer.reason


def test_decode_serves_few_pairs() -> None:
    problem = problem_of("FP8_DYNAMIC")
    assert isinstance(kernel.fit_decode(problem, 8, SM90), Rank)
    answer = kernel.fit_decode(problem, 9, SM90)
    assert isinstance(answer, Reject) and "at most 64 pairs of a token and an expert, got 72" in answer.reason


def test_choice_by_tokens() -> None:
    """One token goes to the decode form, many to the grouped one; both read one layout."""
    for spec in ("FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W8A16", "W4A16"):
        dispatch = choose_moe(problem_of(spec), SM90)
        assert dispatch.layout == "experts"
        assert dispatch.kernel_for(1).name == "triton_moe_decode" and dispatch.kernel_for(2048).name == "triton_moe"


def test_plans_cover_every_size() -> None:
    """Rows divide their sizes, groups end with steps, and blocks of both products agree."""
    for spec in ("FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W4A16", "int4.group32+16", "int4.group16+16"):
        for hidden, inner in ((16, 16), (2048, 768), (4096, 14336), (7168, 2048), (2880, 2880), (80, 1040)):
            for top_k in (1, 2, 6, 8, 10):
                problem = problem_of(spec, 16, hidden, inner, top_k)
                group = kernel.groups(problem.scheme)[1] or 1
                decode = kernel.decode_plan(problem, SM90)
                for rows, n in ((decode.first, inner), (decode.second, hidden)):
                    assert n % rows.block_n == 0 and rows.block_k % min(group, rows.block_k) == 0
                    assert rows.block_k >= group
                for tokens in (1, 64, 1024, 8192):
                    plan = kernel.plan(problem, tokens, SM90)
                    assert plan.first.block_m == plan.second.block_m
                    assert group == 1 or group % plan.first.block_k == 0
