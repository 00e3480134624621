"""``load`` under a tp_plan: each rank reads and holds its parts of a checkpoint, and computes what one process does with the whole."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import quant_compile
from tests.checkpoints import packers
from tests.checkpoints.support import quantized, quantized_experts, tiny_llama, tiny_moe
from tests.distributed import checks, loads
from tests.distributed.world import RANKS, World

TP = {"tp_plan": "auto"}
# As in test_tensor_parallel: ranks add the same products in another order.
CLOSE = 1e-5
KEEP = {"rules": [], "default": "keep"}
# A scale per row of a weight that is cut along its inputs is on every rank; nothing else is held twice but norms.
TWICE = 1.03


def llama(folder: Path, case: packers.Case) -> Path:
    return quantized(folder, tiny_llama(layers=1), case.pack, case.config)


def held(report: Any) -> int:
    """Bytes of what is quantized."""
    return sum(line.bytes_after for line in report.lines if line.scheme)


def check(found: list[loads.Loaded], close: float = CLOSE) -> None:
    """What holds of every checkpoint."""
    for rank in found:
        assert rank.report.coverage == 1.0, rank.report.skips
        assert rank.wrong == [] and rank.cut > 1
        assert rank.off < close
        assert held(rank.report) < held(rank.one) / RANKS * TWICE
        assert rank.total.bytes_total == rank.one.bytes_total
        assert {(line.names, line.scheme) for line in rank.total.lines} == {
            (line.names, line.scheme) for line in rank.one.lines
        }
        table = sum(line.bytes_before for line in rank.report.lines if "embed" in line.names[0])
        assert (
            rank.read[0] < rank.read[1] / RANKS * TWICE + table / 1e6
        )  # which some versions of transformers do not divide
    assert found[0].total == found[1].total and found[0].tokens == found[1].tokens


def test_integers_in_groups(world: World, folder: Path) -> None:
    path = llama(folder / "w4", packers.ct_packed(4, 64, True))
    found = world.run(loads.beside, path, None, TP, "model.layers.0.mlp.down_proj.weight")
    check(found)
    with pytest.raises(AssertionError):
        check([replace(rank, off=rank.damaged) for rank in found])
    assert all(rank.damaged > 100 * CLOSE for rank in found)


def test_experts_in_tensors_of_their_own(world: World, folder: Path) -> None:
    case = packers.ct_packed(4, 64, True)
    path = quantized_experts(folder / "moe", tiny_moe(), case.pack, case.config)
    check(world.run(loads.beside, path, KEEP, TP))


def test_weights_are_quantized_as_their_parts_are_read(world: World, folder: Path) -> None:
    for rank in world.run(loads.on_the_way, checks.make("one_block", folder), "W8A16", TP):
        assert rank["same"] and rank["ledger"] and rank["coverage"] == 1.0


def broken(path: Path, copy: Path) -> Path:
    """The same checkpoint with a scale that is NaN."""
    shutil.copytree(path, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale"][-1, 0] = torch.nan
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


def one_kv_head() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {**checks.ONE_LAYER, "num_key_value_heads": 1}
    return LlamaForCausalLM._from_config(LlamaConfig(**sizes, intermediate_size=128), dtype=torch.bfloat16)


def test_failures(world: World, folder: Path) -> None:
    path = llama(folder / "good", packers.ct_packed(4, 64, True))
    cut = llama(folder / "cut", packers.ct_packed(4, 128, True))
    one_kv_head().save_pretrained(folder / "heads")
    paths = [path, broken(path, folder / "broken")]
    gguf = Path(__file__).parents[1] / "nothing.gguf"
    plain = checks.make("one_layer", folder)
    first, second = world.run(loads.failures, paths, plain, folder / "heads", cut, gguf)
    assert (
        second["broken"].startswith("CheckpointError")
        and "up_proj.weight_scale holds a scale of nan" in second["broken"]
    )
    assert first["broken"].startswith("RankError") and "rank 1 of 2" in first["broken"] and "up_proj" in first["broken"]
    for rank in (first, second):
        assert rank["seconds"] < 60  # and no timeout of the process group
        assert "num_key_value_heads 1, which 2 processes cannot share" in rank["heads"]
        assert "down_proj" in rank["cut"] and "k_local=192 of k=384" in rank["cut"] and "Fix: " in rank["cut"]
        assert rank["gguf"].startswith("CheckpointError")
        assert "device='cpu' is given beside a tp_plan" in rank["device"]
        assert rank["device_map"].startswith("OptionError")
        assert "max_memory is" in rank["memory"]
        assert "both given" in rank["both"] and "not by FSDP" in rank["fsdp"]
        assert rank["world"].startswith("OptionError") and "torchrun" in rank["world"]
        assert rank["plan"].startswith("OptionError") and "'autoo'" in rank["plan"]
        assert rank["key"].startswith("OptionError") and "tp_pln" in rank["key"]
        assert rank["policies"].startswith("RankError") and "different values of policy" in rank["policies"]
        assert rank["after"], "a restore that failed on one rank changed another"
    assert first["one device"].startswith("RankError") and second["one device"].startswith("OptionError")
    assert second["alone"] == "", "a rank that loads a model for itself waits for nobody"
    assert first["restore"].startswith("RankError") and second["restore"].startswith("StaleWeightError")


def test_one_process_with_a_plan_says_so(tmp_path: Path) -> None:
    made = quant_compile.load(checks.make("one_layer", tmp_path), "W8A16", tp_plan="auto")
    assert any("there is one, which has the model whole" in note for note in quant_compile.report(made).notes)


CASES: dict[str, packers.Case] = {
    "zeros": packers.ct_packed(4, 64, False),
    "fp8 of the tensor": packers.ct_fp8("tensor"),
    "int8": packers.ct_int8(False, True),
    "nvfp4": packers.ct_nvfp4(False),
    "mxfp4": packers.ct_mxfp4(),
    "gptq": packers.gptq(4, 64, True),
    "gptq 3 bits": packers.gptq(3, 64, False),
}
DYNAMIC = {"int8"}  # inputs are scaled per token by each rank for itself: logits are near, and planes equal


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_format(world: World, folder: Path, name: str) -> None:
    found = world.run(loads.beside, llama(folder / name, CASES[name]), None, TP, "", True)
    check(found, 0.1 if name in DYNAMIC else CLOSE)
    assert found[0].tokens[0] == found[0].tokens[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["awq", "blocks"])
def test_formats_of_larger_groups(world: World, folder: Path, name: str) -> None:
    """Sizes that 2 x 128 divide."""
    case = {"awq": packers.awq(False), "blocks": packers.deepseek()}[name]
    path = quantized(folder / name, wide_llama(), case.pack, case.config)
    check(world.run(loads.beside, path, None, TP), 0.1 if name == "blocks" else CLOSE)


def wide_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {**checks.ONE_LAYER, "hidden_size": 256, "head_dim": 128, "intermediate_size": 512, "vocab_size": 256}
    return LlamaForCausalLM._from_config(LlamaConfig(**sizes, dtype="bfloat16"), dtype=torch.bfloat16).eval()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["NVFP4", checks.TENSOR, checks.GROUP32], ids=["nvfp4", "tensor", "group32"])
@pytest.mark.parametrize("family", ["one_block", "tied", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("experts", [False, True], ids=["tp", "ep"])
def test_every_family(world: World, folder: Path, family: str, policy: Any, experts: bool) -> None:
    if experts and family == "tied":
        pytest.skip("has no experts")
    for rank in world.run(loads.on_the_way, checks.make(family, folder), policy, checks.plan(experts)):
        assert rank["same"] and rank["ledger"] and rank["coverage"] == 1.0


@pytest.mark.slow
def test_expert_parallel(world: World, folder: Path) -> None:
    case = packers.ct_packed(4, 64, True)
    path = quantized_experts(folder / "ep", tiny_moe(), case.pack, case.config)
    check(world.run(loads.beside, path, KEEP, checks.plan(True)))


@pytest.mark.slow
def test_what_transformers_loads_quantized_in_parts_is_refused(world: World, folder: Path) -> None:
    pytest.importorskip("compressed_tensors")
    path = llama(folder / "theirs", packers.ct_packed(4, 64, True))
    for rank in world.run(loads.through_transformers, path):
        assert rank[0].startswith("CheckpointError") and "q_proj" in rank[0] and "quant_compile.load(" in rank[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pack-quantized", "fp8"])
def test_what_was_loaded_in_parts_is_saved_whole(world: World, folder: Path, tmp_path: Path, name: str) -> None:
    """Scales that all ranks have are one scale again."""
    case = {"pack-quantized": packers.ct_packed(4, 64, True), "fp8": packers.ct_fp8("channel")}[name]
    for rank in world.run(loads.saved, llama(folder / f"to save {name}", case), tmp_path, TP):
        assert rank["said"] == "" and rank.get("differ", []) == []
