"""Tiny models of every family of transformers, made from config classes by general rules: no list of families.

A config's numbers are made small by what their names say (layers, heads, widths, experts, tokens), and what follows from them is
kept consistent; a class is found through transformers' auto mappings; inputs are made for what ``forward`` asks for. Reads the
installed transformers; downloads and writes nothing.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

LAYERS, WIDTH, HEADS, HEAD_DIM, INNER, VOCAB = 2, 64, 4, 16, 96, 512
MOST_LAYERS = 6
FIRST_SPECIAL = 480  # ids of special tokens that lie beyond the small vocabulary come after this
MOST_PARAMETERS = 120e6
SMALL, OWN_IMAGE, SHALLOW = "small", "small, images of the default size", "few layers of the default width"
LEVELS = (SMALL, OWN_IMAGE, SHALLOW)
# Where a class for a family is looked for, the best first; an encoder's head before the decoder that it can be made to be.
MAPPINGS = (
    *("MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM", "CAUSAL_LM"),
    *(
        "IMAGE_CLASSIFICATION",
        "OBJECT_DETECTION",
        "UNIVERSAL_SEGMENTATION",
        "SEMANTIC_SEGMENTATION",
        "DEPTH_ESTIMATION",
    ),
    *("CTC", "AUDIO_CLASSIFICATION", "TEXT_TO_WAVEFORM", "TEXT_TO_SPECTROGRAM", "VIDEO_CLASSIFICATION"),
    *("VISUAL_QUESTION_ANSWERING", "RETRIEVAL", "TIME_SERIES_PREDICTION", "RNNT", "TDT", "KEYPOINT_MATCHING"),
)


class NotBuilt(Exception):
    """A family of which no model can be made or run eagerly; the reason is the text."""


@dataclass(frozen=True)
class Tiny:
    """A recipe that gives the same model and the same inputs each time.

    Attributes:
        family: transformers' model type.
        model_class: the class.
        config: the small config.
        level: which rules made it.
        inputs: keyword arguments of a call.
    """

    family: str
    model_class: type
    config: Any
    level: str
    inputs: Mapping[str, Any]

    def make(self) -> nn.Module:
        """A model with seeded weights, in inference mode."""
        return make(self.model_class, self.config)


# --- families --------------------------------------------------------------------------------------------------------


@cache
def families() -> tuple[str, ...]:
    """Model types that have a class of their own; of several with the same classes the first."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    known: dict[tuple[str, ...], str] = {}
    for family in CONFIG_MAPPING_NAMES:
        names = class_names(family)
        if names:
            known.setdefault((*names, CONFIG_MAPPING_NAMES[family]), family)
    return tuple(known.values())


def class_names(family: str) -> tuple[str, ...]:
    """Names of the classes to try: the best head, then the base model."""
    from transformers.models.auto import modeling_auto

    tables = [getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES") for name in MAPPINGS]
    head = next((table[family] for table in tables if family in table), None)
    others = [
        table for name, table in sorted(vars(modeling_auto).items()) if re.fullmatch(r"MODEL_.*MAPPING_NAMES", name)
    ]
    found = [head, modeling_auto.MODEL_MAPPING_NAMES.get(family), *(table.get(family) for table in others)]
    flat = [name for entry in found if entry for name in ((entry,) if isinstance(entry, str) else entry)]
    return tuple(dict.fromkeys(flat))[:2]


def _class(name: str) -> type:
    return getattr(importlib.import_module("transformers"), name)


def tiny(family: str) -> Tiny:
    """The smallest model of a family that runs eagerly.

    Raises:
        NotBuilt: every attempt's reason in one text, the first attempt's first.
    """
    reasons: dict[str, None] = {}
    for name in class_names(family):
        for level in LEVELS:
            try:
                return _attempt(family, name, level)
            except Exception as error:
                reasons[f"{type(error).__name__}: {first_line(error)}"] = None
    raise NotBuilt("; then ".join(list(reasons)[:2]) if reasons else "no class")


def first_line(error: BaseException) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:200] if lines else "no text"


def _attempt(family: str, name: str, level: str) -> Tiny:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_class = _class(name)
    config = Shrink(level).config(CONFIG_MAPPING[family]())
    count = _count_parameters(model_class, config)
    if count > MOST_PARAMETERS:
        raise NotBuilt(f"{count / 1e6:.0f} million parameters at the smallest")
    model = make(model_class, config)
    inputs = runnable_inputs(model, config)
    return Tiny(family, model_class, config, level, inputs)


