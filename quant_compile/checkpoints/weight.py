"""A module's tensors on their way to planes: checks, and what every format's reader builds its answer of.

``Module`` hands a reader the tensors of one linear, after checking dtype and shape. It may be *dry*: tensors are then on the meta device,
so that a whole checkpoint is checked, and its schemes are known, before a byte of it is read. A reader answers with a
``Quantized`` (planes in row form, see ``lowering/schemes``) or, where no scheme of this package takes the form, with a
``Dense`` and the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import NoReturn

import torch
from torch import Tensor

from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.checkpoints.files import Files, Part, TensorInfo
from quant_compile.ir.errors import SchemeError
from quant_compile.ir.family import Planes, PlaneSpec, family_of
from quant_compile.ir.numerics import dtype_name
from quant_compile.ir.scheme import QuantArgs, Scheme

AGAIN = "Fix: download or write the checkpoint again."
REAL = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Quantized:
    """A weight as planes.

    Attributes:
        scheme: of the planes.
        planes: in row form.
        n: rows.
        k: columns.
        input_scale: [1] f32, of a static scheme.
        gather: [k] i64: planes belong to the input in this order (``desc_act``); None: as it comes.
        factor: [k]: the input is multiplied by it first (``pre_quant_scale``); None: not.
        notes: what is not as the checkpoint has it.
    """

    scheme: Scheme
    planes: Planes
    n: int
    k: int
    input_scale: Tensor | None = None
    gather: Tensor | None = None
    factor: Tensor | None = None
    notes: tuple[str, ...] = ()

    def dequantized(self) -> Tensor:
        """The weight [n, k] in f32, columns in the order of the checkpoint's input."""
        values = family_of(self.scheme).dequantize_weight(self.planes, self.scheme, self.k)
        if self.gather is not None:
            values = torch.empty_like(values).index_copy_(1, self.gather, values)
        return values


@dataclass(frozen=True)
class Dense:
    """A weight in 16 or 32 bits.

    Attributes:
        values: [n, k] of the model's dtype.
        reason: why it is not planes.
        factor: as in ``Quantized``.
    """

    values: Tensor
    reason: str
    factor: Tensor | None = None

    def dequantized(self) -> Tensor:
        """The weight [n, k] in f32."""
        return self.values.float()


Read = Quantized | Dense


@dataclass(frozen=True)
class Axis:
    """What a dimension of a stored tensor goes with.

    Attributes:
        of: ``n``, the weight's rows, or ``k``, its columns.
        unit: rows or columns that an item stands for: 8 where a word packs eight, a group's size for its scale; None: all of them.
    """

    of: str
    unit: Fraction | int | None = 1


N, K = Axis("n"), Axis("k")
Axes = Mapping[str, tuple[Axis, ...]]
"""Of each suffix the dimensions of its tensor; what a suffix does not list goes with nothing, and is every rank's."""


def packed_along(of: str, bits: int) -> Axis:
    """A dimension of 32-bit words, in which codes of so many bits lie one after the other."""
    return Axis(of, Fraction(32, bits))


Refuses = Callable[[Sequence[float]], bool]
MOST_QUESTIONS = 256
"""That wait for each other; those about scales keep them in memory."""


@dataclass
class Questions:
    """What is asked of values on a GPU, answered together: each answer alone would wait until the device has nothing left to do."""

    _numbers: list[Tensor] = field(default_factory=list[Tensor])
    _asked: list[tuple[int, Refuses, Callable[[], NoReturn]]] = field(default_factory=list)

    def ask(self, numbers: Sequence[Tensor], refuses: Refuses, fail: Callable[[], NoReturn]) -> None:
        """Let ``fail`` be called, now or at ``answer``, where ``refuses`` says so of the numbers, each one value.

        Raises:
            CheckpointError: by ``fail``; of values on a CPU at once.
        """
        if not self.waits(numbers):
            if refuses([float(number) for number in numbers]):
                fail()
            return
        self._numbers.extend(number.reshape(()).float() for number in numbers)
        self._asked.append((len(numbers), refuses, fail))
        if len(self._asked) >= MOST_QUESTIONS:
            self.answer()

    @staticmethod
    def waits(numbers: Sequence[Tensor]) -> bool:
        """Whether looking at numbers would wait for a device."""
        return any(number.device.type != "cpu" for number in numbers)

    def answer(self) -> None:
        """Answer all that was asked.

        Raises:
            CheckpointError: by the first ``fail`` whose numbers are refused.
        """
        asked, numbers = self._asked, self._numbers
        self._asked, self._numbers = [], []
        if not asked:
            return
        found, at = torch.stack(numbers).tolist(), 0
        for count, refuses, fail in asked:
            if refuses(found[at : at + count]):
                fail()
            at += count


