"""Policies: reading them, matching, precedence, conventions, plans, and every error with its line."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from quant_compile.ir.errors import PolicyError, PolicyWarning
from quant_compile.ir.scheme import PRESETS, QuantArgs, Scheme, parse
from quant_compile.model.plan import Plan
from quant_compile.policy import Condition, Fuse, Policy, Rule, SiteInfo

INT4_64 = {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": False}}
FULL = """\
version: 1
default: FP8_DYNAMIC                       # a preset
rules:
  - {match: "lm_head", scheme: keep}
  - {match: "re:.*layers\\\\.(0|31)\\\\..*", scheme: w8a8}
  - match: "*.mlp.down_proj"
    kind: linear
    where: {k: [">=4096", "%128"], n: "<100000"}
    reason: largest
    scheme:
      weights: {num_bits: 4, type: int, strategy: group, group_size: 64, symmetric: false}
strict: true
allow_reference: true
fuse: {merge_siblings: false}
release_weights: false
scales: scales.safetensors
"""


def site(
    *names: str, kind: str = "linear", module: str | None = "Linear", n: int = 64, k: int = 64, head: bool = False
) -> SiteInfo:
    return SiteInfo(names, kind, module, n, k, head)


def load_text(tmp_path: Path, text: str) -> Policy:
    path = tmp_path / "p.yaml"
    path.write_text(text, encoding="utf-8")
    return Policy.load(path)


def error_of(tmp_path: Path, text: str) -> str:
    with pytest.raises(PolicyError) as caught:
        load_text(tmp_path, text)
    return str(caught.value).replace(str(tmp_path) + "/", "")


# Loading.


@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "fp8_dynamic", "W4a16"])
def test_a_preset_name_of_any_case_is_a_policy(name: str) -> None:
    policy = Policy.load(name)
    assert policy.default == PRESETS[name.upper()]
    assert policy.rules == () and policy.name == name.upper() and not policy.strict


def test_every_key_of_a_file_is_read(tmp_path: Path) -> None:
    policy = load_text(tmp_path, FULL)
    assert policy.default == PRESETS["FP8_DYNAMIC"]
    assert [rule.line for rule in policy.rules] == [4, 5, 6]
    assert policy.rules[0].scheme is None and policy.rules[1].scheme == PRESETS["W8A8"]
    assert policy.rules[1].match == r"re:.*layers\.(0|31)\..*"
    last = policy.rules[2]
    assert last.where == (Condition("k", ">=", 4096), Condition("k", "%", 128), Condition("n", "<", 100000))
    assert last.scheme == Scheme(QuantArgs(4, "int", "group", symmetric=False, group_size=64))
    assert last.kind == "linear" and last.reason == "largest"
    assert policy.strict and policy.allow_reference and policy.release_weights is False
    assert policy.fuse == Fuse(share_quant=True, merge_siblings=False)
    assert policy.scales == tmp_path / "scales.safetensors", "relative to the file, not to the working directory"
    assert policy.name == "p" and policy.source == str(tmp_path / "p.yaml")


def test_a_dict_of_the_same_keys_is_the_same_policy(tmp_path: Path) -> None:
    from_file = load_text(tmp_path, "default: W8A8\nrules: [{match: a, scheme: keep, where: {n: 4}}]\n")
    from_dict = Policy.load({"default": "W8A8", "rules": [{"match": "a", "scheme": "keep", "where": {"n": 4}}]})
    assert from_file == from_dict and from_file.content_hash == from_dict.content_hash
    assert hash(from_file) == hash(from_dict)


def test_a_policy_loads_as_itself_and_copies_as_an_equal() -> None:
    policy = Policy.load({"default": "keep", "rules": [{"match": "a", "scheme": INT4_64}]})
    assert Policy.load(policy) is policy
    assert copy.deepcopy(policy) == policy


def test_scheme_objects_and_keep_in_any_case_are_values() -> None:
    policy = Policy.load({"default": PRESETS["W8A8"], "rules": [{"match": "a", "scheme": "KEEP"}]})
    assert policy.default == PRESETS["W8A8"] and policy.rules[0].scheme is None


def test_names_win_over_files_and_dotted_paths_over_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("llama3").write_text("default: W4A16\n", encoding="utf-8")
    assert Policy.load("llama3").default == PRESETS["FP8_DYNAMIC"]
    assert Policy.load("./llama3").default == PRESETS["W4A16"]


# Saving and content.


def test_save_round_trips(tmp_path: Path) -> None:
    policy = load_text(tmp_path, FULL)
    (tmp_path / "scales.safetensors").write_bytes(b"one")
    again = Policy.load(policy.save(tmp_path / "copy.yaml"))
    assert again == policy and again.content_hash == policy.content_hash
    assert "scales: scales.safetensors" in (tmp_path / "copy.yaml").read_text(encoding="utf-8")
    elsewhere = tmp_path / "sub"
    elsewhere.mkdir()
    assert Policy.load(policy.save(elsewhere / "copy.yaml")).scales == tmp_path / "scales.safetensors"


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_round_trip_as_default_and_by_their_fields(tmp_path: Path, preset: str) -> None:
    by_name = Policy.load(preset)
    assert Policy.load(by_name.save(tmp_path / "a.yaml")) == by_name
    by_fields = Policy.load({"default": PRESETS[preset].to_fields()})
    assert by_fields == by_name and by_fields.content_hash == by_name.content_hash


EDITS: list[dict[str, Any]] = [
    {"default": "W4A16"},
    {"rules": []},
    {"rules": [{"match": "b", "scheme": "keep"}]},
    {"rules": [{"match": "a", "scheme": "W8A8"}]},
    {"rules": [{"match": "a", "scheme": "keep", "where": {"k": 8}}]},
    {"strict": True},
    {"allow_reference": True},
    {"fuse": {"share_quant": False}},
    {"fuse": {"all_reduce": True}},
    {"all_reduce": "INT8"},
    {"attention": "keep"},
    {"release_weights": True},
]


@pytest.mark.parametrize("value", ["bogus", 3, ["FP8"], True])
def test_what_ranks_send_has_a_name(value: Any) -> None:
    for make in (lambda: Policy(None, all_reduce=value), lambda: Policy.load({"default": "W8A8", "all_reduce": value})):
        with pytest.raises(PolicyError, match="keep, FP8 or INT8"):
            make()
    assert (
        Policy.load({"default": "W8A8", "all_reduce": False}).all_reduce is None
        and Policy(None, all_reduce="int8").all_reduce == "INT8"
    )


@pytest.mark.parametrize("edit", EDITS)
def test_any_edit_gives_another_hash(edit: dict[str, Any]) -> None:
    base = {"default": "W8A8", "rules": [{"match": "a", "scheme": "keep"}]}
    assert Policy.load({**base, **edit}).content_hash != Policy.load(base).content_hash


def test_a_file_edited_under_the_same_path_gives_another_hash(tmp_path: Path) -> None:
    before = load_text(tmp_path, "default: W8A8\n")
    after = load_text(tmp_path, "default: W8A16\n")
    assert before.source == after.source
    assert before != after and before.content_hash != after.content_hash


def test_the_scales_files_content_is_part_of_the_hash_and_its_path_is_not(tmp_path: Path) -> None:
    text = "default: W8A8_STATIC\nscales: s.safetensors\n"
    absent = load_text(tmp_path, text).content_hash
    (tmp_path / "s.safetensors").write_bytes(b"one")
    one = load_text(tmp_path, text).content_hash
    (tmp_path / "s.safetensors").write_bytes(b"two")
    two = load_text(tmp_path, text).content_hash
    (tmp_path / "t.safetensors").write_bytes(b"two")
    assert len({absent, one, two}) == 3
    assert load_text(tmp_path, text.replace("s.saf", "t.saf")).content_hash == two


def test_name_and_lines_do_not_change_the_content(tmp_path: Path) -> None:
    one = load_text(tmp_path, "default: W8A8\nrules: [{match: a, scheme: keep}]\n")
    two = load_text(tmp_path, "# note\nname: other\n\ndefault: W8A8\nrules:\n  - {match: a, scheme: keep}\n")
    assert one == two and one.content_hash == two.content_hash


# Matching.


@pytest.mark.parametrize(
    ("pattern", "name", "hits"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("lm_head", "xlm_head", False),
        ("lm_head", "lm_head.inner", False),
        ("mlp.up_proj", "layers.0.mlp.up_proj", True),
        ("*.up_proj", "layers.0.mlp.up_proj", True),
        ("*.up_proj", "up_proj", False),
        ("layers.?.mlp", "layers.0.mlp", True),
        ("layers.?.mlp", "model.layers.0.mlp", False),
        ("layers.[01].mlp", "layers.1.mlp", True),
        ("*.UP_proj", "layers.0.up_proj", False),
        (r"re:.*layers\.(0|31)\..*", "model.layers.31.mlp.up_proj", True),
        (r"re:.*layers\.(0|31)\..*", "model.layers.3.mlp.up_proj", False),
        (r"re:layers", "layers.0", False),
    ],
)
def test_patterns(pattern: str, name: str, hits: bool) -> None:
    assert Rule(pattern).matches(site(name)) is hits


def test_any_alias_may_match() -> None:
    tied = site("model.embed_tokens", "lm_head")
    assert Rule("lm_head").matches(tied) and Rule("*embed_tokens").matches(tied)


@pytest.mark.parametrize(
    ("where", "k", "holds"),
    [
        (">=64", 64, True),
        (">=64", 63, False),
        (">64", 64, False),
        ("<=64", 64, True),
        ("<64", 64, False),
        ("==64", 64, True),
        (64, 65, False),
        ("%32", 64, True),
        ("%32", 65, False),
        (["> 16", "< 64"], 32, True),
        (["> 16", "< 64"], 64, False),
    ],
)
def test_shape_conditions(where: Any, k: int, holds: bool) -> None:
    policy = Policy.load({"default": "keep", "rules": [{"where": {"k": where}, "scheme": "W8A8"}]})
    assert policy.rules[0].matches(site("a", k=k, n=1)) is holds


def test_kind_and_module_conditions() -> None:
    rules = [
        {"kind": "moe", "scheme": "keep"},
        {"module": "*Router", "scheme": "keep"},
        {"module": "Linear", "scheme": "W8A8"},
    ]
    policy = Policy.load({"default": "W8A16", "rules": rules})
    assert policy.decide(site("a", kind="moe")).rule == 0
    assert policy.decide(site("a", module="TopKRouter")).rule == 1
    assert policy.decide(site("a")).rule == 2
    assert policy.decide(site("a", module=None)).origin == "default"


def test_the_first_matching_rule_decides_and_says_so(tmp_path: Path) -> None:
    policy = load_text(
        tmp_path, "default: W8A8\nrules:\n- {match: a.b, scheme: keep, reason: mine}\n- {match: b, scheme: W4A16}\n"
    )
    first = policy.decide(site("a.b"))
    assert (first.scheme, first.origin, first.rule, first.line) == (None, "rule", 0, 3)
    assert first.reason == 'rule 1 (match "a.b", line 3): mine'
    second = policy.decide(site("c.b"))
    assert (second.scheme, second.rule) == (PRESETS["W4A16"], 1)
    other = policy.decide(site("c"))
    assert (other.scheme, other.origin, other.rule) == (PRESETS["W8A8"], "default", None)


# Conventions.

HEADS = ["lm_head", "model.lm_head", "proj_out", "model.proj_out", "embed_out"]
ROUTERS = [
    "model.layers.0.mlp.gate",
    "mlp.gate",
    "model.layers.3.mlp.shared_expert_gate",
    "model.layers.3.block_sparse_moe.gate",
    "model.layers.3.mlp.router",
    "model.layers.3.block_sparse_moe.router.layer",
    "model.layers.3.router.proj",
    "model.layers.3.mlp.router.gate",
    "encoder.layers.3.ffn.router.classifier",
    "model.layers.3.mlp.gate.wg",
    "model.layers.3.mlp.gate.router_mlp.fc1",
]


@pytest.mark.parametrize(
    ("name", "what"), [*((n, "output head") for n in HEADS), *((n, "MoE router gate") for n in ROUTERS)]
)
def test_conventions_keep_heads_and_routers(name: str, what: str) -> None:
    decision = Policy.load("FP8_DYNAMIC").decide(site(name))
    assert decision.scheme is None and decision.origin == "convention"
    assert decision.reason == f"kept by convention: {what}"


@pytest.mark.parametrize(
    "name",
    [
        *("model.layers.0.mlp.gate_proj", "transformer_blocks.0.proj_out", "gate", "score", "classifier"),
        *("router_proj", "proj", "feed_forward.gate", "mixer.gate", "lora_head", "wg"),
    ],
)
def test_conventions_leave_other_linears_alone(name: str) -> None:
    assert Policy.load("FP8_DYNAMIC").decide(site(name)).origin == "default"


@pytest.mark.parametrize("name", ["q_proj.lora_A.default", "lora_B", "mlp.up.lora_A.a", "x.lora_embedding_B.default"])
def test_conventions_keep_lora_adapters(name: str) -> None:
    assert Policy.load("W4A16").decide(site(name)).reason == "kept by convention: LoRA adapter"


@pytest.mark.parametrize("kind", ["Lfm2MoeTopKRouter", "NemotronHTopkRouter"])
def test_conventions_know_the_classes_of_routers(kind: str) -> None:
    info = SiteInfo(("model.layers.0.feed_forward.gate",), "linear", kind, 8, 64)
    assert Policy.load("W8A8").decide(info).reason == "kept by convention: MoE router gate"
    assert Policy.load("W8A8").decide(replace(info, module_class="Linear")).origin == "default"


def test_an_output_embedding_of_any_name_is_kept_and_tied_heads_too() -> None:
    policy = Policy.load("W8A8")
    assert policy.decide(site("cls.decoder", head=True)).reason == "kept by convention: output head"
    assert policy.decide(site("model.embed_tokens", "lm_head")).origin == "convention"


def test_a_rule_overrides_a_convention() -> None:
    policy = Policy.load({"default": "keep", "rules": [{"match": "lm_head", "scheme": "W8A8"}]})
    assert policy.decide(site("model.embed_tokens", "lm_head", head=True)).scheme == PRESETS["W8A8"]


# Plans.


class Headed(nn.Module):
    """A model whose output embedding has a name that no convention knows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.to_words = nn.Linear(8, 24)

    def get_output_embeddings(self) -> nn.Module:
        return self.to_words


