"""The weight store by itself: one pack a key, merged siblings, staleness, memory while packing, weak references."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from quant_compile import MissingScalesError, StaleWeightError, WeightError
from quant_compile.ir.family import family_of
from quant_compile.ir.numerics import CHUNK_ELEMENTS
from quant_compile.ir.scheme import parse
from quant_compile.lowering.registry import ROWS, Layout, layouts
from quant_compile.lowering.weights import MOST_FURTHER, Key, WeightStore, fingerprint, quantize
from quant_compile.model.ledger import packed_bytes
from tests.runtime_support import bf16

BF16 = torch.bfloat16


def key(spec: str = "W8A8", layout: str = "rows", transposed: bool = False, dtype: torch.dtype = BF16) -> Key:
    return Key(spec, layout, transposed, dtype)


def weight(n: int, k: int = 32, seed: int = 0) -> Parameter:
    return Parameter(bf16(n, k, seed=seed), requires_grad=False)


def truth(parameter: Tensor, spec: str = "W8A8") -> tuple[Tensor, ...]:
    return family_of(parse(spec)).quantize_weight(parameter.detach(), parse(spec))


def same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    return len(found) == len(wanted) and all(
        torch.equal(a.float(), b.float()) and a.shape == b.shape and a.dtype == b.dtype for a, b in zip(found, wanted)
    )


def joined(*parameters: Parameter, spec: str = "W8A8") -> tuple[Tensor, ...]:
    return tuple(torch.cat(parts) for parts in zip(*(truth(p, spec) for p in parameters)))


@pytest.fixture
def store() -> WeightStore:
    return WeightStore()


def test_one_pack_for_each_scheme_layout_orientation_and_dtype(store: WeightStore) -> None:
    w = weight(48)
    first = store.planes((w,), (key(),))
    epoch = store.epoch
    assert store.planes((w,), (key(),))[0] is first[0] and store.epoch == epoch
    assert same(first, truth(w))
    assert same(store.planes((w,), (key("FP8_DYNAMIC"),)), truth(w, "FP8_DYNAMIC"))
    square = weight(32)
    assert same(store.planes((square,), (key(transposed=True),)), truth(square.t()))
    assert same(store.planes((w,), (key("W4A16", dtype=torch.float32),)), truth(w.float(), "W4A16"))
    assert len(store.entry(w).packs) == 3


@pytest.mark.parametrize("spec", ["W8A8", "FP8_DYNAMIC", "W4A16", "W4A16_ASYM", "W8A16"])
def test_merged_siblings_share_one_slab_and_each_is_a_slice(spec: str, store: WeightStore) -> None:
    q, k, v = weight(48, seed=1), weight(16, seed=2), weight(17, seed=3)
    keys = (key(spec),) * 3
    merged = store.planes((q, k, v), keys)
    assert same(merged, joined(q, k, v, spec=spec))
    assert store.planes((q, k, v), keys)[0] is merged[0]
    storages = {plane.untyped_storage()._cdata for plane in merged}
    for sibling in (q, k, v):
        own = store.planes((sibling,), (key(spec),))
        assert same(own, truth(sibling, spec))
        assert {plane.untyped_storage()._cdata for plane in own} == storages, (
            "a sibling's own planes are views of the slab"
        )
    pair = store.planes((q, k), keys[:2])
    assert same(pair, joined(q, k, spec=spec)) and {p.untyped_storage()._cdata for p in pair} == storages


def test_siblings_packed_alone_first_are_merged_later_without_a_second_copy(store: WeightStore) -> None:
    q, k = weight(48, seed=1), weight(16, seed=2)
    store.planes((q,), (key(),))
    store.planes((k,), (key(),))
    assert same(store.planes((q, k), (key(), key())), joined(q, k))
    assert len({id(pack.slab) for w in (q, k) for pack in store.entry(w).packs.values()}) == 1


def test_another_graph_groups_siblings_in_another_order(store: WeightStore) -> None:
    q, k, v = weight(48, seed=1), weight(16, seed=2), weight(24, seed=3)
    keys = (key(),) * 3
    assert same(store.planes((q, k, v), keys), joined(q, k, v))
    assert same(store.planes((v, q), keys[:2]), joined(v, q))
    assert same(store.planes((q, k, v), keys), joined(q, k, v))
    for sibling in (q, k, v):
        assert same(store.planes((sibling,), keys[:1]), truth(sibling))


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_only_one_sibling_changes(changed: int, store: WeightStore) -> None:
    siblings = [weight(48, seed=1), weight(16, seed=2), weight(24, seed=3)]
    keys = (key(),) * 3
    before = [plane.clone() for plane in store.planes(tuple(siblings), keys)]
    siblings[changed].mul_(-3)
    after = store.planes(tuple(siblings), keys)
    assert same(after, joined(*siblings)) and not same(after, tuple(before))


def _interleaved() -> Layout:
    """A layout in tiles of 16 rows, padded, so that 8 rows of a pack are not the pack of 8 rows."""

    def pack(planes: tuple[Tensor, ...], problem: Any) -> tuple[Tensor, ...]:
        data, scale = planes
        padded = torch.nn.functional.pad(data, (0, 0, 0, -data.shape[0] % 16))
        return padded.view(-1, 16, data.shape[1]).transpose(1, 2).contiguous(), scale

    def unpack(planes: tuple[Tensor, ...], problem: Any) -> tuple[Tensor, ...]:
        data, scale = planes
        return data.transpose(1, 2).reshape(-1, data.shape[1])[: problem.n].contiguous(), scale

    return Layout("tiles16", pack, unpack, ROWS.planes, lambda problem: 16)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Layout:
    made = _interleaved()
    table = {**layouts(), made.name: made}
    monkeypatch.setattr("quant_compile.lowering.weights.layouts", lambda: table)
    return made


def test_slices_off_the_kernels_tile_get_a_pack_of_their_own(tiles: Layout, store: WeightStore) -> None:
    """The row slice of a merged pack is the pack of one sibling only where rows are a multiple of the kernel's tile."""
    q, k, v = weight(32, seed=1), weight(8, seed=2), weight(24, seed=3)
    tiled = key(layout="tiles16")
    merged = store.planes((q, k, v), (tiled,) * 3)
    assert same(merged, tiles.pack(joined(q, k, v), None))
    for sibling in (q, k, v):
        assert same(store.planes((sibling,), (tiled,)), tiles.pack(truth(sibling), None)), sibling.shape
    shared = {plane.untyped_storage()._cdata for plane in merged}
    assert {p.untyped_storage()._cdata for p in store.planes((q,), (tiled,))} == shared
    assert {p.untyped_storage()._cdata for p in store.planes((k,), (tiled,))} != shared
    assert same(store.planes((q, k), (tiled,) * 2), tiles.pack(joined(q, k), None))
    assert same(store.planes((k, v), (tiled,) * 2), tiles.pack(joined(k, v), None))
    assert same(store.planes((q, k, v), (tiled,) * 3), tiles.pack(joined(q, k, v), None))


