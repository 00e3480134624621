"""Ops of sgl-kernel as torch knows them, for machines without the library: doubles are called through its own schemas.

The texts are those that the libraries' wheels declare (FP4: sgl-kernel 0.3.21, its last release with them; the others also
sglang-kernel 0.4.4). torch's dispatcher then checks what the real op would: number, order and types of the arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

SCHEMAS = (
    "cutlass_scaled_fp4_mm(Tensor! out, Tensor a, Tensor b, Tensor block_scale_a, Tensor block_scale_b, Tensor alpha) -> ()",
    "scaled_fp4_experts_quant(Tensor! output, Tensor! output_scale, Tensor input, Tensor input_global_scale, "
    "Tensor input_offset_by_experts, Tensor output_scale_offset_by_experts) -> ()",
    "cutlass_fp4_group_mm(Tensor! output, Tensor a, Tensor b, Tensor a_blockscale, Tensor b_blockscale, Tensor alphas, "
    "Tensor ab_strides, Tensor c_strides, Tensor problem_sizes, Tensor expert_offsets, Tensor sf_offsets) -> ()",
    "cutlass_w4a8_moe_mm(Tensor! d, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor expert_offsets, "
    "Tensor problem_sizes, Tensor a_strides, Tensor b_strides, Tensor d_strides, Tensor s_strides, int chunk_size, int topk) "
    "-> ()",
    "qserve_w4a8_per_chn_gemm(Tensor _in_feats, Tensor _kernel, Tensor _wscales, Tensor _ascales, Tensor _w_szs, "
    "Tensor _a_ssums, Tensor! _out_feats) -> ()",
    "qserve_w4a8_per_group_gemm(Tensor _in_feats, Tensor _kernel, Tensor _zeros, Tensor _scales_i8, Tensor _wscales, "
    "Tensor _ascales, Tensor! _out_feats) -> ()",
    "ggml_dequantize(Tensor W, int type, SymInt m, SymInt n, ScalarType? dtype) -> Tensor",
    "ggml_mul_mat_vec_a8(Tensor W, Tensor X, int type, SymInt row) -> Tensor",
    "ggml_moe_a8_vec(Tensor X, Tensor W, Tensor topk_ids, int top_k, int type, SymInt row, SymInt tokens) -> Tensor",
    "ggml_mul_mat_a8(Tensor W, Tensor X, int type, SymInt row) -> Tensor",
)
NAMESPACE = "sgl_kernel_doubles"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_DOUBLES: dict[str, Callable[..., None]] = {}


def _define(schema: str) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, lambda *arguments: _DOUBLES[name](*arguments), "CPU")


for _schema in SCHEMAS:
    _define(_schema)


def through_schema(name: str, double: Callable[..., None]) -> Callable[..., Any]:
    """The op ``name`` of sgl-kernel, computed by ``double``."""
    _DOUBLES[name] = double
    return getattr(getattr(torch.ops, NAMESPACE), name).default
