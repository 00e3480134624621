"""Decode steps are recorded once and replayed; the recorder is one for any device, so what runs here is all but CUDA itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import quant_compile
from tests.generation.support import (
    NEW,
    TapeRecorder,
    compiled,
    llama,
    loop_of,
    prompt,
    recorder,
    reference,
    tokens,
)
from tests.runtime_support import CompileCounter, plain_inductor

__all__ = ["plain_inductor", "recorder"]
REPLAYED = NEW - 2  # the prompt's call makes the first token, the step that runs as compiled code the second


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def test_a_step_is_recorded_once_and_replayed(plain_inductor: CompileCounter, recorder: TapeRecorder) -> None:
    model = llama()
    wanted = tokens(reference(model), prompt())
    compiled(model)
    assert torch.equal(tokens(model, prompt()), wanted)
    assert (recorder.warmed, recorder.recorded, recorder.replayed) == (1, 1, REPLAYED)
    assert len(set(wanted[:, 7:].flatten().tolist())) > NEW // 2, "tokens that are all alike show nothing"


def test_other_calls_reuse_it(plain_inductor: CompileCounter, recorder: TapeRecorder) -> None:
    """A second call, another prompt length, another batch size and back: recordings are kept."""
    model = llama()
    calls = [
        prompt(2, 7),
        prompt(2, 12, seed=6),
        prompt(4, 7),
        prompt(1, 5),
        prompt(2, 9, seed=8),
        prompt(4, 8),
        prompt(1, 9),
    ]
    eager = reference(model)
    wanted = [tokens(eager, inputs) for inputs in calls]
    compiled(model)
    for inputs, result in zip(calls, wanted, strict=True):
        assert torch.equal(tokens(model, inputs), result)
    # Two rows have two: the prompt's graph for two rows gave way to one for any number.
    assert recorder.recorded == recorder.warmed == 4
    recorder.replayed = 0
    for inputs, result in zip(calls, wanted, strict=True):
        assert torch.equal(tokens(model, inputs), result)
    assert recorder.recorded == 4 and recorder.replayed == len(calls) * (NEW - 1)
    assert len(plain_inductor) == 6, "a prompt and a decode graph for two rows, for any number of them, and for one"


def test_two_models_in_turn_record_nothing_anew(plain_inductor: CompileCounter, recorder: TapeRecorder) -> None:
    models = [llama(seed) for seed in (3, 4)]
    wanted = [tokens(reference(model), prompt()) for model in models]
    for model in models:
        compiled(model)
        tokens(model, prompt())
    assert not torch.equal(*wanted)
    for model in models:  # packing the second model's planes has moved the store's epoch
        tokens(model, prompt())
    before = recorder.recorded
    for _ in range(2):
        for model, result in zip(models, wanted, strict=True):
            assert torch.equal(tokens(model, prompt()), result)
    assert recorder.recorded == before


def test_padding_and_none_are_two_recordings(plain_inductor: CompileCounter, recorder: TapeRecorder) -> None:
    model = llama()
    calls = [prompt(3, 7, padded=padded) for padded in (True, False, True, False)]
    wanted = [tokens(reference(model), inputs) for inputs in calls]
    compiled(model)
    for inputs, result in zip(calls, wanted, strict=True):
        assert torch.equal(tokens(model, inputs), result)
    assert recorder.recorded == 2


def test_an_update_in_place_is_seen(plain_inductor: CompileCounter, recorder: TapeRecorder) -> None:
    model = llama()
    compiled(model)
    before = tokens(model, prompt())
    model.model.layers[0].mlp.down_proj.weight.mul_(-3)
    wanted = tokens(reference(model), prompt())
    assert not torch.equal(before, wanted)
    assert torch.equal(tokens(model, prompt()), wanted)
    assert recorder.recorded == 2


def test_an_update_between_two_tokens_is_seen(plain_inductor: CompileCounter, recorder: TapeRecorder) -> None:
    """As an eager model would: the next token is made with the new values."""
    from transformers import LogitsProcessor

    class Edit(LogitsProcessor):
        def __init__(self, model: Any) -> None:
            self.model, self.calls = model, 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 5:
                self.edit()
            return scores

        def edit(self) -> None:
            self.model.model.layers[0].mlp.down_proj.weight.mul_(-3)

    class EditReference(Edit):
        def edit(self) -> None:
            layer = self.model.model.layers[0].mlp.down_proj
            layer.planes = (layer.planes[0].neg(), layer.planes[1] * 3)

    model = llama()
    eager = reference(model)
    unedited = tokens(eager, prompt())
    wanted = tokens(eager, prompt(), logits_processor=[EditReference(eager)])
    assert not torch.equal(unedited, wanted)
    compiled(model)
    assert torch.equal(tokens(model, prompt(), logits_processor=[Edit(model)]), wanted)


def test_a_parameter_in_other_memory_is_seen(plain_inductor: CompileCounter, recorder: TapeRecorder) -> None:
    """The recording reads the old memory; so does it of weights that nobody quantizes."""
    model = llama()
    compiled(model)
    tokens(model, prompt())
    for name in ("embed_tokens", "norm"):
        module = getattr(model.model, name)
        module.weight = torch.nn.Parameter(module.weight * -1.5)
        assert torch.equal(tokens(model, prompt()), tokens(reference(quant_copy(model)), prompt()))
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.flip(0).clone()
    assert torch.equal(tokens(model, prompt()), tokens(reference(quant_copy(model)), prompt()))


def quant_copy(model: Any) -> Any:
    """An uncompiled model with the same values."""
    made = llama()
    made.load_state_dict(model.state_dict())
    return made


def test_replaced_modules_are_seen(plain_inductor: CompileCounter, recorder: TapeRecorder) -> None:
    """There and back: each time the recording of the model as it is."""
    model = llama()
    compiled(model)
    first = tokens(model, prompt())
    layer = model.model.layers[0]
    old, new = layer.mlp, llama(seed=9).model.layers[0].mlp
    layer.mlp = new
    second = tokens(model, prompt())
    assert not torch.equal(first, second)
    layer.mlp = old
    assert torch.equal(tokens(model, prompt()), first)
    layer.mlp = new
    assert torch.equal(tokens(model, prompt()), second)


def test_hidden_states_and_scores_of_all_steps(plain_inductor: CompileCounter, recorder: TapeRecorder) -> None:
    """A replay overwrites what the last one returned; users keep all of them."""
    model = llama()
    more = {"output_hidden_states": True, "output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    wanted = tokens(reference(model), prompt(), **more)
    compiled(model)
    for _ in range(2):
        found = tokens(model, prompt(), **more)
        assert torch.equal(found.sequences, wanted.sequences)
        for name in ("hidden_states", "scores", "logits"):  # f32, added in other orders
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-3)
    assert recorder.recorded == 1


def test_a_step_that_cannot_be_recorded_goes_on_compiled(
    plain_inductor: CompileCounter, recorder: TapeRecorder
) -> None:
    model = llama()
    wanted = tokens(reference(model), prompt())
    compiled(model)
    recorder.failure = RuntimeError("no memory for a graph\nand more")
    for _ in range(2):
        assert torch.equal(tokens(model, prompt()), wanted)
    notes = quant_compile.report(model).notes
    assert any("cannot be recorded" in note and "no memory for a graph" in note for note in notes)
    assert recorder.replayed == 0


def test_another_stream_records_for_itself(plain_inductor: CompileCounter, recorder: TapeRecorder) -> None:
    """Intermediate results of recordings share memory, which two streams must not."""
    model = llama()
    compiled(model)
    first = tokens(model, prompt())
    recorder.stream = 1
    assert torch.equal(tokens(model, prompt()), first)
    assert recorder.recorded == 2


@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
def test_modes_without_graphs_record_nothing(mode: str, plain_inductor: CompileCounter, recorder: TapeRecorder) -> None:
    model = llama()
    wanted = tokens(reference(model), prompt())
    compiled(model, mode=mode)
    assert torch.equal(tokens(model, prompt()), wanted)
    assert recorder.recorded == recorder.warmed == 0


def test_reduce_overhead_means_our_graphs_in_generate_and_inductors_outside(
    plain_inductor: CompileCounter, recorder: TapeRecorder
) -> None:
    model = llama()
    compiled(model, mode="reduce-overhead")
    tokens(model, prompt())
    assert recorder.recorded == 1
    assert not any((patches or {}).get("triton.cudagraphs") for patches in plain_inductor.patches)
    model(**prompt())
    assert plain_inductor.patches[-1]["triton.cudagraphs"]


def test_release_and_recording(plain_inductor: CompileCounter, recorder: TapeRecorder) -> None:
    model = llama()
    wanted = tokens(reference(model), prompt())
    compiled(model, release_weights=True)
    for _ in range(2):
        assert torch.equal(tokens(model, prompt()), wanted)
    assert recorder.recorded == 1
    assert all(line.released for line in quant_compile.report(model).lines if line.scheme)


def test_a_cache_grows_during_a_long_answer(
    plain_inductor: CompileCounter, recorder: TapeRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quant_compile.generation.loop.AHEAD", 16)
    model = llama()
    wanted = tokens(reference(model), prompt(), max_new_tokens=150)
    compiled(model)
    for _ in range(2):
        assert torch.equal(tokens(model, prompt(), max_new_tokens=150), wanted)
    assert len(plain_inductor) == 2, "caches of every length share a graph"
    assert recorder.recorded == 3, "one recording for each length of the cache"
    assert len(loop_of(model).pool) == 3