@dataclass
class Uncuttable:
    """A layout that cannot be cut, and how often it packed."""

    layout: Layout
    packs: int = 0

    def wanted(self, *parameters: Parameter) -> tuple[Tensor, ...]:
        """The pack of these weights joined."""
        return self.layout.pack(joined(*parameters), None)  # type: ignore[arg-type]


@pytest.fixture
def uncuttable(monkeypatch: pytest.MonkeyPatch) -> Uncuttable:
    plain = _interleaved()
    made = Uncuttable(plain)

    def pack(planes: tuple[Tensor, ...], problem: Any) -> tuple[Tensor, ...]:
        made.packs += 1
        return plain.pack(planes, problem)

    table = {**layouts(), "tiles16": replace(plain, pack=pack, row_block=lambda problem: 0)}
    monkeypatch.setattr("quant_compile.lowering.weights.layouts", lambda: table)
    return made


TILED = key(layout="tiles16")


def tiled(store: WeightStore, *parameters: Parameter) -> tuple[Tensor, ...]:
    return store.planes(parameters, (TILED,) * len(parameters))


@pytest.mark.parametrize(
    ("groups", "packs"),
    [
        (("qkv", "qk"), 2),
        (("qkv", "vq"), 2),
        (("qkv", "vkq"), 2),
        (("qk", "kv"), 2),
        (("qkv", "q", "k", "v"), 4),
        (("qk", "qkv"), 3),  # the home moves to the larger group once, and the smaller gets a slab of its own
        (("q", "qk", "qkv"), 5),
        (("qk", "kv", "vq", "qkv"), 5),  # kv and vq have slabs of their own already when the home moves
    ],
)
def test_graphs_that_group_siblings_differently_come_to_rest(
    groups: tuple[str, ...], packs: int, uncuttable: Uncuttable, store: WeightStore
) -> None:
    weights = {"q": weight(32, seed=1), "k": weight(8, seed=2), "v": weight(24, seed=3)}
    for turn in range(4):
        if turn == 2:
            at_rest, epoch = uncuttable.packs, store.epoch
        for group in groups:
            members = [weights[name] for name in group]
            found = tiled(store, *members)
            assert same(found, uncuttable.wanted(*members)), (turn, group)
            assert tiled(store, *members)[0] is found[0]
    assert (uncuttable.packs, store.epoch) == (at_rest, epoch), "packed again at a switch"
    assert uncuttable.packs == store.packed == packs


