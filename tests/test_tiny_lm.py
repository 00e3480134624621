"""The bundled trained models: perplexity of every scheme, compiled, against the textbook scheme and against bf16.

Six schemes run as one graph of the whole model; the others are compiled layer by layer, where all layers share one
graph, which tests the same arithmetic in a fifth of the compile time. The MoE's schemes run without Inductor, two with.
"""

from __future__ import annotations

import ast
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import quant_compile
from quant_compile import demo
from quant_compile.ir.errors import PolicyWarning
from quant_compile.ir.family import family_of
from quant_compile.measure.windows import perplexity, windows_of
from tests import textbook
from tests import textbook_gguf as _textbook_gguf  # noqa: F401  adds GGUF types whose scales are searched for
from tests.runtime_support import CompileCounter, plain_inductor

__all__ = ["plain_inductor"]

pytestmark = pytest.mark.skipif(
    not (demo.WEIGHTS / "dense" / "model.safetensors").is_file(),
    reason="the trained weights are not in this checkout (examples/tiny_lm/weights)",
)

WHOLE = ("FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W8A16", "W4A16", "W4A16_ASYM")
# Of GGUF types, which share their path, one with scales and one with scales of scales; blocks of 256 do not fit the MoE's experts.
GGUF = ("GGUF_Q8_0", "GGUF_Q4_K")
TESTED = tuple(name for name in textbook.SCHEMES if not name.startswith("GGUF") or name in GGUF)
BY_LAYER = tuple(name for name in TESTED if name not in WHOLE)
LENGTH, WINDOWS, CALIBRATION = 384, 6, 2
# Product and textbook differ by the order of f32 sums, by where bf16 rounds between fused nodes, and by codes that fall
# on the other side of a tie because of either: far below this.
SAME = 0.005
# Inputs of 4 bits: moving every bf16 input of the textbook's own linears to the next float moves its perplexity on these six
# windows by up to 0.9 % (MoE, NVFP4; 0.3 % for W8A8), since a code that flips is a third of its value away. That means
# are within 0.5 % is shown where more is measured: eight models, 32 windows, benchmarks/quality.py, and test_benchmarks.py.
SAME_FP4_INPUTS = 0.015
CLOSE_TO_BF16 = {"FP8_DYNAMIC": 0.01, "FP8_BLOCK": 0.01, "W8A8": 0.01}


# Of the MoE. All schemes run as lowered graphs without Inductor, which takes seconds; two also as users run them.
MOE_WHOLE = ("FP8_DYNAMIC", "W8A8")


def same(name: str) -> float:
    """How far product and textbook may be apart, relatively."""
    return SAME_FP4_INPUTS if name in ("NVFP4", "NVFP4_STATIC", "MXFP4") else SAME


def forward_of(model: Any) -> Callable[[Tensor], Tensor]:
    """Token ids [1, length] -> logits, without a KV cache."""
    return lambda ids: model(input_ids=ids, use_cache=False).logits


@pytest.fixture(scope="module")
def heldout() -> Tensor:
    return windows_of(demo.load().heldout, LENGTH, WINDOWS + CALIBRATION)


@pytest.fixture(scope="module")
def batches(heldout: Tensor) -> list[Tensor]:
    """Calibration inputs, apart from the windows that are measured."""
    return [window[None, :-1] for window in heldout[WINDOWS:]]


@pytest.fixture(scope="module")
def bf16(heldout: Tensor) -> float:
    return perplexity(forward_of(demo.load().model), heldout[:WINDOWS])


@pytest.fixture(scope="module")
def amax(batches: list[Tensor]) -> dict[str, Tensor]:
    return textbook.input_amax(demo.load().model, batches)


def policy_of(name: str, model: Any, batches: list[Tensor], folder: Path) -> Any:
    """The policy for a textbook scheme; static schemes are calibrated."""
    policy = textbook.POLICIES[name]
    if not textbook.SCHEMES[name].static:
        return policy
    return quant_compile.calibrate(model, batches, policy, path=folder / "scales.safetensors", progress=False)


def textbook_perplexity(name: str, heldout: Tensor, amax: dict[str, Tensor]) -> float:
    return perplexity(forward_of(textbook.fake_quant_model(demo.load().model, name, amax=amax)), heldout[:WINDOWS])


