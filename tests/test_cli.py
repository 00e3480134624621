"""The command line: what each command prints, its exit codes, and errors as one clear text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import transformers

from quant_compile import cli
from quant_compile.ir.errors import PolicyError
from quant_compile.ir.scheme import PRESETS
from quant_compile.lowering.target import Target
from quant_compile.policy import shipped_policies

TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that holds nothing but the config.json of a tiny Llama."""
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaConfig(**TINY, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return str(folder)


Captured = pytest.CaptureFixture[str]


def run(capsys: Captured, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out, err


# policies.


def test_policies_lists_every_preset_and_shipped_policy(capsys: Captured) -> None:
    code, out, err = run(capsys, "policies")
    assert code == 0 and err == ""
    for name in (*PRESETS, *shipped_policies()):
        assert f"│ {name} " in out
    row = next(line for line in out.splitlines() if line.startswith("│ W4A16_ASYM "))
    assert "4.16" in row and "int4.group128.asym" in row and "16 bits" in row and "26% of the bytes of bf16" in row
    assert "inputs need calibrated scales" in next(
        line for line in out.splitlines() if line.startswith("│ W8A8_STATIC ")
    )


# check.


def test_check_prints_the_plan(capsys: Captured, llama: str) -> None:
    code, out, err = run(capsys, "check", "llama3", "--model", llama)
    assert code == 0 and err == ""
    row = next(line for line in out.splitlines() if "mlp.up_proj" in line)
    assert "model.layers.{0-1}.mlp.up_proj (2x)" in row and "FP8_DYNAMIC" in row and "default of the policy" in row
    assert 'rule 1 (match "lm_head", line' in next(line for line in out.splitlines() if "lm_head" in line)


@pytest.mark.parametrize("command", [("check", "GGUF_IQ4_XS"), ("check", "GGUF_IQ3_S"), ("inspect", "GGUF_NVFP4")])
def test_what_only_files_bring_is_refused_for_weights_in_16_bits(
    capsys: Captured, tmp_path: Path, command: tuple[str, str]
) -> None:
    """Before anything says how small it would be."""
    from transformers import LlamaConfig

    sizes = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 64,
    }
    LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    name, preset = command
    policy = ("--model", str(tmp_path)) if name == "check" else ("--policy", preset)
    code, _, err = run(capsys, name, preset if name == "check" else str(tmp_path), *policy)
    if preset == "GGUF_IQ4_XS":
        assert code == 0
    else:
        assert code and f"self_attn.q_proj cannot be quantized to {preset}" in err


def test_check_full_lists_each_weight_and_layers_limits_them(capsys: Captured, llama: str) -> None:
    _, out, _ = run(capsys, "check", "w8a8", "--model", llama, "--full")
    assert "model.layers.0.mlp.up_proj" in out and "model.layers.1.mlp.up_proj" in out
    _, out, _ = run(capsys, "check", "w8a8", "--model", llama, "--full", "--layers", "1")
    assert "model.layers.0.mlp.up_proj" in out and "model.layers.1.mlp.up_proj" not in out


def test_check_json_is_the_plan_and_nothing_else(capsys: Captured, llama: str) -> None:
    code, out, _ = run(capsys, "check", "w4a16", "--model", llama, "--json", "--dtype", "fp16")
    data = json.loads(out)
    assert code == 0 and len(data["weights"]) == 2 * 7 + 1
    assert {w["dtype"] for w in data["weights"]} == {"float16"}
    assert data["weights"][-1]["reason"] == "kept by convention: output head"


def test_check_accepts_the_config_file_itself_and_a_class(capsys: Captured, llama: str) -> None:
    code, out, _ = run(capsys, "check", "w8a8", "--model", f"{llama}/config.json", "--class", "AutoModel", "--json")
    assert code == 0
    assert json.loads(out)["weights"][0]["names"] == ["layers.0.self_attn.q_proj"], (
        "AutoModel has no head and no model."
    )


def test_a_config_that_names_no_class_gives_a_causal_lm_else_the_base_model(capsys: Captured, tmp_path: Path) -> None:
    transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    ).save_pretrained(tmp_path)
    code, out, _ = run(capsys, "check", "w8a8", "--model", str(tmp_path), "--json")
    assert code == 0 and any("query" in w["names"][0] or "q_proj" in w["names"][0] for w in json.loads(out)["weights"])