def test_the_third_of_alternating_calls_packs_nothing(uncuttable: Uncuttable, store: WeightStore) -> None:
    q, k, v = weight(32, seed=1), weight(8, seed=2), weight(24, seed=3)
    counts = []
    for group in ((q, k, v), (q, k)) * 3:
        tiled(store, *group)
        counts.append(uncuttable.packs)
    assert counts == [1, 2, 2, 2, 2, 2]


def test_bytes_of_further_slabs_are_in_the_ledgers_count(uncuttable: Uncuttable, store: WeightStore) -> None:
    q, k, v = weight(32, seed=1), weight(16, seed=2), weight(48, seed=3)
    slabs = [tiled(store, q, k, v), tiled(store, q, k), tiled(store, q)]
    assert len(store.entry(q).slabs()) == 3 and len(store.entry(v).slabs()) == 1
    counted = [packed_bytes(w, store.entry(w)) for w in (q, k, v)]
    row = 32 + 4  # int8 codes and an f32 scale
    assert counted == [3 * 32 * row, 2 * 16 * row, 48 * row]
    assert sum(counted) == sum(plane.nbytes for planes in slabs for plane in planes)


@pytest.mark.parametrize("change", ["in place", "refresh", "dies", "other scheme", "release"])
def test_further_slabs_go_with_any_of_their_members(change: str, uncuttable: Uncuttable, store: WeightStore) -> None:
    q, k, v = weight(32, seed=1), weight(8, seed=2), weight(24, seed=3)
    tiled(store, q, k, v)
    gone = [weakref.ref(plane) for plane in tiled(store, q, k)]
    epoch, wanted = store.epoch, (uncuttable.wanted(q, k), uncuttable.wanted(q, k, v))
    if change == "in place":
        k.mul_(-2)
        tiled(store, k)
        wanted = (uncuttable.wanted(q, k), uncuttable.wanted(q, k, v))
    elif change == "refresh":
        store.refresh([k])
    elif change == "other scheme":
        store.planes((k,), (key("W8A16"),))
        store.keep_only(k, "W8A16")
    elif change == "release":
        store.release(k)
    else:
        k = weight(8, seed=2)
    gc.collect()
    assert not store.entry(q).further and store.epoch > epoch
    assert not any(ref() is not None for ref in gone), "the slab's memory is still held"
    assert same(tiled(store, q, k), wanted[0]) and same(tiled(store, q, k, v), wanted[1])


def test_further_slabs_are_bounded(uncuttable: Uncuttable, store: WeightStore) -> None:
    """A weight that ever new siblings join (replaced at each call, say) does not collect slabs."""
    q, others = weight(32, seed=1), [weight(8, seed=seed) for seed in range(2, 10)]
    for other in others:
        assert same(tiled(store, q, other), uncuttable.wanted(q, other))
    assert len(store.entry(q).further) == MOST_FURTHER
    assert sum(len(store.entry(other).further) for other in others) == MOST_FURTHER
    assert same(tiled(store, q, others[1]), uncuttable.wanted(q, others[1])), "one that was forgotten"


