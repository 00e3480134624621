"""Modules of gptqmodel, bitsandbytes and FP8Experts in a model that is given to ``compile``: they run as ``load`` runs their tensors."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quant_compile
from quant_compile import CheckpointError
from quant_compile.checkpoints import loaded
from quant_compile.lowering.weights import STORE
from tests.checkpoints import doubles
from tests.checkpoints.packers import CASES
from tests.checkpoints.support import distance, linears, logits, tiny_llama, tiny_moe, write


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """Values of a model, in bytes, which compare in every dtype."""
    return {name: value.clone().reshape(-1).view(torch.uint8) for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def planes(model: nn.Module, name: str) -> tuple[Any, ...]:
    """(scheme and so on, planes) of a linear."""
    entry = STORE.peek(model.get_submodule(name).weight)  # type: ignore[arg-type]
    assert entry is not None
    ((key, pack),) = entry.packs.items()
    return key, pack.slab.planes


def biased(model: nn.Module) -> nn.Module:
    """With a bias in one linear, whose values f16 has too."""
    model.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.linspace(-1, 1, 256).half().bfloat16())  # type: ignore[union-attr, index]
    model.config.attention_bias = False  # type: ignore[union-attr]
    return model


GPTQ = ["gptq 4 bits sym", "gptq 4 bits asym", "gptq 2 bits asym", "gptq 8 bits sym", "gptq v2 asym", "gptq desc_act"]
KINDS: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    **{name: (name, doubles.TorchLinear) for name in (*GPTQ, "gptq_p 3 bits", "gptq_p 5 bits")},
    "awq": ("awq", doubles.AwqTorchLinear),
    "awq without zero points": ("awq without zero points", doubles.AwqTorchLinear),
    "bitsandbytes int8": ("bitsandbytes int8", doubles.Linear8bitLt),
}


@pytest.mark.parametrize("name", KINDS)
def test_planes_are_those_of_load(name: str, tmp_path: Path) -> None:
    case, kind = CASES[KINDS[name][0]], KINDS[name][1]
    model, tensors = doubles.with_modules(tiny_llama(1), case, kind)
    before, kinds = bits(model), [type(module) for module in model.modules()]
    ours = quant_compile.load(write(tmp_path / "m", tiny_llama(1), tensors, case.config), device="cpu")
    found = loaded.adopt(model)
    assert not found.stays and len(found.outcomes) == 7
    for path in linears(tiny_llama(1)):
        assert type(model.get_submodule(path)) is nn.Linear
        if case.scheme is None:
            assert torch.equal(model.get_submodule(path).weight, ours.get_submodule(path).weight)  # type: ignore[arg-type]
            continue
        (key, one), (other, two) = planes(model, path), planes(ours, path)
        assert key == other and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert loaded.undo(model) == 7
    assert same(before, bits(model)) and [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("name", ["gptq desc_act", "awq", "bitsandbytes int8"])
def test_a_model_runs_on_them_and_comes_back(name: str, tmp_path: Path) -> None:
    case, kind = CASES[KINDS[name][0]], KINDS[name][1]
    model, tensors = doubles.with_modules(biased(tiny_llama(1)), case, kind)
    eager = logits(model)  # bitsandbytes moves its scales at a first call
    before, kinds = bits(model), [type(module) for module in model.modules()]
    quant_compile.compile(model)
    found, report = logits(model), quant_compile.report(model)
    assert report.coverage == 1.0 and not report.notes
    assert {line.scheme for line in report.lines if line.scheme} == {case.scheme}
    # Codes times scale against values that were rounded to bf16 first.
    assert distance(found, eager) < 2e-2
    quant_compile.uncompile(model)
    assert same(before, bits(model)) and [type(module) for module in model.modules()] == kinds
    assert torch.equal(logits(model), eager)
    quant_compile.compile(model)
    assert torch.equal(logits(model), found)
    codes = sum(t.nbytes for n, t in before.items() if n.endswith(("qweight", "proj.weight")))
    assert quant_compile.release(model) >= codes
    assert torch.equal(logits(model), found)
    del tensors["model.layers.0.self_attn.q_proj.bias"]  # a Llama without biases reads the rest
    plain = quant_compile.load(write(tmp_path / "m", tiny_llama(1), tensors, case.config), device="cpu")
    plain.model.layers[0].self_attn.q_proj.bias = nn.Parameter(  # type: ignore[union-attr, index]
        torch.linspace(-1, 1, 256).half().bfloat16(), requires_grad=False
    )
    assert torch.equal(logits(plain), found)


def test_kernels_with_an_order_of_their_own_stay_and_are_named() -> None:
    case = CASES["gptq 4 bits sym"]
    model, _ = doubles.with_modules(tiny_llama(1), case, doubles.TorchLinear)
    mlp: Any = model.model.layers[0].mlp  # type: ignore[union-attr, index]
    attention: Any = model.model.layers[0].self_attn  # type: ignore[union-attr, index]
    mlp.up_proj.__class__ = doubles.MarlinLinear
    mlp.gate_proj.linear_mode = "inference"
    mlp.down_proj.adapter = object()
    attention.q_proj.pack_dtype = torch.int16
    attention.k_proj.online_full_had = True
    eager = logits(model)
    quant_compile.compile(model)
    assert distance(logits(model), eager) < 2e-2
    notes = "\n".join(quant_compile.report(model).notes)
    for text in (
        "mlp.up_proj: stays as transformers loaded it: MarlinLinear is a kernel of gptqmodel that may hold",
        "mlp.gate_proj: stays as transformers loaded it: TorchLinear has brought its codes into an order of its own",
        "mlp.down_proj: stays as transformers loaded it: TorchLinear has an adapter",
        "q_proj: stays as transformers loaded it: TorchLinear packs codes into int16",
        "k_proj: stays as transformers loaded it: TorchLinear rotates its inputs",
    ):
        assert text in notes, notes
    assert notes.count("quant_compile.load(directory) adopts the integers") == 5
    assert type(attention.v_proj) is nn.Linear and type(mlp.up_proj) is doubles.MarlinLinear


def test_codes_of_a_table_stay_and_run(recwarn: pytest.WarningsRecorder) -> None:
    case = CASES["bitsandbytes nf4"]
    model, _ = doubles.with_modules(tiny_llama(1), case, doubles.Linear4bit)
    eager = logits(model)
    quant_compile.compile(model)
    assert distance(logits(model), eager) < 2e-2
    notes = "\n".join(quant_compile.report(model).notes)
    assert "no scheme has codes that look up a table" in notes and "requantize: true" in notes


def broken(change: Callable[[Any], None], kind: str = "gptq 4 bits asym") -> nn.Module:
    model, _ = doubles.with_modules(tiny_llama(1), CASES[kind], KINDS[kind][1])
    change(model.model.layers[0].mlp.down_proj)  # type: ignore[union-attr, index]
    return model


def cut(key: str) -> Callable[[Any], None]:
    return lambda module: module.register_buffer(key, module._buffers[key][:-1].clone())


FAULTS: list[tuple[Callable[[Any], None], str]] = [
    (cut("qweight"), r"down_proj\.qweight has shape 47x256, must be 48x256 for a weight of 256x384"),
    (cut("qzeros"), r"down_proj\.qzeros has shape 5x32, must be 6x32"),
    (cut("scales"), r"down_proj\.scales has shape 5x256, must be 6x256"),
    (cut("g_idx"), r"down_proj\.g_idx has shape 383, must be 384"),
    (lambda m: m.g_idx.fill_(9), r"down_proj\.g_idx names groups outside of 0 to 5"),
    (lambda m: m.scales.fill_(float("nan")), r"down_proj\.scales holds a scale of nan"),
    (lambda m: setattr(m, "requested_group_size", 100), "groups of 100 do not divide its 384 inputs"),
    (lambda m: setattr(m, "requested_group_size", 128), r"down_proj\.(scales|qzeros) has shape 6"),
    (lambda m: setattr(m, "requested_group_size", 0), r"down_proj\.group_size is 0, and must be -1 or from 1 up"),
    (lambda m: setattr(m, "bits", 9), r"down_proj\.bits is 9, and must be one of 2, 3, 4"),
    (lambda m: setattr(m, "bits", 8), r"down_proj\.qweight has shape 48x256, must be 96x256"),
    (lambda m: m.register_buffer("rotation", torch.ones(4)), "down_proj holds rotation, which is no tensor of gptq"),
    (lambda m: delattr(m, "qzeros"), r"down_proj has g_idx, qweight, scales and no qzeros"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=[text.split("_proj")[-1][:24] for _, text in FAULTS])
def test_a_fault_of_a_module_is_an_error_that_changes_nothing(fault: tuple[Callable[[Any], None], str]) -> None:
    model = broken(fault[0])
    before, kinds = bits(model), [type(module) for module in model.modules()]
    with pytest.raises(CheckpointError, match=fault[1]) as caught:
        quant_compile.compile(model)
    assert "\nFix: " in str(caught.value)
    assert [type(module) for module in model.modules()] == kinds
    assert same(before, bits(model)) and not any(loaded.MARK in vars(module) for module in model.modules())


# --- experts ----------------------------------------------------------------------------------------------------------


def with_fp8_experts(model: nn.Module, block: tuple[int, int] | None, scheme: str = "dynamic") -> nn.Module:
    """As transformers' FineGrainedFP8 makes a model, on any device; gate and up have scales of their own."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
    from transformers.integrations.moe import use_experts_implementation

    old: Any = model.model.layers[0].mlp.experts  # type: ignore[union-attr, index]
    kind: Any = use_experts_implementation(
        experts_class=FP8Experts, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS, has_bias=False, has_gate=True
    )
    new = kind(config=old.config, block_size=block, activation_scheme=scheme, has_bias=False, has_gate=True)
    for key, parts in (("gate_up_proj", 2), ("down_proj", 1)):
        codes, scales = [], []
        for part in getattr(old, key).detach().float().chunk(parts, 1):
            rows, columns = block or part.shape[1:]
            padded = nn.functional.pad(part, (0, -part.shape[2] % columns, 0, -part.shape[1] % rows))
            scale = padded.unflatten(1, (-1, rows)).unflatten(3, (-1, columns)).abs().amax((2, 4)) / 448
            wide = scale.repeat_interleave(rows, 1).repeat_interleave(columns, 2)[:, : part.shape[1], : part.shape[2]]
            codes.append((part / wide).to(torch.float8_e4m3fn))
            scales.append(scale)
        setattr(new, key, nn.Parameter(torch.cat([c.view(torch.uint8) for c in codes], 1).view(codes[0].dtype), False))
        setattr(new, f"{key}_scale_inv", nn.Parameter(torch.cat(scales, 1), requires_grad=False))
        if scheme == "static":
            setattr(new, f"{key}_activation_scale", nn.Parameter(torch.linspace(0.02, 0.05, 4), requires_grad=False))
    model.model.layers[0].mlp.experts = new.requires_grad_(False)  # type: ignore[union-attr, index]
    return model.eval()


