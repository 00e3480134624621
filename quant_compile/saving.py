"""``save``: a compiled model to a folder, or a GGUF file, that others load, with the integers that it runs on.

Finds out what a model runs on from the ledger and the weight store; ``checkpoints`` plans and writes the tensors.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quant_compile.checkpoints import packed
from quant_compile.checkpoints.cache_writer import cache_form
from quant_compile.checkpoints.compressed_tensors import METHOD
from quant_compile.checkpoints.config import describe
from quant_compile.checkpoints.errors import CheckpointError, SaveError
from quant_compile.checkpoints.export import Export, export_of
from quant_compile.checkpoints.files import Files
from quant_compile.checkpoints.gguf import writer as gguf
from quant_compile.checkpoints.gguf.container import is_gguf
from quant_compile.checkpoints.gguf.files import open_files
from quant_compile.checkpoints.gguf.tokenizer import tokenizer
from quant_compile.checkpoints.write import check_space, check_target, replacing, shards_of, write_shards
from quant_compile.gathering import gathered
from quant_compile.generation import kept_of
from quant_compile.generation.blocks import layer_names
from quant_compile.ir.errors import OptionError
from quant_compile.ir.ggml.types import PLAIN
from quant_compile.ir.kv import CacheScheme
from quant_compile.ir.scheme import parse
from quant_compile.lowering.target import Target
from quant_compile.lowering.tune import exported
from quant_compile.lowering.weights import STORE, Key
from quant_compile.model import offload
from quant_compile.model.cache_scales import CacheScales
from quant_compile.model.distributed import has_parts
from quant_compile.model.ledger import LEDGER
from quant_compile.model.names import names_in
from quant_compile.model.places import parameters_of, unwrap, wrapped_by_peft
from quant_compile.model.weights import linear_weights
from quant_compile.options import PolicySource
from quant_compile.policy import Policy
from quant_compile.pretrained import load
from quant_compile.rules import CacheRule, CacheRules

FORMATS = (METHOD, packed.FORMAT, gguf.FORMAT)
# Room for configs, headers and what a file system rounds up, besides the tensors.
BESIDES = 8_000_000
SHOWN = 4
VERSIONS = ("quant-compile", "torch", "transformers")
# Linears that vLLM and SGLang join, whatever their names in files.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
GLOBAL_SCALE = "weight_global_scale"
# Files of a tokenizer or a processor, as transformers and sentencepiece name them.
ALONG = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja", "*.tiktoken", "spiece.model",
    "sentencepiece*.model", "processor_config.json", "*preprocessor_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Saved:
    """What was written.

    Attributes:
        folder: that holds it.
        nbytes: of all tensors.
        files: how many hold tensors.
        schemes: scheme -> weights that have it.
        kept: weights and buffers in their own dtype.
        notes: what a reader should know, one sentence each.
    """

    folder: Path
    nbytes: int
    files: int
    schemes: Mapping[str, int]
    kept: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """In a few lines, for people."""
        parts = [f"{count} {'weight' if count == 1 else 'weights'} in {spec}" for spec, count in self.schemes.items()]
        parts = parts or ["nothing is quantized"]
        size = f"{self.nbytes / 1e6:,.2f} MB in {self.files} {'file' if self.files == 1 else 'files'}"
        head = f"{self.folder}: {size}; {', '.join(parts)}; {self.kept} as they were"
        return "\n".join([head, *(f"note: {note}" for note in self.notes)])


def save(model: nn.Module, directory: str | Path, format: str = METHOD, *, beside: Iterable[Path] = ()) -> Saved:
    """Write a compiled model to a folder: its codes and scales as it runs on them, its other weights in their own dtype.

    The folder appears whole: it is written beside its place, and an older one is replaced in one step.

    Args:
        model: of transformers, compiled and called once, or made by ``load``; its weights may be released. Where ranks have it in parts
            every rank calls this, and the first one writes what one process would.
        directory: to write; a checkpoint that is there is replaced. A name that ends in ``.gguf`` is that of a file, in that format.
        format: ``compressed-tensors``, which vLLM, SGLang, transformers and ``load`` read, or ``packed``: planes as the kernels of this
            device read them, for ``load`` alone, which then neither quantizes nor packs nor measures; ``gguf``: a file of llama.cpp.
        beside: files to copy into the folder, such as a tokenizer's.

    Returns:
        What was written; ``str`` of it is a summary. Its notes are warnings too.

    Raises:
        OptionError: the format is not known.
        SaveError: the model is not compiled, was never called, or has weights that the format cannot express; the folder cannot be
            replaced, or does not fit the disk. Nothing has been written.
        WeightError: planes of a released weight do not unpack exactly, or values are NaN or inf. The folder is what it was.
    """
    saved = (_save_parts if has_parts(unwrap(model)) else _save)(model, directory, format, beside)
    for note in saved.notes:
        warnings.warn(note, UserWarning, stacklevel=2)
    return saved


def _save_parts(model: nn.Module, directory: str | Path, format: str, beside: Iterable[Path]) -> Saved:
    """The same of a model that ranks have in parts: the first one writes, all hear of it."""
    import torch.distributed as dist

    if _format(format, Path(directory)) == packed.FORMAT:
        raise SaveError(
            "planes of ranks' parts are laid out for each rank's kernels, and the format packed is for one device.\n"
            'Fix: save it as "compressed-tensors", and on one GPU: sglquant convert FOLDER OTHER --format packed.'
        )
    first = gathered(_checked(model), _key)
    outcome: list[Any] = [None]
    if first is not None:
        try:
            outcome = [_save(first.made(), directory, format, beside)]
        except Exception as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _format(format: str, place: Path) -> str:
    """The format of what is written there.

    Raises:
        OptionError: it is not known, or the name is that of another.
    """
    if format not in FORMATS:
        raise OptionError(f"format {format!r} is not known; there is {', '.join(FORMATS)}")
    if place.suffix == ".gguf" and format == METHOD:
        return gguf.FORMAT
    if (format == gguf.FORMAT) != (place.suffix == ".gguf"):
        raise OptionError(f"{place}: the name of a GGUF file, and of nothing else, ends in .gguf")
    return format


def _save_gguf(model: nn.Module, file: Path) -> Saved:
    gguf.check_target(file)
    inner = _checked(model)
    export = gguf.export_of(inner, _key)
    check_space(file, export.nbytes + BESIDES)
    nbytes = gguf.write(file, export, inner, _dtype(inner))
    notes = list(_skipped(model, export.kept))
    if gguf.MARK not in vars(inner):
        notes.append("the file has no tokenizer, since the model was not loaded from a GGUF file")
    schemes = Counter(scheme.spec for scheme in export.schemes.values())
    return Saved(file, nbytes, 1, dict(schemes), len(export.kept), tuple(notes))


def _save(model: nn.Module, directory: str | Path, format: str, beside: Iterable[Path]) -> Saved:
    folder = Path(directory)
    format = _format(format, folder)
    if format == gguf.FORMAT:
        return _save_gguf(model, folder)
    check_target(folder)
    inner = _checked(model)
    _load_scales(inner)
    if format == packed.FORMAT:
        export = _packed(inner)
        notes: Iterable[str] = _skipped(model, export.kept)
    else:
        cache = cache_form(inner, *_cache(inner))
        export = export_of(inner, _key, _dtype(inner), cache)
        notes = chain(cache.notes, _notes(model, export, folder))  # of what is written
    files = list(beside)
    shards = shards_of(export.jobs)
    check_space(folder, export.nbytes + BESIDES + sum(file.stat().st_size for file in files))
    with replacing(folder) as made, torch.no_grad():
        nbytes = write_shards(made, shards)
        _write_configs(inner, export, made)
        for name, text in export.texts.items():
            (made / name).write_text(text, encoding="utf-8")
        for file in files:
            shutil.copyfile(file, made / file.name)
    schemes = Counter(scheme.spec for scheme in export.schemes.values())
    return Saved(folder, nbytes, len(shards), dict(schemes), len(export.kept), tuple(notes))


def _packed(model: nn.Module) -> Export:
    """Planes as they lie.

    Raises:
        SaveError: the model would not be the same when it is loaded.
    """
    policy, (schemes, scales) = LEDGER.policy_of(model), _cache(model)
    assert isinstance(policy, Policy)
    if not schemes:
        policy = replace(policy, kv_cache=None)
    elif schemes != _caches_by(policy, schemes):  # an option of compile decided otherwise
        rules = tuple(CacheRule(layer, scheme) for layer, scheme in schemes.items())
        policy = replace(policy, kv_cache=CacheRules(None, rules))
    made = packed.Packer(model, _key, scales)
    device = next(p.device for p in model.parameters())
    target = Target.of(device if device.type == "cuda" else "cpu")
    versions = {name: version(name) for name in VERSIONS}
    document = made.document(policy.to_dict(), target.label, exported(target), versions)
    texts = {packed.FILE: json.dumps(document, indent=1) + "\n"}
    return Export(tuple(made.jobs), packed.quantization_config(), made.schemes, tuple(made.kept), texts)


def convert(
    source: str | Path,
    directory: str | Path,
    policy: Any = None,
    format: str = METHOD,
    *,
    dtype: str | None = None,
    device: str = "cpu",
) -> Saved:
    """Load a checkpoint, quantized or not, with a policy, and save it; no call of the model is needed.

    Args:
        source: folder or GGUF file to read; its tokenizer's and processor's files are copied.
        directory: as in ``save``.
        policy: for what ``source`` has in 16 bits, and for all else where it says ``requantize``; None: only a checkpoint that is
            quantized is written in another format. One that keeps every weight writes a checkpoint in 16 bits, of a quantized one where
            it says ``requantize``.
        format: as in ``save``.
        dtype: of what is not quantized; None: the config's.
        device: to quantize on.

    Raises:
        CheckpointError, OptionError, PolicyError, SaveError: as ``load`` and ``save``.
    """
    source, folder = Path(source), Path(directory)
    written = _format(format, folder)
    (gguf.check_target if written == gguf.FORMAT else check_target)(folder)
    if policy is None and not _is_quantized(source):
        raise OptionError(f"{source} is not quantized. Fix: name a policy.")
    model = load(source, policy, device=device, dtype=dtype)
    if not is_gguf(source):
        files = [file for file in sorted(source.iterdir()) if file.is_file() and _goes_along(file.name)]
        return _save(model, folder, format, files)
    with tempfile.TemporaryDirectory(prefix="sglquant-") as made:
        files = [] if written == gguf.FORMAT else _tokenizer_files(source, Path(made))
        return _save(model, folder, format, files)


def _is_quantized(source: Path) -> bool:
    if is_gguf(source):
        return any(block.name not in PLAIN for block in open_files(source).types.values())
    return bool(describe(source).method)


def _tokenizer_files(source: Path, folder: Path) -> list[Path]:
    """A GGUF file's tokenizer as transformers has it; none where the file has none that is known."""
    try:
        tokenizer(source).save_pretrained(folder)
    except CheckpointError as error:
        warnings.warn(f"no tokenizer is written: {error}", UserWarning, stacklevel=4)
    return sorted(folder.iterdir())


