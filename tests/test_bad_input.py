"""Bad input through torch.compile and the public functions: a clear error with its fix, and a model that is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quant_compile
from quant_compile import (
    MissingScalesError,
    NoKernelError,
    OptionError,
    PolicyError,
    QuantError,
    StaleWeightError,
    WeightError,
)
from quant_compile.ir.errors import GraphError, PolicyWarning
from quant_compile.ir.scheme import PRESETS
from quant_compile.lowering.weights import STORE
from tests.runtime_support import EXACT, CompileCounter, Mlp, bf16, inner_error, plain_inductor, reference_of

__all__ = ["plain_inductor"]

REFERENCE = {"kernels": "reference"}


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def fails(run: Any, kind: type[QuantError], *parts: str) -> str:
    """Run, expect ``kind`` inside whatever torch wraps it in, with every one of ``parts`` in the text the user sees."""
    with pytest.raises(Exception) as caught:
        run()
    error = inner_error(caught.value)
    assert isinstance(error, kind), f"{type(error).__name__}: {error}"
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    return str(error)


def backend(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="sglquant", options={**REFERENCE, **options})


# -- options ----------------------------------------------------------------------------------------------------------

BAD_OPTIONS = {
    "unknown key": ({"polcy": "w8a8"}, ("'polcy'", "policy", "mode", "release_weights", "kernels", "tune", "inductor")),
    "mode": ({"mode": "fast"}, ("mode must be one of", "reduce-overhead", "max-autotune", "'fast'")),
    "kernels": (
        {"kernels": "cutlass"},
        ("kernels must be one of", "auto", "reference", "{scheme: kernel}", "'cutlass'"),
    ),
    "pinned kernel": ({"kernels": {"W8A8": "cutlass"}}, ("kernels must be one of", "torch_cpu", "'cutlass'")),
    "tune": ({"tune": "always"}, ("tune must be one of off, quick, full", "'always'")),
    "release_weights": ({"release_weights": "yes"}, ("release_weights must be true or false", "'yes'")),
    "inductor": ({"inductor": ["max_autotune"]}, ("inductor must be a dict", "list")),
    "inductor's key": (
        {"inductor": {"max_autotun": True}},
        ("'max_autotun' is no setting", "Did you mean 'max_autotune'?"),
    ),
    "far from any key": ({"inductor": {"xyzzy.q": 1}}, ("'xyzzy.q' is no setting", "list_options()")),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(case: str, plain_inductor: CompileCounter) -> None:
    options, parts = BAD_OPTIONS[case]
    model, x = Mlp().bfloat16(), bf16(5, 32)
    before = model(x)
    fails(lambda: torch.compile(model, backend="sglquant", options=options)(x), OptionError, *parts)
    fails(lambda: quant_compile.compile(model, EXACT, **options), OptionError, *parts)
    assert model._compiled_call_impl is None, "the model has been compiled in spite of the error"
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("name, value", [("dynamic", "yes"), ("dynamic", 1), ("fullgraph", "no"), ("fullgraph", None)])
def test_what_torch_compile_would_refuse_at_the_first_call(name: str, value: Any) -> None:
    model = Mlp()
    given: dict[str, Any] = {name: value}
    with pytest.raises(OptionError, match=f"{name} must be one of .*True, False, got {value!r}"):
        quant_compile.compile(model, EXACT, **given)
    assert model._compiled_call_impl is None


BAD_POLICIES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "name": ("fp8_dynamc", ("fp8_dynamc", "FP8_DYNAMIC", "presets:", "shipped policies:")),
    "file": ("./no/such/policy.yaml", ("no/such/policy.yaml", "cannot be read")),
    "type": (7, ("a name, a path, a dict or a Policy", "int")),
    "no default": ({"rules": []}, ("default",)),
    "key": ({"default": "W8A8", "rulez": []}, ("'rulez'", "rules")),
    "scheme": ({"default": "W9A9"}, ("W9A9", "W8A8")),
    "scheme of a rule": ({"default": "keep", "rules": [{"match": "*", "scheme": "W3A3"}]}, ("W3A3",)),
    "field": (
        {"default": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_sise": 64}}},
        ("group_sise", "group_size"),
    ),
    "no family": (
        {"default": {"weights": {"num_bits": 3, "type": "int", "strategy": "channel"}}},
        ("no scheme family implements", "4- or 8-bit"),
    ),
}


@pytest.mark.parametrize("case", BAD_POLICIES)
def test_bad_policies(case: str, plain_inductor: CompileCounter) -> None:
    policy, parts = BAD_POLICIES[case]
    model, x = Mlp().bfloat16(), bf16(5, 32)
    before = model(x)
    fails(lambda: backend(model, policy=policy)(x), PolicyError, *parts)
    fails(lambda: quant_compile.compile(model, policy, **REFERENCE), PolicyError, *parts)
    assert model._compiled_call_impl is None
    assert torch.equal(model(x), before)
    assert len(plain_inductor) == 0


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("version: 1\ndefault: W8A8\nrules:\n  - {match: 'a', scheme: NOPE}\n", 4),
        ("version: 1\ndefault: W8A8\nrules:\n  - match: a\n    skheme: keep\n", 5),
        ("version: 1\ndefault: W8A8\nrules: [\n", None),
        ("version: 1\ndefault: !!python/object/apply:os.system ['true']\n", 2),
    ],
)
def test_bad_yaml_names_the_file_and_line(
    text: str, line: int | None, tmp_path: Path, plain_inductor: CompileCounter
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    model = Mlp().bfloat16()
    words = ("bad.yaml",) if line is None else ("bad.yaml", str(line))
    fails(lambda: backend(model, policy=str(path))(bf16(5, 32)), PolicyError, *words)


def test_a_rule_that_matches_nothing_warns_and_strict_makes_it_an_error(plain_inductor: CompileCounter) -> None:
    rules = [{"match": "model.layers.7.*", "scheme": "keep"}]
    model = Mlp().bfloat16()
    with pytest.warns(PolicyWarning, match=r"model\.layers\.7"):
        quant_compile.compile(model, {"default": EXACT, "rules": rules}, **REFERENCE)
    strict = Mlp().bfloat16()
    with pytest.raises(PolicyError, match=r"model\.layers\.7"):
        quant_compile.compile(strict, {"default": EXACT, "rules": rules, "strict": True}, **REFERENCE)
    assert strict._compiled_call_impl is None


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spec", ["w8a8", "fp8_dynamic", "w4a16"])
def test_nan_and_inf_weights_are_refused_by_name(bad: float, spec: str, plain_inductor: CompileCounter) -> None:
    model, x = Mlp().bfloat16(), bf16(5, 32)
    model.down_proj.weight[3, 3] = bad
    run = backend(model, policy=spec)
    for _ in range(2):
        fails(lambda: run(x), WeightError, "down_proj.weight", "NaN or inf", "keep")
    assert torch.equal(model(x).isnan(), model.forward(x).isnan()), "eager use goes on"
    model.down_proj.weight[3, 3] = 0
    torch.testing.assert_close(run(x), reference_of(model, spec)(x), rtol=0.02, atol=0.02)


def test_kept_nan_weights_do_not_matter(plain_inductor: CompileCounter) -> None:
    model, x = Mlp().bfloat16(), bf16(5, 32)
    model.down_proj.weight[3, 3] = float("nan")
    policy = {"default": EXACT, "rules": [{"match": "down_proj", "scheme": "keep"}]}
    assert backend(model, policy=policy)(x)[:, 3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.complex64, torch.float64])
def test_integer_complex_and_double_parameters_are_kept_with_a_reason(
    dtype: torch.dtype, plain_inductor: CompileCounter
) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(32, 32).to(dtype), requires_grad=False)
            self.proj = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            y = nn.functional.linear(x.to(dtype), self.weight)
            return self.proj((y.real if y.is_complex() else y).to(torch.bfloat16))

    model, x = Odd(), bf16(5, 32)
    model.proj.bfloat16()
    y = backend(model, policy=EXACT)(x)
    torch.testing.assert_close(y, reference_of(model, EXACT)(x), rtol=0.02, atol=0.02)
    report = quant_compile.report(model)
    line = next(line for line in report.lines if line.names == ("weight",))
    assert line.scheme is None and str(dtype).removeprefix("torch.") in line.reason
    assert next(line for line in report.lines if line.names == ("proj.weight",)).scheme == EXACT


def test_model_on_the_meta_device(plain_inductor: CompileCounter) -> None:
    model = Mlp().bfloat16().to("meta")
    fails(lambda: quant_compile.compile(model, EXACT), WeightError, "meta device", "to_empty")
    fails(
        lambda: backend(model, policy=EXACT)(torch.empty(5, 32, dtype=torch.bfloat16, device="meta")),
        GraphError,
        "meta device",
    )
    assert model._compiled_call_impl is None


def test_a_static_scheme_without_scales(plain_inductor: CompileCounter, tmp_path: Path) -> None:
    model, x = Mlp().bfloat16(), bf16(5, 32)
    for spec in ("fp8", "w8a8_static"):
        fails(
            lambda spec=spec: backend(model, policy=spec)(x),
            MissingScalesError,
            "gate_proj.weight",
            "calibrate",
            "dynamic",
        )
    missing = {"default": "FP8", "scales": str(tmp_path / "none.safetensors")}
    fails(lambda: backend(model, policy=missing)(x), PolicyError, "none.safetensors", "does not exist", "calibrate")
    for content in (b"", b"no safetensors at all"):
        (tmp_path / "bad.safetensors").write_bytes(content)
        bad = {"default": "FP8", "scales": str(tmp_path / "bad.safetensors")}
        fails(
            lambda bad=bad: backend(model, policy=bad)(x), PolicyError, "bad.safetensors", "not readable", "calibrate"
        )
    assert torch.equal(model(x), model.forward(x))


def test_a_released_weight_used_eagerly_and_repacked(plain_inductor: CompileCounter) -> None:
    model, x = Mlp().bfloat16(), bf16(5, 32)
    backend(model, policy=EXACT, release_weights=True)(x)
    fails(lambda: model(x), quant_compile.ReleasedWeightError, "restore")
    fails(lambda: backend(model, policy="w8a16")(x), StaleWeightError, "released as W8A8", "W8A16", "restore")


# -- kernels ----------------------------------------------------------------------------------------------------------


def test_no_kernel_gives_every_reason_and_leaves_the_model_usable(plain_inductor: CompileCounter) -> None:
    model, x = Mlp().bfloat16(), bf16(5, 32)
    before = model(x)
    pins = {"fp8_dynamic": "sgl_fp8"}
    run = torch.compile(model, backend="sglquant", options={"policy": "fp8_dynamic", "kernels": pins})
    for _ in range(2):
        text = fails(lambda: run(x), NoKernelError, "gate_proj", "FP8_DYNAMIC", "sgl_fp8", "Fix:")
    for name in quant_compile.lowering.registry.kernels():
        assert f"  {name}: " in text, f"no reason of {name}"
    assert torch.equal(model(x), before)
    assert len(plain_inductor) == 0 and not any(p.nbytes == 0 for p in model.parameters())
    assert all(STORE.peek(p) is None or not STORE.entry(p).packs for p in model.parameters())
    again = backend(model, policy=EXACT)
    assert torch.equal(again(x), reference_of(model, EXACT)(x))


def test_no_kernel_in_compile_in_place_leaves_the_model_usable(plain_inductor: CompileCounter) -> None:
    model, x = Mlp().bfloat16(), bf16(5, 32)
    before = model(x)
    quant_compile.compile(model, "fp8_dynamic", kernels={"*": "sgl_fp8"})
    fails(lambda: model(x), NoKernelError, "sgl_fp8")
    assert torch.equal(quant_compile.uncompile(model)(x), before)
    quant_compile.compile(model, EXACT, **REFERENCE)
    assert torch.equal(model(x), reference_of(model, EXACT)(x))


def test_a_failure_in_one_layer_leaves_no_half_rewritten_model(plain_inductor: CompileCounter) -> None:
    """The second linear cannot be served; nothing of the first may have changed."""
    model, x = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).bfloat16(), bf16(5, 32)
    before, values = model(x), [p.clone() for p in model.parameters()]
    policy = {"default": "W8A8", "rules": [{"match": "1", "scheme": "FP8_DYNAMIC"}]}
    pins = {"fp8_dynamic": "sgl_fp8", "w8a8": "reference"}
    options = {"policy": policy, "kernels": pins, "release_weights": True}
    fails(lambda: torch.compile(model, backend="sglquant", options=options)(x), NoKernelError, "1.weight")
    assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values))
    assert torch.equal(model(x), before)


def test_a_missing_library_is_a_reason_and_not_a_crash(
    monkeypatch: pytest.MonkeyPatch, plain_inductor: CompileCounter
) -> None:
    """A library that is there but broken counts as absent too."""
    import importlib

    from quant_compile.lowering import target

    original = importlib.import_module

    def broken(name: str, *more: Any) -> Any:
        if name.split(".")[0] in ("humming", "sgl_kernel", "deep_gemm"):
            raise OSError("libcuda.so.1: cannot open shared object file")
        return original(name, *more)

    monkeypatch.setattr(importlib, "import_module", broken)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    target.probe_library.cache_clear()
    target.probe_op.cache_clear()
    try:
        model, x = Mlp().bfloat16(), bf16(5, 32)
        run = torch.compile(model, backend="sglquant", options={"policy": "w4a16"})
        torch.testing.assert_close(run(x), reference_of(model, "W4A16")(x), rtol=0.05, atol=0.05)
    finally:
        target.probe_library.cache_clear()
        target.probe_op.cache_clear()


# -- public functions -------------------------------------------------------------------------------------------------


def test_restore_from_something_else(plain_inductor: CompileCounter, tmp_path: Path) -> None:
    model = Mlp().bfloat16()
    backend(model, policy=EXACT, release_weights=True)(bf16(5, 32))
    fails(lambda: quant_compile.restore(model, tmp_path / "x.safetensors"), OptionError, "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"no safetensors at all")
    fails(lambda: quant_compile.restore(model, tmp_path), OptionError, "x.safetensors", "not readable", "Nothing")
    fails(lambda: quant_compile.restore(model, {}), StaleWeightError, "gate_proj.weight")
    meta = {name: torch.empty(p.shape, device="meta") for name, p in model.named_parameters()}
    fails(lambda: quant_compile.restore(model, meta), StaleWeightError, "meta")


def test_report_of_a_model_that_was_never_compiled() -> None:
    report = quant_compile.report(Mlp())
    assert report.coverage == 0.0 and report.share == 0.0
    assert any("no compiled graph" in note for note in report.notes)
    assert {line.reason for line in report.lines} == {"not compiled yet"}


def test_every_error_is_a_quant_error() -> None:
    from quant_compile.ir import errors

    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, Exception)]
    assert all(issubclass(k, QuantError) or issubclass(k, Warning) for k in kinds)
    assert issubclass(OptionError, ValueError) and issubclass(NoKernelError, RuntimeError)


# -- weights without elements -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", sorted(PRESETS))
@pytest.mark.parametrize(("middle", "bias"), [((32, 0), True), ((0, 32), True), ((0, 0), False)])
def test_an_empty_weight_is_kept_whatever_the_scheme(
    spec: str, middle: tuple[int, int], bias: bool, plain_inductor: CompileCounter
) -> None:
    """A linear from or to no features gives its bias, or nothing; no scheme has a scale for it, and a strict policy asks for none."""
    k, n = middle
    model = nn.Sequential(nn.Linear(32, k), nn.Linear(k, n, bias=bias), nn.Linear(n, 8)).bfloat16()
    x = bf16(3, 32)
    wanted = model(x)
    rules = [{"match": name, "scheme": "keep"} for name in ("0", "2")]
    run = backend(model, policy={"default": spec, "strict": True, "rules": rules})
    torch.testing.assert_close(run(x), wanted)
    report = quant_compile.report(model)
    assert [line.names for line in report.lines if "no elements" in line.reason] == [("1.weight",)]
    assert not report.skips
