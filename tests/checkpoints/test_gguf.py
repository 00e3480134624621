"""GGUF files: logits are those of the dequantized model, whatever a converter has done; mixes, splits, memory, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

import quant_compile  # noqa: E402
from quant_compile import cli  # noqa: E402
from quant_compile.checkpoints.errors import CheckpointError  # noqa: E402
from quant_compile.ir.errors import PolicyError  # noqa: E402
from quant_compile.lowering.target import Target  # noqa: E402
from quant_compile.lowering.weights import STORE  # noqa: E402
from quant_compile.pretrained import plan_of  # noqa: E402
from tests.checkpoints.gguf_files import CASES, VOCAB, make, mixed, write  # noqa: E402
from tests.checkpoints.support import distance  # noqa: E402

# Both sides multiply the same f32 values; what differs is the order of sums.
CLOSE = 1e-4
SAMPLES = Path(os.environ.get("SGLQ_CHECKPOINTS", "samples"))  # llama.cpp wrote them; too large to be committed


def load(path: Path, *args: Any, **kwargs: Any) -> torch.nn.Module:
    return quant_compile.load(path, *args, device="cpu", dtype=torch.float32, **kwargs)


def logits(model: torch.nn.Module, tokens: int = 40) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(tokens)[None] % VOCAB).logits.float()


def written(path: Path, name: str, *args: Any, **kwargs: Any) -> tuple[Path, torch.nn.Module]:
    case = CASES[name]
    model = make(case)
    return write(path / "model.gguf", case, model, *args, **kwargs), model


# What is undone of each kind: rows, offsets, experts apart and together, factors, latents. The others are like one of these.
FAST = ("llama", "llama 3.1", "mixtral", "gemma3", "gpt-oss", "deepseek3")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_architectures(name: str, tmp_path: Path) -> None:
    path, model = written(tmp_path, name)
    found = load(path)
    assert type(found) is type(model)
    assert distance(logits(found), logits(model)) < CLOSE
    report = quant_compile.report(found)
    lines = [line for line in report.lines if line.scheme]
    assert {line.scheme for line in lines} >= {"GGUF_Q4_K", "GGUF_Q6_K"} and report.coverage == 1.0
    assert all(line.released and "model.gguf (gguf q" in line.reason for line in lines)


@pytest.mark.parametrize(("name", "kind"), [("llama", "f16"), ("gemma2", "bf16"), ("qwen3moe", "f32")])
def test_files_in_16_bits_are_quantized_by_the_policy(kind: str, name: str, tmp_path: Path) -> None:
    path, model = written(tmp_path, name, lambda tensor: kind if mixed(tensor) != "f32" else "f32")
    plan = plan_of(path)
    assert plan.dtype == {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
    assert plan.given is not None and not plan.description.method  # the default of the device
    found = load(path, {"default": "keep"})
    assert distance(logits(found), logits(model)) < CLOSE
    outcomes = plan_of(path, "GGUF_Q4_K").outcomes
    assert {outcome.scheme.spec for outcome in outcomes if outcome.scheme} == {"GGUF_Q4_K"}


def test_a_policy_for_what_a_mix_has_in_16_bits(tmp_path: Path) -> None:
    path, model = written(
        tmp_path, "llama", lambda name: "f16" if "ffn" in name and "norm" not in name else mixed(name)
    )
    schemes = {outcome.scheme.spec for outcome in plan_of(path, "W8A16").outcomes if outcome.scheme}
    assert schemes == {"W8A16", "GGUF_Q4_K", "GGUF_Q6_K"}
    with pytest.raises(PolicyError, match=r"q_proj.*GGUF_Q4_K|GGUF_Q4_K.*requantize"):
        load(path, {"default": "keep", "rules": [{"match": "*q_proj", "scheme": "W8A16"}]})
    again = load(path, {"default": "W8A16", "requantize": True})
    assert distance(logits(again), logits(model)) < 0.05  # of eight bits a row
    kinds = {line.scheme: line.names[0] for line in quant_compile.report(again).lines if line.scheme}
    assert (
        set(kinds) == {"W8A16", "GGUF_Q6_K"} and kinds["GGUF_Q6_K"] == "lm_head.weight"
    )  # which policies leave by convention


def test_blocks_are_the_planes(tmp_path: Path) -> None:
    """Byte for byte, rows of q in the model's order."""
    path, _ = written(tmp_path, "llama")
    found = load(path)
    reader = gguf.GGUFReader(str(path))
    raw = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    for ours, theirs in (("mlp.up_proj", "ffn_up"), ("self_attn.v_proj", "attn_v"), ("self_attn.q_proj", "attn_q")):
        (plane,) = planes(found.get_parameter(f"model.layers.0.{ours}.weight"))
        rows = raw[f"blk.0.{theirs}.weight"]
        if theirs == "attn_q":
            rows = rows.reshape(4, 32, 2, -1).swapaxes(1, 2).reshape(rows.shape)
        assert torch.equal(plane, rows)


