"""Text that a model writes itself: its own samples, the same for a seed, whatever its maker set, and batches for calibrate."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import quant_compile
from quant_compile.ir.errors import OptionError

VOCAB = 64


def tiny(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": VOCAB, "max_position_embeddings": 64, **sizes, **more})).eval()


class Chain(LlamaForCausalLM):
    """Writes tokens of a Markov chain over eight: after t comes t + 1, or t + 2 once in four times."""

    def forward(self, input_ids: Tensor, **more: Any) -> Any:  # type: ignore[override]
        found = super().forward(input_ids, **more)
        ids = input_ids[:, -1:]
        logits = torch.full((*ids.shape, VOCAB), -1e4)
        logits.scatter_(-1, (ids[..., None] + 1) % 8, torch.tensor(0.75).log().item())
        logits.scatter_(-1, (ids[..., None] + 2) % 8, torch.tensor(0.25).log().item())
        found.logits = logits
        return found


def test_texts_have_the_size_asked_and_a_seed_repeats_them() -> None:
    model = tiny()
    state = torch.get_rng_state()
    texts = quant_compile.own_text(model, sequences=70, length=12)
    assert [tuple(part.shape) for part in texts] == [(8, 12)] * 8 + [(6, 12)] and all(
        p.dtype == torch.int64 for p in texts
    )
    assert torch.equal(torch.get_rng_state(), state)
    again = quant_compile.own_text(model, sequences=70, length=12)
    other = quant_compile.own_text(model, sequences=70, length=12, seed=1)
    assert all(map(torch.equal, texts, again)) and not any(map(torch.equal, texts, other))
    whole = torch.cat(texts)
    assert (whole[:, 0] == model.config.bos_token_id).all() and len(set(map(tuple, whole.tolist()))) == 70


def test_text_is_drawn_from_the_model_and_nothing_is_cut_off_it() -> None:
    model = Chain(tiny(eos_token_id=3).config).eval()
    makers = {"top_k": 1, "repetition_penalty": 5.0, "min_p": 0.5, "suppress_tokens": [5], "num_beams": 3}
    model.generation_config.update(**makers, stop_strings=["a"], return_dict_in_generate=True)
    before = model.generation_config
    whole = torch.cat(quant_compile.own_text(model, sequences=48, length=40))
    assert model.generation_config is before and before.num_beams == 3
    steps = whole.diff(dim=1) % 8
    counts = Counter(steps.flatten().tolist())
    # 2 once in four: of 1872 draws a share that is 0.05 off a quarter comes once in a million.
    assert set(counts) == {1, 2} and abs(counts[2] / steps.numel() - 0.25) < 0.05
    assert (whole[:, :-1] == 3).any()  # an end of text, and the text goes on


def test_a_model_without_a_first_token_begins_anywhere() -> None:
    model = tiny(bos_token_id=None, eos_token_id=[3, 5])
    whole = torch.cat(quant_compile.own_text(model, sequences=32, length=20))
    assert whole.shape == (32, 20) and len(set(whole[:, 0].tolist())) > 8


def test_modes_come_back() -> None:
    model = tiny().train()
    model.lm_head.eval()
    quant_compile.own_text(model, 2, 4)
    assert model.training and model.model.training and not model.lm_head.training


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Linear(2, 2), "Linear has no generate"),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
            ),
            "from an encoder's input",
        ),
    ],
)
def test_models_that_write_nothing(make: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words) as raised:
        quant_compile.own_text(make())
    assert "Fix: calibrate by example batches" in str(raised.value)


@pytest.mark.parametrize("sizes", [(0, 8), (2, 1), (2, 65), (-1, 8)])
def test_sizes_that_it_cannot_write(sizes: tuple[int, int]) -> None:
    with pytest.raises(OptionError, match=r"at most 64 \(max_position_embeddings\); got"):
        quant_compile.own_text(tiny(), *sizes)
    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(), is_encoder_decoder=False)
    with pytest.raises(OptionError, match="has no vocab_size"):
        quant_compile.own_text(SimpleNamespace(config=config, generate=print))  # type: ignore[arg-type]


def test_planes_are_made_by_it(tmp_path: Path) -> None:
    model = tiny(hidden_size=128, intermediate_size=128)
    texts = quant_compile.own_text(model, sequences=16, length=16)
    policy = quant_compile.calibrate(
        model, texts, {"default": "W4A16", "method": "gptq"}, path=tmp_path / "own.safetensors", progress=False
    )
    quant_compile.compile(model, policy)
    with torch.no_grad():
        model(texts[0])
    assert quant_compile.report(model).coverage == 1.0
    assert any("gptq" in str(line) for line in quant_compile.report(model).lines)
