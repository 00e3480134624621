"""Textbook round-to-nearest quantization, eager and slow: the yardstick that the product is measured against.

It is written from the definitions of the schemes and shares no code with quant_compile, which it does not import.
Values are rounded and multiplied back in f32 ("fake quantization"), products are f32 matmuls, and a linear's output is
cast to the dtype of its input. Floats are rounded by arithmetic on their exponent, not by a dtype cast, so that even
the meaning of e4m3 and e5m2 is stated here.

Definitions, for a weight W [n, k] and an input X [..., k]; amax is the largest magnitude of what shares a scale:

    FP8     scale = amax / largest finite value (e4m3: 448, e5m2: 57344), round to nearest even, saturate. Inputs are
            e4m3 even where weights are e5m2, since no GPU multiplies e5m2 by e5m2.
    INT8    scale = amax / 127, round half to even, -127 .. 127.
    INT4    symmetric: scale = amax / 7.5, codes -8 .. 7 (compressed-tensors). Asymmetric: scale = (max - min) / 15 over
            a range that holds 0, zero = round(-min / scale), codes 0 .. 15, W = scale * (code - zero).
            The scale is stored in the weight's dtype and codes are rounded under the stored scale.
    NVFP4   e2m1 values (0, 0.5, 1, 1.5, 2, 3, 4, 6) under an e4m3 scale for each 16 of k below one f32 scale: whole = amax of
            the tensor / (448 * 6), local = amax of the 16 / 6 / whole rounded to e4m3 (2**-9 at least). A static scheme
            calibrates the amax that ``whole`` is made of.
    MXFP4   e2m1 values under a power of two for each 32 of k: 2**(e - 2) for an amax of m * 2**e, 1 <= m < 2, and twice that
            from m = 1.75 on.
    W4A8    INT4 weights (symmetric, groups of 128), INT8 inputs per token; W4AFP8: FP8 inputs per token.
    QSERVE  INT8 inputs per token; weights in INT4 with a zero point over a range that holds 0, per row (CHANNEL), scale =
            (max - min) / 15, or (GROUP) in INT8 per row, scale = amax / 119, and those integers in groups of 128 in INT4 with
            a zero point, scale = the whole number that is at least (max - min) / 15 and 1. A row's scale is the smallest
            f16 that is not below it, so that nothing is clipped.

A static input scale is amax / largest code over the calibration batches of the model as it was; amax 0 gives zeros.

An expert block is a stack of linears, [E, 2 i, h] with the gate's rows first and [E, h, i]. Each expert's matrices are
quantized on their own, as any linear's. The block's tokens are one input, quantized before they are dealt out; the hidden
layer of each expert is an input of its own. In a static scheme each of the block's two weights has one input amax.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

E4M3 = (3, -6, 448.0)
E5M2 = (2, -14, 57344.0)
E2M1 = (1, 0, 6.0)
"""(mantissa bits, smallest normal exponent, largest finite value)."""


def round_float(x: Tensor, kind: tuple[int, int, float]) -> Tensor:
    """f32 ``x`` rounded to the nearest value of a small float, ties to even, saturating."""
    mantissa, smallest, largest = kind
    exponent = torch.frexp(x).exponent - 1  # x = m * 2**exponent, 1 <= m < 2
    step = torch.exp2((exponent.clamp(min=smallest) - mantissa).float())
    return (torch.round(x / step) * step).clamp(-largest, largest)


def _scale(amax: Tensor, largest: float) -> Tensor:
    """amax / largest, with 1 where there is nothing to scale."""
    return torch.where(amax > 0, amax / largest, torch.ones_like(amax))


def fake_float(x: Tensor, amax: Tensor, kind: tuple[int, int, float]) -> Tensor:
    """``x`` after FP8 and back, scaled by ``amax`` (broadcast)."""
    scale = _scale(amax, kind[2])
    return round_float(x / scale, kind) * scale


def fake_int8(x: Tensor, amax: Tensor) -> Tensor:
    """``x`` after symmetric INT8 and back, scaled by ``amax`` (broadcast)."""
    scale = _scale(amax, 127.0)
    return torch.round(x / scale).clamp(-127, 127) * scale


def by_row(w: Tensor) -> Tensor:
    """amax of each row, [..., 1]."""
    return w.abs().amax(-1, keepdim=True)


def by_tensor(w: Tensor) -> Tensor:
    """amax of everything, a scalar."""
    return w.abs().amax()


def by_group(x: Tensor, size: int) -> Tensor:
    """amax of each run of ``size`` along the last dimension, repeated to x's shape; the last run may be short."""
    return torch.cat([by_row(part).expand_as(part) for part in x.split(size, dim=-1)], dim=-1)


