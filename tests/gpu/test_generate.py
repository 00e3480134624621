"""``generate`` on the GPU: decode steps become CUDA graphs that are recorded once, read what they should, and are used again."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    T5Config,
    T5ForConditionalGeneration,
)

import quant_compile
from quant_compile.generation.graphs import CudaRecorder

pytestmark = pytest.mark.gpu

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# Its sums do not depend on the number of rows or on what else runs, so tokens with and without graphs are equal.
# Attention stays as written for the same reason: its kernel adds in another order than SDPA does without a static cache.
PINNED = {"kernels": {"FP8_DYNAMIC": "triton_scaled_mm"}, "tune": "off", "attention": "keep"}
NEW = 24


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    gc.collect()
    torch.cuda.empty_cache()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


class Counter:
    """Recordings of CUDA graphs and their replays."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorded = self.replayed = 0
        record = CudaRecorder.record

        def counted(recorder: CudaRecorder, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
            replay, made = record(recorder, run)
            self.recorded += 1

            def again() -> None:
                self.replayed += 1
                replay()

            return again, made

        monkeypatch.setattr(CudaRecorder, "record", counted)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts decode steps; prompts are not recorded."""
    monkeypatch.setattr("quant_compile.generation.lease.LONGEST", 0)
    return Counter(monkeypatch)


@pytest.fixture
def count_prompts(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts prompts as well."""
    return Counter(monkeypatch)


def seeded(make: Callable[[], Any], seed: int = 3) -> Any:
    torch.manual_seed(seed)
    with torch.device("cuda"):
        return make().to(torch.bfloat16).eval()


def llama(seed: int = 3, **changes: Any) -> Any:
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})), seed)


def prompt(rows: int = 1, length: int = 40, seed: int = 5, padded: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(2, 512, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padded:
        for row in range(rows - 1):
            mask[row, : 1 + row] = 0
    return {"input_ids": (ids * mask).cuda(), "attention_mask": mask.cuda()}


def tokens(model: Any, inputs: dict[str, Tensor], **more: Any) -> Any:
    torch.manual_seed(11)
    return model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **more})


def without_graphs(make: Callable[[], Any], calls: list[dict[str, Any]], **options: Any) -> list[Any]:
    """What a model says whose steps run as compiled code."""
    model = make()
    quant_compile.compile(model, "fp8_dynamic", mode="default", **{**PINNED, **options})
    wanted = [tokens(model, **call) for call in calls]
    quant_compile.uncompile(model)
    del model
    torch._dynamo.reset()
    gc.collect()  # the end of a model later on would count as a change of the store
    return wanted


def fast(model: Any, **options: Any) -> Any:
    return quant_compile.compile(model, "fp8_dynamic", **{**PINNED, **options})


def test_graphs_serve_further_calls_other_lengths_and_other_batches(count: Counter) -> None:
    calls = [
        {"inputs": prompt(rows, length, seed=seed)}
        for seed, (rows, length) in enumerate([(1, 40), (1, 55), (8, 40), (1, 17), (8, 33)])
    ]
    wanted = without_graphs(llama, calls)
    assert count.recorded == 0, "mode default records nothing"
    assert len({tuple(w[0, -NEW:].tolist()) for w in wanted}) == len(wanted)
    model = fast(llama())
    for _ in range(2):
        for call, result in zip(calls, wanted, strict=True):
            assert torch.equal(tokens(model, **call), result)
    recorded, count.replayed = count.recorded, 0
    for _ in range(2):
        for call, result in zip(calls, wanted, strict=True):
            assert torch.equal(tokens(model, **call), result)
    assert count.recorded == recorded
    assert count.replayed == 2 * len(calls) * (NEW - 1), "every token but the first is a replay"
    assert not quant_compile.report(model).notes


