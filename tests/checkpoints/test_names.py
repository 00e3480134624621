"""Names: every tensor is used or named, every weight is filled or named, whichever way a library cuts experts up."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.checkpoints.fill import Filler
from quant_compile.checkpoints.names import slots_of
from quant_compile.ir.errors import PolicyError
from quant_compile.pretrained import Plan, plan_of
from tests.checkpoints.packers import CASES, ct_config, mxfp4_parts, nvfp4_parts
from tests.checkpoints.support import quantized, tiny_gpt_oss, tiny_llama, tiny_moe, tiny_nemotron, write

MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}


def filled(folder: Path) -> dict[str, Tensor]:
    """Every Parameter of the model, planes dequantized, as the model stores it."""
    from quant_compile.ir.family import family_of
    from quant_compile.ir.scheme import parse
    from quant_compile.lowering.weights import STORE

    plan = plan_of(folder, dtype=torch.bfloat16)
    Filler(plan.files, plan.description, plan.dtype, torch.device("cpu")).fill(plan.mapped)
    out: dict[str, Tensor] = {}
    for name, parameter in plan.model.named_parameters(remove_duplicate=False):
        entry = STORE.peek(parameter)
        if entry is None or not entry.released:
            out[name] = parameter.detach().float()
            continue
        (key, pack), scheme = next(iter(entry.packs.items())), None
        scheme = parse(key.spec)
        shape = parameter.shape
        k = shape[-2] if key.transposed else shape[-1]
        if parameter.dim() == 2:
            values = family_of(scheme).dequantize_weight(pack.slab.planes, scheme, k)
            out[name] = values.t() if key.transposed else values
            continue
        experts = []
        for expert in range(shape[0]):
            values = family_of(scheme).dequantize_weight(tuple(p[expert] for p in pack.slab.planes), scheme, k)
            if key.interleaved:
                values = torch.stack(values.chunk(2), 1).flatten(0, 1)
            experts.append(values.t() if key.transposed else values)
        out[name] = torch.stack(experts)
    return out


def per_expert(model: nn.Module, pack, suffixed: bool = True) -> dict[str, Tensor]:
    """State dict with an expert's tensors one by one; the model's own weights become what they stand for."""
    tensors = dict(model.state_dict())
    for path, module in model.named_modules():
        if not path.endswith(".experts"):
            continue
        columns = getattr(module, "is_transposed", False)
        alternate = not getattr(module, "is_concatenated", True)
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            parameter = getattr(module, name, None)
            if parameter is None:
                continue
            for expert in range(parameter.shape[0]):
                whole = parameter.detach()[expert].float()
                whole = whole.t() if columns else whole
                bias = getattr(module, f"{name}_bias", None)
                rows = {name: whole}
                biases = {name: None if bias is None else bias[expert]}
                if name == "gate_up_proj":
                    cut = (lambda x: (x[0::2], x[1::2])) if alternate else (lambda x: x.chunk(2))
                    rows = dict(zip(("gate_proj", "up_proj"), cut(whole), strict=True))
                    biases = dict(
                        zip(("gate_proj", "up_proj"), (None, None) if bias is None else cut(bias[expert]), strict=True)
                    )
                made = []
                for part, weight in rows.items():
                    found, values = pack(f"{path}.{expert}.{part}", weight.contiguous())
                    tensors |= {f"{path}.{expert}.{part}.{suffix}": t for suffix, t in found.items()}
                    if biases[part] is not None:
                        tensors[f"{path}.{expert}.{part}.bias"] = biases[part]
                    made.append(values)
                joined = torch.cat(made) if not alternate or len(made) == 1 else torch.stack(made, 1).flatten(0, 1)
                parameter.data[expert] = (joined.t() if columns else joined).to(parameter.dtype)
            del tensors[f"{path}.{name}"]
            tensors.pop(f"{path}.{name}_bias", None)
    return tensors


@pytest.mark.parametrize("make", [tiny_moe, tiny_gpt_oss, tiny_nemotron])
@pytest.mark.parametrize("form", ["bf16", "mxfp4", "gptq 4 bits sym"])
def test_experts_one_by_one_become_the_fused_weight(make, form: str, tmp_path: Path) -> None:
    model = make()
    if form == "bf16":
        pack, config = (lambda name, w: ({"weight": w.to(torch.bfloat16)}, w)), None
    elif form == "mxfp4":

        def pack(name, w):
            packed, scale, values = mxfp4_parts(w)
            return {"weight_packed": packed, "weight_scale": scale}, values

        config = ct_config("mxfp4-pack-quantized", MXFP4)
    else:
        from tests.checkpoints.packers import gptq

        case = gptq(4, 32, True)
        pack, config = case.pack, case.config
    tensors = per_expert(model, pack)
    found = filled(write(tmp_path, model, tensors, config))
    wanted = dict(model.named_parameters())
    assert set(wanted) <= set(found)
    for name, parameter in wanted.items():
        assert torch.equal(found[name].to(parameter.dtype), parameter.detach()), name


@pytest.mark.parametrize("form", ["mxfp4", "modelopt nvfp4"])
def test_fused_quantized_experts_of_gpt_oss(form: str, tmp_path: Path) -> None:
    """[E, n, k/32, 16] as OpenAI writes it; [E, k/2, n], packed along the input, as modelopt does."""
    model = tiny_gpt_oss()
    tensors = dict(model.state_dict())
    experts = model.model.layers[0].mlp.experts  # type: ignore[union-attr, index]
    for name in ("gate_up_proj", "down_proj"):
        parameter = getattr(experts, name)
        full = f"model.layers.0.mlp.experts.{name}"
        rows = [w.t().contiguous().float() for w in parameter.detach()]
        del tensors[full]
        if form == "mxfp4":
            parts = [mxfp4_parts(w) for w in rows]
            packed = torch.stack([p for p, _, _ in parts])
            tensors[f"{full}_blocks"] = packed.unflatten(-1, (-1, 16))
            tensors[f"{full}_scales"] = torch.stack([s for _, s, _ in parts])
            values = [v for _, _, v in parts]
        else:
            whole = max(float(w.abs().amax()) for w in rows) / 2688
            own = [
                nvfp4_parts(torch.cat((w, torch.full((1, w.shape[1]), whole * 2688)))) for w in rows
            ]  # one scale for all
            tensors[full] = torch.stack([p[:-1].t() for p, *_ in own])
            tensors[f"{full}_weight_scale"] = torch.stack([s[:-1].t() for _, s, *_ in own])
            tensors[f"{full}_weight_scale_2"] = own[0][2]
            tensors[f"{full}_input_scale"] = torch.tensor(0.01)
            values = [v[:-1] for *_, v in own]
        parameter.data = torch.stack([v.t() for v in values]).to(torch.bfloat16)
    config = {"quant_method": "mxfp4"} if form == "mxfp4" else {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    found = filled(write(tmp_path, model, tensors, config))
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name].to(parameter.dtype), parameter.detach()), name


def edit(folder: Path, change) -> Path:
    """Change the tensors of a written checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, str(folder / "model.safetensors"))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_llama()
    return write(tmp_path_factory.mktemp("plain"), model, dict(model.state_dict()), None)


