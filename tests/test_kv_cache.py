"""A quantized KV cache: found in graphs, the same tokens as its eager self, half the bytes, and whole after all that caches go through."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import transformers as hf

import quant_compile
from quant_compile.generation import quantized
from quant_compile.generation.caches import PLAIN
from quant_compile.generation.quantized import Quantized, types
from quant_compile.ir.errors import OptionError, PolicyError
from quant_compile.ir.kv import BITS, NAMES, CacheScheme, decode, encode, parse_cache
from quant_compile.policy import Policy
from tests.attention_support import DECODERS, Seen, compiled, generated, seeded
from tests.generation.support import (
    TapeRecorder,
    llama,
    loop_of,
    prompt,
    recorder,
    recorder_of_prompts,
    tokens,
)
from tests.generation.support import compiled as compiled_reference
from tests.generation.support import reference as eager_reference
from tests.runtime_support import plain_inductor

__all__ = ["plain_inductor", "recorder", "recorder_of_prompts"]

CLOSE = 1e-4  # the order of sums in f32
SCHEMES = ("FP8", "FP8_E5M2", "INT8")


def cache_of(model: Any, scheme: str = "FP8", length: int = 24, **more: Any) -> Any:
    return quant_compile.QuantizedStaticCache(model.config.get_text_config(decoder=True), length, scheme, **more)


def made(model: Any, scheme: str = "FP8", **more: Any) -> Any:
    """An empty cache whose tensors exist."""
    cache = cache_of(model, scheme, **more)
    with torch.no_grad():
        ids = torch.ones(2, 2, dtype=torch.long, device=model.device)
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    cache.reset()
    return cache


def each(*quick: Any, of: Iterable[Any]) -> list[Any]:
    """All of them; those that are not named are slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in of]


# --- numbers ---


@pytest.mark.parametrize("name", NAMES)
def test_a_code_is_the_nearest(name: str) -> None:
    """No other code is nearer to a value than its own; a second quantization changes nothing."""
    scheme = parse_cache(name)
    x = torch.randn(2, 3, 5, 16) * torch.logspace(-6, 4, 5)[:, None]
    fixed = {
        "token": None,
        "head": torch.tensor([0.1, 1.0, 9.0]).reshape(1, 3, 1, 1),
        "tensor": torch.full((1, 1, 1, 1), 0.5),
    }
    codes, scale = encode(x, scheme, fixed[scheme.scale])
    assert codes.dtype == scheme.stored
    values = decode(codes, scale, scheme.format, torch.float32)
    all_codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(scheme.codes).float()
    all_codes = all_codes[all_codes.isfinite() & (all_codes.abs() <= scheme.largest)]
    nearest = (x[..., None] - all_codes * scale[..., None]).abs().amin(-1)
    assert torch.allclose((x - values).abs(), nearest, rtol=1e-5, atol=1e-12)
    again, _ = encode(values, scheme, scale)
    assert torch.equal(again, codes)


def test_e4m3_by_bits_is_e4m3() -> None:
    """Every byte, every rounding: all f16 values, their neighbours in f32, ties, and random words; NaN and inf as well."""
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    words = torch.randint(-(1 << 31), 1 << 31, (1 << 18,), generator=torch.Generator().manual_seed(0)).int()
    steps = [halves.view(torch.int32) + i for i in (-1, 1)]
    x = torch.cat((halves, *(step.int().view(torch.float32) for step in steps), words.view(torch.float32)))[
        None, None, :, None
    ]
    scheme, one = parse_cache("FP8_TENSOR"), torch.ones(1, 1, 1, 1)
    wanted, _ = encode(x, scheme, one)
    found, _ = encode(x, scheme, one, by_bits=True)
    same = (found == wanted) | (x.isnan() & (found & 0x7F == 0x7F))
    assert same.all(), x[~same][:5]
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    values, truth = decode(codes, one, BITS, torch.float32), decode(codes, one, "e4m3", torch.float32)
    assert torch.equal(values.nan_to_num(7.5), truth.nan_to_num(7.5))


