"""The lowered quantization is plain ATen, so Inductor fuses it into the norm or activation before it: kernels are counted.

FP4 inputs, of which Inductor makes more, have kernels of their own on a GPU: these are counted too.

No GPU is needed: a driver that claims to be sm90 lets Inductor generate its Triton code for CPU tensors; nothing is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.utils import get_code
from torch.nn import functional as F

from quant_compile.backend import sglquant
from quant_compile.ir.scheme import parse
from quant_compile.lowering.target import Target

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

H200 = DeviceProperties(
    type="cuda",
    index=0,
    multi_processor_count=132,
    cc=90,
    major=9,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
)
# On a GPU the backend turns split reductions off itself (see backend.py); here it believes that it is on a CPU.
INDUCTOR = {"cpu_backend": "triton", "split_reductions": False, "force_disable_caches": True}
DYNAMIC = ("FP8_DYNAMIC", "W8A8", "W4A8", "W4AFP8", "QSERVE_W4A8_CHANNEL", "QSERVE_W4A8_GROUP")
STATIC = ("FP8", "W8A8_STATIC", "int4.group128+fp8e4m3.tensor")
# Kernels of norm and quantize, and of activation and quantize. A norm has sums of a row and FP4 has maxima of a group, which
# Inductor does not put into one kernel (a GPU has ours for FP4: ONE_LAUNCH); a dynamic scale of the whole tensor needs all
# rows first. FP8_BLOCK's codes, which are not packed by a sum over the group, are a kernel of their own after an activation,
# where they read what it stored in bf16.
SEVERAL = {"NVFP4_STATIC": (2, 1), "MXFP4": (2, 1), "NVFP4": (3, 3), "FP8_BLOCK": (2, 2), "FP8_TENSOR_DYNAMIC": (3, 3)}
# The same on a GPU: (kernels of Inductor, of ours) behind a norm, and behind an activation.
ONE_LAUNCH = {"NVFP4_STATIC": ((0, 1), (1, 0)), "MXFP4": ((0, 1), (1, 0)), "NVFP4": ((1, 1), (1, 1))}
OURS = ("torch.ops.sglq_kernels.norm_quantize.default", "torch.ops.sglq_kernels.quantize_rows.default")
GEMM = "torch.ops.sglq_kernels.linear.default"


class FakeDriver:
    """What Inductor asks of a Triton driver while it generates code."""

    def get_current_target(self) -> GPUTarget:
        """An H200."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The first."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors are."""
        return torch.device("cpu")


@pytest.fixture
def sm90(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor generates Triton code for sm90 on this machine."""
    monkeypatch.setattr(DeviceProperties, "create", lambda device: H200)
    monkeypatch.setattr(driver, "_active", FakeDriver())


