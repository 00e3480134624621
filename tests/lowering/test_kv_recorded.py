"""What Inductor makes of a decode step over a quantized cache: RoPE, quantization and the write in one kernel, no copy of the cache."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quant_compile.ir.kv import CacheScheme, encode, parse_cache
from quant_compile.lowering import ops
from quant_compile.lowering.expand import expanding
from tests.lowering.test_attention_recorded import call_of, code_of, launched, on_sm90, sm90  # noqa: F401  # fixtures
from tests.lowering.test_expand import cubins


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers writes RoPE."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


@pytest.mark.parametrize("name", ["FP8", "FP8_E5M2", "INT8", "FP8_HEAD", "INT8_TENSOR"])
def test_the_write_side(name: str, on_sm90: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # noqa: F811
    scheme = parse_cache(name)

    def step(
        q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Tensor, kc: Tensor, vc: Tensor, ks: Tensor, vs: Tensor,
        mask: Tensor,
    ) -> Tensor:  # fmt: skip
        positions = torch.arange(1) + at
        at.add_(1)
        for x, codes, scale in ((rotated(k, cos, sin), kc, ks), (v, vc, vs)):
            made, own = encode(x, scheme, scale if scheme.fixed else None)
            codes.index_copy_(2, positions, made)
            if not scheme.fixed:
                scale.index_copy_(2, positions, own)
        q = rotated(q, cos, sin)
        return ops.attention(q, kc, vc, mask, 0.1, 0.0, None, "triton_decode", ks, vs, scheme.format) * 3

    q, k = torch.randn(2, 8, 1, 64).bfloat16(), torch.randn(2, 2, 1, 64).bfloat16()
    cos = torch.randn(1, 1, 1, 64).bfloat16()
    codes = [torch.zeros(2, 2, 256, 64, dtype=scheme.stored) for _ in range(2)]
    scales = [torch.ones(scale_shape(scheme)) for _ in range(2)]
    mask = torch.ones(2, 1, 1, 256, dtype=torch.bool)
    with expanding():
        code = code_of(step, monkeypatch, q, k, k + 1, cos, cos + 1, torch.tensor(7), *codes, *scales, mask)
    assert launched(code) == ["decode", "combine"]
    made = re.findall(r"(triton_\w+)\.run\(", call_of(code))
    writes = [name for name in made if "index_copy" in name]
    assert len(writes) == 2, "codes and scales of K, or of V, are made and written in one kernel"
    assert scheme.fixed or all("amax" in name for name in writes)
    assert len(cubins(code, tmp_path)) >= 3


def scale_shape(scheme: CacheScheme) -> tuple[int, ...]:
    return {"token": (2, 2, 256, 1), "head": (1, 2, 1, 1), "tensor": (1, 1, 1, 1)}[scheme.scale]
