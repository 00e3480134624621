"""``compare``: its numbers are those of direct evaluation, its refusals name the fix, and the model is as before afterwards."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import quant_compile
from quant_compile import cli, demo
from quant_compile.ir.errors import MissingLibraryError, OptionError, PolicyError, WeightError
from quant_compile.measure import compare as module
from quant_compile.measure.compare import compare, labelled
from quant_compile.measure.comparison import Comparison, Row, size_text
from quant_compile.measure.text import windows_for
from quant_compile.measure.windows import perplexity, windows_of
from quant_compile.policy import Policy
from tests import textbook

SIZE, LENGTH = 128, 24


def small() -> Any:
    """A Llama of one layer in f32, all of whose linears have k = 128, in train mode; weights are large enough to be sure of tokens."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=SIZE,
        intermediate_size=SIZE,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    return transformers.LlamaForCausalLM(config).train().requires_grad_(False)


def text() -> Tensor:
    return torch.randint(0, 96, (3 * LENGTH + 5,), generator=torch.Generator().manual_seed(1))


class State:
    """What must not change of a model: values, attributes of every module, generation config, and what it computes."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.values = {name: value.clone() for name, value in model.state_dict().items()}
        self.keys = {name: set(vars(part)) for name, part in model.named_modules()}
        self.modes = {name: part.training for name, part in model.named_modules()}
        self.config = model.generation_config.to_dict()
        self.out = self.compute()

    def compute(self) -> Tensor:
        with torch.no_grad():
            return self.model(input_ids=torch.arange(8)[None]).logits

    def check(self) -> None:
        assert {name: set(vars(part)) for name, part in self.model.named_modules()} == self.keys
        assert {name: part.training for name, part in self.model.named_modules()} == self.modes
        assert self.model.generation_config.to_dict() == self.config
        assert all(torch.equal(value, self.values[name]) for name, value in self.model.state_dict().items())
        assert torch.equal(self.compute(), self.out)


@pytest.fixture(scope="module")
def compared() -> Iterator[tuple[Any, Comparison, State]]:
    model = small()
    model.model.layers[0].mlp.eval()  # modes need not be alike
    before = State(model)
    mixed = {"default": "keep", "rules": [{"match": "*.mlp.*", "scheme": "W8A16"}]}
    policies = {"all": "W8A16", "static": "FP8", "mlp": mixed}
    yield model, compare(model, policies, text(), length=LENGTH, new_tokens=0, progress=False), before


def test_every_policy_has_a_row(compared: tuple[Any, Comparison, State]) -> None:
    result = compared[1]
    assert [row.label for row in result.rows] == ["eager", "keep", "all", "static", "mlp"]
    assert result.meta["windows"] == 3 and result.meta["tokens"] == 3 * LENGTH


def test_bits_and_bytes_are_those_of_the_planes(compared: tuple[Any, Comparison, State]) -> None:
    """int8 and one f32 scale for 128 inputs; 4 linears of attention and 3 of the MLP of 128 x 128."""
    model, result, _ = compared
    whole = sum(parameter.nbytes for parameter in model.parameters())
    assert (result["eager"].bits, result["eager"].bytes) == (32, whole)
    assert (result["keep"].bits, result["keep"].bytes, result["keep"].coverage) == (32, whole, None)
    assert result["all"].bits == result["mlp"].bits == pytest.approx(8 + 32 / SIZE)
    saved = SIZE * SIZE * 4 - SIZE * (SIZE + 4)
    assert result["all"].bytes == whole - 7 * saved and result["mlp"].bytes == whole - 3 * saved
    assert result["all"].coverage == result["mlp"].coverage == 1.0


def test_keeping_diverges_by_rounding_only(compared: tuple[Any, Comparison, State]) -> None:
    """Compiled f32 and eager f32 differ in the order of sums; logarithms near -5 have steps of 5e-7."""
    kept = compared[1]["keep"]
    assert kept.kl is not None and kept.kl < 1e-6 and kept.kl_999 is not None and kept.kl_999 < 1e-6
    assert kept.top1 == 1.0
    assert kept.perplexity == pytest.approx(compared[1]["eager"].perplexity, rel=1e-5)


def test_numbers_are_those_of_direct_evaluation(compared: tuple[Any, Comparison, State]) -> None:
    """Perplexity and divergence of the textbook's own quantized model; f32 sums of another order move both a little."""
    model, result, _ = compared
    cut = windows_of(text(), LENGTH, 3)
    model.eval()
    fake = textbook.fake_quant_model(small().eval(), "W8A16")
    forward = lambda of: lambda ids: of(input_ids=ids, use_cache=False).logits  # noqa: E731
    assert result["eager"].perplexity == pytest.approx(perplexity(forward(model), cut), rel=1e-6)
    assert result["all"].perplexity == pytest.approx(perplexity(forward(fake), cut), rel=1e-4)
    with torch.no_grad():
        logs = [forward(of)(cut[:, :-1]).double().log_softmax(-1) for of in (model, fake)]
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).flatten()
    row = result["all"]
    assert row.kl == pytest.approx(float(kl.mean()), rel=0.02)
    assert row.kl_999 == pytest.approx(float(kl.quantile(0.999)), rel=0.05)
    assert row.top1 == pytest.approx(float((logs[0].argmax(-1) == logs[1].argmax(-1)).double().mean()), abs=2 / 72)


