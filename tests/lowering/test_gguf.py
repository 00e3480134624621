"""GGUF types as schemes: fields, planes, refusals, the CPU kernel, and merged siblings; what the bytes mean is tests/ir/test_ggml.py."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import quant_compile
from quant_compile.ir.errors import PolicyError, PolicyWarning, SchemeError, WeightError
from quant_compile.ir.family import Reject, bits_per_weight, family_of
from quant_compile.ir.ggml.decode import decode
from quant_compile.ir.ggml.types import TYPES
from quant_compile.ir.scheme import PRESETS, QuantArgs, Scheme, parse
from quant_compile.lowering.registry import Problem, Rank, kernels, layouts
from quant_compile.lowering.schemes import gguf
from quant_compile.lowering.select import choose
from quant_compile.lowering.target import Target
from quant_compile.lowering.weights import STORE
from quant_compile.policy import Policy
from tests.ir.test_ggml import random_blocks
from tests.runtime_support import CompileCounter, plain_inductor

__all__ = ["plain_inductor"]

NAMES = tuple(gguf.PRESETS)
ABLE = tuple(name for name in NAMES if TYPES[name.removeprefix("GGUF_").lower()].encodes)
FROM_FILES = tuple(name for name in NAMES if name not in ABLE)


def type_of(name: str) -> str:
    return name.removeprefix("GGUF_").lower()


def test_every_type_is_a_preset_and_the_other_way_round() -> None:
    assert {type_of(name) for name in NAMES} == set(TYPES)
    assert set(FROM_FILES) == {
        f"GGUF_{name}" for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "NVFP4")
    }


@pytest.mark.parametrize("name", NAMES)
def test_fields_and_text_round_trip(name: str) -> None:
    scheme, kind = PRESETS[name], type_of(name)
    assert scheme.to_fields() == {"weights": {"type": "gguf", "format": kind}}
    assert Scheme.from_fields(scheme.to_fields()) == scheme == parse(name) == parse(f"gguf.{kind}+16")
    assert QuantArgs.from_spec(scheme.weights.spec) == scheme.weights
    assert Policy.load({"default": {"weights": {"type": "gguf", "format": kind.upper()}}}).default == scheme
    assert family_of(scheme).name == "gguf" and scheme.spec == name


@pytest.mark.parametrize("name", NAMES)
def test_bits_are_those_of_the_blocks(name: str) -> None:
    block = TYPES[type_of(name)]
    assert bits_per_weight(PRESETS[name]) == pytest.approx(8 * block.nbytes / block.size, abs=1e-3)
    (plane,) = family_of(PRESETS[name]).weight_planes(PRESETS[name], 3, 2 * block.size, torch.float32)
    assert (plane.name, plane.shape, plane.dtype) == ("blocks", (3, 2 * block.nbytes), torch.uint8)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"type": "gguf"}, "type gguf needs a format, one of q4_0, "),
        ({"type": "gguf", "format": "q4_k_m"}, "got 'q4_k_m'"),
        ({"type": "gguf", "format": "e4m3"}, "got 'e4m3'"),
        ({"type": "gguf", "format": "q4_k", "num_bits": 5}, "the fields type and format alone"),
        ({"type": "gguf", "format": "q4_k", "symmetric": False}, "the fields type and format alone"),
        ({"type": "int", "num_bits": 4, "strategy": "channel", "format": "q4_k"}, "format 'q4_k' needs type float"),
    ],
)
def test_wrong_fields_are_errors(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(SchemeError, match=words):
        Scheme.from_fields({"weights": fields})


def test_quantized_inputs_are_refused() -> None:
    with pytest.raises(PolicyError, match="gguf: inputs must stay in 16 bits"):
        Policy.load(
            {
                "default": {
                    "weights": {"type": "gguf", "format": "q8_0"},
                    "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
                }
            }
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_kernel_multiplies_what_the_blocks_say(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the weight is cut into rows: 17 rows, a few at a time."""
    scheme = PRESETS[name]
    k = 5 * TYPES[type_of(name)].size
    planes = (random_blocks(name_of := type_of(name)),)
    planes[0].view(17, 5, -1)[..., :] = tame(name_of, planes[0].view(17, 5, -1))
    monkeypatch.setattr("quant_compile.lowering.kernels.cpu.torch_cpu_gguf.CHUNK_ELEMENTS", 4 * k)
    monkeypatch.setattr(gguf, "CHUNK_ELEMENTS", 3 * k)
    w = decode(name_of, planes[0])
    assert torch.equal(family_of(scheme).dequantize_weight(planes, scheme, k), w)
    target = Target.fake("cpu")
    for m in (1, 5):
        x, bias = torch.randn(m, k).to(dtype), torch.randn(17).to(dtype)
        for added in (None, bias):
            problem = Problem(scheme, 17, k, dtype, added is not None)
            wanted = x.double() @ w.double().t() + (0 if added is None else added.double())
            fitting = [kernel for kernel in kernels().values() if isinstance(kernel.fit(problem, m, target), Rank)]
            assert {kernel.name for kernel in fitting} >= {"torch_cpu_gguf", "reference"}
            for kernel in fitting:
                y = kernel.run((x,), layouts()[kernel.layout].pack(planes, problem), added, problem)
                assert y.dtype == dtype and y.shape == (m, 17)
                # Sums in f32, rounded once to 16 bits.
                assert float((y.double() - wanted).norm() / wanted.norm()) <= max(2e-6, torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ["GGUF_Q4_0", "GGUF_Q4_1", "GGUF_Q4_K"])