def by_block(w: Tensor, size: int) -> Tensor:
    """amax of each ``size`` x ``size`` block of [n, k], repeated to its shape; the last blocks may be smaller."""
    rows = [
        torch.cat([by_tensor(tile).expand_as(tile) for tile in band.split(size, dim=1)], dim=1)
        for band in w.split(size, dim=0)
    ]
    return torch.cat(rows, dim=0)


def fake_int4(w: Tensor, group: int | None, symmetric: bool, stored: torch.dtype) -> Tensor:
    """[n, k] f32 after INT4 and back, one scale (stored as ``stored``) for each ``group`` of k, or for a whole row."""
    parts = w.split(group or w.shape[1], dim=1)
    return torch.cat([_fake_int4_part(part, symmetric, stored) for part in parts], dim=1)


def _fake_int4_part(w: Tensor, symmetric: bool, stored: torch.dtype) -> Tensor:
    if symmetric:
        scale = _scale(by_row(w), 7.5).to(stored).float()
        return torch.round(w / scale).clamp(-8, 7) * scale
    low = w.amin(1, keepdim=True).clamp(max=0)
    high = w.amax(1, keepdim=True).clamp(min=0)
    scale = _scale(high - low, 15.0).to(stored).float()
    zero = torch.round(-low / scale).clamp(0, 15)
    return (torch.round(w / scale + zero).clamp(0, 15) - zero) * scale


def f16_from_above(x: Tensor) -> Tensor:
    """The smallest f16 (11 significant bits, 2**-14 the smallest normal) that is at least x > 0, as f32."""
    exponent = torch.frexp(x).exponent - 1
    step = torch.exp2((exponent.clamp(min=-14) - 10).float())
    return torch.ceil(x / step) * step


def fake_uint4(x: Tensor, step: Tensor) -> Tensor:
    """[n, k] after 4 bits with a zero point and back, under ``step`` [n, 1], a fifteenth of the row's range at least."""
    zero = torch.round(-x.amin(1, keepdim=True).clamp(max=0) / step)
    return ((torch.round(x / step) + zero).clamp(0, 15) - zero) * step


def spread(x: Tensor) -> Tensor:
    """Width [n, 1] of the smallest range that holds a row and 0."""
    return x.amax(1, keepdim=True).clamp(min=0) - x.amin(1, keepdim=True).clamp(max=0)


def fake_qserve_channel(w: Tensor) -> Tensor:
    """[n, k] f32 after QServe's per-channel form and back."""
    return fake_uint4(w, f16_from_above(_scale(spread(w), 15.0)))


def fake_qserve_group(w: Tensor, group: int) -> Tensor:
    """[n, k] f32 after QServe's two levels and back."""
    scale = f16_from_above(_scale(by_row(w), 119.0))
    whole = torch.round(w / scale)
    parts = whole.split(group, dim=1)
    return torch.cat([fake_uint4(part, torch.ceil(spread(part) / 15).clamp(min=1)) for part in parts], dim=1) * scale


