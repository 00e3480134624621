"""Tiny models of eleven families, unmodified, compiled and compared with an eager model whose linears are quantized by hand.

The reference is a torch function mode that quantizes, multiplies and dequantizes with the scheme's own torch functions for
exactly the weights of linears outside the output head: no graph, no pass, no store, no kernel. (That these functions compute
what the schemes define is tested against tests/textbook.py in tests/lowering/test_schemes.py.) Each family takes another
scheme.

In 16 bits any code that moves by one spreads, through the rounding of everything after it, to an error like that of the
quantization itself: 5-8 % of the logits for FP8 here. So Inductor is asked to round where eager does
(``emulate_precision_casts``). One model in f32, where rounding flips few codes, is compiled with default settings and held
against the textbook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

import quant_compile
from quant_compile.ir.family import family_of
from quant_compile.ir.report import Report
from quant_compile.ir.scheme import PRESETS, Scheme
from quant_compile.policy import Policy
from tests.textbook import SCHEMES as TEXTBOOK
from tests.textbook import Textbook

G32 = {"default": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}}
G64_ASYM = {
    "default": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": False}}
}
CHANNEL = {"default": {"weights": {"num_bits": 4, "type": "int", "strategy": "channel"}}}
TOLERANCE = 2e-2
"""Relative error of the logits."""


@dataclass(frozen=True)
class Case:
    """One family.

    Attributes:
        make: config and model.
        inputs: keyword arguments of a call.
        policy: for the compiled model; its default is the scheme of the reference.
        heads: names of linears that conventions keep.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    policy: Any
    heads: tuple[str, ...] = ("lm_head",)


def tokens() -> dict[str, Tensor]:
    """Two sequences of 9 tokens."""
    return {"input_ids": torch.randint(3, 300, (2, 9))}


def seq2seq() -> dict[str, Tensor]:
    """An encoder's and a decoder's tokens."""
    return {"input_ids": torch.randint(3, 300, (2, 9)), "decoder_input_ids": torch.randint(3, 300, (2, 5))}


def decoder(config: type, model: type, **changes: Any) -> Callable[[], nn.Module]:
    """A decoder of the Llama kind: hidden 96 and 200 inside, so that groups of 64 and tiles of 128 are ragged."""
    sizes = {
        "hidden_size": 96,
        "intermediate_size": 200,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 331,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "use_cache": False,
    }
    return lambda: model(config(**(sizes | changes)))


def encoder_sizes(**changes: Any) -> dict[str, Any]:
    """Sizes in the words that BERT and ViT share."""
    return {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 136} | changes


