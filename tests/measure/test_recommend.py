"""``recommend``: policies that the target's kernels serve, for every goal; names of goals and GPUs; bounds by the formulas."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quant_compile import cli
from quant_compile.explain import explain
from quant_compile.inspect.models import construct, example_inputs
from quant_compile.ir.errors import OptionError, QuantError
from quant_compile.ir.scheme import parse
from quant_compile.lowering import roofs
from quant_compile.lowering.target import FAKE_SM_COUNT, Target
from quant_compile.measure import recommend as search
from quant_compile.measure.devices import CPU_BANDWIDTH, CPU_MATH, DEVICES, OF_ARCH, device_of
from quant_compile.measure.goals import GOALS, goal_of
from quant_compile.measure.recommend import recommend
from quant_compile.measure.recommendation import Recommendation
from quant_compile.measure.roofline import BATCH, CONTEXT
from quant_compile.model.plan import Plan
from quant_compile.policy import Policy

TARGETS = ("sm80", "sm89", "sm90", "sm100", "cpu")
NAMES = tuple(goal.name for goal in GOALS)
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
}


def dense(hidden: int = 256, inner: int = 512, **more: Any) -> Any:
    sizes = SIZES | {"hidden_size": hidden, "intermediate_size": inner} | more
    return transformers.LlamaConfig(**sizes, architectures=["LlamaForCausalLM"], dtype="bfloat16")


def moe() -> Any:
    sizes = SIZES | {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "num_experts": 8}
    return transformers.Qwen3MoeConfig(
        **sizes, num_experts_per_tok=2, architectures=["Qwen3MoeForCausalLM"], dtype="bfloat16"
    )


CONFIGS = {"dense": dense, "moe": moe, "odd": lambda: dense(200, 300, num_attention_heads=5, head_dim=40)}


@lru_cache(maxsize=None)
def model_of(name: str) -> Any:
    return construct(CONFIGS[name](), None, torch.bfloat16).eval()


@lru_cache(maxsize=None)
def found(name: str, target: str, goal: str) -> Recommendation:
    return recommend(model_of(name), target, goal)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_goal_has_a_policy_that_the_target_serves(name: str, target: str) -> None:
    """Traced as compiling would: every weight that the policy names has a scheme and kernels, none of which is the reference."""
    traced: set[Any] = set()
    for goal in NAMES:
        got = found(name, target, goal)
        assert got.policy.default is not None and got.reasons and got.kernels, goal
        assert all("reference" not in served.kernels for served in got.kernels)
        assert not Plan.of(got.policy, model_of(name)).problems
        key = (got.policy.default, got.policy.rules)
        if key not in traced and name != "odd":  # which has problems of other sizes, and the same graph
            traced.add(key)
            report = explain(model_of(name), example_inputs(model_of(name), 8), got.policy, got.target).report
            assert report.coverage == 1.0 and not report.skips, goal


@pytest.mark.parametrize(
    ("target", "goal", "default", "kv_cache"),
    [
        ("sm80", "memory", "W4A16", None),
        ("sm90", "memory", "W4A16", None),
        ("sm80", "throughput", "W8A8", None),
        ("sm89", "throughput", "FP8_DYNAMIC", None),
        ("sm90", "throughput", "FP8_DYNAMIC", None),
        ("sm80", "long-context", "W8A8", "INT8"),
        ("sm90", "long-context", "FP8_DYNAMIC", "FP8"),
        ("sm90", "latency", "W4A16", None),
        ("sm80", "sensitive", "W8A8", None),
        ("sm90", "sensitive", "FP8_BLOCK", None),
        ("cpu", "throughput", "W8A16", None),
        ("cpu", "sensitive", "W8A16", None),
    ],
)
def test_the_guide(target: str, goal: str, default: str, kv_cache: str | None) -> None:
    policy = found("dense", target, goal).policy.to_dict()
    assert (policy["default"], policy.get("kv_cache")) == (default, kv_cache)


def test_large_models_get_four_bit_inputs_where_these_are_multiplied() -> None:
    """On sm100 throughput takes NVFP4 once the products are large enough for it to be estimated clearly faster; on sm90 never."""
    config = dense(8192, 28672, num_attention_heads=64, num_key_value_heads=8, head_dim=128)
    assert recommend(config, "b200", "throughput").policy.to_dict()["default"] == "NVFP4"
    assert recommend(config, "h100", "throughput").policy.to_dict()["default"] == "FP8_DYNAMIC"


def test_a_block_of_experts_is_bound_by_reading_and_still_gets_eight_bits_for_throughput() -> None:
    """Weights in 4 bits are estimated to be faster there, and are named beside."""
    sizes = SIZES | {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128}
    config = transformers.Qwen3MoeConfig(**sizes, num_experts_per_tok=8, architectures=["Qwen3MoeForCausalLM"])
    got = recommend(config, "h100", "throughput")
    assert got.policy.to_dict()["default"] == "FP8_DYNAMIC"
    assert any("W4A16 is estimated to take" in text for text in got.reasons)


def test_a_scheme_without_kernels_is_refused_with_the_kernels_reason() -> None:
    reasons = found("dense", "sm80", "throughput").reasons
    assert any(
        "FP8_DYNAMIC has no kernel here" in text and "needs sm89 or newer, this is sm80" in text for text in reasons
    )
    assert not any("FP8" in cost.name for cost in found("dense", "sm80", "throughput").costs)


def test_weights_without_kernels_get_another_scheme_or_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no kernel took W4A16 at k = 512, and nothing at all at n = 128: the rules name the weights, and nothing else."""
    real = search.kernel_choices

    def without(plan: Any, target: Target) -> Any:
        choices = real(plan, target)
        refused = [(c.problem.k == 512 and c.problem.scheme == parse("W4A16")) or c.problem.n == 128 for c in choices]
        return [replace(c, dispatch=None) if bad else c for c, bad in zip(choices, refused, strict=True)]

    monkeypatch.setattr(search, "kernel_choices", without)
    got = recommend(model_of("dense"), "sm90", "memory")
    plan = Plan.of(got.policy, model_of("dense"))
    schemes = {entry.names[0].rpartition(".")[2]: entry.scheme for entry in plan.entries}
    assert (
        schemes.pop("down_proj") == "NVFP4A16"
        and schemes["k_proj"] == schemes["v_proj"] == schemes["lm_head"] == "keep"
    )
    assert {schemes[name] for name in ("q_proj", "o_proj", "gate_proj", "up_proj")} == {"W4A16"}
    assert any("down_proj get NVFP4A16: no kernel of sm90 takes W4A16 at n=256, k=512" in text for text in got.reasons)
    assert any("stay in 16 bits" in text for text in got.reasons) and not plan.problems