def _goes_along(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in ALONG)


def _checked(model: nn.Module) -> nn.Module:
    """The model inside of wrappers.

    Raises:
        SaveError: it cannot be saved, whatever its schemes.
    """
    inner = unwrap(model)
    if wrapped_by_peft(inner) is not None:
        raise SaveError(
            "adapters have no place in a quantized checkpoint.\nFix: save the base model and the adapters apart."
        )
    if getattr(inner, "config", None) is None:
        raise SaveError(
            f"{type(inner).__name__} has no config: the format describes models of transformers.\n"
            "Fix: save a model of transformers."
        )
    if LEDGER.policy_of(inner) is None:
        raise SaveError(
            "the model is not compiled, so that nothing of it is quantized.\n"
            "Fix: quant_compile.compile(model, policy), call it once, then save it."
        )
    if offload.lent_parameters(inner):
        raise SaveError("some weights are offloaded.\nFix: load the model without a device_map that offloads.")
    if not any(_key(parameter) is not None for parameter in parameters_of(inner)) and not _keeps_all(inner):
        raise SaveError(
            "no weight of the model is quantized, since it has never been called.\n"
            "Fix: call the model once, with inputs that every part of it sees."
        )
    _check_policy(inner)
    return inner


def _keeps_all(model: nn.Module) -> bool:
    """Whether the policy wants no weight of the model quantized."""
    policy = LEDGER.policy_of(model)
    return isinstance(policy, Policy) and all(policy.decide(w.site).scheme is None for w in linear_weights(model))


