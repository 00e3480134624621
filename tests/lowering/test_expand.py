"""Kernel ops become what they run while Inductor's graph is traced: its code launches the kernels itself.

No GPU is needed: a driver that claims to be sm90 lets Inductor generate its code for CPU tensors; the kernels that it copied
into that code are compiled to cubins, and not run. ``tests/gpu`` runs them.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.device_interface import CpuInterface
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers

pytest.importorskip("triton")

from quant_compile.ir.family import family_of
from quant_compile.ir.scheme import parse
from quant_compile.lowering import ops
from quant_compile.lowering.expand import BEYOND, Served, expanding, served
from quant_compile.lowering.registry import Problem, kernels, layouts
from quant_compile.lowering.select import Dispatch
from quant_compile.lowering.sides import SPLIT, without_guards
from quant_compile.lowering.target import Target
from quant_compile.lowering.trace import analysed_once
from tests.passes.test_fusion import FakeDriver, sm90

K, N = 512, 256
# Kernel, scheme, rows of x.
RECORDED = [
    ("triton_gemv", "FP8_DYNAMIC", 1),
    ("triton_gemv", "W8A8", 3),
    ("triton_scaled_mm", "FP8_DYNAMIC", 9),
    ("triton_scaled_mm", "W8A8", 40),
    ("triton_w4a16_gemv", "W4A16", 1),
    ("triton_w4a16", "W4A16_ASYM", 24),
    ("triton_w8a16_gemv", "W8A16", 1),
    ("triton_w8a16", "W8A16", 20),
    ("triton_fp8a16_gemv", "fp8e4m3.channel+16", 1),
    ("triton_fp8a16", "fp8e4m3.channel+16", 20),
    ("triton_flat_gemv", "W4A8", 2),
    ("triton_w4a8_gemv", "W4A8", 3),
    ("triton_w4a8", "W4AFP8", 33),
    ("triton_fp4a16_gemv", "NVFP4A16", 1),
    ("triton_fp4a16", "MXFP4A16", 24),
    ("triton_gguf_gemv", "GGUF_Q4_K", 1),
    ("triton_gguf_gemv", "GGUF_Q8_0", 2),
    ("triton_gguf", "GGUF_Q4_K", 20),
    ("triton_gguf", "GGUF_Q6_K", 40),
    ("triton_gguf_mxfp4_gemv", "GGUF_MXFP4", 1),
]


class Stop(Exception):
    """The code is there; there is no GPU to load it."""


@pytest.fixture
def on_sm90(sm90: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels believe in an sm90 too."""
    monkeypatch.setattr(FakeDriver, "is_active", staticmethod(lambda: True), raising=False)
    monkeypatch.setattr(Target, "of", staticmethod(lambda device: Target.fake("sm90")))
    monkeypatch.setattr(triton_helpers, "set_driver_to_gpu", lambda: None)  # it would look for the GPU
    # torch 2.15 asks for a triton that compiles for CPUs, the device of the tensors.
    monkeypatch.setattr(
        CpuInterface, "raise_if_triton_unavailable", staticmethod(lambda device=None: None), raising=False
    )
    import quant_compile.lowering.kernels._launch as launch

    monkeypatch.setattr(launch, "sm_count_of", lambda device: 132)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("quant_compile.lowering.kernels") and hasattr(
            module, "sm_count_of"
        ):
            monkeypatch.setattr(module, "sm_count_of", lambda device: 132)


def as_it_is(y: Tensor) -> Tensor:
    return y


def code_of(
    dispatch: Dispatch,
    m: int,
    monkeypatch: pytest.MonkeyPatch,
    dynamic: bool = False,
    bias: bool = False,
    after: Callable[[Tensor], Tensor] = as_it_is,
) -> str:
    """Inductor's code for one linear, and what comes ``after`` it."""
    problem = dispatch.problem
    scheme = problem.scheme
    x = torch.randn(m, problem.k, dtype=problem.dtype)
    planes = (x,) if scheme.input_activations is None else family_of(scheme).quantize_input(x, scheme, None)
    w = [torch.zeros(p.shape, dtype=p.dtype) for p in layouts()[dispatch.layout].planes(problem)]
    codes: list[str] = []

    def save(code: str) -> None:
        codes.append(code)
        raise Stop

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        with expanding(), analysed_once():
            return compile_fx(gm, list(inputs), config_patches={"cpu_backend": "triton", "force_disable_caches": True})

    monkeypatch.setattr(GraphLowering, "save_output_code", staticmethod(save))
    added = torch.zeros(problem.n, dtype=problem.dtype) if bias else None

    def linear(x: list[Tensor], w: list[Tensor], bias: Tensor | None) -> Tensor:
        return after(ops.linear(x, w, bias, dispatch.text))

    torch._dynamo.reset()
    if dynamic:
        for plane in planes:
            torch._dynamo.mark_dynamic(plane, 0)
    with torch.no_grad(), pytest.raises(Exception, match=r"Stop|code is there"):
        torch.compile(linear, backend=backend)(list(planes), w, added)
    return codes[-1]