def fake_nvfp4(x: Tensor, amax: Tensor) -> Tensor:
    """``x`` after NVFP4 and back; ``amax`` of the whole tensor."""
    whole = _scale(amax, E4M3[2] * E2M1[2])
    step = round_float(by_group(x, 16) / E2M1[2] / whole, E4M3).clamp(min=2.0**-9) * whole
    return round_float(x / step, E2M1) * step


def fake_mxfp4(x: Tensor) -> Tensor:
    """``x`` after MXFP4 and back."""
    amax = by_group(x, 32)
    significand, exponent = torch.frexp(amax)  # amax = significand * 2**exponent, 0.5 <= significand < 1
    power = exponent - 3 + (significand >= 0.875).to(torch.int32)
    step = torch.where(amax > 0, torch.exp2(power.float()), torch.ones_like(amax))
    return round_float(x / step, E2M1) * step


BLOCKS = {"Q8_0": 32, "Q5_1": 32, "Q5_0": 32, "Q4_1": 32, "Q4_0": 32, "MXFP4": 32, "TQ2_0": 256, "TQ1_0": 256}
"""Weights in a block of each GGUF type that the ``gguf`` package quantizes to; of the others it has no quantizer."""


def fake_gguf(w: Tensor, name: str) -> Tensor:
    """[n, k] f32 after a GGUF type and back, by the ``gguf`` package."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    kind = GGMLQuantizationType[name]
    return torch.from_numpy(dequantize(quantize(w.cpu().numpy(), kind), kind)).to(w.device)


WeightRule = Callable[[Tensor, torch.dtype], Tensor]
InputRule = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Textbook:
    """One scheme.

    Attributes:
        weight: (w f32 [n, k], dtype it was stored in) -> w f32 as quantization leaves it.
        inputs: (x f32 [..., k], calibrated amax or an empty tensor) -> x f32 as quantization leaves it; None keeps x.
        static: the input's amax comes from calibration.
        block: weights whose k is no multiple of it stay as they are, and with one of its weights an expert block.
    """

    weight: WeightRule
    inputs: InputRule | None = None
    static: bool = False
    block: int = 1


def _gguf(name: str, block: int) -> Textbook:
    return Textbook(lambda w, _: fake_gguf(w, name), block=block)


def _int4(group: int | None, symmetric: bool = True) -> Textbook:
    return Textbook(lambda w, dtype: fake_int4(w, group, symmetric, dtype))


def _int8_rows(w: Tensor, dtype: torch.dtype) -> Tensor:
    return fake_int8(w, by_row(w))


SCHEMES: Mapping[str, Textbook] = {
    "FP8_DYNAMIC": Textbook(lambda w, _: fake_float(w, by_row(w), E4M3), lambda x, _: fake_float(x, by_row(x), E4M3)),
    "FP8": Textbook(lambda w, _: fake_float(w, by_tensor(w), E4M3), lambda x, amax: fake_float(x, amax, E4M3), True),
    "FP8_TENSOR_DYNAMIC": Textbook(
        lambda w, _: fake_float(w, by_tensor(w), E4M3), lambda x, _: fake_float(x, by_tensor(x), E4M3)
    ),
    "FP8_E5M2_DYNAMIC": Textbook(
        lambda w, _: fake_float(w, by_row(w), E5M2), lambda x, _: fake_float(x, by_row(x), E4M3)
    ),
    "FP8_BLOCK": Textbook(
        lambda w, _: fake_float(w, by_block(w, 128), E4M3), lambda x, _: fake_float(x, by_group(x, 128), E4M3)
    ),
    "W8A8": Textbook(_int8_rows, lambda x, _: fake_int8(x, by_row(x))),
    "W8A8_STATIC": Textbook(_int8_rows, fake_int8, True),
    "W8A16": Textbook(_int8_rows),
    "W4A16": _int4(128),
    "W4A16_G64": _int4(64),
    "W4A16_G32": _int4(32),
    "W4A16_CHANNEL": _int4(None),
    "W4A16_ASYM": _int4(128, symmetric=False),
    "W4A8": Textbook(lambda w, dtype: fake_int4(w, 128, True, dtype), lambda x, _: fake_int8(x, by_row(x))),
    "W4AFP8": Textbook(lambda w, dtype: fake_int4(w, 128, True, dtype), lambda x, _: fake_float(x, by_row(x), E4M3)),
    "QSERVE_W4A8_CHANNEL": Textbook(lambda w, _: fake_qserve_channel(w), lambda x, _: fake_int8(x, by_row(x))),
    "QSERVE_W4A8_GROUP": Textbook(lambda w, _: fake_qserve_group(w, 128), lambda x, _: fake_int8(x, by_row(x))),
    "NVFP4": Textbook(lambda w, _: fake_nvfp4(w, by_tensor(w)), lambda x, _: fake_nvfp4(x, by_tensor(x))),
    "NVFP4_STATIC": Textbook(lambda w, _: fake_nvfp4(w, by_tensor(w)), fake_nvfp4, True),
    "NVFP4A16": Textbook(lambda w, _: fake_nvfp4(w, by_tensor(w))),
    "MXFP4": Textbook(lambda w, _: fake_mxfp4(w), lambda x, _: fake_mxfp4(x)),
    "MXFP4A16": Textbook(lambda w, _: fake_mxfp4(w)),
    **{f"GGUF_{name}": _gguf(name, block) for name, block in BLOCKS.items()},
}


def _int4_policy(**fields: object) -> dict[str, object]:
    return {"default": {"weights": {"num_bits": 4, "type": "int", **fields}}}


POLICIES: Mapping[str, str | dict[str, object]] = {name: name for name in SCHEMES} | {
    "W4A16_G64": _int4_policy(strategy="group", group_size=64),
    "W4A16_G32": _int4_policy(strategy="group", group_size=32),
    "W4A16_CHANNEL": _int4_policy(strategy="channel"),
}
"""How to ask the product for each scheme: a preset's name, or a policy by its fields."""


