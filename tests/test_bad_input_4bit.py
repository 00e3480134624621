"""Awkward weights, inputs, sizes and scales under every 4-bit scheme, compiled on a CPU: right numbers, none, or a reason.

The yardstick is the scheme's family, eagerly; that those numbers are right is shown in ``lowering/test_schemes.py``,
``lowering/test_fp4.py`` and ``lowering/test_w4a8.py``. What GPU kernels refuse is tested beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quant_compile
from quant_compile import MissingScalesError, PolicyError, WeightError
from quant_compile.ir.family import family_of
from quant_compile.ir.scheme import PRESETS, Scheme
from tests.moe_support import ReferenceExperts, Routed
from tests.runtime_support import CompileCounter, Mlp, bf16, inner_error, plain_inductor, reference_of

__all__ = ["plain_inductor"]

FOUR_BITS = tuple(name for name, s in PRESETS.items() if s.weights.num_bits == 4 and s.weights.type != "gguf")
every_scheme = pytest.mark.parametrize("spec", FOUR_BITS)


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def compiled(model: nn.Module, policy: Any) -> Callable[..., Tensor]:
    """With the kernels that a user would get, and every weight quantized or an error. Siblings apart: as eager code does it."""
    full = policy if isinstance(policy, dict) else {"default": policy}
    run = torch.compile(model, backend="sglquant", options={"policy": {"fuse": {"merge_siblings": False}, **full}})

    def call(*inputs: Tensor) -> Tensor:
        y = run(*inputs)
        quant_compile.report(model).require(coverage=1.0)
        return y

    return call


def scales_of(model: nn.Module, spec: str, folder: Path, *batch: Tensor) -> dict[str, Tensor]:
    """Input scales by name, calibrated on ``batch``, of a static scheme; none of another."""
    if not PRESETS[spec].static:
        return {}
    quant_compile.calibrate(model, [batch], spec, path=folder / "s.safetensors", progress=False)
    return load_file(str(folder / "s.safetensors"))


def both(model: nn.Module, spec: str, folder: Path, *batch: Tensor) -> tuple[Callable[..., Tensor], nn.Module]:
    """The compiled model, and its linears through their family eagerly, under the same scales."""
    scales = scales_of(model, spec, folder, *batch)
    return compiled(model, policy_of(spec, folder)), reference_of(model, spec, scales)


def policy_of(spec: str, folder: Path) -> dict[str, str]:
    """With the scales in the folder where the scheme is static."""
    return {"default": spec} | ({"scales": str(folder / "s.safetensors")} if PRESETS[spec].static else {})


def assert_same(got: Tensor, wanted: Tensor) -> None:
    """As close as sums in another order, rounded to bf16, can be; NaN and inf in the same places."""
    assert torch.equal(got.isfinite(), wanted.isfinite())
    got, wanted = (y.float().nan_to_num(0, 0, 0) for y in (got, wanted))
    assert (got - wanted).norm() <= 5e-3 * wanted.norm()


def linear(n: int, k: int, seed: int = 0, bias: bool = False) -> nn.Linear:
    made = nn.Linear(k, n, bias=bias).bfloat16()
    made.weight.copy_(bf16(n, k, seed=seed + 1))
    return made


def one(n: int, k: int, bias: bool = False) -> nn.Sequential:
    """A model of one linear, called ``0``."""
    return nn.Sequential(linear(n, k, bias=bias))


# --- sizes -----------------------------------------------------------------------------------------------------------


@every_scheme
@pytest.mark.parametrize(
    ("n", "k", "bias"),
    [(7, 40, True), (33, 130, False), (1, 16, False), (5, 1, True), (31, 257, True), (64, 100, False)],
)
def test_any_size(spec: str, n: int, k: int, bias: bool, plain_inductor: CompileCounter, tmp_path: Path) -> None:
    """K a multiple of nothing, N odd, one row, one column."""
    x = bf16(9, k)
    run, reference = both(one(n, k, bias), spec, tmp_path, x)
    assert_same(run(x), reference(x))


@every_scheme
def test_a_model_of_odd_sizes(spec: str, plain_inductor: CompileCounter, tmp_path: Path) -> None:
    """Several linears behind each other, and more tokens than one kernel serves."""
    run, reference = both(Mlp(37, 75).bfloat16(), spec, tmp_path, bf16(300, 37))
    for rows in (1, 3, 300):
        x = bf16(rows, 37)
        # A last bit of the first product may flip codes of the second's input; most of the result is x itself.
        assert (run(x).float() - reference(x).float()).norm() <= 0.02 * reference(x).float().norm()


@every_scheme
def test_a_weight_packed_in_chunks_of_rows(
    spec: str, plain_inductor: CompileCounter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = bf16(4, 130)
    run, reference = both(one(33, 130), spec, tmp_path, x)
    monkeypatch.setattr("quant_compile.ir.numerics.CHUNK_ELEMENTS", 400)
    assert_same(run(x), reference(x))


# --- weights ---------------------------------------------------------------------------------------------------------


@every_scheme
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_weights_are_refused_by_name(
    spec: str, bad: float, plain_inductor: CompileCounter, tmp_path: Path
) -> None:
    model, x = one(8, 40), bf16(2, 40)
    model[0].weight[3, 17] = bad
    scales_of(model, spec, tmp_path, x)
    with pytest.raises(Exception) as caught:
        compiled(model, policy_of(spec, tmp_path))(x)
    error = inner_error(caught.value)
    assert isinstance(error, WeightError) and "0.weight has NaN or inf" in str(error) and "keep" in str(error)


@every_scheme
def test_zeros_give_zeros(spec: str, plain_inductor: CompileCounter, tmp_path: Path) -> None:
    """A weight of zeros, a row of zeros, groups of zeros beside others, tokens of zeros."""
    x = bf16(6, 160)
    x[2] = 0
    nothing = one(9, 160)
    nothing[0].weight.zero_()
    assert (both(nothing, spec, tmp_path, x)[0](x) == 0).all()
    some = one(9, 160)
    some[0].weight[4] = 0
    some[0].weight[:, 32:144] = 0
    run, reference = both(some, spec, tmp_path, x)
    y = run(x)
    assert (y[2] == 0).all() and (y[:, 4] == 0).all() and (y[0, :4] != 0).all()
    assert_same(y, reference(x))


@every_scheme
@pytest.mark.parametrize("power", [-120, -30, 15, 100])
def test_weights_of_any_magnitude(spec: str, power: int, plain_inductor: CompileCounter, tmp_path: Path) -> None:
    """Tiny and huge bf16 weights: what f32 and the scale's dtype can hold is right, what they cannot is not finite, or zero."""
    model, x = one(8, 160), bf16(3, 160)
    plain = both(model, spec, tmp_path, x)[1](x)
    model[0].weight.mul_(2.0**power)
    run, reference = both(model, spec, tmp_path, x)
    y = run(x)
    assert_same(y, reference(x))
    if spec.startswith("QSERVE") and power == 100:
        assert not y.isfinite().any(), "a scale beyond f16 is inf, and shows"
    elif (spec.startswith("QSERVE") and power < -14) or power < -100:
        # Steps are too coarse, but 0 is among the codes: rounding to the nearest moves no weight by more than itself.
        assert ((y.float() - model(x).float()) * 2.0**-power).norm() <= 1.1 * plain.float().norm()
    else:  # powers of two change no code
        torch.testing.assert_close(y.float(), plain.float() * 2.0**power, rtol=0.01, atol=0.01 * 2.0**power)