@pytest.mark.parametrize("name", WHOLE)
def test_whole_model_has_the_textbook_perplexity(
    name: str, heldout: Tensor, batches: list[Tensor], bf16: float, amax: dict[str, Tensor], tmp_path: Path
) -> None:
    model = demo.load().model
    quant_compile.compile(model, policy=policy_of(name, model, batches, tmp_path))
    measured = perplexity(forward_of(model), heldout[:WINDOWS])
    quant_compile.report(model).require(coverage=1.0)
    assert measured == pytest.approx(textbook_perplexity(name, heldout, amax), rel=same(name))
    assert measured != bf16  # not a single scheme is exact: equality would mean that nothing was quantized
    if name in CLOSE_TO_BF16:
        assert measured == pytest.approx(bf16, rel=CLOSE_TO_BF16[name])


@pytest.mark.parametrize("name", BY_LAYER)
def test_layers_have_the_textbook_perplexity(
    name: str, heldout: Tensor, batches: list[Tensor], amax: dict[str, Tensor], tmp_path: Path
) -> None:
    model = demo.load().model
    policy = policy_of(name, model, batches, tmp_path)
    for layer in model.model.layers:
        layer.compile(backend="sglquant", options={"policy": policy})
    measured = perplexity(forward_of(model), heldout[:WINDOWS])
    report = quant_compile.report(model)
    layers = sum(p.numel() * p.element_size() for p in model.model.layers.parameters() if p.dim() == 2)
    assert sum(line.bytes_before for line in report.lines if line.scheme) == layers
    assert measured == pytest.approx(textbook_perplexity(name, heldout, amax), rel=same(name))


@dataclass(frozen=True)
class Moe:
    """What the tests of the MoE share: windows, their bf16 perplexity, calibration inputs and their textbook amax."""

    windows: Tensor
    bf16: float
    batches: list[Tensor]
    amax: dict[str, Tensor]

    def textbook(self, name: str) -> float:
        """Perplexity of the textbook scheme, linears and experts."""
        fake = textbook.fake_quant_model(demo.load("moe").model, name, amax=self.amax)
        return perplexity(forward_of(fake), self.windows)


@pytest.fixture(scope="module")
def moe(heldout: Tensor, batches: list[Tensor]) -> Moe:
    model, windows = demo.load("moe").model, heldout[:WINDOWS]
    return Moe(windows, perplexity(forward_of(model), windows), batches, textbook.input_amax(model, batches))


def check_moe_report(model: Any) -> None:
    """Every linear and every expert quantized, embeddings, head, gates and norms kept: by bytes, and one kernel a block."""
    report = quant_compile.report(model).require(coverage=1.0)
    experts = [line for line in report.lines if ".experts." in line.names[0]]
    assert len(experts) == 2 * model.config.num_hidden_layers
    assert all(line.scheme and line.kernels for line in experts)
    kept = {line.names[0].removesuffix(".weight").rpartition(".")[2] for line in report.lines if not line.scheme}
    assert kept == {"embed_tokens", "gate", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "norm"}


@pytest.mark.parametrize("name", [name for name in TESTED if textbook.SCHEMES[name].block <= 128])
def test_moe_has_the_textbook_perplexity(name: str, moe: Moe, tmp_path: Path, plain_inductor: CompileCounter) -> None:
    model = demo.load("moe").model
    policy = policy_of(name, model, moe.batches, tmp_path)
    for layer in model.model.layers:
        layer.compile(backend="sglquant", options={"policy": policy})
    measured = perplexity(forward_of(model), moe.windows)
    check_moe_report(model)
    assert len(plain_inductor) > 0
    assert measured == pytest.approx(moe.textbook(name), rel=same(name))
    assert measured != moe.bf16


@pytest.mark.parametrize("name", MOE_WHOLE)
def test_whole_moe_is_close_to_bf16(name: str, moe: Moe) -> None:
    model = demo.load("moe").model
    quant_compile.compile(model, policy=name)
    measured = perplexity(forward_of(model), moe.windows)
    check_moe_report(model)
    assert measured == pytest.approx(moe.textbook(name), rel=same(name))
    assert measured == pytest.approx(moe.bf16, rel=0.01)
    assert measured != moe.bf16


def another_expert(experts: Any) -> None:
    """Expert 0 gives what expert 1's second weight makes of its hidden layer."""
    experts.down_proj[0] = experts.down_proj[1]