def copy(source: Path, folder: Path) -> Path:
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight"]
)
def test_a_missing_tensor_is_named(name: str, plain: Path, tmp_path: Path) -> None:
    folder = edit(copy(plain, tmp_path), lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"no tensor fills: {re.escape(name)}"):
        plan_of(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.extra.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "something",
        "model.layers.0.mlp.up_proj.lora_A",
    ],
)
def test_a_left_over_tensor_is_named(name: str, plain: Path, tmp_path: Path) -> None:
    folder = edit(copy(plain, tmp_path), lambda tensors: tensors.update({name: torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=f"belong to no weight: {re.escape(name)}"):
        plan_of(folder)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("model.layers.2.self_attn.q_proj.weight", "predicts further tokens"),
        ("model.layers.0.self_attn.k_scale", "KV cache"),
        ("model.layers.0.self_attn.k_proj.k_scale", "KV cache"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "computed from the config"),
    ],
)
def test_what_is_not_used_is_named_with_its_reason(name: str, why: str, plain: Path, tmp_path: Path) -> None:
    folder = edit(copy(plain, tmp_path), lambda tensors: tensors.update({name: torch.ones(2)}))
    ignored = plan_of(folder).mapped.ignored
    assert list(ignored) == [name] and why in ignored[name]


