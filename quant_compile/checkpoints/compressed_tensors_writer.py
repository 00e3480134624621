"""Planes to tensors and config of compressed-tensors: the inverse of its reader, in whose words formats are described.

``form_of`` says how a scheme is stored, or why it cannot be; ``tensors_of`` makes the tensors of one linear, also of planes on the meta
device, so that names, shapes and dtypes of a whole checkpoint are known before anything is written.

Where compressed-tensors is wider than what loads it, the form is that of the loaders: integers under 16-bit or FP8 inputs are packed into
words, which vLLM asks for; integers under int8 inputs are bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quant_compile.checkpoints.compressed_tensors import FP8, INT8, METHOD, MXFP4, NVFP4, PACKED
from quant_compile.checkpoints.description import alike, matches
from quant_compile.checkpoints.errors import SaveError
from quant_compile.checkpoints.weight import nibbles, unpack_bits, words
from quant_compile.ir.family import Planes, Reject
from quant_compile.ir.scheme import GGUF, QuantArgs, Scheme

DENSE = "dense"  # format of a checkpoint whose weights are as they were


@dataclass(frozen=True)
class Form:
    """How the weights of a scheme are stored.

    Attributes:
        format: one of the reader's.
        scheme: in compressed-tensors' words; a load of it has this scheme.
    """

    format: str
    scheme: Scheme


def form_of(scheme: Scheme, n: int, k: int) -> Form | Reject:
    """The form of a weight [n, k], or why compressed-tensors has none for it."""
    w, a = scheme.weights, scheme.input_activations
    refusal = _refusal(w, a, k)
    if refusal is not None:
        return Reject(refusal)
    if w.strategy == "tensor" and (
        w.type == "int" or n == 1
    ):  # the same scale in each row, which is what its planes have
        w = replace(w, strategy="channel")
    if w.group_size is not None and w.group_size > k and w.type == "int":  # one scale for a row
        w = replace(w, strategy="channel", group_size=None)
    return Form(_format(w, a), Scheme(w, a))


def _refusal(w: QuantArgs, a: QuantArgs | None, k: int) -> str | None:
    if w.type == GGUF:
        return "the format has no blocks of GGUF"
    if "e5m2" in (w.format, a.format if a is not None else None):
        return "the format's 8-bit floats are e4m3"
    if w.strategy == "channel_group" or (not w.symmetric and a is not None):
        return "the format has no zero points, and no scales of two levels, under 8-bit inputs"
    if w.strategy == "tensor_group" and a is not None and a.dynamic:
        return "the format's NVFP4 inputs have calibrated global scales: NVFP4_STATIC by quant_compile.calibrate, or NVFP4A16"
    if w.group_size is not None and k % w.group_size and not (w.type == "int" and w.group_size > k):
        return f"groups of {w.group_size} do not divide its {k} inputs"
    return None


def _format(w: QuantArgs, a: QuantArgs | None) -> str:
    if w.type == "int":
        return INT8 if a is not None and a.type == "int" else PACKED
    return {"tensor_group": NVFP4, "group": MXFP4}.get(w.strategy, FP8)


def tensors_of(form: Form, planes: Planes, n: int, k: int, input_scale: Tensor | None = None) -> dict[str, Tensor]:
    """A linear's tensors by suffix.

    Args:
        form: of its scheme.
        planes: in row form.
        n: rows.
        k: columns.
        input_scale: [1] f32, of a static scheme.

    Raises:
        SaveError: rows of one tensor have different scales where the form has one.
    """
    if form.format == PACKED:
        out = _packed(form, planes, n, k)
    elif form.format == INT8:
        out = {"weight": _int8(form, planes, k), "weight_scale": planes[1]}
    elif form.format == FP8:
        one = form.scheme.weights.strategy == "tensor"
        out = {"weight": planes[0], "weight_scale": _one(planes[1]) if one else planes[1]}
    else:
        out = {"weight_packed": planes[0], "weight_scale": planes[1]}
        if form.format == NVFP4:
            out["weight_global_scale"] = divisor(_one(planes[2]))
    if input_scale is not None:
        name = "input_global_scale" if form.format == NVFP4 else "input_scale"
        out[name] = divisor(input_scale) if form.format == NVFP4 else input_scale.float().reshape(1)
    return {suffix: tensor.contiguous() for suffix, tensor in out.items()}


def _packed(form: Form, planes: Planes, n: int, k: int) -> dict[str, Tensor]:
    """Codes along k and zero points along n, as words; 4-bit planes have the order of nibbles already."""
    data = planes[0].view(torch.uint8)
    out = {
        "weight_packed": words(data if form.scheme.weights.num_bits == 4 else data ^ 0x80),
        "weight_scale": planes[1],
        "weight_shape": torch.tensor([n, k]),
    }
    if not form.scheme.weights.symmetric:
        zero = unpack_bits(words(planes[2]), 4, planes[1].shape[1])
        out["weight_zero_point"] = words(nibbles(zero.t())).t()
    return out


def _int8(form: Form, planes: Planes, k: int) -> Tensor:
    """int8 [n, k]; 4-bit codes in bytes of their own."""
    if form.scheme.weights.num_bits == 8:
        return planes[0]
    return unpack_bits(words(planes[0]), 4, k).to(torch.int8) - 8


def _one(scale: Tensor) -> Tensor:
    """[1] of a tensor's scale, which planes repeat in every row."""
    if not scale.is_meta and not bool((scale == scale[:1]).all()):
        raise SaveError("rows of a tensor that should share one scale have several.\nFix: report this defect.")
    return scale[:1].reshape(1) if scale.shape[0] else scale.new_ones(1)