def _check_policy(model: nn.Module) -> None:
    """Refuse planes of an earlier policy, which are there until the first call under the next.

    Raises:
        SaveError: there are some.
    """
    policy = LEDGER.policy_of(model)
    if policy is None or LEDGER.has_graphs(model):
        return
    for weight in linear_weights(model):
        key, entry = _key(weight.parameter), STORE.peek(weight.parameter)
        if key is None or entry is None or entry.released or policy.decide(weight.site).scheme == parse(key.spec):
            continue
        raise SaveError(
            f"the model was compiled with {policy.name} and has not been called since: {weight.site.names[0]} is in {key.spec}.\n"
            "Fix: call the model once."
        )


def _key(parameter: nn.Parameter) -> Key | None:
    record = LEDGER.peek(parameter)
    return STORE.held(parameter, record.scheme if record is not None else None)


def _load_scales(model: nn.Module) -> None:
    """Give weights that no call has read yet, since they were quantized as they were loaded, their policy's scales of inputs."""
    policy, names = LEDGER.policy_of(model), names_in(model)
    source = PolicySource(policy, "") if isinstance(policy, Policy) and policy.scales is not None else None
    for parameter in parameters_of(model) if source is not None else ():
        key, entry = _key(parameter), STORE.peek(parameter)
        if source is not None and entry is not None and key is not None and parse(key.spec).static:
            entry.input_scale = (
                source.input_scale(names[id(parameter)].full) if entry.input_scale is None else entry.input_scale
            )