def test_two_models_in_turn(count: Counter) -> None:
    call = {"inputs": prompt()}
    wanted = [without_graphs(lambda seed=seed: llama(seed), [call])[0] for seed in (3, 4)]
    assert not torch.equal(*wanted)
    models = [fast(llama(seed)) for seed in (3, 4)]
    for _ in range(3):
        for model in models:
            tokens(model, **call)
    recorded, count.replayed = count.recorded, 0
    for _ in range(3):
        for model, result in zip(models, wanted, strict=True):
            assert torch.equal(tokens(model, **call), result)
    assert count.recorded == recorded and count.replayed == 6 * (NEW - 1)


def test_memory_stays_as_it_is(count: Counter) -> None:
    model = fast(llama())
    for _ in range(2):
        for rows in (1, 8):
            tokens(model, prompt(rows))
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        for rows in (1, 8):
            tokens(model, prompt(rows, 50 + rows))  # of the same length of cache
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("layers", [2, 4])
def test_short_prompts_are_replayed(count_prompts: Counter, layers: int) -> None:
    """By blocks and as a whole; other contents, padding and batches; nothing is recorded or held anew once each shape has come twice."""
    calls = [
        {"inputs": prompt(rows, length, seed, padded)}
        for seed, (rows, length, padded) in enumerate([(1, 40, False), (3, 33, True), (3, 33, True), (1, 17, False)])
    ]
    wanted = without_graphs(lambda: llama(num_hidden_layers=layers), calls, blocks=True)
    model = fast(llama(num_hidden_layers=layers), blocks=True)
    for _ in range(3):
        for call, result in zip(calls, wanted, strict=True):
            assert torch.equal(tokens(model, **call), result)
    gc.collect()
    torch.cuda.synchronize()
    recorded, held, count_prompts.replayed = count_prompts.recorded, torch.cuda.memory_allocated(), 0
    for _ in range(3):
        for call, result in zip(calls, wanted, strict=True):
            assert torch.equal(tokens(model, **call), result)
    gc.collect()
    torch.cuda.synchronize()
    assert count_prompts.replayed == 3 * len(calls) * NEW and count_prompts.recorded == recorded
    assert torch.cuda.memory_allocated() == held
    assert not quant_compile.report(model).notes


@pytest.mark.parametrize("policy", ["W4A16", "W4A8", "W8A8"])
def test_short_prompts_of_other_schemes_are_replayed(count_prompts: Counter, policy: str) -> None:
    """Kernels of libraries among them, whose sums may vary from call to call."""
    model = quant_compile.compile(llama(num_hidden_layers=4), policy)
    for seed in range(3):
        tokens(model, prompt(1, 40, seed), max_new_tokens=1)
    count_prompts.replayed = 0
    for seed in range(3):
        assert tokens(model, prompt(1, 40, seed), max_new_tokens=1).shape == (1, 41)
    assert count_prompts.replayed == 3, quant_compile.report(model).notes


def test_a_changed_weight_reaches_the_first_token(count_prompts: Counter) -> None:
    call = {"inputs": prompt(), "max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    model = fast(llama(num_hidden_layers=4))
    before = [tokens(model, **call).logits[0] for _ in range(3)][-1]
    model.model.layers[1].mlp.down_proj.weight.mul_(-3)
    changed = [tokens(model, **call).logits[0] for _ in range(3)]
    assert not torch.equal(changed[0], before)
    assert torch.equal(changed[0], changed[1]) and torch.equal(changed[0], changed[2])


def test_uncompile_gives_the_memory_back(count: Counter) -> None:
    model = llama()
    tokens(model, prompt(8))
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    fast(model)
    for _ in range(2):
        tokens(model, prompt(8))
    held = torch.cuda.memory_allocated() - before
    quant_compile.uncompile(model)
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.synchronize()
    left = torch.cuda.memory_allocated() - before
    assert held > 0 and left <= 40 << 20, f"{left} bytes are left; cuBLAS keeps 32 MiB for the stream of recordings"


def test_an_update_in_place_is_seen_at_once(count: Counter) -> None:
    call = {"inputs": prompt()}

    def edited() -> Any:
        model = llama()
        model.model.layers[0].mlp.down_proj.weight.mul_(-3)
        return model

    (before,), (after,) = without_graphs(llama, [call]), without_graphs(edited, [call])
    assert not torch.equal(before, after)
    model = fast(llama())
    for _ in range(2):
        assert torch.equal(tokens(model, **call), before)
    model.model.layers[0].mlp.down_proj.weight.mul_(-3)
    for _ in range(2):
        assert torch.equal(tokens(model, **call), after)
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight * -1)
    changed = tokens(model, **call)
    assert not torch.equal(changed, after) and torch.equal(tokens(model, **call), changed)