def test_what_the_model_calls_its_output_embeddings_is_kept() -> None:
    by_name = {e.names[0]: e.decision for e in plan_of("W8A8", Headed()).entries}
    assert by_name["to_words"].reason == "kept by convention: output head"
    assert by_name["body"].origin == "default"


class Conv1D(nn.Module):
    """Stores [k, n], as transformers' class of this name does."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(k, n))


class TinyExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(4, 32, 16))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 32)
        self.up = nn.Linear(32, 128)
        self.conv = Conv1D(128, 48)
        self.experts = TinyExperts()
        self.norm = nn.LayerNorm(32)
        self.lm_head = nn.Linear(32, 96, bias=False)
        self.lm_head.weight = self.embed.weight


@pytest.fixture
def model() -> nn.Module:
    with torch.device("meta"):
        return Model().to(torch.bfloat16)


def plan_of(policy: Any, model: nn.Module) -> Plan:
    return Plan.of(Policy.load(policy), model)


def test_a_plan_covers_every_linear_weight_and_all_bytes(model: nn.Module) -> None:
    plan = plan_of("W8A8", model)
    by_name = {entry.names[0]: entry for entry in plan.entries}
    assert set(by_name) == {"embed", "up", "conv", "experts.up"}
    assert by_name["embed"].names == ("embed", "lm_head") and by_name["embed"].scheme == "keep"
    assert (by_name["conv"].n, by_name["conv"].k) == (48, 128), "a Conv1D is stored [k, n]"
    assert by_name["up"].bytes_before == 128 * 32 * 2
    assert by_name["up"].bytes_after == 128 * 32 + 128 * 4, "int8 codes and one f32 scale a row"
    assert plan.bytes_before == sum(p.nbytes for p in model.parameters())
    saved = sum(e.bytes_before - e.bytes_after for e in plan.entries)
    assert plan.bytes_after == plan.bytes_before - saved
    quantized = sum(by_name[name].bytes_before for name in ("up", "conv", "experts.up"))
    assert plan.share == quantized / plan.bytes_before


def test_a_quantized_tied_head_leaves_the_embedding_in_place(model: nn.Module) -> None:
    plan = plan_of({"default": "keep", "rules": [{"match": "lm_head", "scheme": "W8A16"}]}, model)
    head = next(e for e in plan.entries if "lm_head" in e.names)
    assert head.bytes_after == head.bytes_before + 96 * 32 + 96 * 4


def test_static_schemes_count_their_scale_and_miss_it(model: nn.Module) -> None:
    plan = plan_of("W8A8_STATIC", model)
    up = next(e for e in plan.entries if e.names == ("up",))
    assert up.bytes_after == 128 * 32 + 128 * 4 + 4
    note = plan.calibration_note
    assert note is not None and note.startswith(
        "3 weights have static input scales but the policy names no scales file"
    )
    assert plan_of("W8A8", model).calibration_note is None


def test_a_scales_file_is_looked_into(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    policy = {"default": "W8A8_STATIC", "scales": str(path)}
    names = [e.names[0] for e in plan_of("W8A8_STATIC", model).entries if e.scheme != "keep"]
    for content, words in (
        ({}, "no scale of 3 of them, e.g. " + names[0]),
        (names[:1], "no scale of 2 of them"),
        (names, ""),
    ):
        save_file({f"{name}.input_scale": torch.ones(1) for name in content}, str(path))
        note = plan_of(policy, model).calibration_note
        assert (words in note and "calibrate" in note) if words else note is None, note
    path.write_bytes(b"no safetensors")
    note = plan_of(policy, model).calibration_note
    assert note is not None and "s.safetensors is not readable" in note


def test_a_block_of_two_schemes_is_planned_as_it_is_run() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = TinyExperts()
            self.experts.down = nn.Parameter(torch.randn(4, 16, 16))

    policy = {"default": "W8A8", "rules": [{"match": "*.down", "scheme": "W8A16"}]}
    plan = plan_of(policy, Block())
    assert [e.scheme for e in plan.entries] == ["keep", "keep"] and plan.bytes_after == plan.bytes_before
    assert all("an expert block has one" in problem for problem in plan.problems) and plan.problems
    assert [e.scheme for e in plan_of("W8A8", Block()).entries] == [parse("W8A8").spec] * 2


def test_experts_are_planned_and_rules_may_name_their_block(model: nn.Module) -> None:
    entry = next(e for e in plan_of("W8A8", model).entries if e.kind == "moe")
    assert entry.block == "experts" and entry.names == ("experts.up",)
    assert entry.bytes_after == 4 * (32 * 16 + 32 * 4), "int8 codes and one f32 scale a row of each of four experts"
    for rule in ({"kind": "moe"}, {"match": "experts"}, {"match": "experts.up"}):
        plan = plan_of({"default": "W8A8", "rules": [{**rule, "scheme": "keep"}]}, model)
        assert plan.problems == () and next(e for e in plan.entries if e.kind == "moe").scheme == "keep", rule


def test_integer_weights_are_refused_with_the_reason() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False)})
    model["a"].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)  # type: ignore[assignment]
    entry = plan_of("W8A8", model).entries[0]
    assert (
        entry.decision.refused and entry.decision.reason == "int8 weights cannot be quantized; only floating point can"
    )
    assert plan_of("W8A8", model).problems == (f"a stays int8: {entry.decision.reason}",)


def test_a_rule_that_matches_nothing_warns_with_a_hint(tmp_path: Path, model: nn.Module) -> None:
    rules = ["{kind: moe, scheme: keep}", "{match: '*.lm_haed', scheme: keep}", "{match: up.weight, scheme: keep}"]
    text = "\n- ".join(["default: W8A8\nrules:", *rules])
    policy = load_text(tmp_path, text)
    with pytest.warns(PolicyWarning) as caught:
        plan = policy.resolve(model)
    messages = [str(w.message) for w in caught]
    assert messages[0].endswith('rule 2 (line 4), match "*.lm_haed", matches no weight; did you mean lm_head?')
    assert messages[1].endswith('rule 3 (line 5), match "up.weight", matches no weight; names carry no .weight here')
    assert len(messages) == 2 and [unused.index for unused in plan.unmatched_rules] == [1, 2]


def test_a_rule_in_the_shadow_of_earlier_ones_is_reported(model: nn.Module) -> None:
    rules = [{"kind": "moe", "scheme": "keep"}, {"match": "*", "scheme": "keep"}, {"match": "up", "scheme": "W4A16"}]
    plan = plan_of({"default": "W8A8", "rules": rules}, model)
    assert plan.problems == ('rule 3, match "up", decides nothing: earlier rules take all 2 weights that it matches',)


def test_strict_makes_it_an_error(model: nn.Module) -> None:
    policy = {
        "default": "W8A8",
        "strict": True,
        "rules": [{"kind": "moe", "scheme": "keep"}, {"match": "nowhere", "scheme": "keep"}],
    }
    with pytest.raises(PolicyError, match=r'strict and does not fit(.|\n)*rule 2, match "nowhere"(.|\n)*Fix: '):
        Policy.load(policy).resolve(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Policy.load({**policy, "rules": policy["rules"][:1]}).resolve(model)  # type: ignore[index]


def test_strict_refuses_a_weight_that_cannot_have_its_scheme(model: nn.Module) -> None:
    codes = nn.Parameter(torch.zeros(4, 8, 8, dtype=torch.int8), requires_grad=False)
    model.experts.up = codes  # type: ignore[union-attr]
    with pytest.raises(PolicyError, match=r"experts\.up stays int8: int8 weights cannot be quantized"):
        Policy.load({"default": "W8A8", "strict": True}).resolve(model)


def test_a_compiled_wrapper_has_the_models_own_names() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._orig_mod = nn.Sequential(nn.Linear(8, 8))

    assert [e.names for e in plan_of("W8A8", Wrapper()).entries] == [("0",)]


def test_the_table_joins_layers_and_json_lists_every_weight() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 16)}) for _ in range(12)])})
    plan = plan_of({"default": "W8A8", "rules": [{"match": "re:layers\\.(0|5)\\.up", "scheme": "keep"}]}, model)
    labels = list(plan.table().columns[0].cells)
    assert labels[:2] == ["layers.{0,5}.up (2x)", "layers.{1-4,6-11}.up (10x)"]
    assert len(list(plan.table(full=True).columns[0].cells)) == 12 + 2
    data = json.loads(plan.to_json())
    assert len(data["weights"]) == 12 and data["weights"][5]["rule"] == 0
    assert data["bytes_before"] == sum(p.nbytes for p in model.parameters())


# Errors.

ERRORS = [
    ("default: FP8_DYNAMC\n", "p.yaml:1: unknown scheme 'FP8_DYNAMC'. Did you mean FP8_DYNAMIC? Valid: keep, "),
    ("version: 1\ndefualt: keep\n", "p.yaml:2: unknown key 'defualt'. Did you mean default? Valid keys: version, "),
    ("rules: []\n", "p.yaml:1: key 'default' is missing. Fix: add `default: FP8_DYNAMIC`"),
    ("version: 2\ndefault: keep\n", "p.yaml:1: version must be 1, got 2"),
    ("default: keep\nrules:\n  - {match: a}\n", "p.yaml:3: a rule needs a scheme"),
    ("default: keep\nrules:\n  - {scheme: keep}\n", "p.yaml:3: a rule needs match, kind, module or where"),
    ("default: keep\nrules:\n  match: a\n", "p.yaml:2: rules must be a list"),
    ("default: keep\nrules:\n  - match: a\n    scheem: keep\n", "p.yaml:4: unknown key 'scheem'. Did you mean scheme?"),
    (
        "default: keep\nrules:\n  - match: 're:('\n    scheme: keep\n",
        "p.yaml:3: match 're:(' is not a regular expression: ",
    ),
    (
        "default: keep\nrules:\n  - match: a\n    scheme: keep\n    kind: conv\n",
        "p.yaml:5: kind must be one of linear, moe",
    ),
    (
        "default: keep\nrules:\n- {match: a, scheme: keep, where: {k: big}}\n",
        "p.yaml:3: k: 'big' is no condition. Fix: write ",
    ),
    ("default: keep\nrules:\n- {match: a, scheme: keep, where: {k: '%0'}}\n", "p.yaml:3: k: '%0' is no condition"),
    (
        "default: keep\nrules:\n- {match: a, scheme: keep, where: {m: 3}}\n",
        "p.yaml:3: unknown key 'm'. Valid keys: n, k",
    ),
    ("default: keep\nstrict: 'yes'\n", "p.yaml:2: strict must be true or false, got 'yes'"),
    ("default: keep\nfuse: {share: true}\n", "p.yaml:2: unknown key 'share'. Did you mean share_quant?"),
    ("default: keep\nscales: 3\n", "p.yaml:2: scales must be text, got 3"),
    ("default: keep\ndefault: W8A8\n", "p.yaml:2: key 'default' is given twice (first on line 1)"),
    ("default: 8\n", "p.yaml:1: a scheme is keep, a preset's name or {weights: ...}, got 8"),
    ("default:\n  weights:\n    num_bits: 8\n    type: int\n", "p.yaml:2: scheme.weights: field 'strategy' is missing"),
    (
        "default:\n  weights: {num_bits: 8,\n    type: int, strategi: channel}\n",
        "p.yaml:3: unknown key 'strategi'. Did you mean strategy?",
    ),
    (
        "default:\n  weights:\n    {num_bits: 4, type: int, strategy: channel, symmetric: 'no'}\n",
        "p.yaml:3: symmetric must be true or false, got 'no'",
    ),
    (
        "default:\n  weights: {num_bits: '8', type: int, strategy: channel}\n",
        "p.yaml:2: num_bits must be a whole number, got '8'",
    ),
    (
        "default:\n  weights: {num_bits: 8, type: float, strategy: block, block_structure: 128}\n",
        "p.yaml:2: block_structure must be a list [rows, columns], got 128",
    ),
    (
        "default:\n  weights: {num_bits: 4, type: int, strategy: group}\n",
        "p.yaml:2: scheme.weights: strategy group and group_size None contradict each other",
    ),
    (
        "default:\n  weights: {num_bits: 3, type: int, strategy: channel}\n",
        "p.yaml:1: no scheme family implements int3.channel+16",
    ),
    (
        "default:\n  input_activations: {num_bits: 8, type: int, strategy: token}\n",
        "p.yaml:1: scheme: a custom scheme needs weights",
    ),
    ("- a\n- b\n", "p.yaml:1: expected keys and values (version, "),
    ("", "p.yaml:1: the file is empty"),
    ("# only a comment\n", "p.yaml:1: the file is empty"),
    ("default: keep\nrules: [\n", "p.yaml:3: not readable as YAML: "),
    ("default: keep\n\tstrict: true\n", "p.yaml:2: not readable as YAML: "),
    ("default: keep\n---\ndefault: keep\n", "p.yaml:2: not readable as YAML: "),
    ("default: !!python/object/apply:os.getcwd []\n", "p.yaml:1: YAML tag "),
    ("default: !!python/name:os.getcwd\n", "p.yaml:1: not readable as YAML: could not determine a constructor"),
    ("default: keep\n3: keep\n", "p.yaml:2: keys must be text, got '3'"),
    ("base: &b {default: keep}\n<<: *b\n", "p.yaml:2: merge keys (<<) are not read"),
    ("default: keep\nrules: &r\n  - *r\n", "the YAML aliases unfold without end"),
    ("default: \x00\n", "p.yaml:1: not readable as YAML: "),
]


@pytest.mark.parametrize(("text", "message"), ERRORS, ids=[message[:48] for _, message in ERRORS])
def test_errors_name_file_line_and_fix(tmp_path: Path, text: str, message: str) -> None:
    assert message in error_of(tmp_path, text)


def test_an_anchor_may_be_used_again(tmp_path: Path) -> None:
    first = "{match: a, scheme: &s {weights: {num_bits: 8, type: int, strategy: channel}}}"
    text = f"default: keep\nrules:\n- {first}\n- {{match: b, scheme: *s}}\n"
    policy = load_text(tmp_path, text)
    assert policy.rules[0].scheme == policy.rules[1].scheme == PRESETS["W8A16"]


def test_aliases_that_multiply_are_refused_quickly(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    assert "unfold without end" in error_of(tmp_path, "\n".join(lines))


def test_errors_of_a_dict_name_the_path() -> None:
    with pytest.raises(PolicyError, match=r"^policy: rules\[1\]\.where\.k: k: 'x' is no condition"):
        Policy.load(
            {
                "default": "keep",
                "rules": [{"match": "a", "scheme": "keep"}, {"match": "b", "scheme": "keep", "where": {"k": "x"}}],
            }
        )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("W8A9", r"unknown policy 'W8A9'\. Did you mean W8A8\?"),
        ("lama3", r"unknown policy 'lama3'\. Did you mean llama3\?"),
        ("nowhere.yaml", r"nowhere\.yaml: cannot be read: No such file"),
        ("/", r"/: cannot be read: Is a directory"),
        (3, r"a policy is a name, a path, a dict or a Policy, got int"),
        (None, r"a policy is a name, a path, a dict or a Policy, got NoneType"),
    ],
)
def test_sources_that_are_no_policy(source: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Policy.load(source)


def test_text_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_bytes(b"default: \xff\n")
    with pytest.raises(PolicyError, match="not UTF-8 text"):
        Policy.load(path)


def test_requantize_is_a_rules_key_and_the_policys() -> None:
    """A rule's own wins; on a model that is no checkpoint it decides nothing."""
    rules = [{"match": "a", "scheme": "W8A16"}, {"match": "b", "scheme": "W8A16", "requantize": False}]
    policy = Policy.load({"default": "keep", "requantize": True, "fallback": "fp8", "rules": rules})
    sites = [SiteInfo((name,), "linear", "Linear", 8, 8) for name in ("a", "b", "c", "lm_head")]
    assert [policy.decide(site).requantize for site in sites] == [True, False, True, False]
    assert Policy.load(policy.to_dict()) == policy
    with pytest.raises(PolicyError, match=r"requantize must be true or false, got 'yes'"):
        Policy.load({"default": "keep", "rules": [{"match": "a", "scheme": "keep", "requantize": "yes"}]})
    with pytest.raises(PolicyError, match=r"fallback must be weight_only or fp8, got 'int8'"):
        Policy.load({"default": "keep", "fallback": "int8"})