def one_by_one(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors as a file has them: an expert's gate, up and down."""
    tensors = dict(model.state_dict())
    block = "model.layers.0.mlp.experts"
    for key, names in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        whole = {"weight": tensors.pop(f"{block}.{key}"), "weight_scale_inv": tensors.pop(f"{block}.{key}_scale_inv")}
        inputs = tensors.pop(f"{block}.{key}_activation_scale", None)
        for expert in range(4):
            for i, name in enumerate(names):
                stem = f"{block}.{expert}.{name}"
                tensors |= {f"{stem}.{suffix}": t[expert].chunk(len(names))[i] for suffix, t in whole.items()}
                if inputs is not None:
                    tensors[f"{stem}.activation_scale"] = inputs[expert]
    return tensors


@pytest.mark.parametrize("block", [(128, 128), None], ids=["blocks", "tensor"])
@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_fp8_experts_run_on_their_own_codes(block: tuple[int, int] | None, scheme: str, tmp_path: Path) -> None:
    if block is not None and scheme == "static":
        pytest.skip("blocks have dynamic inputs")
    model = with_fp8_experts(tiny_moe(), block, scheme)
    before, kinds = bits(model), [type(module) for module in model.modules()]
    config = {"quant_method": "fp8", "activation_scheme": scheme, "weight_block_size": block and list(block)}
    folder = write(tmp_path / "m", tiny_moe(), one_by_one(model), config)
    hooked = model.model.layers[0].mlp.experts.register_forward_hook(lambda *_: None)  # type: ignore[union-attr, index]
    quant_compile.compile(model)
    experts: Any = model.model.layers[0].mlp.experts  # type: ignore[union-attr, index]
    assert type(experts).__name__ == "Qwen3MoeExperts" and experts.config is model.config and not experts.training
    found, report = logits(model), quant_compile.report(model)
    assert torch.equal(found, logits(quant_compile.load(folder, device="cpu")))
    lines = {line.names[0].rpartition(".")[2]: line for line in report.lines}
    assert report.coverage == 1.0 and lines["gate_up_proj"].scheme == lines["down_proj"].scheme is not None
    assert "planes from the FP8Experts that transformers loaded" in lines["down_proj"].reason
    quant_compile.uncompile(model)
    hooked.remove()
    assert not experts._forward_hooks
    assert [type(module) for module in model.modules()] == kinds and same(before, bits(model))
    quant_compile.compile(model)
    assert torch.equal(logits(model), found)
    assert quant_compile.release(model) > 4 * (256 + 128) * 256  # codes, which are in planes of their own now
    assert torch.equal(logits(model), found)


def test_experts_that_share_blocks_of_rows_become_values(tmp_path: Path) -> None:
    """64 rows of gate and of up, each under a scale of its own, are no FP8_BLOCK planes; a block needs one scheme for both weights."""
    small = tiny_moe_of(64)
    model = with_fp8_experts(small, (128, 128))
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    folder = write(tmp_path / "m", tiny_moe_of(64), one_by_one(model), config)
    ours = quant_compile.load(folder, device="cpu")
    quant_compile.compile(model)
    for key in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{key}"
        assert torch.equal(model.get_parameter(name), ours.get_parameter(name))
    assert torch.equal(logits(model), logits(ours))
    reasons = "\n".join(line.reason for line in quant_compile.report(model).lines)
    assert "gate has 64 rows" in reasons
    (_, down) = loaded.adopt(with_fp8_experts(tiny_moe_of(64), (128, 128))).outcomes
    assert down.notes == ("gate_up_proj of its block is not in FP8_BLOCK: its values are kept in bfloat16",)


def tiny_moe_of(inner: int) -> nn.Module:
    """A ``tiny_moe`` whose experts have another size."""
    model = tiny_moe()
    model.config.moe_intermediate_size = inner  # type: ignore[union-attr]
    torch.manual_seed(0)
    return type(model)._from_config(model.config, dtype=torch.bfloat16).eval()  # type: ignore[operator]


def test_experts_that_cannot_be_adopted_are_named() -> None:
    packed = with_fp8_experts(tiny_moe(), (128, 128))
    experts: Any = packed.model.layers[0].mlp.experts  # type: ignore[union-attr, index]
    experts.down_proj = nn.Parameter(experts.down_proj.data.view(torch.int8), requires_grad=False)
    found = loaded.adopt(packed)
    assert [stay.reason.split(";")[0] for stay in found.stays] == [
        "FP8Experts holds down_proj in packed e2m1 (FP4), and e4m3 is taken over"
    ]

    other = with_fp8_experts(tiny_moe(), (128, 128))
    other.config.moe_intermediate_size = 64  # type: ignore[union-attr]
    (stay,) = loaded.adopt(other).stays
    assert "Qwen3MoeExperts has gate_up_proj 4x128x256" in stay.reason and "load(directory)" in stay.reason

    broken = with_fp8_experts(tiny_moe(), (128, 128))
    broken.config.vocab_size = -1  # type: ignore[union-attr]
    (stay,) = loaded.adopt(broken).stays
    assert "Qwen3MoeForCausalLM cannot be made without weights" in stay.reason


@pytest.mark.parametrize("key", ["gate_up_proj", "down_proj"])
def test_a_fault_of_experts_is_an_error_that_changes_nothing(key: str) -> None:
    model = with_fp8_experts(tiny_moe(), (128, 128))
    experts: Any = model.model.layers[0].mlp.experts  # type: ignore[union-attr, index]
    getattr(experts, f"{key}_scale_inv").data[3, 0, 0] = 0
    before, kinds = bits(model), [type(module) for module in model.modules()]
    with pytest.raises(CheckpointError, match=rf"experts\.{key}_scale_inv holds a scale of 0"):
        quant_compile.compile(model)
    assert [type(module) for module in model.modules()] == kinds and same(before, bits(model))
    getattr(experts, f"{key}_scale_inv").data[3, 0, 0] = 1
    setattr(experts, f"{key}_scale_inv", nn.Parameter(torch.ones(4, 3, 5), requires_grad=False))
    with pytest.raises(CheckpointError, match=rf"experts\.{key}_scale_inv has shape"):
        quant_compile.compile(model)
    assert [type(module) for module in model.modules()] == kinds


# --- the libraries themselves -----------------------------------------------------------------------------------------


def lacks(*libraries: str) -> bool:
    return any(importlib.util.find_spec(library) is None for library in libraries)


@pytest.mark.skipif(lacks("bitsandbytes"), reason="bitsandbytes is not installed")
@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called"])
def test_bitsandbytes_itself(called: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(1).save_pretrained(tmp_path / "bf16")  # type: ignore[operator]
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", quantization_config=config)
    if called:
        logits(model)
    before = bits(model)
    model.save_pretrained(tmp_path / "int8")
    quant_compile.compile(model)
    found = logits(model)
    assert {line.scheme for line in quant_compile.report(model).lines if line.scheme} == {"W8A16"}
    assert torch.equal(found, logits(quant_compile.load(tmp_path / "int8", device="cpu")))
    quant_compile.uncompile(model)
    assert same(before, bits(model))
    # Its own product quantizes the inputs to 8 bits.
    assert distance(logits(model), found) < 5e-2


@pytest.mark.skipif(lacks("gptqmodel", "optimum"), reason="gptqmodel or optimum is not installed")
@pytest.mark.parametrize("name", ["gptq desc_act", "gptq 4 bits asym", "awq"])
def test_gptqmodel_itself(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    case = CASES[name]
    _, tensors = doubles.with_modules(tiny_llama(1), case, KINDS[name][1])
    folder = write(tmp_path / "m", tiny_llama(1), tensors, case.config)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    before = bits(model)
    quant_compile.compile(model)
    found = logits(model)
    assert quant_compile.report(model).coverage == 1.0 and not quant_compile.report(model).notes
    assert torch.equal(found, logits(quant_compile.load(folder, device="cpu")))
    quant_compile.uncompile(model)
    assert same(before, bits(model))
    assert distance(logits(model), found) < 2e-2  # its own product rounds values to bf16