def test_an_update_between_two_tokens_is_seen(count: Counter) -> None:
    class Edit(LogitsProcessor):
        def __init__(self, model: Any) -> None:
            self.model, self.calls = model, 0

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == NEW // 2:
                self.model.model.layers[0].mlp.down_proj.weight.mul_(-3)
            return scores

    found = []
    for mode in ("default", "auto"):
        model = llama()
        quant_compile.compile(model, "fp8_dynamic", mode=mode, **PINNED)
        found.append(tokens(model, prompt(), logits_processor=[Edit(model)]))
    assert torch.equal(*found)


def test_hidden_states_scores_and_cache_are_the_users(count: Counter) -> None:
    more = {"return_dict_in_generate": True, "output_hidden_states": True, "output_logits": True}
    call = {"inputs": prompt(2), **more}
    (wanted,) = without_graphs(llama, [call])
    model = fast(llama())
    found = [tokens(model, **call) for _ in range(2)]
    tokens(model, prompt(2, seed=9), **more)
    tokens(model, prompt(2, seed=10))
    for one in found:
        assert torch.equal(one.sequences, wanted.sequences)
        for name in ("hidden_states", "logits"):
            torch.testing.assert_close(one[name], wanted[name], rtol=0, atol=0)
        name = next(key for key in ("cache", "past_key_values") if key in wanted)
        for mine, theirs in zip(one[name].layers, wanted[name].layers, strict=True):
            torch.testing.assert_close(mine.keys, theirs.keys, rtol=0, atol=0)
    assert count.replayed > NEW


