"""Every format as its writer packs it, from the formulas of its documentation and nothing of the package.

Each packer takes a module's name and its weight [n, k] and gives its tensors by suffix and the values that they stand for, in f32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.checkpoints.support import HIDDEN, Pack, integers, stream

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
DYNAMIC_FP8 = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}


@dataclass(frozen=True)
class Case:
    """A format: how to pack it, its config, and the scheme that its linears get (None: values)."""

    pack: Pack
    config: dict[str, Any]
    scheme: str | None
    note: str = ""


def _spread(values: Tensor, group: int) -> Tensor:
    return values.float().repeat_interleave(group, -1)


def gptq(bits: int, group: int, symmetric: bool, version: str = "gptq", shuffled: bool = False) -> Case:
    def pack(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        k = w.shape[1]
        order = torch.randperm(k, generator=torch.Generator().manual_seed(k)) if shuffled else torch.arange(k)
        codes, scale, zero = integers(w[:, order], bits, group, symmetric)
        if version == "gptq" and not symmetric:
            zero = np.maximum(zero, 1)  # what is stored is zero - 1, and a writer cannot store -1 in one field
        stored = zero - 1 if version == "gptq" else zero
        values = (torch.from_numpy(codes) - _spread(torch.from_numpy(zero), group)) * _spread(
            scale.to(torch.bfloat16), group
        )
        place = torch.empty(k, dtype=torch.long)
        place[order] = torch.arange(k)
        codes, values = codes[:, place.numpy()], values[:, place]
        words = planar if version == "gptq_p" and bits in (3, 5, 6, 7) else stream
        return {
            "qweight": words(codes, bits).t(),
            "qzeros": words(stored.T.copy(), bits),
            "scales": scale.t(),
            "g_idx": (place // group).to(torch.int32),
        }, values

    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": shuffled,
        "checkpoint_format": version,
    }
    scheme = {True: f"int4.group{group}", False: f"int4.group{group}.asym"}[symmetric] + "+16" if bits <= 4 else None
    return Case(pack, config, scheme, "" if bits == 4 else f"{bits}-bit")


def planar(codes: np.ndarray, bits: int) -> Tensor:
    """gptq_p: for each 32 codes their low 4 (or 2) bits, then the next 2, then the last, each as words of its own."""
    columns = codes.shape[1]
    widths = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}[bits]
    blocks: list[Tensor] = []
    for start in range(0, columns, 32):
        block, shift = codes[:, start : start + 32], 0
        for width in widths:
            blocks.append(stream((block >> shift) & (2**width - 1), width))
            shift += width
    return torch.cat(blocks, 1)


def awq(symmetric: bool) -> Case:
    def pack(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scale, zero = integers(w, 4, 128, symmetric)
        values = (torch.from_numpy(codes) - _spread(torch.from_numpy(zero), 128)) * _spread(
            scale.to(torch.bfloat16), 128
        )
        return {"qweight": _awq_words(codes.T), "qzeros": _awq_words(zero.T), "scales": scale.t()}, values

    config = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": not symmetric, "version": "gemm"}
    return Case(pack, config, "W4A16" if symmetric else "W4A16_ASYM")


def _awq_words(codes: np.ndarray) -> Tensor:
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), dtype=np.uint32)
    for nibble, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
        words |= (codes[:, column::8].astype(np.uint32) & 15) << np.uint32(4 * nibble)
    return torch.from_numpy(words.view(np.int32).copy())


def ct_config(format: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": format}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def ct_packed(bits: int, group: int, symmetric: bool) -> Case:
    def pack(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scale, zero = integers(w, bits, group, symmetric, torch.bfloat16)
        values = (torch.from_numpy(codes) - _spread(torch.from_numpy(zero), group)) * _spread(scale, group)
        made = {"weight_packed": stream(codes, bits), "weight_scale": scale, "weight_shape": torch.tensor(w.shape)}
        return made | ({} if symmetric else {"weight_zero_point": stream(zero.T.copy(), bits).t()}), values

    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": group, "symmetric": symmetric}
    scheme = f"int4.group{group}{'' if symmetric else '.asym'}+16"
    return Case(
        pack, ct_config("pack-quantized", weights), scheme if bits <= 4 else None, "" if bits == 4 else f"{bits}-bit"
    )


def ct_int8(packed: bool, inputs: bool) -> Case:
    def pack(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale = (w.abs().amax(1, keepdim=True) / 127).to(torch.bfloat16)
        codes = (w / scale.float()).round().clamp(-128, 127)
        stored = (
            {"weight_packed": stream((codes + 128).numpy().astype(int), 8)}
            if packed
            else {"weight": codes.to(torch.int8)}
        )
        return {**stored, "weight_scale": scale}, codes * scale.float()

    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    given = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True} if inputs else None
    return Case(
        pack, ct_config("pack-quantized" if packed else "int-quantized", weights, given), "W8A8" if inputs else "W8A16"
    )


def ct_w4a8() -> Case:
    def pack(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scale, _ = integers(w, 4, 128, True, torch.bfloat16)
        signed = torch.from_numpy(codes - 8)
        return {"weight": signed.to(torch.int8), "weight_scale": scale}, signed * _spread(scale, 128)

    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
    given = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    return Case(pack, ct_config("int-quantized", weights, given), "W4A8")


def _fp8(w: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    codes = (w / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, codes.float() * scale


def ct_fp8(strategy: str) -> Case:
    def pack(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        if strategy == "block":
            scale, wide = _block_scale(w, torch.bfloat16)
        else:
            amax = w.abs().amax() if strategy == "tensor" else w.abs().amax(1, keepdim=True)
            scale = (amax / 448).to(torch.bfloat16).reshape(-1, *([1] if strategy == "channel" else []))
            wide = scale.float()
        codes, values = _fp8(w, wide)
        static = {"input_scale": torch.tensor([0.03], dtype=torch.bfloat16)} if strategy == "tensor" else {}
        return {"weight": codes, "weight_scale": scale, **static}, values

    weights: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    inputs: dict[str, Any] = dict(DYNAMIC_FP8)
    if strategy == "block":
        weights["block_structure"] = [128, 128]
        inputs |= {"strategy": "group", "group_size": 128}
    if strategy == "tensor":
        inputs |= {"strategy": "tensor", "dynamic": False}
    scheme = {"block": "FP8_BLOCK", "channel": "FP8_DYNAMIC", "tensor": "FP8"}[strategy]
    return Case(pack, ct_config("float-quantized", weights, inputs), scheme)


def _block_scale(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    n, k = w.shape
    rows, columns = -(-n // 128), -(-k // 128)
    padded = torch.nn.functional.pad(w, (0, columns * 128 - k, 0, rows * 128 - n))
    scale = (padded.reshape(rows, 128, columns, 128).abs().amax((1, 3)) / 448).to(dtype)
    return scale, scale.float().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]


def _e2m1(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the nearest value, and that value."""
    codes = (x.unsqueeze(-1) - E2M1).abs().argmin(-1)
    return codes, E2M1[codes]


