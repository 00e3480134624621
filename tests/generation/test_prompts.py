"""Short prompts are recorded and replayed, and a model that has changed meanwhile is noticed before its tokens reach anyone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import quant_compile
from quant_compile.generation import prompts
from tests.generation.support import (
    SIZES,
    TapeRecorder,
    compiled,
    llama,
    loop_of,
    prompt,
    recorder,
    recorder_of_prompts,
    reference,
    seeded,
    tokens,
)
from tests.runtime_support import CompileCounter, plain_inductor

__all__ = ["plain_inductor", "recorder", "recorder_of_prompts"]
LAYERS = 3
FIRST = {"max_new_tokens": 1}


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def first(model: Any, seed: int = 5, rows: int = 2, length: int = 7, **more: Any) -> torch.Tensor:
    """The first token of a prompt."""
    return tokens(model, prompt(rows, length, seed), **{**FIRST, **more})


def recorded(model: Any, **more: Any) -> Any:
    """A model whose prompts of two rows of seven tokens are replayed from now on."""
    compiled(model, **more)
    for seed in (5, 6):
        first(model, seed)
    return model


def held(model: Any) -> int:
    """Recordings of prompts in all idle blocks of cache."""
    blocks = loop_of(model).pool._idle
    return sum(p is not None and p.recorded is not None for block in blocks for p in block.prompts.known.values())


@pytest.mark.parametrize("blocks", [True, False])
def test_a_prompt_is_replayed_from_the_third_time_on(recorder_of_prompts: TapeRecorder, blocks: bool) -> None:
    model = llama(num_hidden_layers=LAYERS)
    eager = reference(model)
    calls = [prompt(2, 7, seed, padded) for seed in range(4) for padded in (False, True)]
    wanted = [tokens(eager, inputs) for inputs in calls]
    compiled(model, blocks=blocks)
    for inputs, result in zip(calls, wanted, strict=True):
        assert torch.equal(tokens(model, inputs), result)
    recorder, before = recorder_of_prompts, recorder_of_prompts.recorded
    recorder.replayed = 0
    for inputs, result in zip(calls, wanted, strict=True):
        assert torch.equal(tokens(model, inputs, **FIRST), result[:, :8])
    assert (recorder.replayed, recorder.recorded) == (len(calls), before)
    assert len({tuple(result[:, 7].tolist()) for result in wanted}) > 2, "tokens that are all alike show nothing"


def test_nothing_is_compiled_for_a_replay(plain_inductor: CompileCounter, recorder_of_prompts: TapeRecorder) -> None:
    model = recorded(llama(num_hidden_layers=LAYERS), blocks=True)
    before = len(plain_inductor)
    first(model, 7)
    assert len(plain_inductor) == before and held(model) == 1


def scaled(module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook that turns a block's or an embedding's result around."""
    return -output


def swap(model: Any) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def exchange(model: Any) -> None:
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.flip(0).contiguous())


EDITS: dict[str, Callable[[Any], Any]] = {
    "a weight in place": lambda model: model.model.layers[0].mlp.down_proj.weight.mul_(-3),
    "a norm in place": lambda model: model.model.norm.weight.mul_(-1),
    "the head in place": lambda model: model.lm_head.weight.mul_(-1),
    "the embedding in place": lambda model: model.model.embed_tokens.weight.mul_(-1),
    "another parameter": exchange,
    "layers in another order": swap,
    "a layer less": lambda model: model.model.layers.pop(1),
    "a hook on the embedding": lambda model: model.model.embed_tokens.register_forward_hook(scaled),
    "a hook on the norm": lambda model: model.model.norm.register_forward_hook(scaled),
    "a hook on the head": lambda model: model.lm_head.register_forward_hook(scaled),
    "a number in a block": lambda model: setattr(model.model.layers[0].self_attn, "scaling", -3.0),
    "a number around the blocks": lambda model: setattr(model.model.rotary_emb, "attention_scaling", -2.0),
}


