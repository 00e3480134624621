"""The loops that people run, each with the tokens of the eager quantized reference."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    TextIteratorStreamer,
    set_seed,
)

import quant_compile
from quant_compile.generation import facts
from tests.generation.support import (
    NEW,
    POLICY,
    REFERENCE,
    SIZES,
    TapeRecorder,
    compiled,
    llama,
    loop_of,
    prompt,
    recorder,
    reference,
    seeded,
    tokens,
)
from tests.runtime_support import CompileCounter, plain_inductor

__all__ = ["plain_inductor", "recorder"]


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("rows", [1, 8, 32])
@pytest.mark.parametrize("padded", [False, True])
def test_rows_and_padding(rows: int, padded: bool, recorder: TapeRecorder) -> None:
    if rows == 1 and padded:
        pytest.skip("one row has no padding")
    model = llama()
    wanted = tokens(reference(model), prompt(rows, padded=padded))
    compiled(model)
    for _ in range(2):
        assert torch.equal(tokens(model, prompt(rows, padded=padded)), wanted)
    assert recorder.recorded == 1


def test_sampling_with_a_seed(recorder: TapeRecorder) -> None:
    model = llama()
    more = {"do_sample": True, "top_k": 5, "temperature": 1.5}
    eager = reference(model)
    set_seed(7)
    wanted = tokens(eager, prompt(), **more)
    set_seed(8)
    other = tokens(eager, prompt(), **more)
    compiled(model)
    for seed, result in ((7, wanted), (8, other)):
        set_seed(seed)
        assert torch.equal(tokens(model, prompt(), **more), result)
    assert not torch.equal(wanted, other)


@pytest.mark.parametrize(
    "more", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"num_beams": 2, "do_sample": True}]
)
def test_beams(more: dict[str, Any], recorder: TapeRecorder) -> None:
    """Beams take over each other's rows of the cache, in place."""
    model = llama()
    set_seed(3)
    wanted = tokens(reference(model), prompt(2, padded=True), **more)
    compiled(model)
    for _ in range(2):
        set_seed(3)
        assert torch.equal(tokens(model, prompt(2, padded=True), **more), wanted)
    assert recorder.recorded == 1


def test_several_answers_to_one_prompt(recorder: TapeRecorder) -> None:
    model = llama()
    more = {"do_sample": True, "num_return_sequences": 3}
    set_seed(3)
    wanted = tokens(reference(model), prompt(), **more)
    compiled(model)
    set_seed(3)
    assert torch.equal(tokens(model, prompt(), **more), wanted)


def test_prompt_of_one_token_and_answer_of_one(recorder: TapeRecorder) -> None:
    model = llama()
    eager = reference(model)
    short, one = prompt(2, 1), tokens(eager, prompt(), max_new_tokens=1)
    wanted = tokens(eager, short)
    compiled(model)
    assert torch.equal(tokens(model, short), wanted)
    assert torch.equal(tokens(model, prompt(), max_new_tokens=1), one)
    assert torch.equal(tokens(model, prompt(), max_length=10), tokens(eager, prompt(), max_length=10))


def test_embeddings_as_a_prompt(recorder: TapeRecorder) -> None:
    model = llama()
    embeds = model.get_input_embeddings()(prompt()["input_ids"])
    eager = reference(model)
    wanted = eager.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False)
    compiled(model)
    for _ in range(2):
        assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False), wanted)


def test_assisted_decoding_with_another_policy(plain_inductor: CompileCounter) -> None:
    main, helper = llama(), llama(seed=4)
    wanted = tokens(reference(main), prompt(1))
    compiled(main)
    quant_compile.compile(helper, "w4a16", **REFERENCE)
    assert torch.equal(tokens(main, prompt(1), assistant_model=helper), wanted)
    assert {line.scheme for line in quant_compile.report(main).lines} == {"W8A16", None}
    assert {line.scheme for line in quant_compile.report(helper).lines} == {"W4A16", None}
    notes = quant_compile.report(main).notes
    assert any("assisted_generation" in note for note in notes)


class Words:
    """Stands for a tokenizer: a token is a word."""

    def decode(self, ids: Any, **more: Any) -> str:
        return "".join(f"{int(i)} " for i in ids)


def test_streaming_from_a_thread(recorder: TapeRecorder) -> None:
    model = llama()
    wanted = tokens(reference(model), prompt(1))
    compiled(model)
    for _ in range(2):
        streamer = TextIteratorStreamer(Words(), skip_prompt=True, timeout=120)
        more = {"streamer": streamer, "max_new_tokens": NEW, "do_sample": False}
        thread = threading.Thread(target=model.generate, kwargs={**prompt(1), **more})
        thread.start()
        text = "".join(streamer)
        thread.join()
        assert text.split() == [str(int(i)) for i in wanted[0, 7:]]
    assert recorder.recorded == 1