def _pairs(codes: Tensor) -> Tensor:
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).to(torch.uint8)


def nvfp4_parts(w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed codes, e4m3 scales, the scale of the tensor (multiplies), values."""
    whole = w.abs().amax() / 2688
    grouped = w.reshape(w.shape[0], -1, 16)
    scale = (grouped.abs().amax(-1) / 6 / whole).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    codes, values = _e2m1(grouped / (scale.float() * whole)[..., None])
    return _pairs(codes.flatten(1)), scale, whole, (values * scale.float()[..., None]).flatten(1) * whole


def ct_nvfp4(inputs: bool) -> Case:
    def pack(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        packed, scale, whole, values = nvfp4_parts(w)
        made = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": (1 / whole).reshape(1)}
        return made | ({"input_global_scale": torch.tensor([512.0])} if inputs else {}), values

    args = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    given = {**args, "dynamic": "local"} if inputs else None
    return Case(pack, ct_config("nvfp4-pack-quantized", args, given), "NVFP4_STATIC" if inputs else "NVFP4A16")


def mxfp4_parts(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, exponents, values."""
    grouped = w.reshape(w.shape[0], -1, 32)
    exponent = torch.floor(torch.log2(grouped.abs().amax(-1).clamp_min(1e-30))) - 2
    codes, values = _e2m1(grouped / 2.0 ** exponent[..., None])
    return _pairs(codes.flatten(1)), (exponent + 127).to(torch.uint8), (values * 2.0 ** exponent[..., None]).flatten(1)


def ct_mxfp4() -> Case:
    def pack(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        packed, scale, values = mxfp4_parts(w)
        return {"weight_packed": packed, "weight_scale": scale}, values

    args = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    return Case(pack, ct_config("mxfp4-pack-quantized", args), "MXFP4A16")


def ct_mxfp8() -> Case:
    def pack(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        grouped = w.reshape(w.shape[0], -1, 32)
        exponent = torch.floor(torch.log2(grouped.abs().amax(-1).clamp_min(1e-30))) - 8
        codes = (grouped / 2.0 ** exponent[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
        values = (codes.float() * 2.0 ** exponent[..., None]).flatten(1)
        return {"weight": codes.flatten(1), "weight_scale": (exponent + 127).to(torch.uint8)}, values

    args = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    return Case(pack, ct_config("mxfp8-quantized", args), None, "MXFP8")


def deepseek(exponents: bool = False) -> Case:
    def pack(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale, wide = _block_scale(w, torch.float32)
        if exponents:
            power = torch.ceil(torch.log2(scale))
            wide = (2.0**power).repeat_interleave(128, 0)[: w.shape[0]].repeat_interleave(128, 1)[:, : w.shape[1]]
            scale = (power + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
        codes, values = _fp8(w, wide)
        return {"weight": codes, "weight_scale_inv": scale}, values

    config = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    return Case(pack, config, "FP8_BLOCK")


def modelopt_fp8() -> Case:
    def pack(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale = w.abs().amax() / 448
        codes, values = _fp8(w, scale)
        return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.02)}, values

    return Case(pack, {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}, "FP8")


def modelopt_blocks() -> Case:
    def pack(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale, wide = _block_scale(w, torch.float32)
        codes, values = _fp8(w, wide)
        return {"weight": codes, "weight_scale": scale[:, None, :, None]}, values

    config = {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO", "ignore": ["lm_head"]}
    return Case(pack, config, None, "no scheme family implements")


def modelopt_nvfp4(inputs: bool) -> Case:
    def pack(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        packed, scale, whole, values = nvfp4_parts(w)
        made = {"weight": packed, "weight_scale": scale, "weight_scale_2": whole}
        return made | ({"input_scale": torch.tensor(0.002)} if inputs else {}), values

    config = {"quant_method": "modelopt", "quant_algo": "NVFP4" if inputs else "W4A16_NVFP4", "ignore": ["lm_head"]}
    return Case(pack, config, "NVFP4_STATIC" if inputs else "NVFP4A16")


def modelopt_int4(algorithm: str) -> Case:
    def pack(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scale, _ = integers(w, 4, 128, True, torch.bfloat16)
        signed = torch.from_numpy(codes - 8)
        nibbles = (signed & 15).to(torch.uint8)
        made = {"weight": nibbles[0::2] | (nibbles[1::2] << 4), "weight_scale": scale.float()}
        if algorithm == "W4A8_AWQ":
            made |= {"weight_scale_2": torch.tensor(0.5), "input_scale": torch.tensor(0.02)}
        return made, signed * _spread(scale, 128)

    config = {"quant_method": "modelopt", "quant_algo": algorithm, "group_size": 128, "ignore": ["lm_head"]}
    return Case(pack, config, {"W4A16_AWQ": "W4A16", "W4A8_AWQ": "int4.group128+fp8e4m3.tensor"}[algorithm])


def bnb(kind: str) -> Case:
    table = torch.linspace(-1, 1, 16) ** 3  # any table will do, as a reader must look it up

    def four(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        blocks = w.reshape(-1, 64)
        absmax = blocks.abs().amax(1)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(w.shape)}
        extra: dict[str, Tensor] = {"weight.absmax": absmax}
        if kind == "double":
            inner, offset = torch.linspace(-1, 1, 256), float(absmax.mean())
            outer = (absmax - offset).reshape(-1).split(256)
            largest = torch.stack([part.abs().amax() for part in outer])
            codes = torch.cat(
                [((p / m).unsqueeze(1) - inner).abs().argmin(1) for p, m in zip(outer, largest, strict=True)]
            )
            absmax = inner[codes] * largest.repeat_interleave(256)[: len(codes)] + offset
            extra = {
                "weight.absmax": codes.to(torch.uint8),
                "weight.nested_absmax": largest,
                "weight.nested_quant_map": inner,
            }
            state |= {"nested_blocksize": 256, "nested_offset": offset, "nested_dtype": "float32"}
        codes = ((blocks / absmax[:, None]).unsqueeze(-1) - table).abs().argmin(-1).reshape(-1)
        values = (table[codes].reshape(-1, 64) * absmax[:, None]).reshape(w.shape)
        packed = ((codes[0::2] << 4) | codes[1::2]).to(torch.uint8).reshape(-1, 1)
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return {
            "weight": packed,
            "weight.quant_map": table,
            "weight.quant_state.bitsandbytes__nf4": text,
            **extra,
        }, values

    def eight(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        row = w.abs().amax(1)
        codes = (w / row[:, None] * 127).round().to(torch.int8)
        made = {"weight": codes, "SCB": row, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return made, codes.float() * (row[:, None] / 127)

    config = {"quant_method": "bitsandbytes", "load_in_4bit": kind != "int8", "load_in_8bit": kind == "int8"}
    return Case(eight, config, "W8A16") if kind == "int8" else Case(four, config, None, "look up a table")


def torchao(kind: str) -> Case:
    def pack(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        amax = w.abs().amax(1, keepdim=True)
        if kind == "fp8":
            codes, values = _fp8(w, amax / 448)
            return {"_weight_qdata": codes, "_weight_scale": amax / 448}, values
        scale = amax / 127
        codes = (w / scale).round().to(torch.int8)
        zero = torch.zeros(w.shape[0], 1, dtype=torch.int8)
        return {"_weight_qdata": codes, "_weight_scale": scale, "_weight_zero_point": zero}, codes.float() * scale

    types = {"fp8": "Float8DynamicActivationFloat8WeightConfig", "int8": "Int8WeightOnlyConfig"}
    config = {"quant_method": "torchao", "quant_type": {"default": {"_type": types[kind]}}}
    return Case(pack, config, {"fp8": "FP8_DYNAMIC", "int8": "W8A16"}[kind])


def auto_round(case: Case, packing: str, symmetric: bool, index: bool) -> Case:
    def pack(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        tensors, values = case.pack(name, w)
        return {suffix: tensor for suffix, tensor in tensors.items() if index or suffix != "g_idx"}, values

    config = {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": 128,
        "sym": symmetric,
        "data_type": "int",
        "packing_format": packing,
    }
    return Case(pack, config, case.scheme)


CASES: dict[str, Case] = {
    **{f"gptq {bits} bits {'sym' if sym else 'asym'}": gptq(bits, 64, sym) for bits in (2, 4, 8) for sym in (True, False)},
    "gptq 3 bits": gptq(3, 128, True),
    "gptq v2 asym": gptq(4, 128, False, "gptq_v2"),
    "gptq v2 3 bits": gptq(3, 64, False, "gptq_v2"),
    "gptq desc_act": gptq(4, 64, True, shuffled=True),
    "gptq desc_act asym 8 bits": gptq(8, 64, False, "gptq_v2", shuffled=True),
    **{f"gptq_p {bits} bits": gptq(bits, 64, False, "gptq_p") for bits in (3, 4, 5, 6, 7)},
    "awq": awq(False),
    "awq without zero points": awq(True),
    **{f"ct packed {bits} {'sym' if sym else 'asym'}": ct_packed(bits, 64, sym) for bits in (2, 3, 4, 8) for sym in (True, False)},
    "ct packed group of a row": ct_packed(4, HIDDEN // 2, True),
    "ct int8 packed": ct_int8(True, False),
    "ct int8": ct_int8(False, True),
    "ct w4a8": ct_w4a8(),
    **{f"ct fp8 {strategy}": ct_fp8(strategy) for strategy in ("tensor", "channel", "block")},
    "ct nvfp4": ct_nvfp4(True),
    "ct nvfp4a16": ct_nvfp4(False),
    "ct mxfp4": ct_mxfp4(),
    "ct mxfp8": ct_mxfp8(),
    "deepseek": deepseek(),
    "deepseek ue8m0": deepseek(True),
    "modelopt fp8": modelopt_fp8(),
    "modelopt fp8 blocks": modelopt_blocks(),
    "modelopt nvfp4": modelopt_nvfp4(True),
    "modelopt w4a16 nvfp4": modelopt_nvfp4(False),
    "modelopt int4 awq": modelopt_int4("W4A16_AWQ"),
    "modelopt w4a8 awq": modelopt_int4("W4A8_AWQ"),
    "bitsandbytes nf4": bnb("nf4"),
    "bitsandbytes nf4 double": bnb("double"),
    "bitsandbytes int8": bnb("int8"),
    "torchao int8": torchao("int8"),
    "torchao fp8": torchao("fp8"),
    "auto-round": auto_round(gptq(4, 128, True), "auto_round", True, False),
    "auto-round auto_gptq": auto_round(gptq(4, 128, True), "auto_round:auto_gptq", True, True),
    "auto-round asym": auto_round(awq(False), "auto_round:auto_awq", False, False),
}  # fmt: skip
