"""``model.generate``: prefill and decode run quantized, and the tokens are those of the eager quantized reference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import quant_compile
from tests.runtime_support import EXACT, UNMERGED, CompileCounter, plain_inductor, reference_of, store_bytes

__all__ = ["plain_inductor"]

REFERENCE = {"kernels": "reference"}
STEPS = 6


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def llama(tied: bool = False, layers: int = 1, seed: int = 3) -> LlamaForCausalLM:
    """A tiny Llama with sharp enough logits that tokens vary."""
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def prompt(batch: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 96, (batch, length), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def tokens(model: Any, **more: Any) -> torch.Tensor:
    settings = {"max_new_tokens": STEPS, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    return model.generate(**prompt(), **{**settings, **more})


def keep_head(spec: str) -> Any:
    return lambda name: None if name == "lm_head" else spec


@pytest.mark.parametrize("spec", [EXACT, "W4A16"])
def test_tokens_equal_those_of_the_eager_reference(spec: str, plain_inductor: CompileCounter) -> None:
    model = llama(layers=2)
    wanted = tokens(reference_of(model, keep_head(spec)))
    bf16_tokens = tokens(model)
    quant_compile.compile(model, {"default": spec, **UNMERGED}, **REFERENCE)
    assert torch.equal(tokens(model), wanted)
    assert len(plain_inductor) == 2, "one graph for prefill, one for decode"
    assert len(set(wanted[:, 7:].flatten().tolist())) > STEPS // 2, "tokens that are all alike show nothing"
    report = quant_compile.report(model).require(1.0)
    assert {line.scheme for line in report.lines if line.names[0].startswith("model.layers.0.mlp")} == {spec}
    if spec == "W4A16":
        assert not torch.equal(wanted, bf16_tokens), "the scheme is coarse enough to be seen"


def test_prefill_and_decode_share_one_packed_copy(plain_inductor: CompileCounter) -> None:
    model = llama()
    quant_compile.compile(model, EXACT, **REFERENCE)
    model(**prompt())
    held = store_bytes(model)
    tokens(model)
    assert store_bytes(model) == held
    linears = [p for name, p in model.named_parameters() if name.endswith("proj.weight")]
    assert held == sum(p.numel() + 4 * p.shape[0] for p in linears)


def test_generate_after_release_runs_prefill_and_decode_on_planes(plain_inductor: CompileCounter) -> None:
    """transformers' own automatic compilation would run prefill eagerly, on weights that are gone."""
    model = llama()
    wanted = tokens(reference_of(model, keep_head(EXACT)))
    quant_compile.compile(model, EXACT, release_weights=True, **REFERENCE)
    assert model.generation_config.disable_compile
    for _ in range(2):
        assert torch.equal(tokens(model, disable_compile=None), wanted)
    assert all(line.released for line in quant_compile.report(model).lines if line.scheme)
    assert torch.equal(tokens(model, cache_implementation=None), wanted)


def test_tied_head_in_generate(plain_inductor: CompileCounter) -> None:
    model = llama(tied=True)
    policy = {"default": EXACT, "rules": [{"match": "lm_head", "scheme": EXACT}]}
    wanted = tokens(reference_of(model, EXACT))
    quant_compile.compile(model, policy, release_weights=True, **REFERENCE)
    assert torch.equal(tokens(model), wanted)
    line = quant_compile.report(model).lines[0]
    assert set(line.names) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert line.scheme == EXACT and not line.released and "tied embedding" in line.reason


def test_torch_compile_of_a_model_is_bypassed_by_generate_but_model_compile_is_not(
    plain_inductor: CompileCounter,
) -> None:
    """States a limit of torch: ``torch.compile(model).generate`` never calls the compiled forward. ``compile`` does."""
    model = llama()
    wrapped = torch.compile(model, backend="sglquant", options={"policy": EXACT, **REFERENCE})
    tokens(wrapped)
    assert len(plain_inductor) == 0
    model.compile(backend="sglquant", options={"policy": EXACT, **REFERENCE})
    assert torch.equal(tokens(model), tokens(reference_of(llama(), keep_head(EXACT))))
    assert len(plain_inductor) == 2


def test_assistant_and_main_model_share_code_and_stay_apart(plain_inductor: CompileCounter) -> None:
    main, helper = llama(), llama(seed=4)
    reference = tokens(reference_of(main, keep_head(EXACT)), cache_implementation=None)
    quant_compile.compile(main, EXACT, **REFERENCE)
    quant_compile.compile(helper, "w4a16", **REFERENCE)
    inputs = {key: value[:1] for key, value in prompt().items()}
    found = main.generate(**inputs, max_new_tokens=STEPS, do_sample=False, assistant_model=helper, disable_compile=True)
    assert torch.equal(found[0], reference[0]), "greedy assisted decoding gives the main model's own tokens"
    assert {line.scheme for line in quant_compile.report(main).lines} == {EXACT, None}
    assert {line.scheme for line in quant_compile.report(helper).lines} == {"W4A16", None}
    assert quant_compile.report(main).coverage == quant_compile.report(helper).coverage == 1.0


def test_layers_differ_by_policy_in_generate(plain_inductor: CompileCounter) -> None:
    model = llama(layers=2)
    policy = {"default": EXACT, "rules": [{"match": "model.layers.0.*", "scheme": "keep"}]}
    wanted = tokens(reference_of(model, lambda n: EXACT if n.startswith("model.layers.1") else None))
    quant_compile.compile(model, policy, **REFERENCE)
    assert torch.equal(tokens(model), wanted)


def test_hf_compile_config_copies_options(plain_inductor: CompileCounter) -> None:
    """transformers deep-copies the options of its CompileConfig; a Policy object must survive that and compare equal."""
    options = {"policy": quant_compile.Policy.load({"default": EXACT}), **REFERENCE}
    assert copy.deepcopy(options) == options
    assert copy.deepcopy(options)["policy"].content_hash == options["policy"].content_hash


def test_generate_with_inductor() -> None:
    model = llama()
    wanted = tokens(reference_of(model, keep_head("W8A16")), max_new_tokens=4)
    quant_compile.compile(model, "w8a16", **REFERENCE)
    assert torch.equal(tokens(model, max_new_tokens=4), wanted)
    assert quant_compile.report(model).coverage == 1.0