def divisor(scale: Tensor) -> Tensor:
    """[1] f32 whose reciprocal in f32 is ``scale``; in f64 where there is no such f32 number."""
    if scale.is_meta:
        return torch.empty_like(scale, dtype=torch.float32)
    exact = scale.double().reciprocal()
    nearest = exact.float()
    up, down = (torch.nextafter(nearest, torch.full_like(nearest, to)) for to in (torch.inf, -torch.inf))
    return next((d for d in (nearest, up, down) if torch.equal(d.reciprocal(), scale.float())), exact)


# --- the config ---


def quantization_config(
    forms: Mapping[str, Form], others: Mapping[str, bool], cache: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """``quantization_config`` of a checkpoint.

    Args:
        forms: of every module that is quantized, by its name in the files.
        others: modules that are not; True: one that would be taken for a linear, and is named in ``ignore``.
        cache: ``kv_cache_scheme``.
    """
    kinds = list(dict.fromkeys(forms.values()))
    targets: dict[Form, list[str]] = {form: [] for form in kinds}
    if len(kinds) == 1:
        targets[kinds[0]] = ["Linear"]
    else:
        for pattern, name in alike({**dict.fromkeys(others), **forms}):
            if name in forms:
                targets[forms[name]].append(f"re:^{pattern}$")
    groups = {f"group_{i}": _group(form, targets[form]) for i, form in enumerate(kinds)}
    formats = {form.format for form in kinds} or {DENSE}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": cache,
        "config_groups": groups,
        "ignore": [_ignored(name, forms) for name, linear in others.items() if linear],
    }


def _ignored(name: str, forms: Mapping[str, Form]) -> str:
    """A module's name, unless readers that take it for a part of longer names would leave out more."""
    taken = any(name in module and matches(name, module) for module in forms)  # the first is quick, of many experts
    return f"re:^{re.escape(name)}$" if taken else name


def _group(form: Form, targets: list[str]) -> dict[str, Any]:
    w, a = form.scheme.weights, form.scheme.input_activations
    weights = _args(w)
    scales = {NVFP4: "torch.float8_e4m3fn", MXFP4: "torch.uint8"}.get(form.format)
    if scales is not None:
        weights["scale_dtype"] = scales
    inputs = None if a is None else _args(a)
    if inputs is not None and scales is not None:
        inputs |= {"scale_dtype": scales}
    if inputs is not None and form.format == NVFP4:
        inputs["dynamic"] = "local"  # scales of groups at run time, below a global one that is fixed
    return {
        "targets": targets,
        "format": form.format,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }


def _args(args: QuantArgs) -> dict[str, Any]:
    return {
        "num_bits": args.num_bits,
        "type": args.type,
        "strategy": args.strategy,
        "symmetric": args.symmetric,
        "dynamic": args.dynamic,
        "group_size": args.group_size,
        "block_structure": None if args.block_structure is None else list(args.block_structure),
    }
