"""What the ranks of a world run of ``load``: checkpoints in parts, beside the same in one process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quant_compile
from quant_compile.ir.family import family_of
from quant_compile.ir.scheme import parse
from quant_compile.lowering.identity import local_of, shard_of
from quant_compile.lowering.weights import STORE
from quant_compile.model.distributed import own_part
from quant_compile.model.weights import linear_weights
from tests.distributed.checks import _distance, _said, _same_bits, loaded, without_inductor


@dataclass(frozen=True)
class Loaded:
    """A divided model beside one that has the whole checkpoint.

    Attributes:
        off: relative distance of logits.
        damaged: the same once a rank's scales are off.
        tokens: that this rank generates, and those of one process, where asked for.
        wrong: weights whose planes do not stand for this rank's part of what the whole ones stand for.
        cut: how many planes were compared of weights that are cut.
        report: of this rank.
        total: of all ranks.
        one: of one process.
        read: bytes of tensors that this rank has read, and that one process has.
    """

    off: float
    damaged: float
    tokens: list[Any]
    wrong: list[str]
    cut: int
    report: Any
    total: Any
    one: Any
    read: tuple[float, float]


def divided(path: Path, policy: Any, plan: dict[str, Any], **options: Any) -> Any:
    """The checkpoint in parts."""
    from transformers.distributed import DistributedConfig

    return quant_compile.load(
        path, policy, distributed_config=DistributedConfig(**plan), dtype=torch.float32, **options
    )


def beside(path: Path, policy: Any, plan: dict[str, Any], damage: str = "", generate: bool = False) -> Loaded:
    """A checkpoint in parts and in one process.

    Args:
        damage: name of a weight; the scales of this rank's part of it are multiplied by 1.05 on rank 1, in the end.
    """
    import torch.distributed as dist

    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad(), without_inductor():
        one = quant_compile.load(path, policy, dtype=torch.float32)
        made = divided(path, policy, plan)
        wrong, cut = compared(one, made)
        wanted = one(ids).logits
        off = _distance(made(ids).logits, wanted)
        both = (made, one) if generate else ()
        tokens = [model.generate(ids[:1], max_new_tokens=4, do_sample=False).tolist() for model in both]
        reports = quant_compile.report(made), quant_compile.report(one)
        if damage and dist.get_rank() == 1:
            scales_of(made.get_parameter(damage)).mul_(1.05)
        damaged = _distance(made(ids).logits, wanted) if damage else 0.0
    read = [float(note.split()[1].replace(",", "")) for note in reports[0].notes if note.startswith("read ")]
    whole = sum(file.stat().st_size for file in Path(path).glob("*.safetensors")) / 1e6
    return Loaded(off, damaged, tokens, wrong, cut, reports[0], reports[0].all_ranks(), reports[1], (read[0], whole))


def compared(one: Any, made: Any) -> tuple[list[str], int]:
    """Names of weights whose planes are not the part of the whole ones; how many are cut."""
    wholes = {weight.site.names[0]: weight.parameter for weight in linear_weights(one)}
    wrong, cut = list[str](), 0
    for weight in linear_weights(made):
        name, shard = weight.site.names[0], shard_of(weight.parameter)
        mine, whole = values(weight.parameter), values(wholes[name])
        if shard is None or not shard.cuts or mine is None or whole is None:
            continue
        cut += 1
        if not torch.equal(mine, own_part(weight.parameter, whole)):
            wrong.append(name)
    return wrong, cut


def values(parameter: Any) -> Tensor | None:
    """What adopted planes in rows stand for; None of a weight that has values."""
    entry = STORE.peek(parameter)
    if entry is None or not entry.packs:
        return None
    key, pack = next(iter(entry.packs.items()))
    scheme = parse(key.spec)
    k = parameter.shape[-2 if key.transposed else -1]
    planes = [plane[pack.start : pack.stop] for plane in pack.slab.planes]
    if parameter.dim() == 2:
        return family_of(scheme).dequantize_weight(tuple(planes), scheme, k)
    experts = (tuple(plane[i] for plane in planes) for i in range(parameter.shape[0]))
    return torch.stack([family_of(scheme).dequantize_weight(each, scheme, k) for each in experts])


def scales_of(parameter: Any) -> Tensor:
    """The scales of a weight's planes."""
    entry = STORE.peek(local_of(parameter))
    assert entry is not None
    pack = next(iter(entry.packs.values()))
    return pack.slab.planes[1]


