"""The decode kernel over latents: against plain torch in the interpreter, refusals, cubins."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_compile.ir.attend import sum_latents
from quant_compile.ir.family import Reject
from quant_compile.ir.kv import CacheScheme, decode, encode
from quant_compile.lowering.kernels._roofline import shared_memory
from quant_compile.lowering.kernels.attention import triton_latent
from quant_compile.lowering.target import Target
from tests.lowering import test_expand
from tests.lowering.test_attention import BF16, E4M3, F16, TOLERANCE, additive, error, filled, mend_dot
from tests.lowering.test_attention_recorded import LIBRARY, call_of, code_of, record
from tests.lowering.test_expand import cubins
from tests.lowering.test_latent import V3
from tests.lowering.triton_support import compile_cubin, mend_bfloat16, needs_triton, run_interpreted, stack_bytes
from tests.passes import test_fusion

on_sm90, sm90 = test_expand.on_sm90, test_fusion.sm90
LIBRARY.define(
    "latents(Tensor q, Tensor turned, Tensor latent, Tensor rope, Tensor mask, Tensor one, Tensor other) -> Tensor"
)
record("latents", lambda q, t, k, r, mask, one, other: triton_latent.run(q, t, k, r, mask, 0.1, one, other, "e4m3"))


def compare(
    b: int, heads: int, t: int, rank: int, rope: int, length: int, mask: Tensor | None, *, dtype: torch.dtype = F16,
    scheme: str = "", fixed: bool = False, splits: int | None = None, device: str = "cpu",
) -> None:  # fmt: skip
    """The kernel against ``sum_latents`` over values in f32 of the same cache."""
    g = torch.Generator(device).manual_seed(heads + length)
    random = lambda *shape: torch.randn(shape, generator=g, device=device).to(dtype)  # noqa: E731
    q, turned = random(b, heads, t, rank), random(b, heads, t, rope) * 4
    latent, ropes = random(b, 1, length, rank), random(b, 1, length, rope)
    coded: tuple[Any, ...] = ()
    if scheme:
        how = CacheScheme(scheme)
        given = torch.full((1, 1, 1, 1), 0.05, device=device) if fixed else None
        (latent, one), (ropes, other) = encode(latent, how, given), encode(ropes, how, given)
        coded = (one, other, scheme)
        values = [decode(x, s, scheme, torch.float32) for x, s in ((latent, one), (ropes, other))]
    else:
        values = [latent.float(), ropes.float()]
    scale = (rank + rope) ** -0.5
    wanted = sum_latents(q.float(), turned.float(), *values, mask, scale).to(dtype)
    got = triton_latent.run(q, turned, latent, ropes, mask, scale, *coded, splits=splits)
    assert error(got, wanted) < TOLERANCE[dtype], (heads, t, length, scheme, error(got, wanted))
    assert got.transpose(1, 2).is_contiguous()


def sixteen_bits() -> None:
    mend_dot()
    mend_bfloat16()
    compare(2, 4, 1, 64, 32, 70, filled(2, 1, 70, 40, left=(0, 5)), splits=2)
    compare(1, 20, 3, 128, 64, 64, additive(filled(1, 3, 64, 50), F16), splits=1)
    compare(1, 40, 1, 64, 64, 96, None, dtype=BF16, splits=3)
    compare(2, 3, 2, 64, 32, 33, None, splits=1)


def codes() -> None:
    for scheme in ("e4m3", "e5m2", "int8"):
        compare(2, 4, 1, 64, 32, 70, filled(2, 1, 70, 40, left=(0, 5)), scheme=scheme, splits=2)
    compare(1, 20, 2, 128, 64, 64, None, scheme="int8", fixed=True, splits=1)


@needs_triton
@pytest.mark.parametrize("function", ["sixteen_bits", "codes"])
def test_in_interpreter(function: str) -> None:
    run_interpreted(__name__, function)


@pytest.mark.parametrize(
    ("changes", "target", "reason"),
    [
        ({}, "cpu", "needs a CUDA GPU"),
        ({}, "sm89", "shared memory"),
        ({"dtype": torch.float32}, "sm90", "bfloat16 or float16"),
        ({"rank": 24}, "sm90", "latents must be of"),
        ({"mask": "other"}, "sm90", "its mask"),
        ({"mask": "bool", "mask_heads": True}, "sm90", "its mask"),
    ],
)
def test_refusals(changes: dict[str, Any], target: str, reason: str) -> None:
    answer = triton_latent.fit(replace(V3, **changes), Target.fake(target))
    assert isinstance(answer, Reject) and reason in answer.reason


POINTERS = {BF16: "*bf16", F16: "*fp16", E4M3: "*fp8e4nv", torch.uint8: "*u8", torch.int8: "*i8"}
BUILDS: dict[str, tuple[str, int, torch.dtype]] = {
    "16 bits": ("", 1, BF16),
    "16 bits, tokens": ("", 4, BF16),
    "e4m3": ("e4m3", 1, BF16),
    "int8": ("int8", 1, F16),
}


@needs_triton
@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_cubins(arch: int, name: str, tmp_path: Path) -> None:
    """DeepSeek's sizes, as launched: within an SM's memory; 64 rows of 512 sums leave some 30 registers' worth on the stack."""
    from quant_compile.lowering.kernels.attention import _triton_latent as source

    codes, tokens, dtype = BUILDS[name]
    target, kernel = Target.fake(f"sm{arch}"), source.latent_kernel
    rows = 128 * tokens
    block_m = triton_latent.block_rows(rows, bool(codes), target)
    stored = dtype if not codes else torch.int8 if codes == "int8" else E4M3 if arch >= 89 else torch.uint8
    types = {arg: "i32" for arg in kernel.arg_names if arg.endswith(("_b", "_h", "_t", "_n"))}
    types |= {arg: POINTERS[dtype] for arg in ("q_ptr", "t_ptr", "out_ptr")}
    types |= {arg: POINTERS[stored] for arg in ("k_ptr", "r_ptr")}
    types |= {arg: "*fp32" for arg in ("parts_ptr", "stats_ptr", *(("ks_ptr", "rs_ptr") if codes else ()))}
    types |= {"mask_ptr": "*i1", "scale": "fp32", "length": "i32"}
    mask = torch.empty(1, 1, tokens, 4096, dtype=torch.bool, device="meta")
    none: dict[str, Any] = {"m_n": 1} | ({"ks_n": 1, "rs_n": 1} if codes else {"ks_ptr": None, "rs_ptr": None})
    constants = triton_latent.constants_of(
        128, tokens, 512, 64, 4096, block_m, 8, mask, "token" if codes else "none", codes, dtype, target
    )
    types = {arg: kind for arg, kind in types.items() if arg not in none}
    built = compile_cubin(
        kernel, arch, types, constants | none, num_warps=triton_latent.WARPS, num_stages=triton_latent.STAGES
    )
    assert built.metadata.shared <= shared_memory(target) + (16 * 1024 if arch >= 90 else 0)
    assert stack_bytes(built, tmp_path) <= 256


def test_inductor_launches_it(on_sm90: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Over a cache in codes whose keys are split: two launches, and no op of ours at a call."""

    def step(
        q: Tensor, turned: Tensor, latent: Tensor, rope: Tensor, mask: Tensor, one: Tensor, other: Tensor
    ) -> Tensor:
        return torch.ops.sglq_test_attention.latents(q + 1, turned, latent, rope, mask, one, other)

    inputs = (
        torch.randn(1, 16, 1, 128).bfloat16(), torch.randn(1, 16, 1, 64).bfloat16(),
        torch.zeros(1, 1, 512, 128, dtype=torch.uint8), torch.zeros(1, 1, 512, 64, dtype=torch.uint8),
        torch.ones(1, 1, 1, 512, dtype=torch.bool), torch.ones(1, 1, 512, 1), torch.ones(1, 1, 512, 1),
    )  # fmt: skip
    code = code_of(step, monkeypatch, *inputs)
    call = call_of(code)
    assert re.findall(r"(latent|combine)_kernel\w*\.run\(", call) == ["latent", "combine"]
    assert "sglq" not in call and ".copy_(" not in call
    assert len(cubins(code, tmp_path)) >= 2