@pytest.fixture
def sm100(sm90: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend believes that it is on sm100, for which it has FP4 kernels; Inductor's code is that for sm90."""
    monkeypatch.setattr(Target, "of", staticmethod(lambda device: Target.fake("sm100")))
    # Libraries that this device is said to have are not here: linears stay ops, which are counted.
    monkeypatch.setattr("quant_compile.backend.expanding", nullcontext)


class Norm(nn.Module):
    """Residual add and RMSNorm as transformers writes it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    """add, RMSNorm, then q, k and v."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = Norm(size)
        self.q, self.k, self.v = (nn.Linear(size, rows, bias=False) for rows in (size, 64, 64))

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        x = x + residual
        y = self.norm(x)
        return self.q(y), self.k(y), self.v(y), x


class MLP(nn.Module):
    """RMSNorm, gate and up, silu times, down."""

    def __init__(self, size: int, inside: int) -> None:
        super().__init__()
        self.norm = Norm(size)
        self.gate, self.up = nn.Linear(size, inside, bias=False), nn.Linear(size, inside, bias=False)
        self.down = nn.Linear(inside, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.down(F.silu(self.gate(y)) * self.up(y))


class Activation(nn.Module):
    """silu times, then down, as after a GEMM that is not ours."""

    def __init__(self, inside: int, size: int) -> None:
        super().__init__()
        self.down = nn.Linear(inside, size, bias=False)

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.down(F.silu(gate) * up)


def generated(model: nn.Module, policy: Any, *inputs: Tensor, dynamic: bool = False, **changes: Any) -> str:
    """Inductor's code of the quantized graph; ``changes`` are Inductor settings."""
    model = model.to(torch.bfloat16).requires_grad_(False)

    def generate_only(gm: fx.GraphModule, example: Sequence[Any]) -> Callable[..., Any]:
        sglquant(gm, example, options={"policy": policy, "inductor": INDUCTOR | changes})
        return gm.forward

    with torch.no_grad():
        return get_code(torch.compile(model, backend=generate_only, dynamic=dynamic), *inputs)[0]


def kernels(code: str) -> list[str]:
    """Names of the Triton kernels that are launched, in order."""
    return re.findall(r"(triton_\w+)\.run\(", code)


def externs(code: str) -> list[str]:
    """Ops that are called, not generated, in order; but for reading FP4's packed words as bytes, which runs nothing."""
    called = re.findall(r"((?:torch\.ops|extern_kernels|aten)\.[\w.]+)\(", code[code.index("async_compile.wait(") :])
    return [op for op in called if op != "torch.ops.aten.view.dtype"]


def gemms(code: str) -> int:
    """Number of quantized linears that are called; nothing else is."""
    assert set(externs(code)) == {GEMM}
    return len(externs(code))


def bf16(*shape: int) -> Tensor:
    """Random activations."""
    return torch.randn(shape, dtype=torch.bfloat16)


def policy_of(spec: str, model: nn.Module, folder: Path) -> Any:
    """A policy; for static schemes with one scale for every linear of the model."""
    if not parse(spec).static:
        return spec
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    path = folder / "scales.safetensors"
    save_file({f"{name}.input_scale": torch.tensor([0.02]) for name in linears}, str(path))
    return {"default": spec, "scales": str(path)}


@pytest.mark.parametrize("spec", [*DYNAMIC, *STATIC])
@pytest.mark.parametrize(("rows", "dynamic"), [(1, False), (16, False), (300, True)])
def test_norm_and_quantize_are_one_kernel(sm90: None, tmp_path: Path, spec: str, rows: int, dynamic: bool) -> None:
    model = Attention(512)
    code = generated(model, policy_of(spec, model, tmp_path), bf16(rows, 512), bf16(rows, 512), dynamic=dynamic)
    assert len(kernels(code)) == 1, kernels(code)
    assert gemms(code) == 1, "q, k and v are one GEMM"


@pytest.mark.parametrize("spec", [*DYNAMIC, *STATIC])
@pytest.mark.parametrize(("rows", "width"), [(1, 14336), (16, 14336), (64, 1000)])
def test_activation_and_quantize_are_one_kernel(sm90: None, tmp_path: Path, spec: str, rows: int, width: int) -> None:
    """Few rows of great width are where Inductor would split the reduction into several kernels."""
    model = Activation(width, 64)
    code = generated(model, policy_of(spec, model, tmp_path), bf16(rows, width), bf16(rows, width))
    assert len(kernels(code)) == 1, kernels(code)
    assert gemms(code) == 1


@pytest.mark.parametrize("spec", [*DYNAMIC, *STATIC])
def test_mlp_is_two_kernels_and_two_gemms(sm90: None, tmp_path: Path, spec: str) -> None:
    model = MLP(512, 1024)
    code = generated(model, policy_of(spec, model, tmp_path), bf16(16, 512))
    assert len(kernels(code)) == 2, kernels(code)
    assert gemms(code) == 2


@pytest.mark.parametrize("rows", [1, 16])
def test_qserves_sum_of_codes_comes_from_the_kernel_of_the_codes(sm90: None, rows: int) -> None:
    """The GEMM's three input planes are what the one kernel stores."""
    code = generated(Attention(512), "QSERVE_W4A8_CHANNEL", bf16(rows, 512), bf16(rows, 512))
    (planes,) = re.findall(re.escape(GEMM) + r"\(\[(\w+), (\w+), (\w+)\]", code)
    (arguments,) = re.findall(r"triton_\w+\.run\(([^\n]*)", code)
    assert len(set(planes)) == 3 and set(planes) <= set(arguments.split(", "))
    assert externs(code) == [GEMM]


@pytest.mark.parametrize("spec", SEVERAL)
def test_kernels_of_groups_and_of_tensors(sm90: None, tmp_path: Path, spec: str) -> None:
    """Packing FP4 is a sum over the group as its amax is a maximum, or it would be a kernel of its own."""
    norm, act = Attention(512), Activation(1024, 64)
    first = generated(norm, policy_of(spec, norm, tmp_path), bf16(16, 512), bf16(16, 512))
    second = generated(act, policy_of(spec, act, tmp_path), bf16(16, 1024), bf16(16, 1024))
    assert (len(kernels(first)), len(kernels(second))) == SEVERAL[spec], (kernels(first), kernels(second))
    # k and v have 64 rows, half a block of FP8_BLOCK's scales, so they are not merged.
    assert gemms(first) == (3 if spec == "FP8_BLOCK" else 1)
    assert gemms(second) == 1


def launches(code: str) -> tuple[int, int]:
    """(Kernels of Inductor, of ours) that quantize; besides them there is one GEMM."""
    called = externs(code)
    assert called.count(GEMM) == 1 and set(called) <= {GEMM, *OURS}, called
    return len(kernels(code)), len(called) - 1


@pytest.mark.parametrize("spec", ONE_LAUNCH)
@pytest.mark.parametrize(("rows", "dynamic"), [(1, False), (16, False), (300, True)])
def test_fp4_on_a_gpu(sm100: None, tmp_path: Path, spec: str, rows: int, dynamic: bool) -> None:
    """One launch where rows can be quantized one by one, two where the global scale of all rows comes first."""
    norm, act = Attention(512), Activation(1024, 64)
    first = generated(norm, policy_of(spec, norm, tmp_path), bf16(rows, 512), bf16(rows, 512), dynamic=dynamic)
    second = generated(act, policy_of(spec, act, tmp_path), bf16(rows, 1024), bf16(rows, 1024), dynamic=dynamic)
    assert (launches(first), launches(second)) == ONE_LAUNCH[spec], (kernels(first), kernels(second))


@pytest.mark.parametrize("spec", ["FP8_DYNAMIC", "W4A8"])
def test_other_schemes_on_a_gpu_stay_with_inductor(sm100: None, spec: str) -> None:
    assert launches(generated(Attention(512), spec, bf16(16, 512), bf16(16, 512))) == (1, 0)


def test_an_eps_that_dynamo_made_an_input_becomes_a_number(sm100: None) -> None:
    """As in transformers' norms under dynamic=True; Dynamo then traces once more, and guards the number."""
    model = Attention(512)
    model.norm = nn.RMSNorm(512, eps=0.25)
    code = generated(model, "MXFP4", bf16(16, 512), bf16(16, 512), dynamic=True)
    assert launches(code) == (0, 1) and "0.25" in code


def test_without_sharing_the_count_is_higher(sm90: None) -> None:
    """What the passes are for, and proof that the counts above can differ: three GEMMs, three quantized copies."""
    off = {"default": "W8A8", "fuse": {"share_quant": False, "merge_siblings": False}}
    code = generated(Attention(512), off, bf16(16, 512), bf16(16, 512))
    assert gemms(code) == 3
    stores = re.findall(r"empty_strided_\w+\([^\n]*torch\.int8\)", code)
    assert len(stores) == 3
    together = generated(Attention(512), "W8A8", bf16(16, 512), bf16(16, 512))
    assert len(re.findall(r"empty_strided_\w+\([^\n]*torch\.int8\)", together)) == 1


def test_split_reductions_would_give_more_kernels(sm90: None) -> None:
    """Why the backend turns them off, and proof that the count at width 14336 can differ."""
    code = generated(Activation(14336, 64), "W8A8", bf16(1, 14336), bf16(1, 14336), split_reductions=True)
    assert len(kernels(code)) > 1