def test_two_threads_have_a_cache_each(recorder: TapeRecorder) -> None:
    model = llama()
    prompts = [prompt(1, 9, seed=seed) for seed in range(4)]
    eager = reference(model)
    wanted = [tokens(eager, inputs) for inputs in prompts]
    compiled(model)
    tokens(model, prompts[0])
    found: dict[int, torch.Tensor] = {}
    both = threading.Barrier(2, timeout=120)

    def wait(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] < 9 + NEW - 1:
            both.wait()
        return scores

    def run(numbers: tuple[int, ...]) -> None:
        for number in numbers:
            found[number] = tokens(model, prompts[number], logits_processor=[wait])

    threads = [threading.Thread(target=run, args=(numbers,)) for numbers in ((0, 1), (2, 3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, result in enumerate(wanted):
        assert torch.equal(found[number], result), number
    assert len(loop_of(model).pool) == 2


def test_chat_compiles_nothing_after_the_second_turn(recorder: TapeRecorder, plain_inductor: CompileCounter) -> None:
    model = llama()
    eager = reference(model)
    ids = prompt(1)["input_ids"]
    counts: list[int] = []
    compiled(model)
    for turn in range(6):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        answer = tokens(model, inputs)
        assert torch.equal(answer, tokens(eager, inputs)), turn
        counts.append(len(plain_inductor))
        ids = torch.cat((answer, prompt(1, 9 + 6 * turn, seed=turn)["input_ids"]), 1)
    assert ids.shape[1] > 128, "several lengths of the cache"
    assert counts[0] == counts[-1] == 2


@pytest.mark.parametrize("length", [7, 20])
@pytest.mark.parametrize("padded", [False, True])
def test_a_sliding_window_that_fills_up(length: int, padded: bool, recorder: TapeRecorder) -> None:
    """Gemma 3: half of the layers keep a window of 12 tokens; a prompt shorter than that, and a longer one."""
    config = {**SIZES, "num_hidden_layers": 2, "head_dim": 8, "sliding_window": 12}
    kinds = ["sliding_attention", "full_attention"]
    model = seeded(lambda: Gemma3ForCausalLM(Gemma3TextConfig(**config, layer_types=kinds)))
    wanted = tokens(reference(model), prompt(2, length, padded=padded), max_new_tokens=12)
    compiled(model)
    for _ in range(2):
        assert torch.equal(tokens(model, prompt(2, length, padded=padded), max_new_tokens=12), wanted)
    assert recorder.recorded == (2 if length == 7 else 1), "one while the window fills up, one when it is full"


def test_windows_everywhere(recorder: TapeRecorder) -> None:
    model = seeded(lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=12)))
    wanted = tokens(reference(model), prompt(2, padded=True), max_new_tokens=12)
    compiled(model)
    for _ in range(2):
        assert torch.equal(tokens(model, prompt(2, padded=True), max_new_tokens=12), wanted)
    assert recorder.recorded == 2


def test_what_the_user_passes_wins(plain_inductor: CompileCounter) -> None:
    model = llama()
    eager = reference(model)
    wanted = tokens(eager, prompt())
    compiled(model)
    name = loop_of(model).step.names.cache
    for more in (
        {name: DynamicCache(config=model.config)},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"disable_compile": True},
        {"use_cache": False},
    ):
        assert torch.equal(tokens(model, prompt(), **more), wanted), more
    assert len(loop_of(model).pool) == 0, "no cache of ours was made"
    assert not any("own way" in note for note in quant_compile.report(model).notes), "that is no news to the user"


def test_linear_attention_goes_transformers_own_way(plain_inductor: CompileCounter) -> None:
    """A hybrid of convolutions and attention: its states cannot be made before the first call."""
    config = Lfm2Config(
        **{**SIZES, "num_hidden_layers": 2}, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
    )
    model = seeded(lambda: Lfm2ForCausalLM(config))
    wanted = tokens(reference(model), prompt())
    compiled(model)
    for _ in range(2):
        assert torch.equal(tokens(model, prompt()), wanted)
    assert any("own way" in note and "before the first call" in note for note in quant_compile.report(model).notes)


@pytest.mark.parametrize("given", [None, (2, 16)])
def test_heads_that_transformers_does_not_know_are_looked_up(given: Any, plain_inductor: CompileCounter) -> None:
    """In a model of the class without weights; where that does not tell, the call goes transformers' own way."""
    model = llama()
    wanted = tokens(reference(model), prompt())
    compiled(model)
    model._get_static_cache_init_shape = lambda: given
    assert torch.equal(tokens(model, prompt()), wanted)
    assert not any("own way" in note for note in quant_compile.report(model).notes)