@pytest.mark.slow
def test_a_gpu_without_e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an A100 would run: the same tokens."""
    model, inputs = seeded(DECODERS["llama3"]), prompt(2, 7)
    wanted = tokens(model, inputs, past_key_values=cache_of(model))
    monkeypatch.setattr(quantized, "_lacks_e4m3", lambda device: True)
    quant_compile.compile(model, {"default": "keep", "kv_cache": "FP8"})
    assert torch.equal(tokens(model, inputs), wanted)


@pytest.mark.parametrize("name", SCHEMES)
def test_odd_numbers(name: str) -> None:
    """Zeros stay zeros; a row with a NaN or an inf is NaN, and no other row."""
    x = torch.randn(1, 1, 4, 8)
    x[0, 0, 0], x[0, 0, 1, 2], x[0, 0, 2, 3] = 0.0, float("nan"), float("inf")
    scheme = parse_cache(name)
    codes, scale = encode(x, scheme)
    values = decode(codes, scale, scheme.format, torch.float32)
    assert not values[0, 0, 0].any() and values[0, 0, 1].isnan().all() and values[0, 0, 2].isnan().any()
    assert values[0, 0, 3].isfinite().all()


# --- models ---


@pytest.mark.parametrize("family", each("llama3", "gemma2", "gpt_oss", "deepseek_v3", of=DECODERS))
def test_attention_reads_codes(family: str) -> None:
    """In prefill and decode, with padding: every site is over codes, and computes what the eager cache does."""
    model = seeded(DECODERS[family])
    wanted = generated(model, model, made(model), True)
    seen = Seen()
    got = generated(model, compiled(model, seen), made(model), True)
    assert set(seen.sites) == {2} and seen.misses == []
    mla = family == "deepseek_v3"  # its keys and values are computed from the cache
    assert all((site.codes == "") == mla for site in seen.found)
    for a, b in zip(got, wanted, strict=True):
        assert float((a - b).norm() / b.norm()) < CLOSE


@pytest.mark.parametrize(
    "family", each("llama3", "gpt_oss", "deepseek_v3", of=[f for f in DECODERS if "eager" not in f])
)
def test_compiled_generate_is_the_eager_cache(family: str) -> None:
    """Token for token, left-padded, past the windows; and it says what it does."""
    model, inputs = seeded(DECODERS[family]), prompt(2, 7, padded=True)
    wanted = tokens(model, inputs, past_key_values=cache_of(model, length=40), max_new_tokens=20)
    quant_compile.compile(model, {"default": "keep", "kv_cache": "FP8"})
    assert torch.equal(tokens(model, inputs, max_new_tokens=20), wanted)
    assert torch.equal(tokens(model, inputs, max_new_tokens=20), wanted)
    assert "KV cache of generate: FP8 in 2 of 2 layers" in quant_compile.report(model).notes
    assert quant_compile.uncompile(model) is model


def whisper_or_t5(name: str) -> tuple[Any, dict[str, Any]]:
    from tests.test_attention import SOUND, t5, whisper

    if name == "whisper":
        return seeded(whisper), SOUND
    return seeded(t5), prompt(2, 7, padded=True)


@pytest.mark.parametrize("name", [pytest.param("t5", marks=pytest.mark.slow), "whisper"])
def test_encoder_decoders_keep_their_own_tokens_in_codes(name: str) -> None:
    """What the encoder gave is written once and stays in 16 bits."""
    model, inputs = whisper_or_t5(name)
    cross = hf.StaticCache(config=model.config, max_cache_len=20 if name == "whisper" else 7)
    cache = hf.EncoderDecoderCache(cache_of(model, length=20), cross)
    wanted = tokens(model, inputs, past_key_values=cache)
    quant_compile.compile(model, {"default": "keep", "kv_cache": "FP8"})
    assert torch.equal(tokens(model, inputs), wanted)
    assert any(note.startswith("KV cache of generate: FP8 in 2 of 2") for note in quant_compile.report(model).notes)


def test_rules_name_layers() -> None:
    model, inputs = seeded(DECODERS["llama3"]), prompt(2, 7)
    policy = {"default": "keep", "kv_cache": {"scheme": "INT8", "rules": [{"match": r"re:.*\.0", "scheme": "keep"}]}}
    quant_compile.compile(model, policy)
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert "KV cache of generate: 16 bits in 1 of 2 layers, INT8 in 1 of 2 layers" in quant_compile.report(model).notes
    assert not any(isinstance(layer, Quantized) for layer in out.past_key_values.layers)
    assert out.past_key_values.layers[0].keys.dtype == torch.float32


@pytest.mark.slow
def test_beams_sampling_and_a_conversation() -> None:
    model, inputs = seeded(DECODERS["llama3"]), prompt(2, 7, padded=True)
    calls: list[dict[str, Any]] = [{"num_beams": 3}, {"do_sample": True, "top_k": 5}]
    wanted = []
    for more in calls:
        torch.manual_seed(1)
        rows = 2 * more.get("num_beams", 1)
        cache = cache_of(model, length=40)
        cache.early_initialization(rows, 2, 16, torch.float32, torch.device("cpu"))
        wanted.append(tokens(model, inputs, past_key_values=cache, **more))
    quant_compile.compile(model, {"default": "keep", "kv_cache": "FP8"})
    for more, tokens_wanted in zip(calls, wanted, strict=True):
        torch.manual_seed(1)
        assert torch.equal(tokens(model, inputs, **more), tokens_wanted)
    # The cache that a call returns holds values: the next one goes on with it.
    one = prompt(1, 7)
    first = model.generate(**one, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat((first.sequences, torch.tensor([[5, 6, 7]])), 1)
    after = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    longer = tokens(model, after, past_key_values=first.past_key_values)
    assert longer.shape[1] == ids.shape[1] + 8


@pytest.mark.slow
def test_a_cache_by_hand_under_a_compiled_model() -> None:
    model, inputs = seeded(DECODERS["llama3"]), prompt(2, 7)
    wanted = tokens(model, inputs, past_key_values=cache_of(model, "INT8"))
    quant_compile.compile(model, {"default": "keep"})
    assert torch.equal(tokens(model, inputs, past_key_values=cache_of(model, "INT8")), wanted)


@pytest.mark.parametrize("name", SCHEMES)
def test_bytes(name: str) -> None:
    """At most 0.53 of a cache in 16 bits, for heads of 128; codes lie in rows of their own."""
    config = hf.LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=512)
    sizes = []
    for cache in (hf.StaticCache(config=config, max_cache_len=64), types().cache(config, 64, name)):
        cache.early_initialization(2, 2, 128, torch.bfloat16, torch.device("cpu"))
        planes = [plane for layer in cache.layers for plane in (layer.keys, layer.values)]
        scales = [
            plane
            for layer in cache.layers
            if layer.__class__ is types().static
            for plane in (layer.key_scale, layer.value_scale)
        ]
        assert all(plane.stride(2) % 16 == 0 for plane in planes)
        sizes.append(sum(plane.nbytes for plane in (*planes, *scales)))
    assert sizes[1] <= 0.53 * sizes[0]


# --- what caches go through ---


def filled(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]


@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_chunks_reset_and_reorder(family: str) -> None:
    """A prompt in pieces, longer than the window, is one in a whole; a reset cache is a new one; rows change places with their scales."""
    model, ids = seeded(DECODERS[family]), torch.randint(2, 90, (2, 11), generator=torch.Generator().manual_seed(1))
    whole = filled(model, ids, cache_of(model))
    cache = cache_of(model)
    for piece in ids.split(3, 1):
        last = filled(model, piece, cache)
    assert torch.allclose(last, whole, atol=1e-4)
    cache.reset()
    filled(model, ids[:, :5], cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    swapped = filled(model, ids[1:, 5:].expand(2, -1), cache)
    assert torch.allclose(swapped[0], swapped[1]) and torch.allclose(swapped[0], whole[1], atol=1e-4)


def test_crop() -> None:
    model, ids = seeded(DECODERS["llama3"]), torch.randint(2, 90, (2, 11), generator=torch.Generator().manual_seed(1))
    cache = cache_of(model)
    if not hasattr(hf.cache_utils.StaticLayer, "crop"):
        pytest.skip("this transformers crops no static cache")
    whole = filled(model, ids, cache)
    cache.crop(-4)
    assert torch.allclose(filled(model, ids[:, 7:], cache), whole, atol=1e-4)


def test_what_does_not_fit_is_an_error_and_changes_nothing() -> None:
    model, ids = seeded(DECODERS["llama3"]), torch.randint(2, 90, (2, 5))
    cache = cache_of(model)
    filled(model, ids, cache)
    before = [plane.clone() for layer in cache.layers for plane in (layer.keys, layer.values, layer.cumulative_length)]
    with pytest.raises(ValueError, match="a cache serves the model and the batch that it was made for"):
        filled(model, torch.ones(3, 1, dtype=torch.long), cache)
    after = [plane for layer in cache.layers for plane in (layer.keys, layer.values, layer.cumulative_length)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    with pytest.raises(OptionError, match="FP8_HEAD has fixed scales, and none are given for layer 0"):
        cache_of(model, "FP8_HEAD")
    with pytest.raises(quant_compile.SchemeError, match="unknown scheme of the KV cache 'FP7'"):
        cache_of(model, "FP7")
    for name, count in (("FP8_HEAD", 3), ("FP8_HEAD", 16), ("INT8_TENSOR", 2)):
        unfit = cache_of(model, name, scales=[(torch.ones(count), torch.ones(count))] * 2)
        for _ in range(3):  # nothing has been set up by the first
            with pytest.raises(OptionError, match=f"{name} has . scales .*, and {count} are given"):
                filled(model, ids, unfit)


def test_a_full_cache_stays_as_it_was() -> None:
    model, ids = seeded(DECODERS["llama3"]), torch.randint(2, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    cache = cache_of(model, length=8)
    filled(model, ids, cache)
    with pytest.raises(ValueError, match="holds 7 of 8 tokens, and 3 more do not fit"):
        filled(model, ids[:, :3], cache)
    assert [int(layer.cumulative_length) for layer in cache.layers] == [7, 7]
    whole = filled(model, torch.cat((ids, ids[:, :1]), 1), cache_of(model))
    assert torch.allclose(filled(model, ids[:, :1], cache), whole, atol=1e-4)


def test_fixed_scales() -> None:
    """Of each head and of all: what does not fit is cut off, and nothing else is written."""
    model, ids = seeded(DECODERS["llama3"]), torch.randint(2, 90, (2, 5))
    for name, scale in (("INT8_HEAD", torch.tensor([0.5, 0.25])), ("FP8_TENSOR", torch.tensor(0.01))):
        cache = cache_of(model, name, scales=[(scale, scale)] * 2)
        assert filled(model, ids, cache).isfinite().all()
        layer = cache.layers[0]
        assert layer.key_scale.numel() == scale.numel()
        keys, _ = layer.held()
        assert float(keys.abs().max()) <= float(scale.max()) * layer.scheme.largest * (1 + 1e-6)


def test_calibrating_a_decoder_leaves_its_encoders_states_alone(tmp_path: Any) -> None:
    from safetensors.torch import load_file

    from tests.test_attention import t5

    model = seeded(t5)
    batch = {**prompt(2, 7), "decoder_input_ids": torch.tensor([[0, 5, 6], [0, 9, 8]])}
    quant_compile.calibrate(
        model, [batch], {"default": "keep", "kv_cache": "INT8_HEAD"}, path=tmp_path / "s", progress=False
    )
    cache = hf.EncoderDecoderCache(hf.DynamicCache(config=model.config), hf.DynamicCache())
    with torch.no_grad():
        model(**batch, past_key_values=cache, use_cache=True)
    scales = load_file(str(tmp_path / "s"))
    assert len(scales) == 4
    for i, layer in enumerate(cache.self_attention_cache.layers):
        for side, plane in (("k", layer.keys), ("v", layer.values)):
            found = next(value for key, value in scales.items() if key.endswith(f".{i}.{side}_scale"))
            torch.testing.assert_close(found, plane.abs().amax((0, 2, 3)) / 127)


# --- policies ---


def test_policies() -> None:
    policy = Policy.load(
        {"default": "keep", "kv_cache": {"scheme": "FP8", "rules": [{"match": "layers.0", "scheme": "keep"}]}}
    )
    assert policy.kv_cache is not None and policy.kv_cache.of("model.layers.0") is None
    assert policy.kv_cache.of("model.layers.10") == CacheScheme()
    assert Policy.load(policy.to_dict()) == policy
    plain = Policy.load({"default": "keep", "kv_cache": "int8_head"})
    assert Policy.load(plain.to_dict()) == plain and plain.to_dict()["kv_cache"] == "INT8_HEAD"
    hashes = {Policy.load({"default": "keep", "kv_cache": name}).content_hash for name in (*NAMES, "keep")}
    assert len(hashes) == len(NAMES) + 1


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("FP6", "unknown scheme of the KV cache 'FP6'"),
        (8, "keep or one of FP8"),
        ({"rules": []}, "kv_cache needs a scheme"),
        ({"scheme": "FP8", "rules": {}}, None),
        ({"scheme": "FP8", "rules": "x"}, "rules must be a list"),
        ({"scheme": "FP8", "rules": [{"match": "x"}]}, "needs scheme"),
        ({"scheme": "FP8", "rules": [{"match": "re:(", "scheme": "keep"}]}, "not a regular expression"),
        ({"scheme": "FP8", "rule": []}, "Did you mean rules"),
    ],
)
def test_bad_policies(given: Any, reason: str | None) -> None:
    if reason is None:
        assert Policy.load({"default": "keep", "kv_cache": given}).kv_cache is not None
        return
    with pytest.raises(PolicyError, match=reason):
        Policy.load({"default": "keep", "kv_cache": given})


def test_the_option_wins() -> None:
    model = seeded(DECODERS["llama3"])
    quant_compile.compile(model, {"default": "keep", "kv_cache": "FP8"}, kv_cache="keep")
    assert loop_of(model).kept == PLAIN
    quant_compile.compile(model, {"default": "keep"}, kv_cache="int8")
    assert loop_of(model).kept.text == "INT8 in 2 of 2 layers"
    with pytest.raises(OptionError, match="kv_cache must be one of keep, FP8"):
        quant_compile.compile(model, {"default": "keep"}, kv_cache="FP9")


@pytest.mark.parametrize("name", each("INT8_HEAD", of=("FP8_TENSOR", "INT8_HEAD")))
def test_calibrated(name: str, tmp_path: Any) -> None:
    """calibrate measures K and V; the file's scales serve a compiled model, and are those of the largest values."""
    model, inputs = seeded(DECODERS["llama3"]), prompt(2, 7)
    policy = quant_compile.calibrate(
        model, [inputs], {"default": "keep", "kv_cache": name}, path=tmp_path / "scales.safetensors", progress=False
    )
    cache = hf.DynamicCache(config=model.config)
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
    other = "INT8_TENSOR" if name.startswith("FP8") else "FP8_HEAD"
    with pytest.raises(quant_compile.MissingScalesError, match=f"are of {name}, and the policy says {other}"):
        quant_compile.compile(model, policy, kv_cache=other)
    scheme = parse_cache(name)
    wanted = []
    for layer in cache.layers:
        pair = [
            x.abs().amax((0, 2, 3)) if name.endswith("HEAD") else x.abs().amax().reshape(1)
            for x in (layer.keys, layer.values)
        ]
        wanted.append(tuple(amax / scheme.largest for amax in pair))
    eager = tokens(model, inputs, past_key_values=cache_of(model, name, scales=wanted))
    quant_compile.compile(model, policy)
    assert torch.equal(tokens(model, inputs), eager)
    assert f"KV cache of generate: {name} in 2 of 2 layers" in quant_compile.report(model).notes
    with pytest.raises(
        quant_compile.MissingScalesError, match=f"model.layers.0 as {name}, whose scales are fixed, and has none"
    ):
        quant_compile.compile(model, {"default": "keep", "kv_cache": name})
    assert torch.equal(tokens(model, inputs), eager)  # still compiled as before