def swapped_gate(experts: Any) -> None:
    """Up rows first."""
    experts.gate_up_proj = torch.cat(experts.gate_up_proj.chunk(2, dim=1)[::-1], dim=1)


@pytest.mark.parametrize("defect", [another_expert, swapped_gate])
def test_moe_perplexity_shows_a_wrong_block(defect: Callable[[Any], None], moe: Moe) -> None:
    """The tolerance is below what such a mistake does in one layer of four; smaller ones are for the tests of single blocks."""
    fake: Any = textbook.fake_quant_model(demo.load("moe").model, "W8A8")
    defect(fake.model.layers[1].mlp.experts)
    wrong = perplexity(forward_of(fake), moe.windows)
    assert wrong != pytest.approx(moe.textbook("W8A8"), rel=2 * SAME)


def test_textbook_experts_are_those_of_transformers(moe: Moe) -> None:
    """Unquantized, the textbook's block computes what transformers' does."""
    block: Any = demo.load("moe").model.model.layers[0].mlp
    none = torch.empty(0)
    plain = textbook.FakeQuantExperts(block.experts, None, (none, none))
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        _, weights, ids = block.gate(x)
        theirs, ours = block.experts(x, ids, weights), plain(x, ids, weights)
    assert (ours.float() - theirs.float()).norm() < 0.01 * theirs.float().norm()


@pytest.mark.parametrize("name", list(textbook.SCHEMES))
def test_weights_are_the_textbook_ones(name: str) -> None:
    """Dequantized planes of real weights; the two may part at ties (a bf16 weight is often one), by one code."""
    layers = demo.load().model.model.layers
    scheme = quant_compile.Policy.load(textbook.POLICIES[name]).default
    assert scheme is not None
    family = family_of(scheme)
    for weight in (layers[0].self_attn.k_proj.weight, layers[2].mlp.down_proj.weight):
        ours = family.dequantize_weight(
            family.quantize_weight(weight.detach(), scheme), scheme, weight.shape[1]
        ).float()
        theirs = textbook.SCHEMES[name].weight(weight.detach().float(), weight.dtype)
        cost = (theirs - weight.float()).norm()
        assert 0 < (ours - weight.float()).norm() <= 1.02 * cost
        assert (ours - theirs).norm() <= 0.2 * cost


def test_schemes_are_ordered_by_their_bits(heldout: Tensor, bf16: float, amax: dict[str, Tensor]) -> None:
    """The yardstick itself: 8 bits cost little, finer groups cost less than coarser ones, no scheme is free."""
    ppl = {name: textbook_perplexity(name, heldout, amax) for name in ("W8A16", "W4A16_G32", "W4A16", "W4A16_CHANNEL")}
    assert abs(ppl["W8A16"] / bf16 - 1) < 0.005
    assert bf16 < ppl["W4A16_G32"] < ppl["W4A16"] < ppl["W4A16_CHANNEL"] < 1.5 * bf16


def test_both_models_have_learned(heldout: Tensor, bf16: float) -> None:
    """Real perplexities: far from the 2048 of guessing. The MoE runs through transformers' own experts."""
    moe = perplexity(forward_of(demo.load("moe").model), heldout[:WINDOWS])
    assert 2 < bf16 < 20
    assert 2 < moe < 20


def test_heldout_text_is_python_and_survives_the_tokenizer() -> None:
    lm = demo.load()
    text = (demo.WEIGHTS / "heldout.txt").read_text(encoding="utf-8")
    assert lm.tokenizer.decode(lm.heldout.tolist()) == text
    first = text.split(demo.END)[1]
    assert "import" in text and len(text) > 40_000 and first.strip()


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_weights_are_small_and_bf16(name: str) -> None:
    assert os.path.getsize(demo.WEIGHTS / name / "model.safetensors") <= 10_000_000
    assert {parameter.dtype for parameter in demo.load(name).model.parameters()} == {torch.bfloat16}


