"""Models compiled block by block: one graph for all layers, the tokens of the eager quantized reference."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel

import quant_compile
from quant_compile.generation.blocks import blocks_of
from quant_compile.policy import Policy
from tests.generation.support import (
    NEW,
    SPEC,
    TapeRecorder,
    compiled,
    llama,
    prompt,
    recorder,
    reference,
    seeded,
    tokens,
)
from tests.runtime_support import CompileCounter, plain_inductor


def test_one_graph_serves_all_layers(plain_inductor: CompileCounter) -> None:
    """Four layers, two phases: two graphs; another prompt length and an updated weight need none more."""
    model = llama(num_hidden_layers=4)
    calls = [prompt(2, 7), prompt(2, 12, seed=6), prompt(2, 9, padded=True)]
    eager = reference(model)
    wanted = [tokens(eager, inputs) for inputs in calls]
    compiled(model, blocks=True)
    for inputs, result in zip(calls, wanted, strict=True):
        assert torch.equal(tokens(model, inputs), result)
    assert len(plain_inductor) <= 3, "a prompt's graph without and with a mask, and a decode step's"
    for graph in plain_inductor.graphs:
        linears = graph.graph.find_nodes(op="call_function", target=torch.ops.sglq_kernels.linear.default)
        assert len(linears) == 7, "one layer's"
    report = quant_compile.report(model)
    assert report.coverage == 1.0
    assert all(line.scheme for line in report.lines if "layers" in line.names[0] and "proj" in line.names[0])


@pytest.mark.parametrize("padded", [False, True])
def test_steps_by_blocks_are_recorded(padded: bool, plain_inductor: CompileCounter, recorder: TapeRecorder) -> None:
    """What is around the blocks asks for no value, so that a stream may be captured."""
    model = llama(num_hidden_layers=3)
    wanted = tokens(reference(model), prompt(padded=padded))
    compiled(model, blocks=True)
    for _ in range(2):
        assert torch.equal(tokens(model, prompt(padded=padded)), wanted)
    assert recorder.recorded == 1 and recorder.replayed == 2 * (NEW - 1) - 1
    assert not [note for note in quant_compile.report(model).notes if "recorded" in note]


def test_a_head_that_the_policy_names_is_quantized(plain_inductor: CompileCounter) -> None:
    model = llama(num_hidden_layers=3)
    policy = {"default": SPEC, "rules": [{"match": "lm_head", "scheme": SPEC}]}
    quant_compile.compile(model, policy, kernels="reference", blocks=True)
    tokens(model, prompt())
    lines = {line.names[0]: line for line in quant_compile.report(model).lines}
    assert lines["lm_head.weight"].scheme == SPEC


def test_sliding_windows_and_plain_calls(plain_inductor: CompileCounter) -> None:
    config = Gemma3TextConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2,
        pad_token_id=0, eos_token_id=None, bos_token_id=1,
    )  # fmt: skip
    model = seeded(lambda: Gemma3ForCausalLM(config), 3)
    wanted = tokens(reference(model), prompt(2, 12))
    compiled(model, blocks=True)
    assert torch.equal(tokens(model, prompt(2, 12)), wanted)
    with torch.no_grad():
        assert model(**prompt(2, 12)).logits.shape == (2, 12, 96)


def test_uncompile_gives_the_blocks_back(plain_inductor: CompileCounter) -> None:
    model = llama(num_hidden_layers=3)
    before = [dict(vars(layer)) for layer in model.model.layers]
    compiled(model, blocks=True)
    tokens(model, prompt())
    quant_compile.uncompile(model)
    assert [dict(vars(layer)) for layer in model.model.layers] == before


def test_models_without_such_blocks_are_compiled_whole(plain_inductor: CompileCounter) -> None:
    """GPT-2's blocks get positional arguments."""
    config = GPT2Config(
        vocab_size=96, n_positions=64, n_embd=32, n_layer=3, n_head=2, pad_token_id=0, eos_token_id=None
    )
    model = seeded(lambda: GPT2LMHeadModel(config), 3)
    wanted = tokens(reference(model), prompt(2, 7))
    compiled(model, blocks=True)
    assert torch.equal(tokens(model, prompt(2, 7)), wanted)


class Tower(nn.Module):
    """More modules of one class than the decoder has layers, which are none of its."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(9))


def test_the_blocks_are_the_decoders_layers() -> None:
    """Not the longest list: a tower, or experts in a list, may be longer."""
    model = llama(num_hidden_layers=4)
    model.tower = Tower()
    found = blocks_of(model, Policy.load(SPEC))
    assert found is not None and [block for _, block in found.repeated] == list(model.model.layers)
    assert set(found.single) == set(model.tower.experts)


@pytest.mark.parametrize("shape", [(32, 32), (2, 32, 32)], ids=["a matrix", "experts"])
def test_other_weights_around_the_blocks_leave_the_model_whole(shape: tuple[int, ...]) -> None:
    """Eager code is not traced: a product with such a parameter would stay in 16 bits in silence."""
    model = llama(num_hidden_layers=4)
    model.model.projection = nn.Parameter(torch.zeros(shape))
    assert blocks_of(model, Policy.load(SPEC)) is None
    kept = Policy.load({"default": SPEC, "rules": [{"match": "*projection", "scheme": "keep"}]})
    assert blocks_of(model, kept) is not None


__all__ = ["plain_inductor", "recorder"]