WHOLE = ("another parameter",)


@pytest.mark.parametrize(("name", "blocks"), [*((name, True) for name in EDITS), *((name, False) for name in WHOLE)])
def test_a_change_of_the_model_is_seen(recorder_of_prompts: TapeRecorder, name: str, blocks: bool) -> None:
    model = recorded(llama(num_hidden_layers=LAYERS), blocks=blocks)
    before = [first(model, seed) for seed in range(5, 9)]
    edit = EDITS[name]
    edit(model)
    twin = llama(num_hidden_layers=LAYERS)
    edit(twin)
    eager = reference(twin)
    wanted = [first(eager, seed) for seed in range(5, 9)]
    assert any(not torch.equal(old, new) for old, new in zip(before, wanted, strict=True))
    for _ in range(2):  # found out, then recorded anew
        for seed, result in zip(range(5, 9), wanted, strict=True):
            assert torch.equal(first(model, seed), result)


def test_states_of_all_layers_are_right(recorder_of_prompts: TapeRecorder) -> None:
    """Results between two blocks are not kept, so a call that hands them out is not replayed."""
    model = llama(num_hidden_layers=LAYERS)
    more = {"output_hidden_states": True, "return_dict_in_generate": True, **FIRST}
    inputs = [prompt(2, 7, seed) for seed in range(5, 9)]
    eager = reference(model)
    wanted = [tokens(eager, i, **more).hidden_states[0] for i in inputs]
    recorded(model, blocks=True)
    for i, result in zip(inputs, wanted, strict=True):
        states = tokens(model, i, **more).hidden_states[0]
        assert len(states) == LAYERS + 1
        for state, other in zip(states, result, strict=True):
            torch.testing.assert_close(state, other)
    before = held(model)
    first(model, 5)
    assert held(model) == before == 1, "hooks by which transformers collects states do nothing in other calls"
    model.config.output_hidden_states = True
    states = tokens(model, inputs[0], **FIRST, return_dict_in_generate=True).hidden_states
    assert states is None or all(state.isfinite().all() for state in states[0])