def planes(parameter: torch.nn.Parameter) -> tuple[torch.Tensor, ...]:
    entry = STORE.peek(parameter)
    assert entry is not None
    return next(iter(entry.packs.values())).slab.planes


@pytest.mark.parametrize("name", ["qwen3moe", "gpt-oss"])
def test_gate_and_up_of_two_types_become_values_with_a_reason(name: str, tmp_path: Path) -> None:
    path, model = written(
        tmp_path, name, lambda tensor: "q8_0" if "blk.0.ffn_up_exps.weight" in tensor else mixed(tensor)
    )
    found = load(path)
    assert distance(logits(found), logits(model)) < CLOSE
    lines = {line.names[0]: line for line in quant_compile.report(found).lines}
    assert lines["model.layers.0.mlp.experts.gate_up_proj"].scheme is None
    reason = "gate and up are one weight, and the file has them in GGUF_Q4_K and GGUF_Q8_0"
    assert reason in lines["model.layers.0.mlp.experts.gate_up_proj"].reason
    assert "gate_up_proj of its block is not in GGUF_Q4_K" in lines["model.layers.0.mlp.experts.down_proj"].reason
    assert lines["model.layers.1.mlp.experts.gate_up_proj"].scheme == "GGUF_Q4_K"


# What Q4_K_M and its like make of experts: the first layers' ffn_down in more bits.
MIXES = (("q4_k", "q6_k"), ("q5_k", "q6_k"), ("q4_0", "q8_0"), ("q6_k", "mxfp4"))


def of_two_types(first: str, second: str, layer: int = 0) -> Callable[[str], str]:
    """Experts' gate and up in one type, and one layer's down in another."""

    def of(name: str) -> str:
        if "exps.weight" not in name:
            return mixed(name)
        return second if f"blk.{layer}.ffn_down" in name else first

    return of


@pytest.mark.parametrize(
    ("name", "mix"),
    [
        *(("qwen3moe", mix) for mix in MIXES),
        *((name, MIXES[0]) for name in ("mixtral", "gpt-oss")),
        *(pytest.param(name, MIXES[0], marks=pytest.mark.slow) for name in ("qwen2moe", "deepseek2", "deepseek3")),
    ],
    ids=str,
)
def test_experts_of_two_types_stay_in_their_blocks(name: str, mix: tuple[str, str], tmp_path: Path) -> None:
    """Bit for bit, each with its scheme in the ledger; the layers, of which some have one type, share a graph."""
    first = 1 if name.startswith("deepseek") else 0  # whose first layer is dense
    path, model = written(tmp_path, name, of_two_types(*mix, first))
    found = load(path)
    assert distance(logits(found), logits(model)) < CLOSE
    report = quant_compile.report(found).require(coverage=1.0)
    lines = {line.names[0]: line for line in report.lines}
    specs = [f"GGUF_{kind.upper()}" for kind in mix]
    raw = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    for layer in range(first, 2):
        block = f"model.layers.{layer}.mlp.experts"
        up, down = lines[f"{block}.gate_up_proj"], lines[f"{block}.down_proj"]
        assert (up.scheme, down.scheme) == (specs[0], specs[layer == first])
        assert up.released and down.released and "as the checkpoint has it" in down.reason
        files = [raw[f"blk.{layer}.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")]
        assert (up.bytes_after, down.bytes_after) == (2 * files[0].n_bytes, files[2].n_bytes)
        gate_up = torch.from_numpy(np.concatenate([files[0].data, files[1].data], 1))
        assert torch.equal(planes(found.get_parameter(f"{block}.gate_up_proj"))[0], gate_up)
        assert torch.equal(planes(found.get_parameter(f"{block}.down_proj"))[0], torch.tensor(files[2].data))


