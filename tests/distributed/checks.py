"""What the ranks of a world run: tiny checkpoints loaded by transformers, in parts and whole, quantized and compared."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    Qwen3MoeConfig,
)

import quant_compile
from quant_compile.lowering.identity import local_of, shard_of
from quant_compile.lowering.weights import STORE, Key, quantize
from quant_compile.model.weights import linear_weights

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
ONE_LAYER: dict[str, Any] = {**SIZES, "num_hidden_layers": 1}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "intermediate_size": 64,
}
DEEPSEEK: dict[str, Any] = {
    **{name: size for name, size in SIZES.items() if name != "head_dim"},
    "num_key_value_heads": 4, "intermediate_size": 128, "moe_intermediate_size": 64, "first_k_dense_replace": 1,
    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1, "q_lora_rank": 32,
    "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
# Parts whose sizes kernels of GPUs take: groups of 128 along each rank's k. Every token has every expert, so that a rounding in bf16
# cannot send it to another one.
WIDE: dict[str, Any] = {**SIZES, "vocab_size": 256, "hidden_size": 256, "head_dim": 64}
FAMILIES = {
    "wide_llama": lambda: LlamaConfig(**WIDE, intermediate_size=256),
    "wide_qwen3_moe": lambda: Qwen3MoeConfig(
        **WIDE, **{**EXPERTS, "num_experts_per_tok": 4, "moe_intermediate_size": 256}
    ),
    "llama": lambda: LlamaConfig(**SIZES, intermediate_size=128),
    "one_layer": lambda: LlamaConfig(**ONE_LAYER, intermediate_size=128),
    "tied": lambda: LlamaConfig(**SIZES, intermediate_size=128, tie_word_embeddings=True),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS),
    "one_block": lambda: Qwen3MoeConfig(**ONE_LAYER, **EXPERTS),
    "gpt_oss": lambda: GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, intermediate_size=64),
    "deepseek_v3": lambda: DeepseekV3Config(**DEEPSEEK),
}


def make(family: str, folder: Path) -> Path:
    """Save a seeded tiny checkpoint."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.08)
    model.save_pretrained(folder / family)
    return folder / family