class Summing(LlamaForCausalLM):
    """What stands around its blocks adds up what they all have made: for the last norm, or for the logits themselves."""

    def __init__(self, config: Any, late: bool) -> None:
        super().__init__(config)
        self.late, self.states = late, []
        layers = self.model.layers
        for layer in layers:
            layer.register_forward_hook(lambda module, args, output: self.keep(module is layers[0], output))
        self.model.norm.register_forward_pre_hook(lambda module, args: None if late else (args[0] + self.sum(),))

    def keep(self, is_first: bool, output: torch.Tensor) -> None:
        """The first block's state begins a new sum."""
        if is_first:
            self.states.clear()
        self.states.append(output)

    def sum(self) -> torch.Tensor:
        """Of all blocks' states."""
        return torch.stack(self.states).sum(0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        made = super().forward(*args, **kwargs)
        if self.late:
            made.logits = made.logits + self.sum().mean(-1, keepdim=True)[:, -1:] * torch.arange(96)
        return made


@pytest.mark.parametrize("late", [False, True])
def test_what_stands_around_the_blocks_may_read_all_of_them(recorder_of_prompts: TapeRecorder, late: bool) -> None:
    """Results that only blocks should read are not kept, so such prompts are not replayed, and the report says so."""
    model = seeded(lambda: Summing(LlamaConfig(**{**SIZES, "num_hidden_layers": LAYERS}), late))
    wanted = [first(model, seed) for seed in range(5, 9)]
    quant_compile.compile(model, {"default": "keep"}, kernels="reference", blocks=True)
    for seed, result in zip(range(5, 9), wanted, strict=True):
        assert torch.equal(first(model, seed), result)
    assert held(model) == 0
    assert "short prompts are not recorded" in str(quant_compile.report(model))


@pytest.mark.parametrize("late", [0.0, 50.0])
def test_kernels_whose_sums_vary(recorder_of_prompts: TapeRecorder, monkeypatch: Any, late: float) -> None:
    """What differs from call to call may differ in a replay as well, by as much; by more it is refused."""
    model = compiled(llama(num_hidden_layers=LAYERS), blocks=True)
    noise = iter(
        [0.0, 0.0, 1e-3 + late, 2e-3, *[0.0] * 99]
    )  # as compiled code, remembered, replayed, as compiled code again
    head = model.lm_head._call_impl
    object.__setattr__(model.lm_head, "_compiled_call_impl", lambda *args: head(*args) + next(noise))
    for seed in range(4):
        first(model, seed)
    assert held(model) == (not late)


class Steering:
    """Hooks of a user's on every block: eager code between compiled graphs, with a state of its own."""

    def __init__(self, model: Any) -> None:
        self.factor, self.calls = 1.0, 0
        for layer in model.model.layers:
            layer.register_forward_hook(self.hook)

    @torch._dynamo.disable
    def hook(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Turn a state around, and refuse NaN."""
        if not output.isfinite().all():
            raise ValueError("nan in hidden states")
        self.calls += 1
        return output.mul_(self.factor)


@pytest.mark.parametrize("blocks", [True, False])
def test_hooks_with_a_state_of_their_own(recorder_of_prompts: TapeRecorder, blocks: bool) -> None:
    """They run once in every call, on what the model really computes."""
    model, twin = (llama(num_hidden_layers=LAYERS) for _ in range(2))
    ours, theirs = Steering(model), Steering(twin)
    quant_compile.compile(model, {"default": "keep"}, kernels="reference", blocks=blocks)
    for seed, factor in enumerate((1.0, 1.0, 1.0, -1.0, 2.0)):
        ours.factor = theirs.factor = factor
        assert torch.equal(first(model, seed), first(twin, seed)), seed
    assert ours.calls == theirs.calls and held(model) == 0


def test_a_hook_on_one_block_is_its_own(recorder_of_prompts: TapeRecorder) -> None:
    """Though blocks share a graph."""
    model, twin = (llama(num_hidden_layers=LAYERS) for _ in range(2))
    quant_compile.compile(model, {"default": "keep"}, kernels="reference", blocks=True)
    for each in (model, twin):
        each.model.layers[1].register_forward_hook(lambda module, args, output: -3 * output)
    for seed in range(4):
        assert torch.equal(first(model, seed), first(twin, seed)), seed


def test_buffers_that_count_calls(recorder_of_prompts: TapeRecorder) -> None:
    class Counting(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(1)
            return self.inner(x)

    model = llama(num_hidden_layers=LAYERS)
    for layer in model.model.layers:
        layer.mlp = Counting(layer.mlp)
    compiled(model, blocks=True)
    for seed in range(5):
        first(model, seed)
    assert [float(layer.mlp.seen) for layer in model.model.layers] == [5.0] * LAYERS
    assert held(model) == 0
    assert any("writes to a Parameter or a buffer" in note for note in quant_compile.report(model).notes)


class Wrapping(LlamaForCausalLM):
    """Makes errors of its own of any error."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().forward(*args, **kwargs)
        except Exception as error:
            raise RuntimeError("wrapped") from error


def test_a_model_that_catches_errors(recorder_of_prompts: TapeRecorder, monkeypatch: Any) -> None:
    monkeypatch.setattr("quant_compile.generation.weights.LIBRARIES", {"torch", "transformers", "tests"})
    model = seeded(lambda: Wrapping(LlamaConfig(**{**SIZES, "num_hidden_layers": LAYERS})))
    recorded(model, blocks=True)
    assert held(model) == 1
    model.model.layers[0].self_attn.scaling = -3.0
    wanted = [first(reference(model), seed) for seed in range(4)]
    assert [first(model, seed).tolist() for seed in range(4)] == [result.tolist() for result in wanted]


def test_recordings_are_few_and_not_made_over_and_over(recorder_of_prompts: TapeRecorder, monkeypatch: Any) -> None:
    monkeypatch.setattr(prompts, "MOST", 3)
    model = compiled(llama())
    lengths = range(5, 12)
    for _ in range(3):
        for length in lengths:
            first(model, length=length)
    assert recorder_of_prompts.recorded == held(model) == 3
    for _ in range(6):  # one that came often takes the place of one that came no more
        for length in (9, 10):
            first(model, length=length)
    assert held(model) == 3 and 3 < recorder_of_prompts.recorded <= 5


def test_a_prompt_that_cannot_be_recorded_is_right_and_named(recorder_of_prompts: TapeRecorder) -> None:
    model = llama()
    wanted = [first(reference(model), seed) for seed in range(5, 9)]
    recorder_of_prompts.failure = RuntimeError("no graph today")
    compiled(model)
    for seed, result in zip(range(5, 9), wanted, strict=True):
        assert torch.equal(first(model, seed), result)
    assert "RuntimeError: no graph today" in str(quant_compile.report(model))
    assert held(model) == 0


def test_long_prompts_are_not_recorded(recorder_of_prompts: TapeRecorder, monkeypatch: Any) -> None:
    monkeypatch.setattr("quant_compile.generation.lease.LONGEST", 13)
    model = recorded(llama())
    first(model)
    assert recorder_of_prompts.recorded == 0


@pytest.mark.parametrize("window", [4, 64])
def test_sliding_windows(recorder_of_prompts: TapeRecorder, window: int) -> None:
    """Their layers count along in Python."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {**SIZES, "num_hidden_layers": 4, "head_dim": 8, "sliding_window": window, "layer_types": None}
    model = seeded(lambda: Gemma3ForCausalLM(Gemma3TextConfig(**sizes, sliding_window_pattern=2)))
    calls = [prompt(2, 7, seed, padded) for seed in range(4) for padded in (False, True)]
    eager = reference(model)
    wanted = [tokens(eager, inputs) for inputs in calls]
    compiled(model, blocks=False)
    for inputs, result in zip(calls, wanted, strict=True):
        assert torch.equal(tokens(model, inputs), result)
    assert held(model)


def test_inference_mode_and_no_grad_by_turns(plain_inductor: CompileCounter, recorder_of_prompts: TapeRecorder) -> None:
    model = llama(num_hidden_layers=LAYERS)
    wanted = [first(reference(model), seed) for seed in range(4)]
    compiled(model, blocks=True)
    for turn in range(4):
        for seed, result in enumerate(wanted):
            with torch.inference_mode(bool(seed % 2)):
                assert torch.equal(first(model, seed), result)
        if turn == 1:
            compiles = len(plain_inductor)
    assert len(plain_inductor) == compiles


def test_threads(recorder_of_prompts: TapeRecorder) -> None:
    model = llama(num_hidden_layers=LAYERS)
    wanted = [tokens(reference(model), prompt(2, 7, seed)) for seed in range(6)]
    recorded(model, blocks=True)
    results: dict[int, Any] = {}

    def work(seed: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                results[seed] = tokens(model, prompt(2, 7, seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, result in enumerate(wanted):
        assert torch.equal(results[seed], result)


def test_releasing_and_another_policy(recorder_of_prompts: TapeRecorder) -> None:
    model = llama(num_hidden_layers=LAYERS)
    twin = reference(model, "W8A16")
    other = reference(model, "W4A16")
    recorded(model, blocks=True)
    assert torch.equal(first(model, 7), first(twin, 7))
    quant_compile.compile(model, "W4A16", kernels="reference", blocks=True)
    for seed in range(5, 9):
        assert torch.equal(first(model, seed), first(other, seed))
    quant_compile.release(model)
    for seed in range(5, 9):
        assert torch.equal(first(model, seed), first(other, seed))