def test_a_policy_that_fails_says_why_and_others_go_on(compared: tuple[Any, Comparison, State]) -> None:
    failed = compared[1]["static"]
    assert failed.perplexity is failed.bits is failed.bytes is None
    assert failed.error is not None and "calibrated input scale" in failed.error
    assert compared[1]["mlp"].error is None
    assert "static: model.layers.0" in str(compared[1])


def test_the_model_is_as_before(compared: tuple[Any, Comparison, State]) -> None:
    model, _, before = compared
    model.train()
    model.model.layers[0].mlp.eval()
    before.check()


def test_logits_that_are_not_kept_are_computed_anew(compared: tuple[Any, Comparison, State]) -> None:
    """Beside the compiled model's, and the ledger takes that for no miss."""
    model = small().eval()
    found = compare(
        model, "W8A16", text(), length=LENGTH, new_tokens=0, baseline=False, keep_logits=0, progress=False
    ).rows[1]
    wanted = compared[1]["all"]
    assert (found.kl, found.top1) == (pytest.approx(wanted.kl, rel=1e-3), wanted.top1)
    assert found.unquantized == () and found.coverage == 1.0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_the_model_is_as_before_after_an_interruption(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    before = State(model)

    def fail(*arguments: Any) -> Any:
        assert model._compiled_call_impl is not None
        raise error

    monkeypatch.setattr(module, "_quality", fail)
    given: Any = (model, ["W8A16"], text())
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            compare(*given, length=LENGTH, new_tokens=0, progress=False)
    else:
        row = compare(*given, length=LENGTH, new_tokens=0, progress=False).rows[-1]
        assert row.error == "RuntimeError: out of memory"
    before.check()


def test_results_are_printed_and_written(compared: tuple[Any, Comparison, State], tmp_path: Path) -> None:
    result = compared[1]
    printed = str(result)
    assert "72 tokens in 3 windows of 24" in printed and "│ mlp " in printed
    data = json.loads(Path(tmp_path / "r.json").read_text() if result.to_json(tmp_path / "r.json") else "")
    assert [row["label"] for row in data["rows"]] == [row.label for row in result.rows] and data[
        "model"
    ] == "LlamaForCausalLM"
    with pytest.raises(KeyError, match="no row 'x'; there are eager, keep"):
        result["x"]


def test_a_plot_is_drawn(compared: tuple[Any, Comparison, State], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = compared[1].plot(tmp_path / "plot.png")
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingLibraryError, match=r"pip install .quant-compile\[plot\]"):
        Comparison((Row("eager"),), {}).plot("x.png")


# Policies in every form.


def test_policies_come_in_every_form(tmp_path: Path) -> None:
    path = Policy.load("W4A16").save(tmp_path / "mine.yaml")
    forms = [str(path), {"default": "W8A8", "name": "own"}, Policy.load("W8A16"), "keep"]
    assert [name for name, _ in labelled(forms)] == ["W4A16", "own", "W8A16", "keep"]
    assert [name for name, _ in labelled("w4a16", baseline=True)] == ["keep", "W4A16"]
    assert [name for name, _ in labelled(["KEEP", "w4a16"], baseline=True)] == ["keep", "W4A16"]
    assert [name for name, _ in labelled({"a": "W4A16", "b": path})] == ["a", "b"]
    assert [name for name, _ in labelled(["W4A16", "W4A16"])] == ["W4A16", "W4A16 (2)"]
    assert labelled({"default": "W8A8"})[0][1] == Policy.load("W8A8")


# Bad input.


class Encoder(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros(ids.shape[0], 4)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"policies": []}, "no policies were given. Fix"),
    ({"text": ""}, "the text is empty. Fix"),
    ({"text": torch.arange(20)}, "too short: 19 tokens to predict, at least 32 are needed"),
    ({"text": torch.tensor([], dtype=torch.int64)}, "token ids are"),
    ({"text": torch.randn(64)}, "token ids are whole numbers, got float32"),
    ({"text": torch.full((64,), 96)}, "token 96 of the text is not in the model's vocabulary of 96. Fix"),
    ({"text": torch.full((64,), -1)}, "token ids are 0 and more"),
    ({"text": ["some", "texts"]}, "Fix: join them"),
    ({"text": object()}, "the text is a string, a path or token ids"),
    ({"text": Path("/nowhere/at.txt")}, "/nowhere/at.txt cannot be read"),
    ({"text": "some words " * 99}, "does not say where its tokenizer is. Fix: give tokenizer="),
    ({"text": "some words " * 99, "tokenizer": "/nowhere"}, "no tokenizer in /nowhere"),
    ({"text": "some words " * 99, "tokenizer": 3}, "tokenizer must be one of transformers or a path"),
    ({"length": 0}, "length must be a number from 1 up"),
    ({"length": 65}, "more than the 64 positions"),
    (
        {"length": 60, "text": torch.zeros(40, dtype=torch.int64)},
        "the text has 40 tokens, and one window needs 61. Fix",
    ),
    ({"batch": 4}, "batch must be 1 to 3"),
    ({"new_tokens": -1}, "new_tokens 0 or more"),
    ({"options": {"release_weights": True}}, "no option 'release_weights'"),
    ({"model": "Qwen/Qwen3-0.6B"}, "must be a torch.nn.Module, got str. Fix: load it first"),
    ({"model": Encoder()}, "gives no logits for each token. Fix"),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_names_the_fix(given: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"model": small(), "policies": "W8A16", "text": text(), "length": LENGTH} | given
    with pytest.raises(OptionError) as raised:
        compare(**arguments, progress=False)
    assert message in str(raised.value)