def test_check_flags_rules_that_match_nothing(capsys: Captured, llama: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("default: W8A8\nrules:\n- {match: '*.up_porj', scheme: keep}\n", encoding="utf-8")
    code, out, err = run(capsys, "check", str(path), "--model", llama)
    assert code == 0 and "mlp.up_proj" in out
    assert err == 'warning: rule 1 (line 3), match "*.up_porj", matches no weight; did you mean up_proj?\n'


def test_check_of_a_strict_policy_fails_after_showing_the_plan(capsys: Captured, llama: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("default: W8A8\nstrict: true\nrules:\n- {match: nowhere, scheme: keep}\n", encoding="utf-8")
    code, out, err = run(capsys, "check", str(path), "--model", llama)
    assert code == 1 and "mlp.up_proj" in out
    assert "the policy is strict and does not fit this model" in err and 'rule 1 (line 4), match "nowhere"' in err


def test_check_tells_that_scales_are_missing(capsys: Captured, llama: str) -> None:
    code, _, err = run(capsys, "check", "w8a8_static", "--model", llama)
    assert code == 0 and "14 weights have static input scales but the policy names no scales file" in err


def test_a_wrong_policy_is_one_text_with_its_line_and_exit_code_1(capsys: Captured, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("version: 1\ndefault: FP8_DYNAMC\n", encoding="utf-8")
    code, out, err = run(capsys, "check", str(path), "--model", "unused")
    assert code == 1 and out == ""
    assert err.startswith(f"sglquant: {path}:2: unknown scheme 'FP8_DYNAMC'. Did you mean FP8_DYNAMIC?")


def test_traceback_raises_the_error_itself(capsys: Captured) -> None:
    with pytest.raises(PolicyError):
        cli.main(["check", "nonsense", "--model", "unused", "--traceback"])


# Models that cannot be built.


def test_a_folder_without_a_config_says_so(capsys: Captured, tmp_path: Path) -> None:
    code, _, err = run(capsys, "check", "w8a8", "--model", str(tmp_path))
    assert code == 1 and "has no config.json. Fix: " in err


def test_a_broken_config_says_so(capsys: Captured, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    code, _, err = run(capsys, "check", "w8a8", "--model", str(tmp_path))
    assert code == 1 and str(tmp_path) in err
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}', encoding="utf-8")
    code, _, err = run(capsys, "check", "w8a8", "--model", str(tmp_path))
    assert code == 1 and "transformers cannot read the configuration" in err and "no-such-model" in err


def test_being_offline_is_explained(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def refuse(source: str, local_files_only: bool = False) -> None:
        asked.append(local_files_only)
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    code, _, err = run(capsys, "check", "w8a8", "--model", "someone/model")
    assert code == 1 and asked == [True, False], "the cache first, then the network"
    assert "no configuration for 'someone/model'" in err and "(We couldn't connect)" in err
    assert "Fix: name a local folder that has the model's config.json, or go online; weights are not needed." in err


def test_a_class_that_does_not_fit_or_exist(capsys: Captured, llama: str) -> None:
    code, _, err = run(capsys, "check", "w8a8", "--model", llama, "--class", "NoSuchModel")
    assert code == 2 and err == "sglquant: transformers has no class 'NoSuchModel'\n"
    code, _, err = run(capsys, "check", "w8a8", "--model", llama, "--class", "AutoModelForMaskedLM")
    assert code == 1 and "AutoModelForMaskedLM cannot be built from this configuration" in err
    code, _, err = run(capsys, "check", "w8a8", "--model", llama, "--class", "BertModel")
    assert code == 1 and "it is a LlamaConfig, and the class takes a BertConfig" in err
    code, _, err = run(capsys, "check", "w8a8", "--model", llama, "--layers", "99")
    assert code == 2 and "--layers 99: this model has" in err
    code, _, err = run(capsys, "check", "w8a8", "--model", llama, "--class", "LlamaConfig")
    assert code == 2 and "LlamaConfig is not a model class of transformers" in err


# Usage.


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nothing",),
        ("check", "w8a8"),
        ("inspect", "m", "--policy", "w8a8", "--target", "sm70"),
        ("check", "w8a8", "--model", "m", "--layers", "0"),
    ],
)
def test_wrong_usage_is_exit_code_2(capsys: Captured, arguments: tuple[str, ...]) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and err.startswith("usage: sglquant")


def test_help_is_exit_code_0(capsys: Captured) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for command in ("policies", "check", "inspect", "demo"):
        assert command in out


def test_an_unforeseen_error_is_one_text_that_names_traceback(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("odd")

    monkeypatch.setitem(sys.modules, "quant_compile.demo", types.SimpleNamespace(main=fail))
    code, _, err = run(capsys, "demo")
    assert code == 1 and err == "sglquant: RuntimeError: odd\nRun again with --traceback to see where it comes from.\n"


def test_demo_calls_the_demo(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "quant_compile.demo", types.SimpleNamespace(main=lambda: print("shown")))
    assert run(capsys, "demo") == (0, "shown\n", "")


def test_demo_gets_its_options(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}
    monkeypatch.setitem(sys.modules, "quant_compile.demo", types.SimpleNamespace(main=given.update))
    assert run(capsys, "demo", "--full", "--policies", "W8A8", "p.yaml", "--moe-policies") == (0, "", "")
    assert given == {"full": True, "policies": ["W8A8", "p.yaml"], "moe_policies": []}


# inspect.


def test_inspect_prints_the_graph_before_and_after(capsys: Captured, llama: str) -> None:
    code, before, _ = run(capsys, "inspect", llama, "--policy", "w8a8", "--graph", "before", "--layers", "1")
    assert code == 0 and "linear(" in before and "sglq" not in before.split("sglquant ledger")[0]
    code, after, _ = run(capsys, "inspect", llama, "--policy", "w8a8", "--graph", "after", "--layers", "1")
    assert code == 0
    sites = [line for line in after.splitlines() if line.startswith("* ")]
    assert sites and all("sglq" in line or "linear" in line for line in sites)
    assert any("down_proj" in line for line in sites), "a site names its weight"
    assert (
        "l_self_modules" not in after
        and "l_args_0" not in after
        and "  model.embed_tokens.weight: bf16[64, 64] = input" in after
    )


def test_inspect_tells_what_is_wrong_with_the_policy(capsys: Captured, llama: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("default: W8A8\nrules:\n- {match: nowhere, scheme: keep}\n", encoding="utf-8")
    code, _, err = run(capsys, "inspect", llama, "--policy", str(path), "--layers", "1")
    assert code == 0 and 'warning: rule 1 (line 3), match "nowhere", matches no weight\n' in err
    path.write_text("strict: true\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    code, out, err = run(capsys, "inspect", llama, "--policy", str(path), "--layers", "1")
    assert code == 1 and out == "" and 'rule 1 (line 4), match "nowhere"' in err


WHISPER = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
OTHERS = {
    "images": lambda: transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    ),
    "sound": lambda: transformers.WhisperConfig(
        vocab_size=64, max_source_positions=20, max_target_positions=32, pad_token_id=0, **WHISPER
    ),
    "pairs of texts": lambda: transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4
    ),
}


@pytest.mark.parametrize(
    ("kind", "class_name"),
    [
        ("images", "ViTForImageClassification"),
        ("sound", "WhisperForConditionalGeneration"),
        ("pairs of texts", "T5ForConditionalGeneration"),
    ],
)
def test_inspect_makes_inputs_for_other_kinds_of_models(
    capsys: Captured, tmp_path: Path, kind: str, class_name: str
) -> None:
    OTHERS[kind]().save_pretrained(tmp_path)
    code, out, err = run(capsys, "inspect", str(tmp_path), "--policy", "w8a8", "--class", class_name)
    assert code == 0 and err == ""
    assert "coverage 100.0% of the bytes the policy names" in out


def test_inspect_diff_shows_what_left_and_what_came(capsys: Captured, llama: str) -> None:
    code, out, _ = run(capsys, "inspect", llama, "--policy", "w8a8", "--graph", "diff", "--layers", "1")
    assert code == 0 and out.startswith("--- before\n+++ after\n")
    assert any(line.startswith("-") and "linear(" in line for line in out.splitlines())
    assert any(line.startswith("+") and "sglq" in line for line in out.splitlines())


def test_inspect_writes_a_page(capsys: Captured, llama: str, tmp_path: Path) -> None:
    """Of a configuration alone; without a policy, of the device's default."""
    page = tmp_path / "report.html"
    code, out, err = run(capsys, "inspect", llama, "--html", str(page), "--target", "sm90", "--layers", "1")
    assert (code, out, err) == (0, f"report: {page}\n", "")
    text = page.read_text(encoding="utf-8")
    assert "<h1>FP8_DYNAMIC</h1>" in text and "model.layers.0.mlp.up_proj.weight" in text


def test_a_page_that_cannot_be_made_is_refused_before_anything_is_traced(
    capsys: Captured, llama: str, tmp_path: Path
) -> None:
    code, out, err = run(capsys, "inspect", llama, "--html", str(tmp_path / "no" / "x.html"))
    assert code == 2 and out == "" and f"cannot be written, the folder {tmp_path / 'no'} does not exist" in err
    code, out, err = run(capsys, "inspect", "model.gguf", "--html", str(tmp_path / "x.html"))
    assert code == 2 and out == "" and "is quantized already" in err and "report(quant_compile.load(" in err


@pytest.mark.parametrize("target", cli.TARGETS)
def test_inspect_target_names_kernels_layouts_and_refusals(capsys: Captured, llama: str, target: str) -> None:
    code, out, _ = run(capsys, "inspect", llama, "--policy", "w4a16", "--target", target, "--layers", "1")
    assert code == 0
    assert f"kernels on {target}: one weight a problem" in out
    kernels, refused = out.split("kernels not chosen")
    assert "NONE" not in kernels and ("torch_cpu_" if target == "cpu" else "triton_w4a16") in kernels
    assert "multiply weights and inputs of other schemes" in refused


def test_inspect_shows_every_reason_where_nothing_can_run(capsys: Captured, llama: str) -> None:
    arguments = ("inspect", llama, "--policy", "fp8_dynamic", "--layers", "1", "--target")
    code, sm90, _ = run(capsys, *arguments, "sm90")
    assert code == 0 and "sgl_fp8" in sm90.split("kernels not chosen")[0]
    code, sm80, err = run(capsys, *arguments, "sm80")
    chosen, refused = sm80.split("kernels not chosen")
    assert code == 1 and "NONE. Fix: set `fallback: weight_only`" in " ".join(re.sub("[│┃]", " ", chosen).split())
    assert "sgl_fp8" in refused
    assert err.startswith("sglquant: no kernel for model.layers.0") and "TORCHDYNAMO" not in err
    assert "Fix: set `fallback: weight_only`" in err and "or map this weight to another scheme" in err


def test_python_m_ends_as_the_command_does() -> None:
    for arguments, status in ((["nonsense"], 2), (["inspect", "no/such/folder"], None)):
        module = subprocess.run([sys.executable, "-m", "quant_compile", *arguments], capture_output=True, check=False)
        wanted = subprocess.run(
            [sys.executable, "-m", "quant_compile.cli", *arguments], capture_output=True, check=False
        )
        assert module.returncode == wanted.returncode
        assert module.returncode == status if status is not None else module.returncode != 0


def test_check_tells_what_kernels_hold(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bf16 models on a CPU q4_0 lies in torch's order, with scales of its own; rows are what the table counts."""
    monkeypatch.setattr(cli, "this_machine", lambda: Target.fake("cpu"))
    for dtype, note in (("bf16", True), ("fp32", False)):
        assert (
            cli.main(
                [
                    "check",
                    "GGUF_Q4_0",
                    "--model",
                    str(Path(__file__).parents[1] / "examples/tiny_lm/weights/dense"),
                    "--dtype",
                    dtype,
                ]
            )
            == 0
        )
        shown = capsys.readouterr().out
        assert ("note: GGUF_Q4_0 takes 5.50 bits a weight and not 4.50 on cpu, 2.70 MB and not 2.21" in shown) == note