@pytest.mark.parametrize("spec", ["NVFP4", "NVFP4A16"])
def test_a_group_far_below_the_largest(spec: str, plain_inductor: CompileCounter) -> None:
    """Its e4m3 scale would round to zero; it keeps the smallest one, and the large group's is 448, not beyond."""
    model, x = linear(4, 64), torch.ones(1, 64, dtype=torch.bfloat16)
    model.weight.fill_(0)
    model.weight[0, 0], model.weight[1, 16] = 2688.0, 2.0**-8
    y = compiled(model, spec)(x)
    assert y[0].tolist() == [2688.0, 2.0**-8, 0, 0]


# --- inputs and their scales -----------------------------------------------------------------------------------------


@every_scheme
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_in_a_token_show(spec: str, bad: float, plain_inductor: CompileCounter, tmp_path: Path) -> None:
    x, clean = bf16(4, 40), bf16(4, 40)
    run, _ = both(one(8, 40), spec, tmp_path, clean)
    x[1, 5] = bad
    y = run(x)
    assert not y[1].isfinite().any()
    if spec != "NVFP4":  # whose one global scale is of the whole input
        assert torch.equal(y[[0, 2, 3]], run(clean)[[0, 2, 3]])


def static_policy(tmp_path: Path, scale: Tensor) -> dict[str, str]:
    save_file({"0.input_scale": scale}, str(tmp_path / "s.safetensors"))
    return {"default": "NVFP4_STATIC", "scales": str(tmp_path / "s.safetensors")}


