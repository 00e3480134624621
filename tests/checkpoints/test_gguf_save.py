"""GGUF files that ``save`` and ``convert`` write: the gguf package reads them, and a load of them has the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

gguf = pytest.importorskip("gguf")

import quant_compile  # noqa: E402
from quant_compile import cli  # noqa: E402
from quant_compile.checkpoints.errors import SaveError  # noqa: E402
from quant_compile.checkpoints.gguf import writer as gguf_writer  # noqa: E402
from quant_compile.ir.errors import OptionError, PolicyWarning  # noqa: E402
from quant_compile.saving import convert  # noqa: E402
from tests.checkpoints.gguf_files import CASES, VOCAB, make, mixed, write  # noqa: E402
from tests.checkpoints.support import distance  # noqa: E402
from tests.checkpoints.support import write as write_folder  # noqa: E402


def load(path: Path, *args: Any, **kwargs: Any) -> torch.nn.Module:
    return quant_compile.load(path, *args, device="cpu", **kwargs)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(24)[None] % VOCAB).logits.float()


def contents(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}


def vocabulary(writer: Any) -> None:
    writer.add_name("tiny")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab", "é"] + [f"<{i}>" for i in range(VOCAB - 4)])
    writer.add_token_merges(["a b"])


@pytest.mark.parametrize("name", ["llama", "llama 3.1", "llama biased", "qwen2", "qwen3", "qwen3moe"])
def test_load_save_load_has_the_same_bits(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    write(first, case, make(case), more=vocabulary)
    model = load(first)
    saved = quant_compile.save(model, second)
    assert saved.schemes["GGUF_Q4_K"] and saved.schemes["GGUF_Q6_K"] and not saved.notes
    again = load(second)
    ours, theirs = contents(second), contents(first)
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        if ours[key].tensor_type == tensor.tensor_type:
            assert (ours[key].data == tensor.data).all() or tensor.tensor_type.name == "F32", (
                key
            )  # rounded to bf16 once
        else:
            assert key == "token_embd.weight" and ours[key].tensor_type.name == "BF16"
    assert torch.equal(logits(again), logits(model))
    assert again.config.to_dict() == model.config.to_dict()  # type: ignore[union-attr, operator]
    fields = gguf.GGUFReader(str(second)).fields
    assert fields["tokenizer.ggml.tokens"].contents()[:4] == ["a", "b", "ab", "é"]
    assert quant_compile.tokenizer(second)("ab").input_ids == [2]


def two_types(name: str) -> str:
    """As Q4_K_M has a layer's experts."""
    return "q6_k" if "blk.0.ffn_down_exps" in name else mixed(name)


def test_experts_of_two_types_have_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Saved before and after a call, as a file and packed; inspect tells each weight's type."""
    case, names = CASES["qwen3moe"], [tmp_path / f"{name}.gguf" for name in ("first", "second", "third")]
    write(names[0], case, make(case), two_types)
    model = load(names[0])
    quant_compile.save(model, names[1])
    wanted = logits(model)
    quant_compile.save(model, names[2])
    quant_compile.save(model, tmp_path / "packed", "packed")
    theirs = contents(names[0])
    for name in names[1:]:
        ours = contents(name)
        for key in (key for key in theirs if "exps" in key):
            assert ours[key].tensor_type == theirs[key].tensor_type and (ours[key].data == theirs[key].data).all(), key
        assert torch.equal(logits(load(name)), wanted)
    packed = load(tmp_path / "packed")
    assert torch.equal(logits(packed), wanted)
    quant_compile.report(packed).require(coverage=1.0)
    assert cli.main(["inspect", str(names[0]), "--full"]) == 0
    shown = capsys.readouterr().out
    assert "GGUF_Q4_K" in shown and "GGUF_Q6_K" in shown and "multiplies experts" not in shown
    convert(names[0], tmp_path / "converted.gguf")
    assert contents(tmp_path / "converted.gguf")["blk.0.ffn_down_exps.weight"].tensor_type.name == "Q6_K"


def test_convert_gives_experts_two_types(tmp_path: Path) -> None:
    case = CASES["qwen3moe"]
    model = make(case)
    folder = write_folder(tmp_path / "bf16", model, dict(model.state_dict()), None)
    policy = tmp_path / "policy.yaml"
    policy.write_text("default: GGUF_Q4_K\nrules:\n  - {match: '*.0.mlp.experts.down_proj', scheme: GGUF_Q6_K}\n")
    assert cli.main(["convert", str(folder), str(tmp_path / "out.gguf"), "--policy", str(policy)]) == 0
    found = contents(tmp_path / "out.gguf")
    kinds = {
        name: found[f"blk.{name}_exps.weight"].tensor_type.name for name in ("0.ffn_up", "0.ffn_down", "1.ffn_down")
    }
    assert kinds == {"0.ffn_up": "Q4_K", "0.ffn_down": "Q6_K", "1.ffn_down": "Q4_K"}