# --- recorded ---


@pytest.mark.parametrize("blocks", each(True, of=[True, False]))
def test_recorded_prompts_and_steps(blocks: bool, recorder_of_prompts: TapeRecorder) -> None:
    """Replayed at the same addresses, over codes and scales that are emptied in between, and in a larger block."""
    model = llama(num_hidden_layers=3)
    eager = eager_reference(model)
    compiled_reference(model, kv_cache="INT8", blocks=blocks)
    for seed in (5, 6, 7, 5):
        inputs = prompt(2, 7, seed, padded=seed == 7)
        cache = cache_of(eager, "INT8", 48)
        assert torch.equal(tokens(model, inputs), tokens(eager, inputs, past_key_values=cache)), seed
    assert recorder_of_prompts.recorded > 1
    long = {"max_new_tokens": 300}
    cache = cache_of(eager, "INT8", 320)
    assert torch.equal(tokens(model, prompt(2, 7), **long), tokens(eager, prompt(2, 7), past_key_values=cache, **long))


# --- said ---


def test_a_rule_that_names_no_layer_is_said() -> None:
    model = seeded(DECODERS["llama3"])
    policy = {"default": "keep", "kv_cache": {"scheme": "keep", "rules": [{"match": "model.layer.0", "scheme": "FP8"}]}}
    with pytest.warns(
        quant_compile.ir.errors.PolicyWarning, match="no layer is named by the rule with match 'model.layer.0'"
    ):
        quant_compile.compile(model, policy)
    assert any("model.layer.0" in note for note in quant_compile.report(model).notes)
    with pytest.raises(PolicyError, match="no layer is named"):
        quant_compile.compile(model, {**policy, "strict": True})


def test_notes_are_those_of_the_last_compile(plain_inductor: Any) -> None:
    model = seeded(DECODERS["llama3"])
    for name in ("INT8", "FP8", "keep"):
        quant_compile.compile(model, {"default": "keep"}, kv_cache=name)
        tokens(model, prompt(1, 5), max_new_tokens=2)
        kept = [note for note in quant_compile.report(model).notes if note.startswith("KV cache of")]
        assert kept == ([] if name == "keep" else [f"KV cache of generate: {name} in 2 of 2 layers"])
        quant_compile.uncompile(model)


def test_a_policy_takes_a_name() -> None:
    policy = Policy(default=None, kv_cache="int8")  # pyright: ignore[reportArgumentType]
    assert policy == Policy.load({"default": "keep", "kv_cache": "INT8"})
