"""``sglquant inspect`` on the shapes of Llama-3-8B and Qwen3-30B-A3B, without a GPU and without weights: every site is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from quant_compile import cli
from quant_compile.inspect.kernels import kernel_choices
from quant_compile.inspect.models import ModelSpec, build_model
from quant_compile.lowering.target import Target
from quant_compile.model.plan import Plan
from quant_compile.policy import Policy

LLAMA = transformers.LlamaConfig(
    vocab_size=128256, num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
    num_key_value_heads=8, architectures=["LlamaForCausalLM"], dtype="bfloat16",
)  # fmt: skip
QWEN = transformers.Qwen3MoeConfig(
    vocab_size=151936, num_hidden_layers=48, hidden_size=2048, moe_intermediate_size=768, num_experts=128,
    num_experts_per_tok=8, num_attention_heads=32, num_key_value_heads=4, intermediate_size=6144,
    architectures=["Qwen3MoeForCausalLM"], dtype="bfloat16",
)  # fmt: skip
QWEN.head_dim = 128
SITES = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen": ("q_proj", "k_proj", "v_proj", "o_proj", "experts.gate_up_proj", "experts.down_proj"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders that hold nothing but a config.json."""
    out: dict[str, str] = {}
    for name, config in (("llama", LLAMA), ("qwen", QWEN)):
        folder = tmp_path_factory.mktemp(name)
        config.save_pretrained(folder)
        assert [path.name for path in Path(folder).iterdir() if path.suffix != ".json"] == []
        out[name] = str(folder)
    return out


def packed(n: int, k: int, count: int = 1) -> int:
    """Bytes of an NVFP4 weight in row form: codes, a scale for 16 of them, a global scale a row."""
    return count * n * (k // 2 + k // 16 + 4)


@pytest.mark.parametrize("model", SITES)
@pytest.mark.parametrize("target", ["sm100", "sm120"])
def test_every_weight_has_a_kernel_a_layout_and_bytes(model: str, target: str, folders: dict[str, str]) -> None:
    """All layers, from the plan."""
    plan = Plan.of(Policy.load("nvfp4"), build_model(ModelSpec(folders[model])))
    choices = kernel_choices(plan, Target.fake(target))
    named = {entry.names[0] for choice in choices for entry in choice.entries}
    layers = 32 if model == "llama" else 48
    assert len(named) == layers * len(SITES[model])
    assert all(any(f".{layer}." in name and name.removesuffix(".weight").endswith(site) for name in named)
               for layer in (0, layers - 1) for site in SITES[model])  # fmt: skip
    for choice in choices:
        assert choice.dispatch is not None and choice.problem.scheme.spec == "NVFP4"
        assert {name for _, name in choice.dispatch.table} <= {"triton_fp4", "triton_fp4_moe"}
    if model == "llama":
        wanted = layers * (packed(4096, 4096, 2) + packed(1024, 4096, 2) + packed(14336, 4096, 2) + packed(4096, 14336))
    else:
        wanted = layers * (packed(4096, 2048) + packed(512, 2048, 2) + packed(2048, 4096))
        wanted += layers * 128 * (packed(2 * 768, 2048) + packed(2048, 768))
    assert sum(choice.bytes_packed for choice in choices) == wanted


@pytest.mark.parametrize("model", SITES)
def test_inspect_tells_every_site_and_why_the_others_were_not_chosen(
    capsys: pytest.CaptureFixture[str], model: str, folders: dict[str, str]
) -> None:
    arguments = ("inspect", folders[model], "--target", "sm100", "--policy", "nvfp4", "--layers", "1")
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    kernels, rest = out.split("kernels not chosen")
    refused, ledger = rest.split("sglquant ledger")
    assert "NONE" not in kernels and "Traceback" not in out + err
    for site in SITES[model]:
        assert site in kernels
        line = next(line for line in ledger.splitlines() if f"{site}" in line)
        assert "NVFP4" in line and "triton_fp4" in line and "→" in line and ("rows" in line or "experts" in line)
    flat = " ".join(refused.replace("│", " ").split())
    assert "its 0.3 series has" in flat and "multiply weights and inputs of other schemes" in flat
    assert "reads layout nvfp4_swizzled" in flat and re.search(r"estimated \d+\.\d\d( to \d+\.\d\d)? times", flat)
    assert "have been run on sm90 only" in kernels
    assert "coverage 100.0%" in ledger
    if model == "qwen":
        assert "128 x 2048 x 768" in kernels and "triton_fp4_moe" in kernels
        assert "all linears" in refused and "all experts" in refused and "torch_grouped_fp4_moe" in refused
        assert "router gate" in ledger


def test_a_policys_fallback_is_what_the_tables_show(
    capsys: pytest.CaptureFixture[str], folders: dict[str, str], tmp_path: Path
) -> None:
    """Linears and experts; the ledger and the table of kernels agree."""
    policy = tmp_path / "fallback.yaml"
    policy.write_text("version: 1\ndefault: NVFP4\nfallback: weight_only\n")
    arguments = ("inspect", folders["qwen"], "--target", "sm90", "--policy", str(policy), "--layers", "1")
    assert cli.main(arguments) == 0
    out, _ = capsys.readouterr()
    kernels, rest = out.split("kernels not chosen")
    ledger = rest.split("sglquant ledger")[1]
    assert "NONE" not in kernels and kernels.count("(fallback of NVFP4)") >= 2
    assert "triton_moe4" in kernels and "have been run on" not in kernels
    line = next(line for line in ledger.splitlines() if "experts.down_proj" in line)
    assert "NVFP4A16" in line and "triton_moe4" in ledger
    flat = " ".join(ledger.replace("│", " ").split())
    assert "no kernel here multiplies" in flat


def test_below_sm100_experts_are_an_error_with_all_reasons(
    capsys: pytest.CaptureFixture[str], folders: dict[str, str]
) -> None:
    arguments = ("inspect", folders["qwen"], "--target", "sm90", "--policy", "nvfp4", "--layers", "1")
    assert cli.main(arguments) == 1
    out, err = capsys.readouterr()
    assert (
        "NONE. Fix: set `fallback: weight_only`" in out and "needs sm100 or newer" in out.split("kernels not chosen")[1]
    )
    assert err.startswith("sglquant: no kernel for model.layers.0")