def test_a_prefix_that_is_missing_or_added(plain: Path, tmp_path: Path) -> None:
    def without(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    assert plan_of(edit(copy(plain, tmp_path), without)).outcomes


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    model = tiny_moe()
    tensors = per_expert(model, lambda name, w: ({"weight": w.to(torch.bfloat16)}, w))
    write(tmp_path, model, tensors, None)
    edit(tmp_path, lambda t: t.pop("model.layers.0.mlp.experts.2.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"expert 2 of model\.layers\.0\.mlp\.experts\.gate_up_proj has no up"):
        plan_of(tmp_path)
    edit(
        tmp_path,
        lambda t: t.update(
            {
                "model.layers.0.mlp.experts.2.up_proj.weight": torch.zeros(128, 256, dtype=torch.bfloat16),
                "model.layers.0.mlp.experts.4.up_proj.weight": torch.zeros(128, 256, dtype=torch.bfloat16),
            }
        ),
    )
    with pytest.raises(CheckpointError, match="has expert 4"):
        plan_of(tmp_path)


def test_tied_heads_need_no_tensor(tmp_path: Path) -> None:
    case = CASES["ct packed 4 sym"]
    folder = quantized(tmp_path, tiny_llama(tied=True), case.pack, case.config)
    plan = plan_of(folder)
    slot = slots_of(plan.model)["lm_head.weight"]
    assert set(slot.names) == {"model.embed_tokens.weight", "lm_head.weight"}


WRONG = {
    "shape": (lambda t: t.update({"model.norm.weight": torch.ones(9)}), "has shape"),
    "codes' dtype": (lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].to(torch.int64)}), "is int64, must be int32"),
    "codes' shape": (lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"][:-1].clone()}), "has shape 31x256, must be 32x256"),
    "scales' shape": (lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][:, :-1].clone()}), "has shape"),
    "no scales": (lambda t: t.pop(f"{Q}.scales"), "no scales"),
    "a tensor of another format": (lambda t: t.update({f"{Q}.weight_scale_inv": torch.ones(2, 2)}), "no tensor of gptq"),
    "codes without scales": (lambda t: t.update({"model.norm.weight": torch.ones(256).to(torch.float8_e4m3fn)}), "without scales"),
}  # fmt: skip
Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = CASES["gptq 4 bits sym"]
    return quantized(tmp_path_factory.mktemp("packed"), tiny_llama(), case.pack, case.config)


@pytest.mark.parametrize("case", WRONG)
def test_headers_that_cannot_be_are_refused_before_anything_is_read(case: str, packed: Path, tmp_path: Path) -> None:
    change, words = WRONG[case]
    folder = edit(copy(packed, tmp_path), change)
    with pytest.raises(CheckpointError, match=words) as raised:
        plan_of(folder)
    assert "Fix:" in str(raised.value)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_scales_that_are_no_numbers(value: float, packed: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.scales"][1, 3] = value

    plan = plan_of(edit(copy(packed, tmp_path), change))
    with pytest.raises(CheckpointError, match=rf"{re.escape(Q)}\.scales holds a scale of {value}"):
        fill_plan(plan)


@pytest.mark.parametrize("value", [-1, 9, 1 << 20])
def test_groups_that_do_not_exist(value: int, packed: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.g_idx"][5] = value

    with pytest.raises(CheckpointError, match="names groups outside of 0 to 3"):
        fill_plan(plan_of(edit(copy(packed, tmp_path), change)))


def fill_plan(plan: Plan) -> None:
    Filler(plan.files, plan.description, plan.dtype, torch.device("cpu")).fill(plan.mapped)


def test_a_policy_may_not_contradict_the_checkpoint(packed: Path) -> None:
    policy = {"default": "FP8_DYNAMIC", "rules": [{"match": "*.q_proj", "scheme": "W8A8"}]}
    with pytest.raises(PolicyError, match=r"q_proj: policy says W8A8 .* has it in int4\.group64\+16"):
        plan_of(packed, policy)
    plan = plan_of(packed, {"default": "FP8_DYNAMIC", "rules": [{"match": "lm_head", "scheme": "W8A16"}]})
    assert {o.name: o.scheme.spec for o in plan.outcomes if o.scheme}["lm_head.weight"] == "W8A16"