def _cache(model: nn.Module) -> tuple[dict[str, CacheScheme | None], dict[str, CacheScales]]:
    """How ``generate`` keeps K and V of each layer (empty: all in 16 bits), and scales of layers that have fixed ones."""
    kept = kept_of(model)
    if not kept.schemes:
        return {}, {}
    schemes = dict(zip(layer_names(model), kept.schemes, strict=True))
    pairs = zip(schemes.items(), kept.scales or (), strict=True)
    return schemes, {
        n: CacheScales(s, *(x.cpu() for x in pair)) for (n, s), pair in pairs if s is not None and pair is not None
    }


def _caches_by(policy: Policy, layers: Iterable[str]) -> dict[str, CacheScheme | None]:
    """What a policy says of layers."""
    return {layer: None if policy.kv_cache is None else policy.kv_cache.of(layer) for layer in layers}


def _dtype(model: nn.Module) -> torch.dtype:
    own = getattr(model, "dtype", None)
    return own if isinstance(own, torch.dtype) else torch.get_default_dtype()


def _write_configs(model: Any, export: Export, folder: Path) -> None:
    """``config.json`` with what the tensors are, and ``generation_config.json``, as transformers writes them."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = _dtype(model)
    if export.config:
        config.quantization_config = export.config
    elif hasattr(config, "quantization_config"):  # of the checkpoint that the values come from
        del config.quantization_config
    config.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation = copy.deepcopy(generation)
        vars(generation).pop("disable_compile", None)  # set while the model is compiled
        generation.to_json_file(folder / "generation_config.json")  # as it is: save_pretrained refuses some that load


def _skipped(model: nn.Module, kept: Collection[str]) -> Iterable[str]:
    skipped = [name for name, _ in LEDGER.report(model).skips if name in kept]
    if skipped:
        more = f" and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
        names = ", ".join(skipped[:SHOWN])
        yield f"the policy names weights that no call has quantized, which are as they were: {names}{more}"


def _notes(model: nn.Module, export: Export, folder: Path) -> Iterable[str]:
    yield from _skipped(model, export.kept)
    apart = _apart(folder)
    if apart:
        yield (
            f"NVFP4: the global scales of {' and '.join(apart)} differ. vLLM and SGLang multiply such weights together, under one global "
            "scale, so that the others would be wrong there; transformers and load take each as it is. Scales of groups cannot make up for "
            "it: e4m3 takes a factor exactly if it is a power of two. For these engines take MXFP4A16 or FP8_DYNAMIC, or llm-compressor"
        )


def _apart(folder: Path) -> tuple[str, ...]:
    """The first modules that engines fuse and that have different global scales in a folder."""
    files = Files.open(folder)
    for name in files.tensors:
        for first, *others in FUSED:
            if name.endswith(f".{first}.{GLOBAL_SCALE}"):
                stem = name.removesuffix(f"{first}.{GLOBAL_SCALE}")
                names = [other for part in others if (other := f"{stem}{part}.{GLOBAL_SCALE}") in files.tensors]
                if any(float(files.get(other)) != float(files.get(name)) for other in names):
                    return tuple(found.removesuffix(f".{GLOBAL_SCALE}") for found in (name, *names))
    return ()