@pytest.mark.parametrize("n", [16, 208])
def test_the_int4_layout_gives_the_blocks_back(name: str, n: int) -> None:
    """Any bytes, more rows than torch packs at a time; products differ by a scale in bf16."""
    scheme, layout = PRESETS[name], layouts()["cpu_gguf_int4"]
    blocks = random_blocks(type_of(name), rows=n)
    problem = Problem(scheme, n, 5 * TYPES[type_of(name)].size, torch.bfloat16)
    planes = layout.pack((blocks,), problem)
    assert [(tuple(plane.shape), plane.dtype) for plane in planes] == [
        (s.shape, s.dtype) for s in layout.planes(problem)
    ]
    assert torch.equal(layout.unpack(planes, problem)[0], blocks)
    assert choose(problem, Target.fake("cpu")).layout == "cpu_gguf_int4"
    w = torch.randn(n, problem.k) * 0.02
    quantized = family_of(scheme).quantize_weight(w, scheme)
    x, bias = torch.randn(3, problem.k).bfloat16(), torch.randn(n).bfloat16()
    y = kernels()["torch_cpu_gguf_int4pack"].run((x,), layout.pack(quantized, problem), bias, problem).float()
    wanted = family_of(scheme).linear((x,), quantized, bias, scheme, torch.float32)
    assert float((y - wanted).norm() / wanted.norm()) <= 5e-3  # scale, offset, sum and sum with the bias: 2^-9 each


@pytest.mark.parametrize(
    ("name", "n", "k", "dtype", "target", "words"),
    [
        ("GGUF_Q8_0", 64, 256, torch.bfloat16, "cpu", "serves GGUF blocks of q4_0, q4_1, q4_k"),
        ("GGUF_Q4_K", 64, 256, torch.float16, "cpu", "only bfloat16 is vectorized, got torch.float16"),
        (
            "GGUF_Q4_K",
            40,
            256,
            torch.bfloat16,
            "cpu",
            "n must be a multiple of 16 and k of whole blocks, got 40 and 256",
        ),
        ("GGUF_Q4_K", 64, 256, torch.bfloat16, "sm90", "runs on CPU only"),
    ],
)
def test_refusals_of_the_int4_kernel(name: str, n: int, k: int, dtype: torch.dtype, target: str, words: str) -> None:
    problem = Problem(PRESETS[name], n, k, dtype)
    answer = kernels()["torch_cpu_gguf_int4pack"].fit(problem, 1, Target.fake(target))
    assert isinstance(answer, Reject) and answer.reason == words


def test_refusals_of_the_kernel_for_every_type() -> None:
    kernel = kernels()["torch_cpu_gguf"]
    for name, target, words in (
        ("W8A16", "cpu", "serves weights in GGUF blocks"),
        ("GGUF_Q8_0", "sm90", "runs on CPU only"),
    ):
        answer = kernel.fit(Problem(PRESETS[name], 64, 256, torch.bfloat16), 1, Target.fake(target))
        assert isinstance(answer, Reject) and answer.reason == words


def tame(name: str, blocks: torch.Tensor) -> torch.Tensor:
    """Blocks whose numbers differ by less than f32 sums can bear: small exponents in f16 scales, and near ones in e8m0."""
    from tests.ir.test_ggml import HALVES

    for place in HALVES.get(name, ()):
        blocks[..., place + 1] = (blocks[..., place + 1] & 0x83) | 0x28
    if name == "iq1_m":
        blocks[..., 55] = (blocks[..., 55] & 0x8F) | 0x20
        blocks[..., 53] = (blocks[..., 53] & 0x0F) | 0x80
    if name == "mxfp4":
        blocks[..., 0] = (blocks[..., 0] & 7) + 120
    if name == "nvfp4":
        blocks[..., :4] = (blocks[..., :4] & 0x1F) | 0x20
    return blocks