def test_experts_of_two_types_that_a_gpu_does_not_serve_become_values(tmp_path: Path) -> None:
    """Under Q2_K and Q3_K no kernel for GPUs multiplies experts."""
    weights = [f"model.layers.0.mlp.experts.{end}" for end in ("gate_up_proj", "down_proj")]
    for mix, served in ((("q4_k", "q6_k"), True), (("q2_k", "q3_k"), False)):
        path, _ = written(tmp_path, "qwen3moe", of_two_types(*mix))
        for policy in (None, "W8A16"):
            outcomes = {o.name: o for o in plan_of(path, policy, target=Target.fake("sm90")).outcomes}
            own = [outcomes[weight] for weight in weights]
            if served:
                assert [o.scheme.spec for o in own if o.scheme] == [f"GGUF_{kind.upper()}" for kind in mix]
                continue
            reason = "no kernel on sm90 multiplies experts of two types under GGUF_Q2_K/GGUF_Q3_K"
            assert all(o.scheme is None and reason in " ".join(o.notes) for o in own)


def test_mxfp4_experts_of_gpt_oss(tmp_path: Path) -> None:
    path, model = written(
        tmp_path,
        "gpt-oss",
        lambda name: "mxfp4" if "exps.weight" in name else "q8_0" if mixed(name) != "f32" else "f32",
    )
    found = load(path)
    assert distance(logits(found), logits(model)) < CLOSE
    assert {line.scheme for line in quant_compile.report(found).lines if line.scheme} == {"GGUF_MXFP4", "GGUF_Q8_0"}


def test_a_scale_of_the_tensor_above_its_blocks(tmp_path: Path) -> None:
    """As files with NVFP4 have it, of one matrix and of each expert."""
    case = CASES["qwen3moe"]
    model, scales = make(case), torch.tensor([0.5, 1.0, 2.0, 3.0])

    def more(writer: Any) -> None:
        writer.add_tensor("blk.0.attn_v.scale", torch.tensor([2.0]).numpy())
        writer.add_tensor("blk.1.ffn_down_exps.scale", scales.numpy())

    path = write(tmp_path / "model.gguf", case, model, lambda name: "q8_0" if mixed(name) != "f32" else "f32", more)
    model.get_parameter("model.layers.0.self_attn.v_proj.weight").data.mul_(2)
    model.get_parameter("model.layers.1.mlp.experts.down_proj").data.mul_(scales[:, None, None])
    found = load(path)
    assert distance(logits(found), logits(model)) < CLOSE
    assert any("below a scale of the tensor" in line.reason for line in quant_compile.report(found).lines)


@pytest.mark.parametrize("shards", [3, 7])
def test_splits(shards: int, tmp_path: Path) -> None:
    path, model = written(tmp_path, "llama")
    first = split(path, shards)
    path.unlink()
    assert distance(logits(load(first)), logits(model)) < CLOSE
    second = first.with_name(first.name.replace("00001", "00002"))
    with pytest.raises(CheckpointError, match="not the first of its splits"):
        plan_of(second)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"needs 1 splits that are not there, .*00002-of"):
        plan_of(first)
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=r"is also in"):
        plan_of(first)