@dataclass(frozen=True)
class Module:
    """The tensors of one linear weight in a checkpoint.

    Attributes:
        name: of the module, as the checkpoint spells it.
        files: that hold its tensors.
        tensors: suffix -> tensor: ``qweight`` -> ``model.layers.0.mlp.up_proj.qweight``.
        n: rows that the model's weight has.
        k: columns.
        dtype: of the model.
        dry: tensors are read on the meta device, and their values are not looked at.
        device: where the planes are made.
        copy: planes must not share memory with the tensors.
        whole: rows and columns of the weight that this is a rank's part of; None: it is the weight.
        column: the first of the weight's columns that the part has.
        questions: where checks of values go that may wait; None: none may.
    """

    name: str
    files: Files
    tensors: Mapping[str, Part]
    n: int
    k: int
    dtype: torch.dtype
    dry: bool = False
    device: str | torch.device = "cpu"
    copy: bool = True
    whole: tuple[int, int] | None = None
    column: int = 0
    questions: Questions | None = None

    def has(self, suffix: str) -> bool:
        """Whether the module has this tensor."""
        return suffix in self.tensors

    def info(self, suffix: str) -> TensorInfo:
        """What the header says of a tensor.

        Raises:
            CheckpointError: the module has no such tensor.
        """
        if suffix not in self.tensors:
            have = ", ".join(sorted(self.tensors))
            raise CheckpointError(f"{self.files.folder}: {self.name} has {have} and no {suffix}.\n{AGAIN}")
        part = self.tensors[suffix]
        return part.info(self.files.tensors[part.name])

    def tensor(self, suffix: str, dtypes: Sequence[torch.dtype], *shapes: tuple[int, ...], why: str = "") -> Tensor:
        """A tensor on the module's device.

        Args:
            dtypes: that it may have.
            shapes: that it may have; none: any.
            why: ends the message about a wrong shape.

        Raises:
            CheckpointError: it is missing, or has another dtype or shape.
        """
        info = self.info(suffix)
        if info.dtype not in dtypes:
            wanted = " or ".join(dtype_name(dtype) for dtype in dtypes)
            _fail(info, f"is {dtype_name(info.dtype)}, must be {wanted}")
        if shapes and info.shape not in shapes:
            wanted = " or ".join(_shape(shape) for shape in shapes)
            _fail(info, f"has shape {_shape(info.shape)}, must be {wanted} for a weight of {self.n}x{self.k}{why}")
        if self.dry:
            return torch.empty(info.shape, dtype=info.dtype, device="meta")
        # A copy on a CPU too: planes must not depend on a file that may change.
        return self.files.load(self.tensors[suffix], self.device, copy=self.copy)

    def scale(self, suffix: str, dtypes: Sequence[torch.dtype], *shapes: tuple[int, ...]) -> Tensor:
        """A tensor of scales: finite and not zero.

        Raises:
            CheckpointError: as ``tensor``, or a scale of 0, NaN or inf.
        """
        found = self.tensor(suffix, dtypes, *shapes)
        self.check_scale(found, self.info(suffix))
        return found

    def check_scale(self, found: Tensor, info: TensorInfo) -> None:
        """Refuse scales of 0, NaN or inf.

        Raises:
            CheckpointError: there is one; where checks may wait, when they are answered.
        """
        if self.dry or found.numel() == 0:
            return

        def fail() -> NoReturn:
            values = found.float()
            at = torch.nonzero(~torch.isfinite(values) | (values == 0))[0].tolist()
            _fail(info, f"holds a scale of {float(values[tuple(at)])} at {at}")

        self.ask(torch.aminmax(found.float().abs()), lambda found: not (found[0] > 0 and found[1] < math.inf), fail)

    def ask(self, numbers: Sequence[Tensor], refuses: Refuses, fail: Callable[[], NoReturn]) -> None:
        """As ``Questions.ask``, of which the answers are asked for at once where nothing may wait.

        Raises:
            CheckpointError: by ``fail``.
        """
        questions = self.questions or Questions()
        questions.ask(numbers, refuses, fail)
        if self.questions is None:
            questions.answer()

    def one(self, suffix: str) -> Tensor:
        """A single positive number, as [1] f32.

        Raises:
            CheckpointError: it is several, or 0, NaN or inf.
        """
        return self.scale(suffix, REAL, (), (1,), (1, 1)).reshape(1).float()

    def factor(self, suffix: str) -> Tensor | None:
        """What the input is multiplied by, [k] of the model's dtype, where the module has that."""
        if not self.has(suffix):
            return None
        return self.scale(suffix, REAL, (self.k,), (1, self.k)).reshape(self.k).to(self.dtype)

    def groups(self, group: int | None) -> int:
        """How many groups a row has.

        Raises:
            CheckpointError: the group size does not divide the row.
        """
        if group is None or group >= self.k:
            return 1
        if self.k % group:
            where = f"{self.files.folder}: {self.name}"
            raise CheckpointError(
                f"{where}: groups of {group} do not divide its {self.k} inputs.\nFix: quantize with a group size that does."
            )
        return self.k // group


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "one number"