def test_a_second_layout_is_packed_from_the_first(tiles: Layout, store: WeightStore) -> None:
    w = weight(40)
    store.planes((w,), (key(),))
    store.release(w)
    assert same(store.planes((w,), (key(layout="tiles16"),)), tiles.pack(truth_of_rows(store, w), None))


def truth_of_rows(store: WeightStore, w: Parameter) -> tuple[Tensor, ...]:
    return store.planes((w,), (key(),))


def test_block_scales_of_siblings(store: WeightStore) -> None:
    q, k, v = weight(256, 200, 1), weight(128, 200, 2), weight(100, 200, 3)
    keys = (key("FP8_BLOCK"),) * 3
    assert same(store.planes((q, k, v), keys), joined(q, k, v, spec="FP8_BLOCK"))
    for sibling in (q, k, v):
        assert same(store.planes((sibling,), keys[:1]), truth(sibling, "FP8_BLOCK"))


def test_per_tensor_siblings_keep_their_own_scales(store: WeightStore) -> None:
    q, k = weight(48, seed=1), weight(16, seed=2)
    k.mul_(100)
    merged = store.planes((q, k), (key("FP8_TENSOR_DYNAMIC"),) * 2)
    assert same(merged, joined(q, k, spec="FP8_TENSOR_DYNAMIC"))
    assert merged[1][0] != merged[1][-1]


def test_dead_parameters_leave_nothing(store: WeightStore) -> None:
    w = weight(48)
    store.planes((w,), (key(),))
    forgotten: list[int] = []

    class Listener:
        def heard(self, identity: int) -> None:
            forgotten.append(identity)

    listener, epoch, identity = Listener(), store.epoch, id(w)
    store.on_forget(listener.heard)
    del w
    gc.collect()
    assert not store._entries and forgotten == [identity] and store.epoch > epoch
    del listener
    other = weight(8)
    store.planes((other,), (key(),))
    del other
    gc.collect()
    assert forgotten == [identity]


def test_an_entry_never_serves_another_parameter_at_the_same_address(store: WeightStore) -> None:
    for seed in range(30):
        w = weight(8, seed=seed)
        assert same(store.planes((w,), (key(),)), truth(w))
        del w
    gc.collect()
    assert not store._entries


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.mul_(2),
        lambda w: setattr(w, "data", w.data * 2),
        lambda w: setattr(w, "data", w.data.half()),
        lambda w: setattr(w, "data", w.data.t().contiguous().t()),
        lambda w: w.copy_(torch.ones_like(w)),
    ],
)
def test_changes_that_torch_records_are_noticed(change: Any, store: WeightStore) -> None:
    w = weight(48)
    store.planes((w,), (key(),))
    with torch.no_grad():
        change(w)
    assert same(store.planes((w,), (key(),)), truth(w.to(BF16)))
    assert len(store.entry(w).packs) == 1


def test_refresh(store: WeightStore) -> None:
    w, never = weight(48), weight(8)
    store.planes((w,), (key(),))
    w.data.mul_(2)
    assert not same(store.planes((w,), (key(),)), truth(w))
    assert store.refresh([w, never]) == 1
    assert same(store.planes((w,), (key(),)), truth(w))
    store.release(w)
    with pytest.raises(StaleWeightError, match="restore"):
        store.refresh([w])