def split(path: Path, count: int) -> Path:
    """As llama.cpp's gguf-split does: metadata in the first, a share of the tensors in each."""
    reader = gguf.GGUFReader(str(path))
    tensors, out = list(reader.tensors), []
    for i in range(count):
        name = path.with_name(f"model-{i + 1:05d}-of-{count:05d}.gguf")
        writer = gguf.GGUFWriter(str(name), "llama")
        if i == 0:
            for key, found in reader.fields.items():
                if not key.startswith("GGUF.") and key != "general.architecture":
                    writer.add_key_value(key, found.contents(), found.types[0])
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(tensors))
        for tensor in tensors[i::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        out.append(name)
    return out[0]


def test_rope_factors_that_no_rule_gives(tmp_path: Path) -> None:
    case = CASES["llama"]
    model = make(case)
    factors = torch.linspace(1, 3, 32)
    path = write(
        tmp_path / "model.gguf", case, model, more=lambda w: w.add_tensor("rope_freqs.weight", factors.numpy())
    )
    found = load(path)
    assert distance(logits(found), logits(model)) > 1e-2
    for name in ("inv_freq", "original_inv_freq"):
        rotary = model.model.rotary_emb  # type: ignore[union-attr]
        rotary._buffers[name] = rotary._buffers[name] / factors  # type: ignore[union-attr, operator, index]
    assert distance(logits(found), logits(model)) < CLOSE
    assert "follow from no rule" in str(quant_compile.report(found))


def test_experts_one_by_one_as_older_files_have_them(tmp_path: Path) -> None:
    case = CASES["mixtral"]
    model = make(case)
    whole = write(tmp_path / "whole.gguf", case, model)
    reader, path = gguf.GGUFReader(str(whole)), tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, found in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, found.contents(), found.types[0])
    for tensor in reader.tensors:
        if "_exps" not in tensor.name:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        for expert in range(4):
            name = tensor.name.replace("_exps.weight", f".{expert}.weight")
            writer.add_tensor(name, tensor.data[expert], raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = load(path)
    assert distance(logits(loaded), logits(model)) < CLOSE
    assert quant_compile.report(loaded).coverage == 1.0


def test_inspect_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = written(tmp_path, "qwen3")
    assert cli.main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert (
        "GGUF_Q4_K" in shown
        and "GGUF_Q6_K" in shown
        and "an embedding reads it" in shown
        and "tensors in q4_k" in shown
    )
    assert cli.main(["inspect", str(path), "--policy", "W8A16"]) == 0
    assert "GGUF_Q4_K" in capsys.readouterr().out
    assert cli.main(["check", "W8A16", "--model", str(path)]) == 0
    assert "W8A16" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:1000])
    assert cli.main(["inspect", str(path)]) == 1
    assert "cut off" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "of", "sizes", "largest"),
    [
        ("llama", "q4_0", dict(intermediate_size=4096), 4096 * 1024 * 18 // 32),
        ("qwen3moe", "q4_k", dict(moe_intermediate_size=1024), 4 * 1024 * 1024 * 210 // 256),
    ],
    ids=["linears", "experts of two types"],
)
def test_memory_is_the_file_and_one_tensor(
    name: str, of: str, sizes: dict[str, int], largest: int, tmp_path: Path
) -> None:
    """No float copy: of a file whose matrices would take 230 MB in f32, all in a process of its own."""
    code = f"""
        import os, resource, quant_compile
        from tests.checkpoints.gguf_files import CASES, SIZES, make, write
        from pathlib import Path
        folder = Path({str(tmp_path)!r})

        def written(name, layers):  # in a process of its own, whose memory is not counted
            if os.fork() == 0:
                more = dict(num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=16)
                SIZES.update(hidden_size=1024, **more)
                case = CASES[{name!r}]
                case.sizes.update({sizes!r})
                experts = lambda tensor: "q6_k" if "ffn_down_exps" in tensor else {of!r}
                write(folder / name, case, make(case), lambda n: "f32" if "norm" in n or "inp" in n else experts(n))
                os._exit(0)
            assert os.wait()[1] == 0
            return folder / name

        small, path = written("small.gguf", 1), written("model.gguf", 4)
        quant_compile.load(small, device="cpu")  # imports
        before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
        open("/proc/self/clear_refs", "w").write("5")
        model = quant_compile.load(path, device="cpu")
        peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
        print(path.stat().st_size, peak - before)
    """
    made = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr[-2000:]
    size, peak = map(int, made.stdout.split()[-2:])
    assert 30e6 < size < 50e6
    assert peak < size + largest + 16e6  # far below the 0.3 GiB that a load may take besides


@pytest.mark.parametrize("name", ["ikllama-Q4_K_M-dense", "ikllama-Q6_K-moe"])
def test_samples_of_a_fork_of_llama_cpp(name: str) -> None:
    """Its own logits; it quantizes inputs to 8 bits, which moves them by about 1e-2."""
    from safetensors.torch import load_file

    folder = SAMPLES / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    truth = next(iter(load_file(str(folder / "ref_logits.safetensors")).values())).reshape(1, 64, -1)
    with torch.inference_mode():
        found = load(folder / "model.gguf")(torch.arange(64)[None]).logits.float()
    assert distance(found, truth) < 1.5e-2