def test_convert_quantizes_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES["qwen3"]
    model = make(case)
    folder = write_folder(tmp_path / "bf16", model, dict(model.state_dict()), None)
    assert (
        cli.main(["convert", str(folder), str(tmp_path / "out.gguf"), "--policy", "GGUF_Q8_0", "--dtype", "fp32"]) == 0
    )
    assert "in GGUF_Q8_0" in capsys.readouterr().out
    found = contents(tmp_path / "out.gguf")
    assert (
        found["blk.0.attn_q.weight"].tensor_type.name == "Q8_0"
        and found["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    )
    truth = torch.from_numpy(gguf.quants.dequantize(found["blk.0.ffn_up.weight"].data, gguf.GGMLQuantizationType.Q8_0))
    assert distance(truth, model.get_parameter("model.layers.0.mlp.up_proj.weight").detach()) < 0.01
    loaded = load(tmp_path / "out.gguf", dtype=torch.float32)
    assert distance(logits(loaded), logits(model)) < 0.02


@pytest.mark.parametrize("kind", ["folder", "f32 file"])
def test_values_beyond_f16_are_kept_as_they_are_loaded(kind: str, tmp_path: Path) -> None:
    """A linear alone, both weights of a block, of which the first was quantized already."""
    case = CASES["qwen3moe"]
    model = make(case)
    large = {"model.layers.0.self_attn.v_proj.weight": "v", "model.layers.0.mlp.experts.down_proj": "down"}
    for name in large:
        model.get_parameter(name).data.view(-1)[-3] = 2e6
    if kind == "folder":
        source = write_folder(tmp_path / "source", model, dict(model.state_dict()), None)
    else:
        source = write(tmp_path / "source.gguf", case, model, lambda name: "f32")
    found = load(source, "GGUF_Q4_0", dtype=torch.float32)
    with pytest.warns(PolicyWarning, match="stays float32: it has a value of 2e\\+06, beyond the f16"):
        assert logits(found).isfinite().all()
    kept = {line.names[0] for line in quant_compile.report(found).lines if "proj" in line.names[0] and not line.scheme}
    assert kept == {*large, "model.layers.0.mlp.experts.gate_up_proj"}
    for name in large:
        assert torch.equal(found.get_parameter(name), model.get_parameter(name))
    saved = quant_compile.save(found, tmp_path / "out.gguf")
    assert (
        saved.schemes["GGUF_Q4_0"]
        and distance(logits(load(tmp_path / "out.gguf", dtype=torch.float32)), logits(found)) < 1e-3
    )


def test_a_file_becomes_a_folder_with_its_tokenizer(tmp_path: Path) -> None:
    case = CASES["llama"]
    source = write(tmp_path / "model.gguf", case, make(case), more=vocabulary)
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "default: W8A16\nrequantize: true\nrules:\n  - {match: lm_head, scheme: W8A16, requantize: true}\n"
    )
    assert cli.main(["convert", str(source), str(tmp_path / "out"), "--policy", str(policy)]) == 0
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert distance(logits(load(tmp_path / "out")), logits(load(source))) < 0.05
    assert cli.main(["convert", str(source), str(tmp_path / "other")]) == 1  # compressed-tensors has no blocks
    assert not (tmp_path / "other").exists()


def test_what_is_not_written(tmp_path: Path) -> None:
    case = CASES["llama"]
    model = make(case)
    source = write(tmp_path / "model.gguf", case, model)
    folder = write_folder(tmp_path / "bf16", model, dict(model.state_dict()), None)
    found = load(folder, "W8A16")
    with pytest.raises(SaveError, match=r"W8A16 is no type of GGUF: model\.layers\.0.*\n.*GGUF scheme"):
        quant_compile.save(found, tmp_path / "out.gguf")
    loaded = load(source)
    with pytest.raises(OptionError, match=r"ends in \.gguf"):
        quant_compile.save(loaded, tmp_path / "out", "gguf")
    with pytest.raises(OptionError, match=r"ends in \.gguf"):
        quant_compile.save(loaded, tmp_path / "out.gguf", "packed")
    (tmp_path / "text.gguf").write_text("something else")
    with pytest.raises(SaveError, match="not replaced"):
        quant_compile.save(loaded, tmp_path / "text.gguf")
    other = write(tmp_path / "gemma.gguf", CASES["gemma2"], make(CASES["gemma2"]))
    with pytest.raises(SaveError, match="gemma2 model is not written as GGUF"):
        quant_compile.save(load(other), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["llama"]
    source = write(tmp_path / "model.gguf", case, make(case))
    model, before = load(source), source.read_bytes()
    made = gguf_writer._stream

    def stop(opened: Any, export: Any) -> None:
        made(opened, export)
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_writer, "_stream", stop)
    with pytest.raises(KeyboardInterrupt):
        quant_compile.save(model, source)
    assert source.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["model.gguf"]
    monkeypatch.undo()
    quant_compile.save(model, source)  # over the file that it came from
    assert source.read_bytes() != before and torch.equal(logits(load(source)), logits(model))
