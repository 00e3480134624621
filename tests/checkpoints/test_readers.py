"""Every format against its writer's formula: dequantized planes are the very numbers, and the scheme is the one that is stored."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from quant_compile.checkpoints.fill import Filler
from quant_compile.checkpoints.names import Linear
from quant_compile.ir.scheme import parse
from quant_compile.pretrained import Plan, plan_of
from tests.checkpoints.packers import CASES
from tests.checkpoints.support import linears, quantized, tiny_llama


def read_all(plan: Plan) -> dict[str, torch.Tensor]:
    """Module name -> what its planes dequantize to."""
    filler = Filler(plan.files, plan.description, plan.dtype, torch.device("cpu"))
    jobs = [job for job in plan.mapped.jobs if isinstance(job, Linear)]
    return {job.slot.name.removesuffix(".weight"): filler.read(job.stem, False).dequantized() for job in jobs}


@pytest.fixture(scope="module")
def one_layer() -> nn.Module:
    return tiny_llama(layers=1)


@pytest.mark.parametrize("name", CASES)
def test_the_weight_is_what_the_formula_says(name: str, one_layer: nn.Module, tmp_path: Path) -> None:
    case = CASES[name]
    originals = {n: m.weight.detach().clone() for n, m in linears(one_layer).items()}
    values = {}
    try:

        def pack(module: str, weight: torch.Tensor):
            tensors, values[module] = case.pack(module, weight)
            return tensors, values[module]

        plan = plan_of(quantized(tmp_path, one_layer, pack, case.config), dtype=torch.bfloat16)
    finally:
        for n, m in linears(one_layer).items():
            m.weight.data = originals[n]
    outcomes = {o.name.removesuffix(".weight"): o for o in plan.outcomes if o.quantized}
    assert set(outcomes) == set(values) and len(values) == 7
    for module, outcome in outcomes.items():
        assert (outcome.scheme.spec if outcome.scheme else None) == (
            parse(case.scheme).spec if case.scheme else None
        ), module
        assert bool(outcome.notes) == bool(case.note)
        assert not case.note or re.search(case.note, outcome.notes[0])
    for module, found in read_all(plan).items():
        # A global scale of NVFP4 that divides is stored as its reciprocal, which is rounded once more.
        close = 2e-7 if "nvfp4" in name else 0.0
        wanted = values[module] if outcomes[module].scheme else values[module].to(torch.bfloat16).float()
        assert torch.allclose(found, wanted, rtol=close, atol=0.0), module
        assert found.abs().sum() > 0


@pytest.mark.parametrize("bits", [3, 4])
def test_zero_points_as_gptqmodel_subtracts_them(bits: int, tmp_path: Path) -> None:
    """Its version 1 subtracts from whole words, so that a zero point of 0 borrows from its neighbour; in 3 bits the words differ."""
    from tests.checkpoints.packers import gptq

    constants = {4: [0x11111111], 3: [0x24924924, 0x92492492, 0x49249249]}[bits]
    case = gptq(bits, 64, False, "gptq_v2")
    values = {}

    def pack(module: str, weight: torch.Tensor):
        tensors, values[module] = case.pack(module, weight)
        words = tensors["qzeros"]
        less = torch.tensor([c - (1 << 32) if c >> 31 else c for c in constants], dtype=torch.int32)
        tensors["qzeros"] = words - less.repeat(words.shape[1] // len(constants))
        return tensors, values[module]

    config = {**case.config, "checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:7.7.0"]}}
    found = read_all(plan_of(quantized(tmp_path, tiny_llama(layers=1), pack, config), dtype=torch.bfloat16))
    assert all(torch.equal(found[module], wanted) for module, wanted in values.items()) and len(found) == 7