@pytest.mark.parametrize("more", [{"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams(more: dict[str, Any], count: Counter) -> None:
    call = {"inputs": prompt(2, padded=True), **more}
    (wanted,) = without_graphs(llama, [call])
    model = fast(llama())
    for _ in range(3):
        assert torch.equal(tokens(model, **call), wanted)
    assert count.recorded == 1


def test_padding_and_sampling(count: Counter) -> None:
    call = {"inputs": prompt(8, padded=True), "do_sample": True, "top_k": 20}
    (wanted,) = without_graphs(llama, [call])
    model = fast(llama())
    for _ in range(2):
        assert torch.equal(tokens(model, **call), wanted)
    assert count.recorded == 1


@pytest.mark.parametrize("length", [20, 60])
@pytest.mark.parametrize("padded", [False, True])
def test_sliding_windows(length: int, padded: bool, count: Counter) -> None:
    kinds = ["sliding_attention", "full_attention"]
    config = {**SIZES, "head_dim": 64, "sliding_window": 32, "layer_types": kinds}

    def make() -> Any:
        return seeded(lambda: Gemma3ForCausalLM(Gemma3TextConfig(**config)))

    call = {"inputs": prompt(2, length, padded=padded)}
    (wanted,) = without_graphs(make, [call])
    model = fast(make())
    for _ in range(2):
        assert torch.equal(tokens(model, **call), wanted)
    assert count.recorded == (2 if length < 32 else 1)


def test_a_long_answer_outgrows_its_first_cache(count: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"inputs": prompt(), "max_new_tokens": 200}
    monkeypatch.setattr("quant_compile.generation.loop.AHEAD", 24)
    (wanted,) = without_graphs(llama, [call])
    model = fast(llama())
    for _ in range(2):
        assert torch.equal(tokens(model, **call), wanted)
    assert count.recorded == 3


@pytest.mark.parametrize("prompts", [False, True])
def test_two_threads(monkeypatch: pytest.MonkeyPatch, prompts: bool) -> None:
    if not prompts:
        monkeypatch.setattr("quant_compile.generation.lease.LONGEST", 0)
    calls = [{"inputs": prompt(1, 40, seed=seed)} for seed in range(4)]
    wanted = without_graphs(llama, calls)
    model = fast(llama())
    tokens(model, **calls[0])
    found: dict[int, Tensor] = {}

    def run(numbers: tuple[int, ...]) -> None:
        for number in numbers:
            found[number] = tokens(model, **calls[number])

    for _ in range(3):
        threads = [threading.Thread(target=run, args=(numbers,)) for numbers in ((0, 1), (2, 3))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, result in enumerate(wanted):
            assert torch.equal(found[number], result), number


def test_another_stream(count: Counter) -> None:
    call = {"inputs": prompt()}
    (wanted,) = without_graphs(llama, [call])
    model = fast(llama())
    tokens(model, **call)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            assert torch.equal(tokens(model, **call), wanted)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(tokens(model, **call), wanted)


def test_a_capture_that_fails_is_reported_and_the_loop_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"inputs": prompt()}
    (wanted,) = without_graphs(llama, [call])
    record = CudaRecorder.record

    def waits_for_the_gpu(recorder: CudaRecorder, run: Callable[[], Any]) -> Any:
        def step() -> Any:
            made = run()
            made.logits.sum().item()
            return made

        return record(recorder, step)

    monkeypatch.setattr(CudaRecorder, "record", waits_for_the_gpu)
    model = fast(llama())
    for _ in range(2):
        assert torch.equal(tokens(model, **call), wanted)
    assert any("cannot be recorded as a CUDA graph" in note for note in quant_compile.report(model).notes)
    assert torch.randn(8, device="cuda").isfinite().all()  # torch's generator is not left as in a capture
    monkeypatch.undo()
    recorded = fast(llama())
    for _ in range(2):
        assert torch.equal(tokens(recorded, **call), wanted)
    assert not [note for note in quant_compile.report(recorded).notes if "cannot be recorded" in note]


def test_reduce_overhead_means_our_graphs(count: Counter) -> None:
    call = {"inputs": prompt()}
    (wanted,) = without_graphs(llama, [call])
    model = fast(llama(), mode="reduce-overhead")
    for _ in range(2):
        assert torch.equal(tokens(model, **call), wanted)
    assert count.recorded == 1


def test_released_weights(count: Counter) -> None:
    call = {"inputs": prompt(2)}
    (wanted,) = without_graphs(llama, [call])
    model = fast(llama(), release_weights=True)
    for _ in range(3):
        assert torch.equal(tokens(model, **call), wanted)
    assert all(line.released for line in quant_compile.report(model).lines if line.scheme)


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}])
def test_an_encoder_decoder(more: dict[str, Any], count: Counter) -> None:
    sizes = {"vocab_size": 512, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 2, "num_heads": 8}

    def make() -> Any:
        config = T5Config(**sizes, pad_token_id=0, decoder_start_token_id=0, eos_token_id=None)
        return seeded(lambda: T5ForConditionalGeneration(config))

    calls = [{"inputs": prompt(2, 30, padded=True), **more}, {"inputs": prompt(2, 44, seed=6), **more}]
    wanted = without_graphs(make, calls)
    model = fast(make())
    for _ in range(3):
        for call, result in zip(calls, wanted, strict=True):
            assert torch.equal(tokens(model, **call), result)
    assert count.recorded <= 3 and quant_compile.report(model).coverage == 1.0