CASES: Mapping[str, Case] = {
    "llama3": Case(
        decoder(hf.LlamaConfig, hf.LlamaForCausalLM, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
        tokens,
        "FP8_DYNAMIC",
    ),
    "qwen3": Case(decoder(hf.Qwen3Config, hf.Qwen3ForCausalLM, tie_word_embeddings=True), tokens, "W8A8"),
    "mistral": Case(decoder(hf.MistralConfig, hf.MistralForCausalLM, sliding_window=4), tokens, "W8A16"),
    "gemma3": Case(
        decoder(
            hf.Gemma3TextConfig,
            hf.Gemma3ForCausalLM,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        ),
        tokens,
        G32,
    ),
    "phi3": Case(decoder(hf.Phi3Config, hf.Phi3ForCausalLM), tokens, "FP8_BLOCK"),
    "gpt2": Case(
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=68, n_layer=2, n_head=4, n_positions=32, vocab_size=331, use_cache=False)
        ),
        tokens,
        "W8A8",
    ),
    "opt": Case(
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                hidden_size=64,
                word_embed_proj_dim=48,
                ffn_dim=136,
                num_hidden_layers=2,
                num_attention_heads=4,
                vocab_size=331,
                max_position_embeddings=32,
                use_cache=False,
            )
        ),
        tokens,
        "W4A16",
    ),
    "bert": Case(
        lambda: hf.BertForSequenceClassification(
            hf.BertConfig(**encoder_sizes(), vocab_size=331, max_position_embeddings=32, num_labels=5)
        ),
        tokens,
        "FP8_E5M2_DYNAMIC",
        heads=(),
    ),
    "vit": Case(
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(**encoder_sizes(), image_size=24, patch_size=8, num_labels=7)
        ),
        lambda: {"pixel_values": torch.randn(2, 3, 24, 24).bfloat16()},
        "FP8_TENSOR_DYNAMIC",
        heads=(),
    ),
    "whisper": Case(
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(
                d_model=64,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=136,
                decoder_ffn_dim=136,
                vocab_size=331,
                max_source_positions=12,
                max_target_positions=16,
                num_mel_bins=8,
                pad_token_id=0,
                use_cache=False,
            )
        ),
        lambda: {
            "input_features": torch.randn(2, 8, 24).bfloat16(),
            "decoder_input_ids": torch.randint(3, 300, (2, 5)),
        },
        CHANNEL,
        heads=("proj_out",),
    ),
    "t5": Case(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                d_model=64,
                d_kv=16,
                d_ff=136,
                num_layers=1,
                num_heads=4,
                vocab_size=331,
                feed_forward_proj="gated-gelu",
                use_cache=False,
            )
        ),
        seq2seq,
        G64_ASYM,
    ),
}


Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class QuantizedLinears(TorchFunctionMode):
    """Eager linears over the given Parameters are computed by ``linear``; everything else is left alone."""

    def __init__(self, weights: Mapping[int, tuple[str, bool]], linear: Linear) -> None:
        super().__init__()
        self.weights, self.linear, self.seen = weights, linear, set[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = [*args, *(kwargs or {}).values()]
        if func in (F.linear, torch.addmm):
            x, w, bias = (values[1], values[2], values[0]) if func is torch.addmm else (*values, None)[:3]
            if id(w) in self.weights:
                self.seen.add(id(w))
                return self.linear(x, w.t().contiguous() if self.weights[id(w)][1] else w, bias)
        return func(*args, **(kwargs or {}))


def by_scheme(scheme: Scheme) -> Linear:
    """A linear of the scheme's own torch functions."""
    family = family_of(scheme)

    def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        planes = (x,) if scheme.input_activations is None else family.quantize_input(x, scheme, None)
        return family.linear(planes, family.quantize_weight(w, scheme), bias, scheme, x.dtype)

    return linear


def by_textbook(scheme: Textbook) -> Linear:
    """A linear of textbook fake quantization."""

    def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        left = x.float() if scheme.inputs is None else scheme.inputs(x.float(), torch.empty(0))
        y = left @ scheme.weight(w.float(), w.dtype).t()
        return (y if bias is None else y + bias.float()).to(x.dtype)

    return linear


def linear_weights(model: nn.Module, heads: tuple[str, ...]) -> dict[int, tuple[str, bool]]:
    """id -> (name, stored [k, n]) of the weight of every linear that is not an output head."""
    return {
        id(module.weight): (f"{name}.weight", isinstance(module, Conv1D))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name not in heads
    }


def randomize(model: nn.Module) -> nn.Module:
    """Weights that keep activations at order one, and biases that are not zero, so that every linear matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
            elif parameter.eq(0).all():
                parameter.normal_(0.0, 0.1)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Outcome:
    """What one family gave."""

    model: nn.Module
    wanted: dict[int, tuple[str, bool]]
    report: Report
    got: Tensor
    reference: Tensor
    plain: Tensor
    other: Tensor
    seen: int


def outcome_of(case: Case, dtype: torch.dtype, linear: Linear, inductor: dict[str, Any]) -> Outcome:
    """Run a family eagerly as it is, with ``linear``, with another scheme; and compiled."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, inputs = randomize(case.make()).to(dtype), case.inputs()
    wanted = linear_weights(model, case.heads)
    other = "FP8_E5M2_DYNAMIC" if scheme_of(case).weights.num_bits == 4 else "W4A16"
    mode = QuantizedLinears(wanted, linear)
    options = {"policy": case.policy, "inductor": inductor}
    with torch.inference_mode():
        plain = model(**inputs).logits
        with mode:
            reference = model(**inputs).logits
        with QuantizedLinears(wanted, by_scheme(PRESETS[other])):
            different = model(**inputs).logits
        got = torch.compile(model, backend="sglquant", options=options)(**inputs).logits
    return Outcome(model, wanted, quant_compile.report(model), got, reference, plain, different, len(mode.seen))


def scheme_of(case: Case) -> Scheme:
    """The scheme that the policy gives to every linear."""
    scheme = Policy.load(case.policy).default
    assert scheme is not None
    return scheme


# Decoders of two kinds, an encoder, and one with both; the others are much like them.
QUICK = ("llama3", "gpt2", "gemma3", "bert", "whisper")


@pytest.fixture(
    scope="module", params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def outcome(request: pytest.FixtureRequest) -> Iterator[Outcome]:
    """Compile a family once, for all of the tests below."""
    case = CASES[request.param]
    yield outcome_of(case, torch.bfloat16, by_scheme(scheme_of(case)), {"emulate_precision_casts": True})
    torch._dynamo.reset()


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def test_logits_equal_the_eager_quantized_reference(outcome: Outcome) -> None:
    assert outcome.seen == len(outcome.wanted), "the reference did not meet every linear"
    assert outcome.got.dtype == outcome.plain.dtype and outcome.got.shape == outcome.plain.shape
    assert relative_error(outcome.got, outcome.reference) <= TOLERANCE


def test_the_comparison_can_fail(outcome: Outcome) -> None:
    """Another scheme is told apart, and so is no quantization at all where that is not itself within the tolerance."""
    error = relative_error(outcome.got, outcome.reference)
    assert relative_error(outcome.got, outcome.other) > max(TOLERANCE, 2 * error)
    assert relative_error(outcome.got, outcome.plain) > max(2e-3, 1.5 * error)


def test_every_linear_is_quantized(outcome: Outcome) -> None:
    report = outcome.report
    assert report.coverage == 1.0 and not report.skips and not report.misses
    quantized = {name for line in report.lines if line.scheme for name in line.names}
    assert quantized >= {name for name, _ in outcome.wanted.values()}
    assert sum(line.scheme is not None for line in report.lines) == len(outcome.wanted)
    assert all(line.kernels and line.layout for line in report.lines if line.scheme)


def test_bytes_add_up(outcome: Outcome) -> None:
    own = sum(parameter.numel() * parameter.element_size() for parameter in outcome.model.parameters())
    assert outcome.report.bytes_total == own
    kept = sum(line.bytes_before for line in outcome.report.lines if not line.scheme)
    smaller = sum(line.bytes_after for line in outcome.report.lines if line.scheme)
    assert outcome.report.bytes_after == kept + smaller < own


def test_default_settings_give_what_the_textbook_says() -> None:
    """f32, Inductor as it comes, and a reference that shares no code with the product."""
    result = outcome_of(CASES["llama3"], torch.float32, by_textbook(TEXTBOOK["FP8_DYNAMIC"]), {})
    assert relative_error(result.got, result.reference) <= TOLERANCE
    assert relative_error(result.got, result.plain) > 2 * TOLERANCE
    assert result.report.coverage == 1.0