def cubins(code: str, folder: Path) -> dict[str, int]:
    """Name of each Triton kernel in generated code -> size of what it is compiled to."""
    sizes: dict[str, int] = {}
    for number, (name, source) in enumerate(re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.S)):
        # torch 2.11 copies texts into its code as they are, so that a line break in one is no Python.
        assert r"\\n" not in source, "a constant of a kernel has a line break"
        file = folder / f"generated_{number}.py"
        text = ast.literal_eval(f"'''{source}'''")  # as Python reads it
        file.write_text(re.sub(r"triton_helpers\.set_driver_to_\w+\(\)", "", text))
        spec = importlib.util.spec_from_file_location(f"generated_{folder.name}_{number}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        tuner = getattr(module, name)
        tuner._precompile_worker()
        kernel = tuner.compile_results[0].kernel
        sizes[name] = len(kernel.asm["cubin"]) if hasattr(kernel, "asm") else 1
    return sizes


def dispatch_of(kernel: str, spec: str) -> Dispatch:
    problem = Problem(parse(spec), N, K, torch.bfloat16)
    return Dispatch(problem, kernels()[kernel].layout, ((4096, kernel),))


@pytest.mark.parametrize(("kernel", "spec", "m"), RECORDED)
def test_a_known_number_of_rows_launches_the_kernel(
    kernel: str, spec: str, m: int, on_sm90: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = code_of(dispatch_of(kernel, spec), m, monkeypatch, bias=True)
    call = code[code.index("def call") :]
    assert "sglq_kernels" not in call, "an op of ours is called"
    assert re.search(r"\w+_kernel\w*\.run\(", call), call
    sizes = cubins(code, tmp_path)
    assert sizes and all(sizes.values())


def test_a_symbol_launches_one_kernel(on_sm90: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No branch for each linear, and no op of ours."""
    code = code_of(dispatch_of("triton_w8a16", "W8A16"), 100, monkeypatch, dynamic=True)
    call = code[code.index("def call") :]
    assert "matmul_w8_kernel" in call and "sglq_kernels" not in call and "\n        if " not in call
    assert cubins(code, tmp_path)


def scores(y: Tensor) -> Tensor:
    """Of every row to every row."""
    return torch.softmax(y.float() @ y.float().mT, -1)


@pytest.mark.parametrize(("kernel", "spec"), [("triton_w8a16", "W8A16"), ("triton_scaled_mm", "FP8_DYNAMIC")])
def test_sums_over_the_rows_of_a_symbol_are_loops(
    kernel: str, spec: str, on_sm90: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The side that was asked is an upper bound: by it Inductor would hold SPLIT rows at once, with threads for the traced number."""
    code = code_of(dispatch_of(kernel, spec), 30, monkeypatch, dynamic=True, after=scores)
    assert re.search(r"triton_red_fused\w*softmax", code) and "triton_per_fused" not in code
    assert cubins(code, tmp_path)


def test_what_the_user_chose_for_inductor_is_asked_too() -> None:
    """Sums over sizes that are known are Inductor's to decide, by its user's class where there is one."""
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    class Own(InductorChoices):
        kind = "own"

        @staticmethod
        def should_use_persistent_reduction(features: Any, *arguments: Any, **named: Any) -> bool:
            return features.answer

    def asked(numel: Any, answer: bool) -> bool:
        return V.choices.should_use_persistent_reduction(SimpleNamespace(reduction_numel=numel, answer=answer), False)

    with V.set_choices_handler(Own()):
        with expanding():
            assert isinstance(V.choices, Own) and V.choices.kind == "own"
            assert not asked(sympy.Symbol("s0") * 2, True)
            assert asked(sympy.Integer(512), True) and asked(512, True) and not asked(512, False)
        assert type(V.choices) is Own and asked(sympy.Symbol("s0"), True)


def test_what_cannot_be_recorded_stays_an_op(on_sm90: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """humming's handles belong to a process; tensor descriptors cannot be recorded."""
    for kernel, spec, m in (("humming_w4a16", "W4A16", 64), ("triton_scaled_mm", "FP8_DYNAMIC", 512)):
        code = code_of(dispatch_of(kernel, spec), m, monkeypatch)
        assert "torch.ops.sglq_kernels.linear.default" in code[code.index("def call") :]


def test_the_kernel_of_a_symbol_serves_most_of_its_range() -> None:
    problem = Problem(parse("FP8_DYNAMIC"), N, K, torch.bfloat16)
    table = ((4, "triton_gemv"), (256, "sgl_fp8"), (4096, "torch_scaled_mm"))
    chosen = Dispatch(problem, "rows", table)
    assert served(chosen, many=False) == Served("sgl_fp8", 256)
    assert served(chosen, many=True) == Served("torch_scaled_mm", BEYOND)
    late = Dispatch(problem, "rows", ((32, "sgl_fp8"), (4096, "torch_scaled_mm")))
    assert served(late, many=False).kernel == "torch_scaled_mm" and served(late, many=False).rows == SPLIT


def test_nothing_is_expanded_outside_of_the_backend(on_sm90: None) -> None:
    """An export, or another backend, keeps the op, which runs anywhere."""
    dispatch = Dispatch(Problem(parse("W8A16"), 64, 64, torch.bfloat16), "rows", ((4096, "torch_cpu_dequant"),))
    seen: list[str] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._functorch.aot_autograd import aot_module_simplified

        def collect(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
            seen.extend(str(node.target) for node in graph.graph.nodes)
            return graph.forward

        with without_guards():
            return aot_module_simplified(gm, inputs, fw_compiler=collect)

    w = family_of(dispatch.problem.scheme).quantize_weight(torch.randn(64, 64).bfloat16(), dispatch.problem.scheme)
    x = torch.randn(3, 64).bfloat16()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(lambda x: ops.linear([x], list(w), None, dispatch.text), backend=backend)(x)
    assert "sglq_kernels.linear.default" in seen


__all__ = ["sm90"]