def _fail(info: TensorInfo, what: str) -> NoReturn:
    raise CheckpointError(f"{info.where} {what}.\n{AGAIN}")


# --- integers ---


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """i32 [r, w] of one little-endian bit stream a row -> [r, count] u8: field j is bits ``bits * j`` and on of its row."""
    data = words.reshape(-1).contiguous().view(torch.uint8).reshape(words.shape[0], -1)  # [r, 4 w]
    if bits == 8:
        return data[:, :count]
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        return ((data.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1)[:, :count]
    # 32 fields at a time, which are whole words; a field lies in one byte or in two.
    data = torch.nn.functional.pad(data, (0, -data.shape[1] % (4 * bits)))
    spans = data.reshape(data.shape[0], -1, 4 * bits).to(torch.int32)
    places = torch.arange(32, device=words.device) * bits
    low, shift = places // 8, places % 8
    high = (low + 1).clamp_max(4 * bits - 1)
    pairs = spans[..., low] | (spans[..., high] << 8)
    return ((pairs >> shift) & (2**bits - 1)).to(torch.uint8).flatten(1)[:, :count]


def words(data: Tensor) -> Tensor:
    """u8 [r, c] -> i32 [r, ceil(c / 4)], little end first; zeros past c."""
    rows, columns = data.shape[0], -(-data.shape[1] // 4)
    flat = torch.nn.functional.pad(data, (0, 4 * columns - data.shape[1])).reshape(-1)
    return flat.contiguous().view(torch.int32).reshape(rows, columns)


@dataclass(frozen=True)
class Integers:
    """An integer weight as all its formats mean it: scale * (code - zero).

    Attributes:
        codes: [n, k] u8, 0 to 2**bits - 1.
        scale: [n, g].
        zero: [n, g], whole numbers; None for 2**(bits - 1).
        bits: of a code.
        group: columns that share a scale; None: all.
        symmetric: the config says so; zero points that are all in the middle then are none.
        stored: dtype of the scales in the file, where they have been converted; None: the scales' own.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group: int | None
    symmetric: bool = True
    stored: torch.dtype | None = None

    @property
    def middle(self) -> int:
        """The zero point of symmetric codes."""
        return 1 << (self.bits - 1)

    def values(self) -> Tensor:
        """f32 [n, k]."""
        k = self.codes.shape[1]
        group = self.group or max(k, 1)
        scale = self.scale.float().repeat_interleave(group, 1)[:, :k]
        if self.zero is None:
            return (self.codes.float() - self.middle) * scale
        return (self.codes.float() - self.zero.float().repeat_interleave(group, 1)[:, :k]) * scale


def integer_weight(module: Module, made: Integers, inputs: QuantArgs | None, input_scale: Tensor | None = None) -> Read:
    """Planes of an integer weight: 4 bits, and 2 and 3 bits as the same values in 4; 8 bits with a scale per row.

    Whatever else is dequantized into the model's dtype, with the reason.
    """
    if made.group is not None and made.group >= module.k and (made.bits == 8 or not _legal(made.group)):
        made = replace(made, group=None)
    if made.symmetric and made.zero is not None and (made.zero.is_meta or bool((made.zero == made.middle).all())):
        made = replace(made, zero=None)
    if made.bits == 8:
        return _eight_bits(module, made, inputs, input_scale)
    if made.bits > 4:
        return dense(module, made.values(), f"no scheme has {made.bits}-bit integers")
    if made.zero is not None and not made.zero.is_meta and bool((made.zero > 15).any() | (made.zero < 0).any()):
        return dense(module, made.values(), "a zero point does not fit 4 bits")
    if made.group is not None and not _legal(made.group):
        return dense(module, made.values(), f"groups of {made.group} are no power of two from 16 up")
    args = QuantArgs(4, "int", "group" if made.group else "channel", made.zero is None, group_size=made.group)
    notes = (f"{made.bits}-bit codes are stored in 4 bits, with the same values",) if made.bits < 4 else ()
    if made.zero is None:
        codes, zero = made.codes + (8 - made.middle), ()
    else:
        codes, zero = made.codes, (nibbles(made.zero.to(torch.uint8)),)
    scale = made.scale.to(module.dtype)
    narrower = not _holds(module.dtype, made.stored or made.scale.dtype)
    if narrower and not scale.is_meta and not bool((torch.isfinite(scale) & (scale != 0)).all()):
        return dense(module, made.values(), f"its scales do not fit {dtype_name(module.dtype)}")
    planes = (nibbles(codes), scale.contiguous(), *zero)
    return with_inputs(module, args, planes, made.values, inputs, input_scale, notes)


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether every finite number but 0 of the other dtype is one here."""
    own, of = torch.finfo(dtype), torch.finfo(other)
    return own.max >= of.max and own.smallest_normal * own.eps <= of.smallest_normal * of.eps


def _legal(group: int) -> bool:
    """Whether 4-bit schemes have such groups."""
    return group >= 16 and not group & (group - 1)


def _eight_bits(module: Module, made: Integers, inputs: QuantArgs | None, input_scale: Tensor | None) -> Read:
    if made.zero is not None:
        return dense(module, made.values(), "no scheme has 8-bit integers with zero points")
    if made.group is not None:
        return dense(module, made.values(), "no scheme has 8-bit integers in groups")
    codes = (made.codes ^ 0x80).view(torch.int8)
    planes = (codes.contiguous(), made.scale.float().reshape(module.n, 1).contiguous())
    return with_inputs(module, QuantArgs(8, "int", "channel"), planes, made.values, inputs, input_scale)


def nibbles(codes: Tensor) -> Tensor:
    """[n, c] of 0..15 -> [n, ceil(c / 2)] u8, even column in the low nibble, as the planes of 4-bit integers are."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


# --- floats ---


def fp8_weight(
    module: Module, codes: Tensor, scale: Tensor, inputs: QuantArgs | None, input_scale: Tensor | None = None
) -> Read:
    """Planes of e4m3 codes [n, k] with a scale of the tensor ([] or [1]) or of each row ([n] or [n, 1])."""
    scale = scale.float().reshape(-1, 1)
    strategy = "tensor" if scale.numel() == 1 and module.n != 1 else "channel"
    planes = (codes.contiguous(), scale.expand(module.n, 1).contiguous())
    args = QuantArgs(8, "float", strategy, format=_format(codes))
    return with_inputs(module, args, planes, lambda: codes.float() * scale, inputs, input_scale)


def fp8_blocks(module: Module, codes: Tensor, scale: Tensor, block: tuple[int, int], inputs: QuantArgs | None) -> Read:
    """Planes of e4m3 codes [n, k] with a scale for each block [ceil(n / bn), ceil(k / bk)]."""
    args = QuantArgs(8, "float", "block", block_structure=block, format=_format(codes))
    planes = (codes.contiguous(), scale.float().contiguous())

    def values() -> Tensor:
        wide = scale.float().repeat_interleave(block[0], 0)[: module.n].repeat_interleave(block[1], 1)
        return codes.float() * wide[:, : module.k]

    return with_inputs(module, args, planes, values, inputs)


def _format(codes: Tensor) -> str:
    return "e5m2" if codes.dtype == torch.float8_e5m2 else "e4m3"


def nvfp4_weight(
    module: Module, packed: Tensor, scale: Tensor, whole: Tensor, inputs: QuantArgs | None, input_scale: Tensor | None
) -> Read:
    """Planes of NVFP4: packed u8 [n, k/2], even k in the low nibble, e4m3 scales [n, k/16] and one f32 that multiplies."""
    planes = (packed.contiguous(), scale.contiguous(), whole.float().reshape(1, 1).expand(module.n, 1).contiguous())
    args = QuantArgs(4, "float", "tensor_group", group_size=16)
    return _floats(module, args, planes, inputs, input_scale)


def mxfp4_weight(module: Module, packed: Tensor, scale: Tensor, inputs: QuantArgs | None) -> Read:
    """Planes of MXFP4: packed u8 [n, k/2], even k in the low nibble, u8 exponents [n, k/32]."""
    planes = (packed.contiguous(), scale.view(torch.uint8).contiguous())
    return _floats(module, QuantArgs(4, "float", "group", group_size=32), planes, inputs, None)


def _floats(
    module: Module, args: QuantArgs, planes: Planes, inputs: QuantArgs | None, input_scale: Tensor | None
) -> Read:
    alone = Scheme(args)

    def values() -> Tensor:
        return family_of(alone).dequantize_weight(planes, alone, module.k)

    return with_inputs(module, args, planes, values, inputs, input_scale)


def check_e8m0(module: Module, suffix: str, scale: Tensor) -> None:
    """Refuse an exponent of 255, which stands for NaN.

    Raises:
        CheckpointError: there is one.
    """
    if not module.dry and scale.numel():
        most = scale.view(torch.uint8).max()
        module.ask(
            (most,), lambda found: found[0] == 255, lambda: _fail(module.info(suffix), "holds a scale of NaN (255)")
        )


def powers(exponents: Tensor) -> Tensor:
    """What e8m0 exponents stand for: f32 2**(e - 127)."""
    whole = exponents.view(torch.uint8).to(torch.int32)
    # Ones of their shape: of a single one torch warns that it resizes its result.
    return torch.ldexp(torch.ones_like(whole, dtype=torch.float32), whole - 127)


def check_fp8(module: Module, suffix: str, codes: Tensor) -> Tensor:
    """Refuse NaN and inf among FP8 codes.

    Raises:
        CheckpointError: there is one.
    """
    if not module.dry and codes.numel():
        worst = 0x7F if codes.dtype == torch.float8_e4m3fn else 0x7C
        most = (codes.view(torch.uint8) & 0x7F).max()
        module.ask((most,), lambda found: found[0] >= worst, lambda: _fail(module.info(suffix), "holds NaN or inf"))
    return codes


def packed_floats(module: Module, suffix: str) -> Tensor:
    """The u8 [n, k/2] of a module's e2m1 codes.

    Raises:
        CheckpointError: another dtype or shape.
    """
    return module.tensor(suffix, (torch.uint8,), (module.n, module.k // 2))


# --- the end of every reader ---


def dense(module: Module, values: Tensor, reason: str, factor: Tensor | None = None) -> Dense:
    """A weight in the model's dtype."""
    return Dense(values.to(module.dtype), f"{reason}: its values are kept in {dtype_name(module.dtype)}", factor)


def with_inputs(
    module: Module,
    weights: QuantArgs,
    planes: Planes,
    values: Callable[[], Tensor],
    inputs: QuantArgs | None,
    input_scale: Tensor | None = None,
    notes: tuple[str, ...] = (),
) -> Read:
    """The planes under the scheme of these weights and inputs.

    Inputs stay in 16 bits, with a note, where no scheme has both; where none has such weights under 16-bit inputs either, the
    weight becomes its ``values``, with the reason.
    """
    why = ""
    for wanted in dict.fromkeys((inputs, None)):
        scheme = Scheme(weights, wanted)
        if scheme.static and input_scale is None:
            why = f"the checkpoint has no scale for inputs in {scheme.spec}"
            continue
        try:
            family = family_of(scheme)
        except SchemeError as error:
            why = why or str(error).splitlines()[0]
            continue
        _check_planes(module, family.weight_planes(scheme, module.n, module.k, module.dtype), planes)
        more = (f"its input stays in 16 bits: {why}",) if wanted is not inputs else ()
        return Quantized(
            scheme, planes, module.n, module.k, input_scale if scheme.static else None, notes=(*notes, *more)
        )
    return dense(module, values(), why)


def _check_planes(module: Module, specs: Sequence[PlaneSpec], planes: Planes) -> None:
    """A reader's planes are those that the family declares; anything else is a defect of the reader."""
    made = [(tuple(plane.shape), plane.dtype) for plane in planes]
    wanted = [(spec.shape, spec.dtype) for spec in specs]
    if made != wanted:
        where = f"{module.files.folder}: {module.name}"
        raise CheckpointError(
            f"{where}: its planes would be {made}, not {wanted}.\nFix: report this defect of the reader."
        )
