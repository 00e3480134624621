"""Rounding, scales and chunks that the schemes share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant_compile.ir import numerics
from quant_compile.ir.numerics import SMALLEST_AMAX, by_row_chunks, safe_amax, tensor_amax, to_float8, to_int8
from tests.textbook import E4M3, E5M2, round_float

ONE = torch.ones(())


@pytest.mark.parametrize(("format", "kind"), [("e4m3", E4M3), ("e5m2", E5M2)])
def test_floats_round_to_nearest_even_and_saturate(format: str, kind: tuple[int, int, float]) -> None:
    """Every f32 in a dense sample, ties among them, against rounding by arithmetic on exponents."""
    exponents = torch.arange(-20, 20).float()
    x = (torch.arange(-64, 65).float() / 32)[:, None] * torch.exp2(exponents)
    assert torch.equal(to_float8(x, ONE, format).float(), round_float(x, kind))


def test_floats_keep_nan_and_saturate_inf() -> None:
    got = to_float8(torch.tensor([float("nan"), float("inf"), float("-inf")]), ONE, "e4m3").float()
    assert got[0].isnan() and got[1:].tolist() == [448.0, -448.0]


def test_integers_round_half_to_even_and_leave_out_minus_128() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 300.0, -127.5, -128.0, -300.0])
    assert to_int8(x, ONE).tolist() == [0, 2, 2, 0, -2, 126, 127, 127, -127, -127, -127]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_amax(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, -3.0], [0.0, 0.0]], dtype=dtype)
    assert safe_amax(x).tolist() == [[3.0], [SMALLEST_AMAX]]
    assert safe_amax(x).dtype == torch.float32
    assert safe_amax(x, None).tolist() == 3.0 and safe_amax(x, None).dim() == 0
    assert tensor_amax(x).tolist() == 3.0 and tensor_amax(-x).tolist() == 3.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_amax_passes_nan_and_inf_on(bad: float) -> None:
    x = torch.tensor([[1.0, bad], [1.0, 2.0]])
    assert not torch.isfinite(safe_amax(x)[0]) and safe_amax(x)[1] == 2
    assert not torch.isfinite(safe_amax(x, None)) and not torch.isfinite(tensor_amax(x))


def test_amax_of_no_rows() -> None:
    assert safe_amax(torch.empty(0, 4)).shape == (0, 1)
    assert safe_amax(torch.empty(0, 4), None) == SMALLEST_AMAX
    assert safe_amax(torch.empty(2, 0, 4), None) == SMALLEST_AMAX


def test_smallest_scale_and_its_inverse_are_normal_numbers() -> None:
    for largest in (448.0, 57344.0, 127.0, 7.5):
        scale = torch.tensor(SMALLEST_AMAX) * (1.0 / largest)
        for value in (scale, scale.reciprocal()):
            assert torch.finfo(torch.float32).tiny <= value <= torch.finfo(torch.float32).max


@pytest.mark.parametrize("rows", [1, 4])
def test_chunks_are_whole_blocks_and_cover_every_row(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "CHUNK_ELEMENTS", 30)
    sizes: list[int] = []

    def function(part: Tensor) -> tuple[Tensor, ...]:
        sizes.append(part.shape[0])
        return part * 2, part[:, :1]

    w = torch.arange(21.0).reshape(7, 3).repeat(3, 1)
    double, first = by_row_chunks(w, rows, function)
    assert torch.equal(double, w * 2) and torch.equal(first, w[:, :1])
    assert len(sizes) > 1 and all(size % rows == 0 for size in sizes[:-1])
    assert max(sizes) * 3 <= 30