def test_a_device_without_libraries_gets_what_is_left() -> None:
    """No Triton and no library: nothing but 16 bits."""
    got = recommend(model_of("dense"), Target.fake("sm90", frozenset()), "memory")
    served = {served.scheme for served in got.kernels}
    assert (got.policy.default is None) == (not served)
    assert all("triton" not in entry.kernels for entry in got.kernels)


def test_a_policy_is_saved_with_its_reasons_and_loads(tmp_path: Path) -> None:
    got = found("moe", "sm90", "long-context")
    path = got.save(tmp_path / "p.yaml")
    assert Policy.load(path) == got.policy
    lines = path.read_text(encoding="utf-8").splitlines()
    assert (
        lines[0].startswith("# long-context on H200 (sm90), Qwen3MoeForCausalLM") and lines[1] == f"# {got.reasons[0]}"
    )
    data = json.loads(got.to_json(tmp_path / "r.json"))
    assert data["policy"] == got.policy.to_dict() and (tmp_path / "r.json").is_file()
    printed = str(got)
    assert "default: FP8_DYNAMIC" in printed and "kernels on sm90" in printed and "mlp.experts" in printed


# Costs.


def test_costs_are_bytes_and_operations_over_the_roofs() -> None:
    """By hand: Llama of one layer, 256 -> 512, 2 heads of 128 over 1; in bf16 on an H100."""
    got = recommend(dense(), "h100", "latency")
    plain, chosen = got.costs[:2]
    linears = 256 * 256 * 2 + 2 * 256 * 128 + 3 * 256 * 512
    head = 512 * 256
    assert plain.bytes == 2 * (linears + 2 * head + 3 * 256)
    assert plain.kv_bytes == 1000 * 2 * 2 * 128
    read = (2 * (linears + head) + CONTEXT * 2 * 2 * 128) / 3350e9
    assert plain.ms_token == pytest.approx(1e3 * read, rel=1e-6)
    assert plain.ms_step == pytest.approx(1e3 * (2 * (linears + head) + BATCH * CONTEXT * 512) / 3350e9, rel=1e-6)
    assert plain.step_bound == "memory" and plain.room == int((72e9 - plain.bytes) / 512)
    # 4.12 bits a weight at least; tiles of small weights are padded.
    assert linears * 4.12 / 8 < chosen.bytes - 2 * (2 * head + 3 * 256) < linears * 5 / 8


def test_of_experts_those_are_read_that_tokens_choose() -> None:
    """One token: 2 of 8."""
    one, all_ = (recommend(model_of("moe"), "h100", "latency").costs[0], recommend(moe(), "h100", "memory").costs[0])
    assert one == all_
    experts = 8 * (256 * 256 + 256 * 128)
    others = one.ms_token * 1e-3 * 3350e9 - experts * 2 / 4 - CONTEXT * 512
    linears = 2 * (256 * 256 * 2 + 2 * 256 * 128 + 8 * 256 + 512 * 256)
    assert others == pytest.approx(linears, rel=1e-6)