def _count_parameters(model_class: Callable[[Any], nn.Module], config: Any) -> int:
    """Parameters of a model on the meta device; a rotary base that a part of the config lacks is taken from another part."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = model_class(config)
        except AttributeError as error:
            missing = re.search(r"'(\w+)' object has no attribute 'rope_theta'", str(error))
            part = next((p for p in parts_of(config) if missing and type(p).__name__ == missing[1]), None)
            if part is None:
                raise
            part.rope_theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
            model = model_class(config)
    return sum(parameter.numel() for parameter in model.parameters())


def seed_all() -> None:
    """The same random numbers in each run."""
    import numpy

    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)


def make(model_class: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    """A model whose matrices keep activations at order one and whose biases are not zero, so that every weight matters."""
    import copy

    seed_all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_class(copy.deepcopy(config)).float().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() > 1 and not re.search(r"A_log|_scale|table|freq", name):
                fan_in = parameter[0].numel() if parameter.dim() != 3 else min(parameter.shape[1:])
                parameter.normal_(0.0, max(fan_in, 1) ** -0.5, generator=generator)
            elif parameter.numel() and (parameter.isnan().any() or parameter.eq(0).all()):
                parameter.normal_(0.0, 0.1, generator=generator)
    return model


# --- configs ---------------------------------------------------------------------------------------------------------


LAYER_COUNT = re.compile(r"(?<!feature_)(layers|n_layer|depth|num_blocks|num_block|num_hidden_layer|layer_num)$")
NO_LAYER_COUNT = re.compile(
    r"window|shared|nextn|residual|max_depth|head_depth|feature_layer|feat_extract|lstm|skip|mtp|bit"
)
INDICES = re.compile(r"ind(ex|ices|exes)s?$|_layers$|_layer_ids$|layers_idx")
SOME_LAYERS = re.compile(r"_layers$|_layer_ids$")  # those of another kind, and not those that something is read from
TOKEN = re.compile(r"(_token_id|_token_index|_token|_id|_token_ids)$")
# The most that a number may be, by the first pattern that its name matches. Counts are made small at every level,
COUNTS: tuple[tuple[str, int], ...] = (
    (r"vocab_size|vocab_offset", VOCAB),
    (r"^n_group$|num_expert_group|^n_groups_moe", 2),
    (r"topk_group", 1),
    (r"per_tok$|topk$|top_k|experts_per|moe_k$|num_selected|per_token$|expert_k", 2),
    (r"shared_experts", 1),
    (r"experts$|n_routed|num_expert|moe_num", 4),
    (r"_period$|_pattern$|_interval$|_step$|every_n|_freq$|_frequency$", 2),
    (r"layer_offset$", 1),
    (r"first_k_dense|num_dense_layers|num_kv_shared|dense_layers|moe_layer_start", 1),
    (r"max_window_layers", 1),
    (r"^sliding_window$|attention_chunk_size|local_attention$", 4),
    (r"max_source_positions", 32),
    (r"num_queries$|num_proposals|num_query_tokens|num_object_queries", 8),
)
# and widths where they are not given stage by stage.
WIDTHS: tuple[tuple[str, int], ...] = (
    (r"key_value_heads|kv_heads|query_groups|num_kv|n_groups$|mamba_groups|key_heads", 2),
    (r"(^|_)(n|num|attention|heads)?_?(head|heads)$|attention_heads|n_heads|num_heads|value_heads", HEADS),
    (r"rotary_dim|^rope_dim", HEAD_DIM // 2),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"head_?dim$|d_kv|dim_head|kv_channels|head_size|d_head|head_width|query_pre_attn_scalar|headdim", HEAD_DIM),
    (r"num_pos_feats", HEAD_DIM),
    (r"_rank$", 32),
    (r"d_state|state_size|ssm_state", 16),
    (r"conv_dim$", 32),
    (r"intermediate|ffn|d_ff$|mlp_dim|n_inner|inner_dim|feed_?forward|mlp_hidden", INNER),
    (r"hidden_size|hidden_dim|d_model|model_dim|n_embe?d|d_embed|emb(ed)?_dim|embedding_(size|dim)|(^|_)dim$", WIDTH),
    (r"proj(ection)?_(dim|size)|output_dim|width$|pooler_output_size|feature_size$", WIDTH),
)
IMAGES: tuple[tuple[str, int], ...] = ((r"^image_seq_len|^num_image_tokens$", 16), (r"^mm_tokens_per_image$", 4))
# Models that leave these open cannot run without.
NEEDED: Mapping[str, Any] = {"clip_qkv": 8.0, "num_experts_per_tok": 2}
TOKEN_NAMES = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index")
IMAGE_SIZE = re.compile(r"(pretrain_)?image_size|input_resolution|img_size")


def _at_most(name: str, value: int, limits: tuple[tuple[str, int], ...]) -> int | None:
    """A number under the first limit that its name has; None where it has none."""
    return next((min(value, limit) for pattern, limit in limits if re.search(pattern, name)), None)


@dataclass
class Shrink:
    """One way to make a config small; ``specials`` keeps one new id for each special token in all of its parts."""

    level: str
    specials: dict[str, int] = field(default_factory=dict)

    def config(self, config: Any) -> Any:
        """A config of the same class with small numbers."""
        cls, found = type(config), dict(vars(config))
        values = {k: v for k, v in found.items() if _is_default_like(v)} | self._values(found)
        stages = found.get("_out_indices")
        if isinstance(stages, (list, tuple)) and self._layers(found) >= len(stages) > 1:
            last = self._layers(found)
            values["out_indices"] = list(range(last - len(stages) + 1, last + 1))
        plain = vars(cls())
        kept = {k: v for k, v in values.items() if not k.startswith("_") and (k not in plain or not _same(v, plain[k]))}
        made = cls(**{k: v for k, v in kept.items() if k not in ("transformers_version", "dtype")})
        rope = getattr(made, "rope_parameters", None)
        if isinstance(rope, dict) and rope.get("rope_theta", 0) is None:
            rope["rope_theta"] = 10000.0
        if vars(made).get("head_dim", 0) is None:
            made.head_dim = _head_dim(vars(made))
        if self.level != SHALLOW and "mrope_section" in getattr(cls, "ignore_keys_at_rope_validation", ()):
            _set_sections(made)
        return made

    def _values(self, found: dict[str, Any]) -> dict[str, Any]:
        layers = self._layers(found)
        out: dict[str, Any] = {}
        for name, value in found.items():
            new = self._value(name, value, found, layers)
            if not _same(new, value):
                out[name] = new
            elif not _is_default_like(value):
                out[name] = value
        return self._consistent(found, out)

    def _layers(self, found: Mapping[str, Any]) -> int:
        """How many layers: two, or as many as there are kinds of layers or layers that something is read from."""
        counts = _layer_counts(found)
        kinds = [len(set(map(str, v))) for k, v in found.items() if _per_layer(k, v, counts)]
        taken = [
            len(v)
            for k, v in found.items()
            if (k == "_out_indices" and v)
            or (_is_indices(k, v, counts) and not SOME_LAYERS.search(k))
            or _is_cycle(k, v)
        ]
        return max([LAYERS, *(min(kind, MOST_LAYERS) for kind in kinds), *(min(n, MOST_LAYERS) for n in taken)])

    def _value(self, name: str, value: Any, found: Mapping[str, Any], layers: int) -> Any:
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            return self.config(value)
        if isinstance(value, dict) and value and name.endswith("config"):
            return value | self._values(value)
        if value is None and name in TOKEN_NAMES:
            return self._id(name)
        if isinstance(value, bool) or value is None:
            return NEEDED.get(name) if value is None else value
        if TOKEN.search(name) and not _is_indices(name, value, _layer_counts(found)):
            return self._special(name, value)
        if isinstance(value, int):
            return -1 if re.search(r"feature_layer$", name) else self._number(name, value, found, layers)
        return self._list(name, value, _layer_counts(found), layers)

    @staticmethod
    def _list(name: str, value: Any, counts: set[int], layers: int) -> Any:
        if _per_layer(name, value, counts):
            return _sample(value, layers)
        if _is_indices(name, value, counts):
            count = 1 if SOME_LAYERS.search(name) else len(value)
            return type(value)(range(max(0, layers - count), layers))
        if not isinstance(value, (list, tuple)):
            return value
        if re.search(r"feature_layers?$", name):
            return type(value)(range(-len(value), 0))
        return type(value)(min(v, 1) for v in value) if name == "depths" else value

    def _special(self, name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)) and value and all(isinstance(v, int) for v in value):
            return type(value)([v if v < VOCAB else self._id(f"{name}.{v}") for v in value][:3])
        return self._id(name) if isinstance(value, int) and value >= FIRST_SPECIAL else value

    def _id(self, name: str) -> int:
        return self.specials.setdefault(name, FIRST_SPECIAL + len(self.specials) % (VOCAB - FIRST_SPECIAL))

    def _number(self, name: str, value: int, found: Mapping[str, Any], layers: int) -> int:
        if LAYER_COUNT.search(name) and not NO_LAYER_COUNT.search(name):
            return min(value, layers)
        count = _at_most(name, value, COUNTS)
        if count is not None:
            return count
        if self.level == SHALLOW or any(_is_stages(k, v) for k, v in found.items()):
            return value
        if self.level == SMALL and IMAGE_SIZE.fullmatch(name):
            patch = found.get("patch_size")
            return min(value, 4 * patch if isinstance(patch, int) and patch > 1 else 64)
        if "kv_heads" in name or "key_value_heads" in name:  # as many as heads, where that is the default
            alike = value in (found.get("num_attention_heads"), found.get("n_heads"))
            return min(value, HEADS if alike else 2)
        limits = (*IMAGES, *WIDTHS) if self.level == SMALL else WIDTHS
        small = _at_most(name, value, limits)
        return value if small is None else small

    def _consistent(self, found: Mapping[str, Any], out: dict[str, Any]) -> dict[str, Any]:
        """Numbers that follow from others: heads of state space models, rotary sections."""
        if self.level == SHALLOW:
            return out
        now = dict(found) | out
        expand = next(
            (now[k] for k in ("expand", "mamba_expand", "expansion_factor") if isinstance(now.get(k), int)), None
        )
        for name, value in found.items():
            own = re.search(r"mamba.*head_?dim|mamba_d_head", name) or (
                name == "head_dim" and "num_attention_heads" not in found
            )
            if expand and own and isinstance(value, int):
                out[name] = expand * WIDTH // HEADS
            if expand and re.search(r"d_ssm$", name):
                out[name] = expand * WIDTH
            if isinstance(value, dict) and re.search("rope", name):
                out[name] = _rotary(value, found, now)
        return out


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and not hasattr(a, "to_dict") and a == b


def _is_default_like(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, tuple, dict, torch.dtype))


def _layer_counts(found: Mapping[str, Any]) -> set[int]:
    return {
        v
        for k, v in found.items()
        if isinstance(v, int) and not isinstance(v, bool) and LAYER_COUNT.search(k) and not NO_LAYER_COUNT.search(k)
    }


def _per_layer(name: str, value: Any, counts: set[int]) -> bool:
    """Whether a list or a text has one item for each layer."""
    if isinstance(value, str):
        return len(value) in counts and name.endswith("pattern")
    return (
        isinstance(value, (list, tuple))
        and len(value) in counts
        and len(value) > LAYERS
        and not _is_indices(name, value, counts)
    )


def _is_indices(name: str, value: Any, counts: set[int]) -> bool:
    """Whether a list names layers by number."""
    if not isinstance(value, (list, tuple)) or not value or not INDICES.search(name) or not counts:
        return False
    ints = all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    return ints and len(set(value)) == len(value) and min(value) >= 0 and max(value) <= max(counts)


def _is_cycle(name: str, value: Any) -> bool:
    """Whether a list of kinds is repeated over the layers."""
    return (
        isinstance(value, (list, tuple))
        and 1 < len(value) <= MOST_LAYERS
        and bool(re.search(r"block_types|attention_types", name))
    )


def _is_stages(name: str, value: Any) -> bool:
    """Whether widths or heads differ from stage to stage."""
    ints = isinstance(value, (list, tuple)) and len(value) > 1 and all(isinstance(v, int) for v in value)
    return bool(
        ints and re.search(r"heads|hidden_sizes|embed_dims?$|widths|channels$|dims$|_dim$", name) and name != "conv_dim"
    )


def _sample(value: Any, layers: int) -> Any:
    """Items for ``layers`` layers that hold each kind once, in order of their first layer; the first kinds again if there are fewer."""
    kinds = list({str(item): item for item in value}.values())[:layers]
    chosen = [*kinds, *value][:layers] if len(kinds) < layers else kinds
    return "".join(chosen) if isinstance(value, str) else type(value)(chosen)


def _rotary(value: dict[str, Any], found: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters whose lists belong to a head of the new size."""
    before, after = _head_dim(found), _head_dim(now)
    out: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            out[key] = _rotary(item, found, now)
        elif isinstance(item, (list, tuple)) and len(item) == before // 2:
            out[key] = list(item)[: after // 2]
        else:
            out[key] = item
    return out


def _head_dim(values: Mapping[str, Any]) -> int:
    given = values.get("head_dim")
    heads, width = values.get("num_attention_heads"), values.get("hidden_size")
    return given or (width // heads if isinstance(heads, int) and isinstance(width, int) and heads else HEAD_DIM)


def _set_sections(config: Any) -> None:
    """Rotary sections of time, height and width that fill a head."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or not hasattr(config, "num_attention_heads"):
        return
    turned = int(_head_dim(vars(config)) * (rope.get("partial_rotary_factor") or 1)) // 2
    before = rope.get("mrope_section") or [24, 24, 16]
    parts = [max(1, part * turned // sum(before)) for part in before]
    alone = next((i for i, part in enumerate(before) if before.count(part) == 1), 0)
    parts[alone] += turned - sum(parts)
    rope["mrope_section"] = parts


# --- inputs ----------------------------------------------------------------------------------------------------------


def parts_of(config: Any) -> Iterator[Any]:
    """A config and all configs in it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from parts_of(value)


def look(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these attributes that some part of a config has as a number or a list."""
    for name in names:
        for part in parts_of(config):
            found = getattr(part, name, None)
            if isinstance(found, (int, list, tuple)) and not isinstance(found, bool):
                return found
    return default


def runnable_inputs(model: nn.Module, config: Any) -> dict[str, Any]:
    """Inputs on which the model runs eagerly.

    Raises:
        NotBuilt: none of the variants runs; the first one's reason.
    """
    reasons: list[str] = []
    for inputs in itertools.islice(variants(model, config), 30):
        try:
            seed_all()
            with torch.inference_mode():
                found = tensors_of(model(**inputs))
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {first_line(error)} (inputs: {', '.join(inputs)})")
            continue
        if found and all(bool(t.isfinite().any()) for t in found if t.numel()):
            return inputs
        reasons.append("the output has no finite number")
    raise NotBuilt(reasons[0] if reasons else "no inputs are known for its forward")


def tensors_of(output: Any) -> list[Tensor]:
    """Floating point tensors of an output, caches left out, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [
            t
            for key, value in output.items()
            if "past_key_values" not in key and "cache" not in key
            for t in tensors_of(value)
        ]
    if isinstance(output, (list, tuple)):
        return [t for value in output for t in tensors_of(value)]
    return []


def variants(model: nn.Module, config: Any) -> Iterator[dict[str, Any]]:
    """Keyword arguments to try: with all that the model sees and hears, then with less."""
    signature = inspect.signature(model.forward).parameters
    required = [
        n for n, p in signature.items() if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    main = getattr(model, "main_input_name", "input_ids")
    senses = [name for name in SENSES if name in signature]
    wanted = [n for n in senses if n in required or n == main or _has_token(config, n)]
    tokens = "input_ids" in signature and (
        main == "input_ids" or "input_ids" in required or not wanted or _has_token(config, *senses)
    )
    others = [n for n in senses if n not in wanted]
    for chosen in dict.fromkeys(
        (tuple(wanted), tuple([*wanted, *others]), tuple(n for n in wanted if n in required), *((n,) for n in others))
    ):
        for made in itertools.product(*(SENSES[name](config, signature) for name in chosen)):
            inputs: dict[str, Any] = {}
            for one in made:
                inputs |= {k: v for k, v in one.items() if k in signature}
            with_tokens = add_tokens(model, config, inputs, signature) if tokens else inputs
            yield from _completed(with_tokens, config, signature, required)


def _completed(
    inputs: dict[str, Any], config: Any, signature: Mapping[str, Any], required: list[str]
) -> Iterator[dict[str, Any]]:
    """Inputs with a decoder's tokens and what else is required, then without the decoder's."""
    batch = next((v.shape[0] for k, v in inputs.items() if k == "input_ids"), 1)
    if "input_ids" not in inputs:
        batch = next((v.shape[0] for v in inputs.values() if isinstance(v, Tensor) and v.dim()), 1)
    for name in required:
        if name not in inputs and name in OTHERS:
            inputs = inputs | {name: OTHERS[name](config, batch)}
    if "bbox" in signature:
        inputs = (
            inputs | {"bbox": torch.zeros(batch, inputs["input_ids"].shape[1], 4, dtype=torch.long)}
            if "input_ids" in inputs
            else inputs
        )
    if "decoder_input_ids" in signature:
        yield inputs | {"decoder_input_ids": token_ids(config, batch, 5)}
    if inputs:
        yield inputs
        more = {name: OTHERS[name](config, batch) for name in ("encoder_hidden_states",) if name in signature}
        if more:
            yield inputs | more


def token_ids(config: Any, batch: int, length: int) -> Tensor:
    """Random tokens, none of them special."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None) or look(config, "vocab_size", default=VOCAB)
    size = min(size, FIRST_SPECIAL) if isinstance(size, int) else FIRST_SPECIAL
    low = 20 if size > 40 else 0
    return torch.randint(low, max(size, low + 1), (batch, length), generator=torch.Generator().manual_seed(2))


TOKENS_FOR = {
    "pixel_values": (("image_token_id", "image_token_index", "media_placeholder_token_id", "image_placeholder_id"), "get_image_features"),
    "input_features": (("audio_token_id", "audio_token_index"), "get_audio_features"),
    "input_values": (("audio_token_id", "audio_token_index"), "get_audio_features"),
}  # fmt: skip


def _has_token(config: Any, *senses: str) -> bool:
    return any(_token_of(config, sense) is not None for sense in senses)


def _token_of(config: Any, sense: str) -> int | None:
    names, _ = TOKENS_FOR.get(sense, ((), ""))
    return next((getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)), None)


def add_tokens(model: nn.Module, config: Any, inputs: dict[str, Any], signature: Mapping[str, Any]) -> dict[str, Any]:
    """Text around one placeholder token for each vector that an image or a sound becomes."""
    batch = 1 if inputs else 2
    parts, types = [token_ids(config, batch, 4)], [torch.zeros(batch, 4, dtype=torch.long)]
    for sense in inputs:
        token = _token_of(config, sense)
        if token is None:
            continue
        count = _count(model, TOKENS_FOR[sense][1], inputs)
        parts.append(torch.full((batch, count), token))
        types.append(torch.ones(batch, count, dtype=torch.long))
    parts.append(token_ids(config, batch, 5).flip(1))
    types.append(torch.zeros(batch, 5, dtype=torch.long))
    ids = torch.cat(parts, 1)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if len(parts) > 2:
        made["mm_token_type_ids"] = made["token_type_ids"] = torch.cat(types, 1)
    return {k: v for k, v in made.items() if k in signature} | inputs


def _count(model: nn.Module, method: str, inputs: Mapping[str, Any]) -> int:
    """Vectors that the model makes of its other senses; one where it does not say."""
    owner = next((m for m in (model, getattr(model, "model", None)) if hasattr(m, method)), None)
    if owner is None:
        return 1
    call = getattr(owner, method)
    known = inspect.signature(call).parameters
    with torch.inference_mode():
        try:
            found = call(**{k: v for k, v in inputs.items() if k in known})
        except Exception:
            return 1
    found = getattr(found, "pooler_output", found)
    tensors = tensors_of(found)
    return sum(t.numel() // t.shape[-1] for t in tensors if t.dim() > 1) or 1


def randn(*shape: int) -> Tensor:
    """Seeded normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def images(config: Any, signature: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Forms that images come in: flattened patches with a grid, a picture, several, frames."""
    size = look(config, "image_size", "img_size", "input_resolution", "pretrain_image_size", default=64)
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    channels = look(config, "num_channels", "in_channels", "in_chans", "num_image_channels", default=3)
    channels = channels if isinstance(channels, int) else 3
    patch = look(config, "patch_size", default=16)
    patch = patch if isinstance(patch, int) else patch[0]
    flat = channels * patch * patch
    out: list[dict[str, Any]] = []
    if "image_grid_thw" in signature or "grid_thw" in signature:
        temporal = look(config, "temporal_patch_size", default=1)
        grid = torch.tensor([[1, 4, 4]])
        out += [
            {"pixel_values": randn(16, flat * t), "image_grid_thw": grid, "grid_thw": grid}
            for t in dict.fromkeys((temporal, 1, 2))
        ]
    if "spatial_shapes" in signature:
        shapes = torch.tensor([[4, 4]])
        out.append(
            {
                "pixel_values": randn(1, 16, flat),
                "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
                "spatial_shapes": shapes,
            }
        )
    frames = look(config, "num_frames", default=2)
    plain = [
        {"pixel_values": randn(*shape, height, width)}
        for shape in ((1, channels), (1, 1, channels), (1, frames, channels))
    ]
    sized = (
        [one | {"image_sizes": torch.tensor([[height, width]])} for one in plain] if "image_sizes" in signature else []
    )
    return [*out, *plain, *sized]


def sounds(config: Any, signature: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Spectrograms [1, mels, frames] and [1, frames, mels]."""
    mels = look(
        config,
        "num_mel_bins",
        "input_feat_per_channel",
        "feature_size",
        "n_mels",
        "feature_projection_input_dim",
        "input_dim",
        default=80,
    )
    frames = 2 * look(config, "max_source_positions", default=32)
    mask = {
        "input_features_mask": torch.ones(1, frames, dtype=torch.long),
        "feature_attention_mask": torch.ones(1, frames, dtype=torch.long),
    }
    return [
        {"input_features": randn(1, mels, frames)} | mask,
        {"input_features": randn(1, frames, mels)} | mask,
        {"input_features": randn(1, 1, frames, mels)},
    ]


def waves(config: Any, signature: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Samples [1, n], with a channel, and spectrograms under the same name."""
    mels = look(config, "num_mel_bins", default=80)
    frames = look(config, "max_length", default=64)
    samples = randn(1, 4800)
    return [{"input_values": samples}, {"input_values": samples[:, None]}, {"input_values": randn(1, frames, mels)}]


def videos(config: Any, signature: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Frames."""
    return [{"pixel_values_videos": made["pixel_values"]} for made in images(config, {})]


def series(config: Any, signature: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A time series with as many channels as the config says."""
    length = look(config, "context_length", default=32)
    lags = look(config, "lags_sequence", default=[0])
    channels = look(config, "num_input_channels", "input_size", default=1)
    past = length + max(lags)
    times = {
        "past_time_features": randn(1, past, look(config, "num_time_features", default=0) or 0),
        "past_observed_mask": torch.ones(1, past),
    }
    return [
        {"past_values": randn(1, length, channels)},
        {"past_values": randn(1, past)} | times,
        {"past_values": randn(1, length)},
    ]


def patches(config: Any, signature: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Flattened patches of one image, as vision towers with a grid take them."""
    sides = look(config, "patch_size", default=16) ** 2 * look(config, "temporal_patch_size", default=1)
    channels = look(config, "in_channels", "num_channels", default=3)
    return [{"hidden_states": randn(16, channels * sides), "grid_thw": torch.tensor([[1, 4, 4]])}]


def codes(config: Any, signature: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Codes of eight frames of sound."""
    return [{"audio_codes": torch.zeros(1, look(config, "num_codebooks", default=8), 8, dtype=torch.long)}]


def encoded(config: Any, batch: int) -> Tensor:
    """What an encoder would give."""
    width = look(config, "encoder_hidden_size", "cross_attention_hidden_size", "hidden_size", default=WIDTH)
    return randn(batch, 7, width)


Forms = Callable[[Any, Mapping[str, Any]], list[dict[str, Any]]]
SENSES: Mapping[str, Forms] = {
    "pixel_values": images,
    "input_features": sounds,
    "input_values": waves,
    "pixel_values_videos": videos,
    "past_values": series,
    "hidden_states": patches,
    "audio_codes": codes,
}
OTHERS: Mapping[str, Callable[[Any, int], Any]] = {
    "decoder_input_ids": lambda config, batch: token_ids(config, batch, 5),
    "attention_mask": lambda config, batch: torch.ones(batch, 9, dtype=torch.long),
    "position_ids": lambda config, batch: torch.arange(9).expand(batch, 9),
    "inputs_embeds": lambda config, batch: randn(batch, 9, look(config, "hidden_size", default=WIDTH)),
    "encoder_hidden_states": lambda config, batch: encoded(config, batch),
    "query_embeds": lambda config, batch: randn(batch, 4, look(config, "hidden_size", default=WIDTH)),
}  # fmt: skip