def test_heads_that_nobody_knows_go_transformers_own_way(
    plain_inductor: CompileCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    sought: list[Any] = []
    monkeypatch.setattr(facts, "_seen_shape", sought.append)
    model = llama()
    wanted = tokens(reference(model), prompt())
    compiled(model)
    model._get_static_cache_init_shape = lambda: (2, 16)
    for _ in range(2):
        assert torch.equal(tokens(model, prompt()), wanted)
    assert len(sought) == 1, "a look at a small model, once"
    assert any("own way" in note for note in quant_compile.report(model).notes)


def test_a_returned_cache_is_the_users(recorder: TapeRecorder) -> None:
    """It grows, as transformers' own, and no later call writes into it."""
    model = llama()
    eager = reference(model)
    name = (
        "cache"
        if "cache" in eager.generate(**prompt(), max_new_tokens=1, return_dict_in_generate=True)
        else "past_key_values"
    )
    compiled(model)
    first = tokens(model, prompt(), return_dict_in_generate=True)
    cache = first[name]
    assert isinstance(cache, DynamicCache) and cache.get_seq_length() == 7 + NEW - 1
    before = [layer.keys.clone() for layer in cache.layers]
    tokens(model, prompt(seed=6))
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
    longer = torch.cat((first.sequences, prompt(2, 3, seed=8)["input_ids"]), 1)
    inputs = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    assert torch.equal(tokens(model, inputs, **{name: cache}), tokens(eager, inputs))
    assert recorder.recorded == 1


@pytest.mark.parametrize("length", [5, 20])
def test_a_returned_window_is_the_users(length: int, plain_inductor: CompileCounter) -> None:
    config = {**SIZES, "num_hidden_layers": 2, "head_dim": 8, "sliding_window": 12}
    kinds = ["sliding_attention", "full_attention"]
    model = seeded(lambda: Gemma3ForCausalLM(Gemma3TextConfig(**config, layer_types=kinds)))
    eager = reference(model)
    wanted = tokens(eager, prompt(2, length), return_dict_in_generate=True)
    name = next(key for key in ("cache", "past_key_values") if key in wanted)
    compiled(model)
    found = tokens(model, prompt(2, length), return_dict_in_generate=True)
    assert torch.equal(found.sequences, wanted.sequences)
    for mine, theirs in zip(found[name].layers, wanted[name].layers, strict=True):
        assert type(mine) is type(theirs)
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-3, atol=1e-3)
        assert mine.get_seq_length() == theirs.get_seq_length()
    longer = torch.cat((found.sequences, prompt(2, 3, seed=8)["input_ids"]), 1)
    inputs = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    assert torch.equal(tokens(model, inputs, **{name: found[name]}), tokens(eager, inputs))


def test_inference_mode_and_no_grad_in_turn(plain_inductor: CompileCounter) -> None:
    """A cache that was made in the one is written in the other."""
    model = llama()
    wanted = tokens(reference(model), prompt())
    compiled(model)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(tokens(model, prompt()), wanted)
    assert len(loop_of(model).pool) == 1


def test_another_generation_config(recorder: TapeRecorder) -> None:
    model = llama()
    wanted = tokens(reference(model), prompt())
    compiled(model)
    model.generation_config = GenerationConfig(max_new_tokens=NEW, pad_token_id=0)
    assert torch.equal(model.generate(**prompt()), wanted)
    passed = GenerationConfig(max_new_tokens=NEW, pad_token_id=0, do_sample=False)
    assert torch.equal(model.generate(**prompt(), generation_config=passed), wanted)
    assert recorder.recorded == 1 and passed.disable_compile is None


def test_release_weights(recorder: TapeRecorder) -> None:
    model = llama(tie_word_embeddings=True)
    wanted = tokens(reference(model), prompt())
    quant_compile.compile(model, POLICY, release_weights=True, **REFERENCE)
    for _ in range(2):
        assert torch.equal(tokens(model, prompt()), wanted)
    assert all(line.released for line in quant_compile.report(model).lines if line.scheme)
    assert torch.equal(tokens(model, prompt(), cache_implementation="dynamic"), wanted)


def test_inductor_itself() -> None:
    """No stand-in for Inductor: what a CPU user runs."""
    model = llama()
    wanted = tokens(reference(model), prompt())
    compiled(model)
    for _ in range(2):
        assert torch.equal(tokens(model, prompt()), wanted)
    assert quant_compile.report(model).coverage == 1.0