def test_eight_bits_of_k_and_v_count() -> None:
    got = found("dense", "sm90", "long-context")
    assert got.costs[1].kv_bytes == 1000 * 2 * (128 + 4) and got.costs[0].kv_bytes == 1000 * 2 * 256
    assert any("K and V in FP8 take 264 KB for 1000 tokens instead of 512 KB" in text for text in got.reasons)


def test_what_does_not_fit_is_said() -> None:
    config = dense(8192, 28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8)
    reasons = " ".join(recommend(config, "rtx4090", "memory").reasons)
    assert "does not fit into 24 GB, and not in this policy either" in reasons
    assert "does not fit into 80 GB." in " ".join(recommend(config, "a100", "memory").reasons)


def test_a_model_without_a_cache_is_told_so() -> None:
    config = transformers.BertConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2)
    config.architectures = ["BertModel"]
    got = recommend(config, "sm90", "long-context")
    assert got.policy.kv_cache is None and got.costs[0].kv_bytes is None
    assert any("no cache to quantize" in text for text in got.reasons)


# Names.


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("memory-bound", "memory"),
        ("Memory Bound", "memory"),
        ("long_context", "long-context"),
        ("KV cache", "long-context"),
        ("low latency", "latency"),
        ("quality", "sensitive"),
        ("THROUGHPUT", "throughput"),
    ],
)
def test_goals_are_understood_however_they_are_written(text: str, name: str) -> None:
    assert goal_of(text).name == name


def test_no_word_means_two_goals() -> None:
    words = [word for goal in GOALS for word in (goal.name.replace("-", ""), *goal.words)]
    assert len(words) == len(set(words))


@pytest.mark.parametrize(
    ("text", "name", "target"),
    [
        ("h100", "H100 SXM", "sm90"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM", "sm90"),
        ("NVIDIA H100 PCIe", "H100 PCIe", "sm90"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB", "sm80"),
        ("A100-PCIE-40GB", "A100 40GB", "sm80"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", "sm89"),
        ("4090", "RTX 4090", "sm89"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", "sm89"),
        ("L40S", "L40S", "sm89"),
        ("sm100", "B200", "sm100"),
        ("NVIDIA A10", "A10", "sm86"),
    ],
)
def test_gpus_are_known_by_their_names(text: str, name: str, target: str) -> None:
    device, known = device_of(text)
    assert (device.name, known.label) == (name, target)


@pytest.mark.parametrize("text", ["a1000", "h10", "sm70", "tpu", ""])
def test_an_unknown_gpu_is_refused_with_those_that_are_known(text: str) -> None:
    with pytest.raises(OptionError, match=r"RTX 4090.*sm90.*cpu"):
        device_of(text)


def test_roofs_are_those_of_the_kernels_estimates() -> None:
    """The same products stand for the archs; kernels take nine tenths of the bandwidth, as a copy does."""
    for arch, roof in roofs.ROOFS.items():
        device = DEVICES[OF_ARCH[arch]]
        assert device.math16 == pytest.approx(roof.math16 / 1e6, rel=0.01)
        assert device.math8 == pytest.approx(roof.math8 / 1e6, rel=0.01)
        assert device.bandwidth * 0.85 < roof.bandwidth / 1e3 < device.bandwidth * 0.95
        assert device.sm_count == FAKE_SM_COUNT[arch] or arch == 120
    core = roofs.CPU_CORE
    assert (core.bandwidth / 1e3, core.math16 / 1e6) == (CPU_BANDWIDTH, CPU_MATH)


# Bad input.


def test_mistakes_name_the_fix(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"unknown goal 'fast'. Fix: one of\n  memory: "):
        recommend(dense(), "h100", "fast")
    with pytest.raises(OptionError, match="got dict"):
        recommend({"hidden_size": 3}, "h100", "memory")
    with pytest.raises(QuantError, match=r"has no config.json. Fix"):
        recommend(tmp_path, "h100", "memory")
    with pytest.raises(OptionError, match="no linear weights"):
        recommend(torch.nn.LayerNorm(4), "h100", "memory")
    with pytest.raises(OptionError, match="must be a name or a Target, got int"):
        recommend(dense(), 90, "memory")  # pyright: ignore[reportArgumentType]


def test_the_command_prints_a_policy_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense().save_pretrained(tmp_path)
    out = tmp_path / "p.yaml"
    assert cli.main(["recommend", str(tmp_path), "--goal", "memory", "--gpu", "a100", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "default: W4A16" in printed and "kernels on sm80" in printed and Policy.load(out).release_weights
    assert cli.main(["recommend", str(tmp_path), "--goal", "memory", "--gpu", "a100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["policy"]["default"] == "W4A16"
    assert cli.main(["recommend", str(tmp_path), "--goal", "speed"]) == 2
    assert "Fix: one of" in capsys.readouterr().err