@pytest.mark.parametrize(
    "spec", ["FP8_DYNAMIC", "FP8_TENSOR_DYNAMIC", "FP8_BLOCK", "W8A8", "W8A16", "W4A16", "W4A16_ASYM"]
)
def test_memory_while_quantizing_is_planes_and_chunks_never_a_full_f32_copy(spec: str) -> None:
    """Counted as the largest tensor that any operation makes: none is as large as the weight in f32."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else (out,):
                if isinstance(value, Tensor):
                    largest = max(largest, value.untyped_storage().nbytes())
            return out

    n, k = 6144, 4096
    w = Parameter(torch.full((n, k), 0.5, dtype=BF16), requires_grad=False)
    with Watch():
        planes = quantize(w, key(spec), "w")
    size = w.numel() * w.element_size()
    assert sum(plane.nbytes for plane in planes) < 0.52 * size
    assert w.numel() > 2 * CHUNK_ELEMENTS, "else the weight is one chunk and nothing is shown"
    assert largest <= size, f"a temporary of {largest} bytes for a bf16 weight of {size}"


def test_refusals(store: WeightStore) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        w = weight(8)
        w[3, 4] = bad
        with pytest.raises(WeightError, match=r"blocks\.3 has NaN or inf.*keep"):
            store.planes((w,), (key(),), ("blocks.3",))
        assert not store.entry(w).packs
    for dtype in (torch.int8, torch.complex64):
        whole = Parameter(torch.ones(4, 4, dtype=dtype), requires_grad=False)
        with pytest.raises(WeightError, match="only floating-point"):
            store.planes((whole,), (key(),))
    with pytest.raises(WeightError, match="meta device"):
        store.planes((Parameter(torch.empty(4, 4, device="meta")),), (key(),))
    with pytest.raises(MissingScalesError, match="calibrate"):
        store.input_scale((weight(4),), ("blocks.3",))


def test_one_bad_sibling_leaves_the_others_alone(store: WeightStore) -> None:
    q, k = weight(48, seed=1), weight(16, seed=2)
    k[0, 0] = float("nan")
    with pytest.raises(WeightError):
        store.planes((q, k), (key(), key()))
    assert same(store.planes((q,), (key(),)), truth(q))
    k[0, 0] = 1
    assert same(store.planes((q, k), (key(), key())), joined(q, k))


def test_empty_weight(store: WeightStore) -> None:
    w = Parameter(torch.empty(0, 32, dtype=BF16), requires_grad=False)
    assert store.planes((w,), (key(),))[0].shape == (0, 32)


def test_packing_under_inference_mode_and_autocast_gives_plain_planes(store: WeightStore) -> None:
    w, v = weight(48, seed=1), weight(16, seed=2)
    with torch.inference_mode(), torch.autocast("cpu", torch.float16):
        planes = store.planes((w, v), (key("FP8_DYNAMIC"),) * 2)
    assert not any(plane.is_inference() or plane.requires_grad for plane in planes)
    assert same(planes, joined(w, v, spec="FP8_DYNAMIC"))
    planes[1].mul_(1)


def test_inference_parameters_have_no_version(store: WeightStore) -> None:
    with torch.inference_mode():
        w = Parameter(torch.randn(8, 32, dtype=BF16), requires_grad=False)
    assert same(store.planes((w,), (key(),)), truth(w))
    store.refresh([w])
    assert same(store.planes((w,), (key(),)), truth(w))


def test_keep_only_forgets_other_schemes_but_not_of_a_released_weight(store: WeightStore) -> None:
    w = weight(48)
    store.planes((w,), (key(),))
    store.planes((w,), (key("W8A16"),))
    store.keep_only(w, "W8A16")
    assert [k.spec for k in store.entry(w).packs] == ["W8A16"]
    store.release(w)
    store.keep_only(w, "W8A8")
    assert [k.spec for k in store.entry(w).packs] == ["W8A16"]
    with pytest.raises(StaleWeightError, match="released as W8A16 and cannot become W8A8"):
        store.planes((w,), (key(),))


def test_threads_packing_the_same_weights_get_one_copy(store: WeightStore) -> None:
    weights = [weight(64, 256, seed) for seed in range(8)]
    results: list[list[Tensor]] = []
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        results.append([store.planes((w,), (key(),))[0] for w in weights])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(a is b for other in results[1:] for a, b in zip(results[0], other))


def test_fingerprint_tells_permutations_and_single_bits_apart() -> None:
    w = weight(16)
    base = fingerprint(w)
    assert fingerprint(Parameter(w.detach().clone())) == base
    flipped = w.detach().clone()
    flipped[3, 3] += 0.0625
    swapped = w.detach().clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert len({base, fingerprint(Parameter(flipped)), fingerprint(Parameter(swapped))}) == 3