def test_other_mistakes_are_told_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_reference", None)
    with pytest.raises(PolicyError, match="Did you mean W8A16"):
        compare(small(), ["W8A61"], text())
    with torch.device("meta"):
        empty = small()
    with pytest.raises(WeightError, match="has no weights"):
        compare(empty, ["W8A16"], text())
    compiled = quant_compile.compile(small().eval(), "W8A16")
    with pytest.raises(OptionError, match=r"uncompile\(model\)"):
        compare(compiled, ["W8A16"], text())
    quant_compile.uncompile(compiled)


def test_a_name_of_a_file_that_is_not_there_is_said_to_be_one() -> None:
    lm = demo.load()
    with pytest.raises(OptionError, match="a file of that name would be read, and there is none"):
        windows_for(lm.model, "corpus.txt", lm.tokenizer)


def test_a_text_is_read_by_the_tokenizer(tmp_path: Path) -> None:
    lm = demo.load()
    words = (demo.WEIGHTS / "heldout.txt").read_text(encoding="utf-8")[:4000]
    (tmp_path / "t.txt").write_text(words, encoding="utf-8")
    wanted = windows_of(torch.tensor(lm.tokenizer(words, add_special_tokens=False)["input_ids"]), 64, 2)
    for given in (words, tmp_path / "t.txt", str(tmp_path / "t.txt"), lm.heldout[:129]):
        for tokenizer in (lm.tokenizer, str(demo.WEIGHTS / "tokenizer.json")):
            assert torch.equal(windows_for(lm.model, given, tokenizer, 64, 2), wanted)
    assert windows_for(lm.model, lm.heldout, length=None, count=2).shape == (2, 513)
    assert torch.equal(windows_for(lm.model, wanted, count=1), wanted[:1])


def test_a_tokenizer_that_begins_texts_begins_windows() -> None:
    class Beginning:
        bos_token_id = 7

        def __call__(self, words: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [7] * add_special_tokens + [8 + ord(c) % 80 for c in words]}

    cut = windows_for(small(), "some words and more of them, " * 9, Beginning(), 32, 4)
    assert cut[:, 0].tolist() == [7] * 4 and 7 not in cut[0, 1:].tolist()


def test_sizes_are_words() -> None:
    assert [size_text(size) for size in (12, 4321, 9.97e6, 16.06e9)] == ["12 B", "4.32 KB", "9.97 MB", "16.1 GB"]


@pytest.mark.slow
def test_speed_is_that_of_generate_and_the_command_prints_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, tokenizer = demo.WEIGHTS / "dense", demo.WEIGHTS / "tokenizer.json"
    given = ["compare", str(folder), str(demo.WEIGHTS / "heldout.txt"), "--policies", "W8A16", "--new-tokens", "32"]
    given += ["--tokenizer", str(tokenizer), "--length", "32", "--windows", "2", "--device", "cpu"]
    assert cli.main([*given, "--json", str(tmp_path / "r.json")]) == 0
    assert "W8A16" in capsys.readouterr().out
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["label"] for row in rows] == ["eager", "keep", "W8A16"]
    for row in rows:  # on a busy machine one token may take as long as 32, which is said
        assert (row["tokens_per_second"] or 0) > 0 or "took no longer than one; raise new_tokens" in row["error"]


def test_the_first_token_is_no_part_of_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cut = small().eval(), windows_of(text(), LENGTH, 3)
    setting = module._Setting(cut, batch=2, new_tokens=8, options={}, keep=0)
    monkeypatch.setattr(module, "_seconds", lambda model, ids, count: {1: 0.5, 8: 1.2}[count])
    assert module._speed(model, setting) == (pytest.approx(2 * 7 / 0.7), None)
    monkeypatch.setattr(module, "_seconds", lambda model, ids, count: 0.5)
    assert module._speed(model, setting) == (None, "generate: 8 tokens took no longer than one; raise new_tokens")
    assert module._speed(nn.Linear(2, 2), setting) == (None, "Linear does not generate")


def test_the_command_reports_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["compare", str(tmp_path), "text", "--policies", "W8A61"]) == 1
    assert "Did you mean W8A16" in capsys.readouterr().err
    assert cli.main(["compare", str(tmp_path), "text", "--policies", "W8A16"]) == 1
    assert "has no config.json. Fix" in capsys.readouterr().err
