"""docs/moe.md tells the truth: its policies decide what it says, its tables name what the code has, its reasons are the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers

from quant_compile.ir import moe
from quant_compile.model.plan import Plan
from quant_compile.policy import CONVENTIONS, Policy, shipped_policies

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "moe.md").read_text(encoding="utf-8")
POLICIES = re.findall(r"^```yaml\n(.*?)^```", TEXT, flags=re.S | re.M)
SOURCES = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "quant_compile").rglob("*.py")))


def decided(index: int, tmp_path: Path) -> dict[str, str]:
    """Name -> scheme that a policy of the document gives a tiny model with two layers."""
    path = tmp_path / "policy.yaml"
    path.write_text(POLICIES[index], encoding="utf-8")
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    plan = Plan.of(Policy.load(path), model)
    assert not plan.problems
    return {entry.names[0].removeprefix("model."): entry.scheme for entry in plan.entries}


def test_experts_and_attention_apart(tmp_path: Path) -> None:
    assert len(POLICIES) == 2
    schemes = decided(0, tmp_path)
    assert schemes["layers.1.mlp.experts.gate_up_proj"] == schemes["layers.0.mlp.experts.down_proj"] == "FP8_DYNAMIC"
    assert schemes["layers.1.self_attn.q_proj"] == schemes["layers.0.self_attn.o_proj"] == "W8A8"
    assert schemes["layers.1.mlp.gate"] == schemes["lm_head"] == "keep"


def test_one_block_is_kept(tmp_path: Path) -> None:
    schemes = decided(1, tmp_path)
    for weight in ("gate_up_proj", "down_proj"):
        assert schemes[f"layers.0.mlp.experts.{weight}"] == "keep"
        assert schemes[f"layers.1.mlp.experts.{weight}"] == "W4A16"
    assert schemes["layers.0.self_attn.q_proj"] == "FP8_DYNAMIC"
    assert schemes["layers.0.mlp.gate"] == "keep"


def test_every_activation_and_gate_and_shipped_policy_is_named() -> None:
    table = re.search(r"^\| activation \|.*\n\|[- |:]+\n((?:\|.*\n)+)", TEXT, flags=re.M)
    assert table is not None
    named = {name.partition("(")[0] for row in table[1].splitlines() for name in re.findall(r"`(\S+?)`", row)}
    assert named == set(moe._KINDS)
    assert all(f"`{rule.match}`" in TEXT for rule in CONVENTIONS if rule.reason == "MoE router gate")
    assert {"qwen3_moe", "mixtral", "deepseek_v3"} <= set(shipped_policies())


REASONS = re.findall(r"^\| `\W*(.+?)\W*` \| (?!max|g |gelu)", TEXT, flags=re.M)


@pytest.mark.parametrize("reason", [reason for reason in REASONS if " " in reason])
def test_quoted_reasons_are_those_of_the_code(reason: str) -> None:
    """Numbers and what stands behind dots differ from case to case."""
    plain = re.sub(r'"\s*f?"|\{[^}]*\}', "#", re.sub(r'"\n\s*f?"', "", SOURCES))
    for part in re.split(r"\W*\.\.\.\W*|; ", reason):
        assert re.sub(r"\b\d\b", "#", part) in plain or part in plain, part


def test_reasons_are_quoted() -> None:
    assert len([reason for reason in REASONS if " " in reason]) == 7