class FakeQuantLinear(nn.Module):
    """A linear whose weight has been through a scheme, and whose input goes through it at each call."""

    def __init__(self, linear: nn.Linear, scheme: Textbook, amax: Tensor) -> None:
        super().__init__()
        with torch.no_grad():
            weight = scheme.weight(linear.weight.detach().float(), linear.weight.dtype)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float(), persistent=False)
        self.register_buffer("amax", amax, persistent=False)
        self.inputs = scheme.inputs

    def forward(self, x: Tensor) -> Tensor:
        """[..., k] -> [..., n] in x's dtype; f32 inside."""
        wide = x.float() if self.inputs is None else self.inputs(x.float(), self.amax)
        return nn.functional.linear(wide, self.weight, self.bias).to(x.dtype)


UP, DOWN = "gate_up_proj", "down_proj"
_NO_AMAX = torch.empty(0)


class FakeQuantExperts(nn.Module):
    """A block of silu experts whose weights have been through a scheme; tokens and hidden layers go through it at each call.

    Like FakeQuantLinear it computes in f32 and casts what a linear gives; the rest happens in the tokens' dtype.
    """

    def __init__(self, block: nn.Module, scheme: Textbook | None, amax: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        for name in (UP, DOWN):
            experts = block.get_parameter(name).detach()
            parts = [w.float() if scheme is None else scheme.weight(w.float(), w.dtype) for w in experts]
            self.register_buffer(name, torch.stack(parts), persistent=False)
        self.amax = amax
        self.inputs = None if scheme is None else scheme.inputs
        self.largest_hidden = torch.zeros(())

    def _fake(self, x: Tensor, which: int) -> Tensor:
        return x.float() if self.inputs is None else self.inputs(x.float(), self.amax[which])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[t, h], experts [t, k] of each token, their weights [t, k] -> [t, h]."""
        dtype = hidden_states.dtype
        tokens = self._fake(hidden_states, 0)
        total = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert, (up_rows, down_rows) in enumerate(zip(self.get_buffer(UP), self.get_buffer(DOWN), strict=True)):
            rows, choice = torch.where(top_k_index == expert)
            if not rows.numel():
                continue
            gate, up = nn.functional.linear(tokens[rows], up_rows).to(dtype).chunk(2, dim=-1)
            inner = nn.functional.silu(gate) * up
            self.largest_hidden = torch.maximum(self.largest_hidden, by_tensor(inner.float()))
            out = nn.functional.linear(self._fake(inner, 1), down_rows).to(dtype)
            total.index_add_(0, rows, out.float() * top_k_weights[rows, choice, None].float())
        return total.to(dtype)


def is_experts(module: nn.Module) -> bool:
    """Whether the module holds the two stacked weights of an expert block."""
    held = [module._parameters.get(name) for name in (UP, DOWN)]
    return all(parameter is not None and parameter.dim() == 3 for parameter in held)


def input_amax(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Largest input magnitude of every nn.Linear and of both weights of every expert block over ``batches`` of token ids.

    By name of the module, and for experts by name of the weight.
    """
    seen: dict[str, Tensor] = {}

    def see(name: str, amax: Tensor) -> None:
        seen[name] = torch.maximum(seen[name], amax) if name in seen else amax

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: see(name, by_tensor(args[0].float()))

    def watch_experts(name: str, module: nn.Module) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        plain = FakeQuantExperts(module, None, (_NO_AMAX, _NO_AMAX))

        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            see(f"{name}.{UP}", by_tensor(args[0].float()))
            plain(*args)
            see(f"{name}.{DOWN}", plain.largest_hidden)

        return hook

    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    blocks = [(name, module) for name, module in model.named_modules() if is_experts(module)]
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in linears]
    hooks += [module.register_forward_pre_hook(watch_experts(name, module)) for name, module in blocks]
    try:
        with torch.no_grad():
            for batch in batches:
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def fake_quant_model(
    model: nn.Module,
    scheme_name: str,
    keep: Sequence[str] = ("lm_head",),
    amax: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """A deep copy of ``model`` whose nn.Linears and expert blocks follow the scheme, except names that end in one of ``keep``.

    Raises:
        ValueError: a static scheme without ``amax`` (see ``input_amax``), or a model without linears to replace.
    """
    scheme = SCHEMES[scheme_name]
    if scheme.static and amax is None:
        raise ValueError(f"{scheme_name} needs the inputs' amax")
    made = copy.deepcopy(model)
    targets = [
        (name, module)
        for name, module in made.named_modules()
        if (isinstance(module, nn.Linear) or is_experts(module))
        and not any(name == end or name.endswith("." + end) for end in keep)
        and not any(p.shape[-1] % scheme.block for p in module.parameters() if p.dim() > 1)
    ]
    if not targets:
        raise ValueError("the model has no linear to replace")
    for name, module in targets:
        parent, _, leaf = name.rpartition(".")
        known = amax if scheme.static and amax is not None else {}
        if isinstance(module, nn.Linear):
            fake: nn.Module = FakeQuantLinear(module, scheme, known.get(name, _NO_AMAX))
        else:
            limits = known.get(f"{name}.{UP}", _NO_AMAX), known.get(f"{name}.{DOWN}", _NO_AMAX)
            fake = FakeQuantExperts(module, scheme, limits)
        setattr(made.get_submodule(parent), leaf, fake)
    return made


def gptq_values(w: Tensor, moments: Tensor, step: Tensor, lowest: float, highest: float, damping: float) -> Tensor:
    """GPTQ by the book (arXiv 2210.17323, section 3), in f64: after each input its row and column leave the inverse.

    Args:
        w: [n, k].
        moments: [k, k], of inputs.
        step: [n, 1], what codes are multiples of; may be negative.
        lowest, highest: codes.
        damping: share of the mean of the diagonal that is added to it.

    Returns:
        [n, k] f64, the values that codes stand for.
    """
    w, step = w.double().clone(), step.double()
    hessian = moments.double()
    inverse = torch.linalg.inv(
        hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    )
    out = torch.empty_like(w)
    for j in range(w.shape[1]):
        out[:, j] = (w[:, j] / step[:, 0]).round().clamp(lowest, highest) * step[:, 0]
        error = (w[:, j] - out[:, j]) / inverse[j, j]
        w[:, j:] -= error[:, None] * inverse[j, j:]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return out


def compensated_values(w: Tensor, moments: Tensor, scale: Tensor, damping: float, at_once: int) -> Tensor:
    """Codes -8 to 7 of ``at_once`` inputs at a time, in f64: of the rest, the values of least damped error given what was rounded.

    No factor of an inverse: those to come are solved for anew each time, out of the whole matrix.

    Args:
        w: [n, k].
        moments: [k, k].
        scale: [n, 1].
    """
    w, scale, hessian = w.double(), scale.double(), moments.double()
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    out = w.clone()
    for start in range(0, w.shape[1], at_once):
        stop = start + at_once
        out[:, start:stop] = (out[:, start:stop] / scale).round().clamp(-8, 7) * scale
        error = (out[:, :stop] - w[:, :stop]) @ hessian[:stop, stop:]
        out[:, stop:] = w[:, stop:] - torch.linalg.solve(hessian[stop:, stop:], error.t()).t()
    return out


def corrected_values(w: Tensor, x: Tensor, y: Tensor, damping: float) -> Tensor:
    """The weight [n, k] whose products with rows of y [t, k] are nearest to w's with x, in f64: least squares, pulled towards w.

    Args:
        damping: share of y's mean square by which a change of the weight costs.
    """
    w, x, y = w.double(), x.double() / len(x) ** 0.5, y.double() / len(y) ** 0.5
    pull = (damping * y.square().sum(0).mean()).sqrt() * torch.eye(w.shape[1], dtype=torch.float64)
    return torch.linalg.lstsq(torch.cat([y, pull]), torch.cat([x @ w.t(), pull @ w.t()])).solution.t()


def least_int4_error(group: Tensor, importance: Tensor, steps: int = 4000) -> float:
    """Least weighted square error of one group [size] under any scale, 16 codes from -8: a fine scan, in f64."""
    group, importance = group.double(), importance.double()
    amax = float(group.abs().max())
    scales = torch.linspace(-amax / 4, amax / 4, steps, dtype=torch.float64)
    scales = scales[scales != 0][:, None]
    values = (group / scales).round().clamp(-8, 7) * scales
    return float(((values - group).square() * importance).sum(-1).min())


def awq_factor(x: Tensor, w: Tensor, power: float) -> Tensor:
    """AWQ's s by the book (arXiv 2306.00978, section 3.2), in f64: root mean square of each input to a power, its ends as far from one.

    Args:
        x: [t, k].
        w: [n, k], which plays no part in the plain form.
        power: 0 to 1.
    """
    s = x.double().square().mean(0).sqrt() ** power
    return s / (s.max() * s.min()).sqrt()


def smoothquant_factor(x: Tensor, w: Tensor, power: float) -> Tensor:
    """SmoothQuant's s by the book (arXiv 2211.10438, equation 4), in f64: max|x|^a / max|w|^(1 - a), its ends as far from one."""
    s = x.double().abs().amax(0) ** power / w.double().abs().amax(0) ** (1 - power)
    return s / (s.max() * s.min()).sqrt()


def rounded_rows(x: Tensor, highest: float) -> Tensor:
    """Symmetric rounding by row in f64: scale max|x| / highest, codes from -highest to highest."""
    step = x.double().abs().amax(-1, keepdim=True) / highest
    return (x.double() / step).round().clamp(-highest, highest) * step