def test_inputs_beyond_a_static_global_scale_saturate(plain_inductor: CompileCounter, tmp_path: Path) -> None:
    """Their e4m3 scales would overflow: they stay at 448, codes at 6, and nothing becomes NaN."""
    model, scale = nn.Sequential(linear(8, 64)), torch.tensor([1.0 / 2688])
    run = compiled(model, static_policy(tmp_path, scale))
    reference = reference_of(model, "NVFP4_STATIC", {"0.input_scale": scale})
    x = bf16(5, 64)
    for factor in (0.1, 1.0, 1e4):
        assert_same(run(x * factor), reference(x * factor))
    # Every group is far out of range, so each value is the largest that there is.
    one = torch.ones(1, 64, dtype=torch.bfloat16)
    torch.testing.assert_close(run(one * 100), run(one), rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("bad", [0.0, -0.5, float("nan"), float("inf")])
def test_a_useless_static_scale_is_refused_by_name(bad: float, plain_inductor: CompileCounter, tmp_path: Path) -> None:
    model = nn.Sequential(linear(8, 64))
    with pytest.raises(Exception) as caught:
        compiled(model, static_policy(tmp_path, torch.tensor([bad])))(bf16(5, 64))
    error = inner_error(caught.value)
    assert isinstance(error, MissingScalesError)
    assert f"the input scale of 0.weight in {tmp_path / 's.safetensors'} is {bad}" in str(error) and "Fix:" in str(
        error
    )


def test_a_static_scale_of_several_numbers_is_refused(plain_inductor: CompileCounter, tmp_path: Path) -> None:
    model = nn.Sequential(linear(8, 64))
    with pytest.raises(Exception, match="is 3 numbers"):
        compiled(model, static_policy(tmp_path, torch.ones(3)))(bf16(5, 64))


def test_calibrating_on_zeros_gives_a_usable_scale(plain_inductor: CompileCounter, tmp_path: Path) -> None:
    """The smallest there is, so that zeros stay zeros and everything else saturates."""
    model = nn.Sequential(linear(8, 64))
    zeros = torch.zeros(2, 64, dtype=torch.bfloat16)
    policy = quant_compile.calibrate(model, [zeros], "NVFP4_STATIC", path=tmp_path / "s.safetensors", progress=False)
    run = torch.compile(model, backend="sglquant", options={"policy": policy})
    assert (run(zeros) == 0).all() and run(bf16(2, 64)).isfinite().all()


# --- groups ----------------------------------------------------------------------------------------------------------


def grouped(spec: str, size: int) -> dict[str, Any]:
    """The fields of a preset with another group size."""
    fields: dict[str, Any] = PRESETS[spec].to_fields()
    return {**fields, "weights": {**fields["weights"], "group_size": size}}


@pytest.mark.parametrize("spec", ["W4A8", "W4AFP8", "QSERVE_W4A8_GROUP"])
@pytest.mark.parametrize("size", [16, 32, 64, 256])
def test_other_groups_of_integers(spec: str, size: int, plain_inductor: CompileCounter) -> None:
    fields = grouped(spec, size)
    scheme = Scheme.from_fields(fields, "scheme")
    model, x = linear(9, 200), bf16(5, 200)
    y = compiled(model, {"default": fields})(x)
    assert_same(y, reference_of(nn.Sequential(model), scheme.spec)(x))
    report = quant_compile.report(model)
    assert [line.scheme for line in report.lines if line.scheme] == [scheme.spec]


@pytest.mark.parametrize(
    ("spec", "size", "words"),
    [
        ("W4A8", 8, "power of two from 16 up"),
        ("W4A8", 48, "power of two from 16 up"),
        ("QSERVE_W4A8_GROUP", 100, "power of two from 16 up"),
        ("NVFP4", 32, "per tensor_group of 16"),
        ("NVFP4A16", 8, "per tensor_group of 16"),
        ("MXFP4", 16, "per group of 32"),
        ("MXFP4A16", 64, "per group of 32"),
    ],
)
def test_groups_that_no_family_has_are_refused(spec: str, size: int, words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        quant_compile.compile(linear(9, 200), {"default": grouped(spec, size)})


# --- experts ---------------------------------------------------------------------------------------------------------


def routed(experts: int, hidden: int, count: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the experts of each, and their weights."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.rand(count, experts, generator=generator).topk(top_k, -1).indices
    return torch.randn(count, hidden, generator=generator), ids, torch.rand(count, top_k, generator=generator)


class StaticExperts(ReferenceExperts):
    """Under calibrated scales, of the tokens and of the hidden layer."""

    def __init__(self, experts: nn.Module, spec: str, scales: dict[str, Tensor]) -> None:
        super().__init__(experts, None, spec)
        self.scales = [scales[f"experts.{name}.input_scale"] for name in ("gate_up_proj", "down_proj")]

    def _linear(self, x: Tensor, which: int, expert: int) -> Tensor:
        assert self.scheme is not None
        family = family_of(self.scheme)
        planes = family.quantize_input(x, self.scheme, self.scales[which])
        return family.linear(planes, self.planes[which][expert], None, self.scheme, x.dtype)


@every_scheme
@pytest.mark.parametrize(("hidden", "inner"), [(40, 20), (136, 72), (33, 17)])
def test_experts_of_any_size(
    spec: str, hidden: int, inner: int, plain_inductor: CompileCounter, tmp_path: Path
) -> None:
    """Groups that are ragged or wider than a row, odd rows, an expert of zeros, zeros beside others."""
    model = Routed(experts=3, hidden=hidden, inner=inner)
    model.experts.gate_up_proj[1] = 0
    model.experts.down_proj[2, :, : inner // 2] = 0
    # NVFP4 has one global scale for all tokens; the reference goes token by token.
    given = routed(3, hidden, *((1, 1) if spec == "NVFP4" else (7, 2)))
    scales = scales_of(model, spec, tmp_path, *given)
    run = compiled(model, policy_of(spec, tmp_path))
    reference = StaticExperts(model.experts, spec, scales) if scales else ReferenceExperts(model.experts, None, spec)
    got, wanted = run(*given), reference(*given)
    assert (got - wanted).norm() <= 5e-3 * wanted.norm() and wanted.norm() > 0
    x, ids, weights = given
    assert (run(x, torch.ones_like(ids), weights) == 0).all()


@every_scheme
def test_nan_in_one_expert_is_named(spec: str, plain_inductor: CompileCounter, tmp_path: Path) -> None:
    model, given = Routed(experts=3, hidden=40, inner=20), routed(3, 40, 4, 2)
    model.experts.down_proj[2, 3, 4] = float("nan")
    scales_of(model, spec, tmp_path, *given)
    with pytest.raises(Exception) as caught:
        compiled(model, policy_of(spec, tmp_path))(*given)
    error = inner_error(caught.value)
    assert isinstance(error, WeightError) and "experts.down_proj has NaN or inf values (expert 2)" in str(error)