def loaded(path: Path, plan: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint, in parts under a ``DistributedConfig`` with these arguments."""
    from transformers.distributed import DistributedConfig

    given = {} if plan is None else {"distributed_config": DistributedConfig(**plan)}
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **given).eval().to(device())


def device() -> torch.device:
    """Where this rank computes."""
    import torch.distributed as dist

    return torch.device("cuda", dist.get_rank()) if dist.get_backend() == "nccl" else torch.device("cpu")


def plan(experts: bool) -> dict[str, Any]:
    """Arguments of a ``DistributedConfig``: with ``experts`` each rank has whole ones, as this version of transformers says it."""
    from dataclasses import fields

    from transformers.distributed import DistributedConfig

    if not experts:
        return {"tp_plan": "auto"}
    known = {field.name for field in fields(DistributedConfig)}
    return {"tp_plan": "auto", **({"ep_size": 2} if "ep_size" in known else {"enable_expert_parallel": True})}


@contextmanager
def without_inductor() -> Generator[list[torch.fx.GraphModule]]:
    """Compiled functions are the lowered graphs, as in ``runtime_support.plain_inductor``."""
    from torch._inductor import compile_fx

    before, graphs = compile_fx.compile_fx, list[torch.fx.GraphModule]()

    def plain(gm: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    compile_fx.compile_fx = plain  # type: ignore[assignment]
    try:
        yield graphs
    finally:
        compile_fx.compile_fx = before


class Parts(nn.Module):
    """Modules whose results are added, as ranks' are: one process's account of what a rowwise cut computes."""

    def __init__(self, parts: list[nn.Module], cut: bool, bias: Tensor | None = None) -> None:
        super().__init__()
        self.parts, self.cut, self.bias = nn.ModuleList(parts), cut, bias

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        xs = x.chunk(len(self.parts), -1) if self.cut else [x] * len(self.parts)
        total = self.parts[0](xs[0], *args)
        for part, each in zip(list(self.parts)[1:], xs[1:], strict=True):
            total = total + part(each, *args)
        return total if self.bias is None else total + self.bias


def in_parts(whole: nn.Module, divided: nn.Module, ranks: int) -> nn.Module:
    """A copy of a model whose modules that ``divided`` has cut along their inputs are sums of their parts."""
    made = copy.deepcopy(whole)
    cuts: dict[str, dict[str, Any]] = {}
    for name, parameter in divided.named_parameters():
        shard = shard_of(local_of(parameter))
        if shard is not None and shard.cuts:
            parent, _, leaf = name.rpartition(".")
            cuts.setdefault(parent, {})[leaf] = shard
    for name, shards in cuts.items():
        module, parent = made.get_submodule(name), made.get_submodule(name.rpartition(".")[0])
        first = next(iter(shards.values()))
        if isinstance(module, nn.Linear) and first.cuts[0][0] == 1:
            parts: list[nn.Module] = [_linear(weight) for weight in module.weight.detach().chunk(ranks, 1)]
            setattr(parent, name.rpartition(".")[2], Parts(parts, True, module.bias))
        elif "down_proj" in shards and shards["down_proj"].cuts[0][0] == 2:
            setattr(parent, name.rpartition(".")[2], Parts([_experts(module, i, ranks) for i in range(ranks)], False))
    return made


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    return made


def _experts(module: Any, rank: int, ranks: int) -> nn.Module:
    part = copy.deepcopy(module)
    gate, up = (half.chunk(ranks, 1)[rank] for half in module.gate_up_proj.detach().chunk(2, 1))
    part.gate_up_proj = nn.Parameter(torch.cat((gate, up), 1), requires_grad=False)
    part.down_proj = nn.Parameter(module.down_proj.detach().chunk(ranks, 2)[rank].contiguous(), requires_grad=False)
    return part


@dataclass(frozen=True)
class Compared:
    """Distances of logits, relative (of the largest), and what the ledger says.

    Attributes:
        parts: from the one-process quantized model whose rowwise products are sums of parts.
        whole: from the one-process quantized model.
        error: of that one from the model in full precision.
        same: whether all ranks have the same logits.
    """

    parts: float
    whole: float
    error: float
    same: bool
    coverage: float
    bytes_before: int
    bytes_after: int
    total: Any
    skips: tuple[tuple[str, str], ...]
    one: Any


def compare(
    path: Path,
    policy: Any,
    plan: dict[str, Any],
    damage: str = "",
    inductor: bool = False,
    dtype: torch.dtype = torch.float32,
    factor: float = 1.05,
) -> Compared:
    """Logits of a model in parts against those of one process.

    Args:
        damage: name of a weight; this rank's part of it is scaled by ``factor`` on rank 1.
        inductor: graphs are compiled.
    """
    return compared(loaded(path, None, dtype), loaded(path, plan, dtype), policy, damage, inductor, factor)


def compared(plain: Any, divided: Any, policy: Any, damage: str, inductor: bool, factor: float) -> Compared:
    """``compare`` of loaded models, which are compiled afterwards."""
    import torch.distributed as dist

    ids = torch.arange(3, 19).view(2, 8).to(device())
    parts = in_parts(plain, divided, dist.get_world_size())
    if damage and dist.get_rank() == 1:
        with torch.no_grad():
            local_of(divided.get_parameter(damage)).mul_(factor)
    with torch.no_grad(), nullcontext() if inductor else without_inductor():
        exact = plain(ids).logits
        made = []
        for model in (parts, plain, divided):
            quant_compile.compile(model, policy)
            made.append(model(ids).logits)
    report, one = quant_compile.report(divided), quant_compile.report(plain)
    everywhere = [torch.empty_like(made[2]) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, made[2])
    return Compared(
        _distance(made[2], made[0]), _distance(made[2], made[1]), _distance(made[1], exact),
        all(torch.equal(each, made[2]) for each in everywhere), report.coverage, report.bytes_total, report.bytes_after,
        report.all_ranks(), report.skips, one,
    )  # fmt: skip


def on_gpus(
    path: Path, policy: str, plan: dict[str, Any], damage: tuple[str, float] = ("", 1.0), inductor: bool = True
) -> dict[str, Any]:
    """``compare`` in bf16, and what the divided model then generates."""
    plain, divided = loaded(path, None, torch.bfloat16), loaded(path, plan, torch.bfloat16)
    found = compared(plain, divided, policy, damage[0], inductor, damage[1])
    ids = torch.arange(3, 11).view(1, 8).to(device())
    with nullcontext() if inductor else without_inductor():
        return {"compared": found, "tokens": divided.generate(ids, max_new_tokens=8, do_sample=False).tolist()}


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def codes(path: Path, policy: Any) -> list[tuple[str, str]]:
    """(name, which plane) of all packed planes that are not the rows and columns of the whole weight's."""
    import torch.distributed as dist

    ids = torch.arange(3, 19).view(2, 8)
    plain, divided = loaded(path), loaded(path, {"tp_plan": "auto"})
    with torch.no_grad(), without_inductor():
        quant_compile.compile(divided, policy)
        divided(ids)
    wrong: list[tuple[str, str]] = []
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for weight in linear_weights(divided):
        shard, entry = shard_of(weight.parameter), STORE.peek(weight.parameter)
        if shard is None or not shard.cuts or entry is None or not entry.packs:
            continue
        key, pack = next(iter(entry.packs.items()))
        assert key.layout == "rows"
        own = plain.get_parameter(f"{weight.site.names[0]}.weight")
        whole = quantize(own, Key(key.spec, "rows", key.transposed, key.dtype), "w")
        dim = shard.cuts[0][0]
        for index, (mine, all_) in enumerate(zip(pack.slab.planes, whole, strict=True)):
            mine = mine[pack.start : pack.stop]
            wanted = all_.chunk(ranks, dim)[rank] if all_.shape[dim] > 1 else all_
            if mine.shape != wanted.shape or not torch.equal(
                mine.view(torch.uint8), wanted.contiguous().view(torch.uint8)
            ):
                wrong.append((weight.site.names[0], f"plane {index} {tuple(mine.shape)} {tuple(wanted.shape)}"))
    return wrong


def lifecycle(path: Path) -> dict[str, Any]:
    """A model in parts through compile, generate, an edit of its weights and uncompile."""
    ids = torch.arange(3, 11).view(1, 8)
    plain, divided = loaded(path), loaded(path, {"tp_plan": "auto"})
    found: dict[str, Any] = {}
    with torch.no_grad(), without_inductor():
        before = divided(ids).logits
        quant_compile.compile(divided, "W8A16")
        found["generated"] = divided.generate(ids, max_new_tokens=6, do_sample=False).tolist()
        first = divided(ids).logits
        report = quant_compile.report(divided)
        found["coverage"] = report.coverage
        found["again"] = torch.equal(first, divided(ids).logits)
        weight = local_of(divided.model.layers[0].self_attn.q_proj.weight)
        weight.mul_(1.5)
        found["edited"] = torch.equal(first, divided(ids).logits)
        weight.div_(1.5)
        quant_compile.uncompile(divided)
        found["untouched"] = (
            torch.allclose(before, divided(ids).logits, atol=1e-5),
            {type(local_of(p)).__name__ for p in divided.parameters()},
        )
        quant_compile.compile(plain, "W8A16")
        found["alone"] = plain.generate(ids, max_new_tokens=6, do_sample=False).tolist()
    return found


def released(path: Path, early: bool) -> dict[str, Any]:
    """A model in parts whose values are given up, when it is compiled or later, and put back again."""
    ids, found = torch.arange(3, 11).view(1, 8), dict[str, Any]()
    divided, kept = loaded(path, {"tp_plan": "auto"}), loaded(path, {"tp_plan": "auto"})
    with torch.no_grad(), without_inductor() as graphs:
        before = divided(ids).logits
        quant_compile.compile(kept, "W8A16")
        wanted = kept(ids).logits
        quant_compile.compile(divided, "W8A16", release_weights=early)
        found["first"] = torch.equal(divided(ids).logits, wanted)
        found["freed"] = 0 if early else quant_compile.release(divided)
        count = len(graphs)
        found["again"] = torch.equal(divided(ids).logits, wanted)
        found["compiled_again"] = len(graphs) - count
        found["shorter"] = torch.equal(divided(ids[:, :5]).logits, kept(ids[:, :5]).logits)
        found["generated"] = [
            model.generate(ids, max_new_tokens=5, do_sample=False).tolist() for model in (divided, kept)
        ]
        projections = [m.weight for m in divided.model.layers.modules() if isinstance(m, nn.Linear)]
        with torch._C.DisableTorchFunctionSubclass():
            found["bytes"] = sum(local_of(weight).untyped_storage().size() for weight in projections)
        weight = divided.model.layers[0].mlp.down_proj.weight
        found["read"] = [_said(act) for act in (weight.sum, divided.state_dict, lambda: copy.deepcopy(weight))]
        reports = [quant_compile.report(model).all_ranks() for model in (divided, kept)]
        found["ledger"] = [
            (r.coverage, r.bytes_total, [(x.names, x.scheme, x.bytes_after) for x in r.lines]) for r in reports
        ]
        found["uncompile"] = _said(lambda: quant_compile.uncompile(divided))
        found["restored"] = quant_compile.restore(divided, path)
        state = divided.state_dict()
        found["state"] = all(
            torch.equal(state[name].full_tensor(), whole) for name, whole in _whole(path) if "proj" in name
        )
        found["after"] = early or torch.equal(divided(ids).logits, wanted)  # a call would give them up again
        quant_compile.uncompile(divided)
        found["untouched"] = torch.equal(before, divided(ids).logits)
        found["classes"] = {type(weight) for weight in divided.parameters()} == {
            type(weight) for weight in kept.parameters()
        }
    return found


def saved(path: Path, folder: Path, policy: Any, plan: dict[str, Any], release: bool = False) -> dict[str, Any]:
    """A model in parts saved, and the one-process model: names of tensors that differ, and how far a loaded one's logits are off."""
    import torch.distributed as dist
    from safetensors.torch import load_file

    ids, found = torch.arange(3, 11).view(1, 8), dict[str, Any]()
    plain, divided = loaded(path), loaded(path, plan)
    with torch.no_grad(), without_inductor():
        for model in (plain, divided):
            quant_compile.compile(model, policy)
        whole, wanted = plain(ids).logits, divided(ids).logits
        if release:
            quant_compile.release(divided)
        found["said"] = _said(lambda: quant_compile.save(divided, folder / "divided"))
        if dist.get_rank() == 0 and not found["said"]:
            quant_compile.save(plain, folder / "plain")
            ours, theirs = (load_file(folder / name / "model.safetensors") for name in ("divided", "plain"))
            found["names"] = ours.keys() == theirs.keys()
            found["differ"] = [
                n for n in ours if ours[n].dtype != theirs[n].dtype or not _same_bits(ours[n], theirs[n])
            ]
            texts = [(folder / name / "config.json").read_text() for name in ("divided", "plain")]
            found["config"] = texts[0] == texts[1]
            found["off"] = _distance(quant_compile.load(folder / "divided")(ids).logits, whole)
        found["again"] = torch.equal(divided(ids).logits, wanted)
        found["packed"] = _said(lambda: quant_compile.save(divided, folder / "packed", "packed"))
    return found


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _whole(path: Path) -> list[tuple[str, Tensor]]:
    return list(loaded(path).state_dict().items())


def _said(act: Any) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals(path: Path, folder: Path) -> dict[str, Any]:
    """What is said of that which cannot be done in parts, and of what breaks on one rank."""
    import torch.distributed as dist

    ids, found = torch.arange(3, 11).view(1, 8), dict[str, Any]()
    with torch.no_grad(), without_inductor():
        divided = loaded(path, {"tp_plan": "auto"})
        quant_compile.compile(divided, "W4A16")
        divided(ids)
        report = quant_compile.report(divided)
        found["cut"] = report.skips
        found["kept"] = {line.names[0] for line in report.lines if line.named and not line.scheme}
        found["calibrate"] = _said(lambda: quant_compile.calibrate(divided, [ids], "W8A8_STATIC"))
        divided = loaded(path, {"tp_plan": "auto"})
        if dist.get_rank() == 1:
            local_of(divided.model.layers[0].mlp.up_proj.weight)[0, 0] = float("nan")
        quant_compile.compile(divided, TENSOR)
        found["nan"] = _said(lambda: divided(ids))
    found["fsdp"] = _said(lambda: quant_compile.compile(_fully_sharded(loaded(path)), "W8A16"))
    return found


def _fully_sharded(model: Any) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return model


FP8_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
TENSOR = {
    "default": {
        "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"},
        "input_activations": FP8_TOKEN,
    }
}
GROUP32 = {"default": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}}


def by_torch(policy: str) -> dict[str, Any]:
    """A model that torch's own ``parallelize_module`` divides, whose products are DTensor's."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    x = torch.randn(4, 32)
    with torch.no_grad(), without_inductor():
        wanted = model(x)
        parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
        quant_compile.compile(model, policy)
        made = model(x)
    return {"error": _distance(made, wanted), "skips": quant_compile.report(model).skips}


def one_rank_fails(path: Path, seconds: float) -> str:
    """What each rank hears of a weight of the second rank that cannot be quantized; leaves the process group broken."""
    from datetime import timedelta

    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _set_pg_timeout

    ids = torch.arange(3, 11).view(1, 8)
    with torch.no_grad(), without_inductor():
        divided = loaded(path, {"tp_plan": "auto"})
        dist.barrier()
        _set_pg_timeout(timedelta(seconds=seconds))
        if dist.get_rank() == 1:
            local_of(divided.model.layers[0].mlp.up_proj.weight)[0, 0] = float("nan")
        quant_compile.compile(divided, "W8A16")
        try:
            divided(ids)
        except Exception as error:
            return "\n".join([str(error), *getattr(error, "__notes__", ())])
    return "nothing"