# --- policies ---


def test_weights_of_sizes_that_no_block_divides_share_a_warning() -> None:
    """Whatever they are called, and however many sizes there are."""
    model = nn.ModuleDict(
        {name: nn.ModuleList([nn.Linear(k, 64) for _ in range(3)]) for name, k in (("q", 96), ("k", 96), ("o", 160))}
    )
    with pytest.warns(PolicyWarning) as told:
        Policy.load("gguf_q6_k").resolve(model)
    texts = [str(warning.message) for warning in told]
    assert texts == [
        "GGUF_Q6_K: q.{0-2} (3x), k.{0-2} (3x), o.{0-2} (3x) stay float32: k must be a multiple of 256, the block of GGUF_Q6_K, "
        "got 96; GGUF_Q8_0, Q5_0, Q4_0 and IQ4_NL have blocks of 32, and alike with other numbers"
    ]


def test_a_row_that_is_no_whole_blocks_stays_with_its_reason(plain_inductor: CompileCounter) -> None:
    model = nn.Sequential(nn.Linear(256, 96), nn.Linear(96, 40)).bfloat16()
    reason = "k must be a multiple of 256, the block of GGUF_Q4_K, got 96; GGUF_Q8_0, Q5_0, Q4_0 and IQ4_NL have blocks of 32"
    with pytest.warns(PolicyWarning, match=f"1 stays bfloat16: {reason}"):
        plan = Policy.load("gguf_q4_k").resolve(model)
    assert [entry.scheme for entry in plan.entries] == ["GGUF_Q4_K", "keep"]
    assert plan.entries[1].decision.refused and plan.entries[1].decision.reason == reason
    x = torch.randn(3, 256).bfloat16()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", PolicyWarning)
        quant_compile.compile(model, policy="GGUF_Q4_K")
        model(x)
    report = quant_compile.report(model)
    assert report.coverage == pytest.approx(256 * 96 / (256 * 96 + 96 * 40))
    assert [line.reason for line in report.lines if line.names == ("1.weight",)] == [reason]


def test_a_strict_policy_refuses_such_a_row() -> None:
    model = nn.Sequential(nn.Linear(96, 40)).bfloat16()
    with pytest.raises(PolicyError, match="k must be a multiple of 256, the block of GGUF_Q6_K, got 96"):
        Policy.load({"default": "GGUF_Q6_K", "strict": True}).resolve(model)
    Policy.load({"default": "GGUF_Q8_0", "strict": True}).resolve(model)


@pytest.mark.parametrize("name", FROM_FILES)
def test_a_type_that_only_files_bring_is_an_error_with_the_fix(name: str, plain_inductor: CompileCounter) -> None:
    model = nn.Sequential(nn.Linear(256, 16)).bfloat16()
    quant_compile.compile(model, policy=name)
    words = f"0.weight cannot be quantized to {name}: there is no quantizer for it here, its blocks come from files.\nFix: use "
    with pytest.raises(WeightError, match=words), torch.no_grad():
        model(torch.randn(2, 256).bfloat16())


# --- siblings ---


class Siblings(nn.Module):
    """Three linears over one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(256, 64), nn.Linear(256, 32), nn.Linear(256, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((self.q(x), self.k(x), self.v(x)), -1)


@pytest.mark.parametrize(("value", "slabs"), [("GGUF_Q4_K", 1), ("GGUF_Q6_K", 2)])
def test_siblings_of_one_type_are_one_product(value: str, slabs: int, plain_inductor: CompileCounter) -> None:
    """The value projection of another type, as mixes have it, is a product of its own."""
    model, x = Siblings(), torch.randn(3, 256)
    policy = Policy.load({"default": "GGUF_Q4_K", "rules": [{"match": "v", "scheme": value}]})
    parts: list[torch.Tensor] = []
    for part, name in ((model.q, "GGUF_Q4_K"), (model.k, "GGUF_Q4_K"), (model.v, value)):
        family, scheme = family_of(parse(name)), parse(name)
        planes = family.quantize_weight(part.weight.detach(), scheme)
        parts.append(family.linear((x,), planes, part.bias.detach(), scheme, torch.float32))
    quant_compile.compile(model, policy=policy)
    with torch.no_grad():
        torch.testing.assert_close(model(x), torch.cat(parts, -1), rtol=1e-5, atol=1e-6)
    packs = [pack.slab for part in (model.q, model.k, model.v) for pack in STORE.entry(part.weight).packs.values()]
    assert len({id(slab) for slab in packs}) == slabs
    quant_compile.release(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), torch.cat(parts, -1), rtol=1e-5, atol=1e-6)