def test_textbook_imports_nothing_of_the_product() -> None:
    """The yardstick would prove nothing if it shared code with what it measures."""
    tree = ast.parse(Path(textbook.__file__).read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    assert names <= {"__future__", "copy", "collections", "dataclasses", "gguf", "torch"}


def test_demo_reads_and_decodes_like_generate() -> None:
    """The demo's own loop over a static cache, eager: logits as without a cache, tokens as by transformers."""
    lm = demo.load()
    windows = windows_of(lm.heldout, 48, 2)
    prompt = windows[:, :-1]
    runner = demo.Runner(lm, 2, 48 + 8)
    with torch.inference_mode():
        whole = forward_of(lm.model)(prompt)
        read = torch.stack(list(runner.read(prompt)), dim=1)
        assert (read.float() - whole.float()).norm() < 0.02 * whole.float().norm()
        ppl, logits = runner.perplexity(windows)
        assert ppl == pytest.approx(perplexity(forward_of(lm.model), windows), rel=0.01)
        tokens, seconds = runner.decode(logits, 8)
        theirs = lm.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    assert tokens.tolist() == theirs[:, 48:].tolist()
    assert seconds > 0


def test_the_experts_of_the_demo(plain_inductor: CompileCounter) -> None:
    """One graph serves perplexity, speed and text; the ledger is of that graph."""
    lm = demo.load("moe")
    windows = windows_of(lm.heldout, 24, 4)
    bf16 = perplexity(forward_of(lm.model), windows)
    sizes = {name: parameter.numel() * parameter.element_size() for name, parameter in lm.model.named_parameters()}
    w8a8, report = demo.measure("moe", lm, "W8A8", windows)
    assert len(plain_inductor) == 1
    assert abs(w8a8.perplexity / bf16 - 1) < 0.05
    assert w8a8.tokens_per_second > 0 and w8a8.continuation
    experts = [line for line in report.lines if ".experts." in line.names[0]]
    assert experts and {line.scheme for line in experts} == {"W8A8"}
    after = sum(line.bytes_after for line in experts)
    assert after < 0.52 * sum(size for name, size in sizes.items() if ".experts." in name)
    assert w8a8.coverage == 1.0


@pytest.mark.parametrize("full", [False, True])
def test_what_the_demo_prints(
    full: bool,
    capfd: pytest.CaptureFixture[str],
    plain_inductor: CompileCounter,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """One table, one text a run, ledgers and a page where they are asked for, our warnings; nothing of torch's or transformers'.

    Nothing is left changed.
    """
    monkeypatch.setattr(demo, "WINDOW", 16)
    monkeypatch.setattr(demo, "SEQUENCES", 2)
    measure, threads = demo.measure, torch.get_num_threads()

    def noisy(*arguments: Any) -> Any:
        warnings.warn("torch has something to say", UserWarning, stacklevel=1)
        warnings.warn("rule 7 matches nothing", PolicyWarning, stacklevel=1)
        return measure(*arguments)

    monkeypatch.setattr(demo, "measure", noisy)
    filters, verbosity = list(warnings.filters), transformers.logging.get_verbosity()
    page = tmp_path / "demo.html"
    assert demo.main(policies=["W8A8"], moe_policies=[], full=full, device="cpu", html=page if full else None) == 0
    assert (warnings.filters, transformers.logging.get_verbosity()) == (filters, verbosity)
    assert transformers.logging.is_progress_bar_enabled() and torch.get_num_threads() == threads
    out, err = capfd.readouterr()
    assert err == "" and len(plain_inductor) == 2
    assert "torch has something to say" not in out and "warning: rule 7 matches nothing" in out
    assert out.index("sglquant demo: 2 runs") < out.index("dense LlamaForCausalLM") < out.index("dense bf16")
    rows = [[cell.strip() for cell in line.split("│")] for line in out.splitlines() if line.startswith("│ dense")]
    (bf16,) = [row for row in rows if row[2] == "bf16"]
    (w8a8,) = [row for row in rows if row[2] == "W8A8"]
    assert bf16[4] == "+0.00%" and bf16[7] == "–" and w8a8[7] == "100.0%"
    assert abs(float(w8a8[3]) / float(bf16[3]) - 1) < 0.05
    assert out.count(" continues:") == 2 and out.count("Held-out perplexity") == 1
    assert out.count("sglquant ledger: W8A8 on cpu") == full
    assert out.count("dense W8A8, weight by weight: ") == full and page.exists() == full
    assert not full or "packing" in page.read_text(encoding="utf-8")


def test_missing_weights_are_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(demo.DemoError, match=r"tokenizer\.json, heldout\.txt is missing(.|\n)*--model DIR"):
        demo.load(folder=tmp_path)
    with pytest.raises(demo.DemoError, match=r"no model 'huge'.*dense, moe"):
        demo.load("huge")
    assert demo.main(model=str(tmp_path)) == 1
    assert "Fix:" in capsys.readouterr().out