def on_the_way(path: Path, policy: Any, plan: dict[str, Any]) -> dict[str, Any]:
    """Weights in 16 bits quantized as parts of them are read, beside transformers' divided model compiled under the same policy."""
    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad(), without_inductor():
        theirs, made = loaded(path, plan), divided(path, policy, plan)
        quant_compile.compile(theirs, policy)
        same = torch.equal(made(ids).logits, theirs(ids).logits)
        reports = [quant_compile.report(model) for model in (made, theirs)]
    lines = [{(line.names, line.scheme) for line in report.lines} for report in reports]
    return {"same": same, "coverage": reports[0].coverage, "ledger": lines[0] == lines[1], "notes": reports[0].notes}


def failures(paths: Sequence[Path], path: Path, heads: Path, cut: Path, gguf: Path) -> dict[str, Any]:
    """What is said of one rank's broken file, and of what cannot be divided; every rank goes on afterwards."""
    import torch.distributed as dist
    from safetensors.torch import load_file

    plan, found = {"tp_plan": "auto"}, dict[str, Any]()
    started = time.monotonic()
    found["broken"] = _said(lambda: divided(paths[dist.get_rank()], None, plan))
    found["seconds"] = time.monotonic() - started
    found["heads"] = _said(lambda: divided(heads, "W8A16", plan))
    found["cut"] = _said(lambda: divided(cut, None, plan))
    found["gguf"] = _said(lambda: divided(gguf, None, plan))
    found["device"] = _said(lambda: divided(path, "W8A16", plan, device="cpu"))
    found["device_map"] = _said(lambda: divided(path, "W8A16", plan, device_map="auto"))
    found["memory"] = _said(lambda: divided(path, "W8A16", plan, max_memory=1000))
    found["both"] = _said(lambda: divided(path, "W8A16", plan, tp_plan="auto"))
    found["fsdp"] = _said(lambda: divided(path, "W8A16", {"fsdp_size": 2}))
    found["world"] = _said(lambda: divided(path, "W8A16", {"tp_size": 3, "tp_plan": "auto"}))
    second = dist.get_rank() == 1
    found["plan"] = _said(lambda: quant_compile.load(path, "W8A16", tp_plan="autoo"))
    found["key"] = _said(lambda: quant_compile.load(path, "W8A16", distributed_config={"tp_pln": "auto"}))
    found["one device"] = _said(lambda: divided(path, "W8A16", plan, **({"device": "cpu"} if second else {})))
    found["policies"] = _said(lambda: divided(path, "W8A16" if second else "W4A16", plan))
    if second:
        found["alone"] = _said(lambda: quant_compile.load(path, "W8A16"))
    dist.barrier()
    with torch.no_grad(), without_inductor():
        made = quant_compile.load(path, "W8A16", tp_plan="auto")
        ids = torch.arange(3, 11).view(1, 8)
        before = made(ids).logits
        found["restore"] = _said(
            lambda: quant_compile.restore(made, {} if second else load_file(path / "model.safetensors"))
        )
        found["after"] = torch.equal(made(ids).logits, before)
    return found


def saved(path: Path, folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """What was taken over in parts, saved: names of tensors that are not those of the checkpoint."""
    import torch.distributed as dist
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    with torch.no_grad(), without_inductor():
        made = divided(path, None, plan)
        found["said"] = _said(lambda: quant_compile.save(made, folder / "saved"))
        if dist.get_rank() == 0 and not found["said"]:
            quant_compile.save(quant_compile.load(path, dtype=torch.float32), folder / "one")
            ours, theirs = (load_file(folder / name / "model.safetensors") for name in ("saved", "one"))
            found["differ"] = [
                n for n in ours.keys() | theirs.keys() if n not in ours or not _same_bits(ours[n], theirs[n])
            ]
    return found


def through_transformers(path: Path) -> list[str]:
    """What ``compile`` says of a quantized checkpoint that transformers has divided."""
    return [_said(lambda: quant_compile.compile(loaded(path, {"tp_plan": "auto"}, torch.bfloat16)))]
