"""What a model looks like to the run: its distinct trainable tensors and buffers in order, and which names share them.

Every worker makes it of its own model; the server compares. Knows names and shapes, no values.
"""

import json
import math
from dataclasses import dataclass

import torch
import xxhash
from torch.nn.parallel import DistributedDataParallel

from hetero_async.errors import PeerError, SchemaError

SCHEMA_BYTES_MAX = 1024 * 1024
FLOATING, INTEGER = KINDS = ("floating", "integer")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64)
INTEGERS = (
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.int64,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One trainable tensor. Its dtype is no part of this: sites may train in different ones, all floating."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferSpec:
    """A buffer that belongs into the model's state_dict. A complex one's shape ends in a 2; truth values are integers.

    Sites may have it in different dtypes of its kind.
    """

    name: str
    shape: tuple[int, ...]
    kind: str  # one of KINDS

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_floating(self) -> bool:
        return self.kind == FLOATING


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    tensors: tuple[TensorSpec, ...]
    aliases: tuple[tuple[str, str], ...]  # a tied parameter's, or buffer's, other name → its first
    buffers: tuple[BufferSpec, ...] = ()

    @property
    def numel(self) -> int:
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def parts(self) -> tuple[TensorSpec | BufferSpec, ...]:
        return (*self.tensors, *self.buffers)

    @property
    def hash(self) -> bytes:
        return xxhash.xxh3_128_digest(self.to_bytes())

    def to_bytes(self) -> bytes:
        tensors = [[tensor.name, list(tensor.shape)] for tensor in self.tensors]
        content: dict[str, object] = {"tensors": tensors, "aliases": self.aliases}
        if self.buffers:
            content["buffers"] = [[buffer.name, list(buffer.shape), buffer.kind] for buffer in self.buffers]
        return json.dumps(content, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Schema":
        """Raises PeerError for anything that `to_bytes` would not write."""
        if len(data) > SCHEMA_BYTES_MAX:
            raise PeerError(f"a schema of {len(data)} bytes, at most {SCHEMA_BYTES_MAX} are allowed")
        try:
            content = json.loads(data)
            tensors = tuple(_spec(name, shape) for name, shape in content["tensors"])
            aliases = tuple((_text(alias), _text(first)) for alias, first in content["aliases"])
            buffers = tuple(_buffer(name, shape, kind) for name, shape, kind in content.get("buffers", ()))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise PeerError(f"not a schema: {error}") from None
        schema = cls(tensors=tensors, aliases=aliases, buffers=buffers)
        if schema.to_bytes() != data:
            raise PeerError("not a schema: it is not written in its one form")
        schema._check_names()
        return schema

    def _check_names(self) -> None:
        firsts = {part.name for part in self.parts}
        names = [*(part.name for part in self.parts), *(alias for alias, _ in self.aliases)]
        if len(set(names)) < len(names):
            raise PeerError("not a schema: it names a tensor twice")
        if not all(first in firsts for _, first in self.aliases):
            raise PeerError("not a schema: a tied name stands for a tensor that it does not have")


def _spec(name: object, shape: object) -> TensorSpec:
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
        raise ValueError(f"shape {shape!r:.60}")
    return TensorSpec(name=_text(name), shape=tuple(shape))


def _buffer(name: object, shape: object, kind: object) -> BufferSpec:
    if kind not in KINDS:
        raise ValueError(f"{kind!r:.60} is no kind of buffer")
    return BufferSpec(name=_text(name), shape=_spec(name, shape).shape, kind=str(kind))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.60} is not a name")
    value.encode()  # half a surrogate pair passes as JSON, and fails when the model is exported
    return value


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model that DistributedDataParallel or torch.compile was given: its parameters have the names they have
    everywhere."""
    inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
    return unwrapped(inner) if isinstance(inner, torch.nn.Module) else model


def schema_of(model: torch.nn.Module) -> Schema:
    """Raises SchemaError for a trainable parameter that is not floating, for a model without any, and for a buffer that
    holds no numbers which could be averaged or compared."""
    first_names: dict[int, str] = {}
    tensors: list[TensorSpec] = []
    aliases: list[tuple[str, str]] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        if id(parameter) in first_names:
            aliases.append((name, first_names[id(parameter)]))
            continue
        if torch.nn.parameter.is_lazy(parameter):
            raise SchemaError(f"{name} has no shape yet: run one batch through the model before joining")
        if not parameter.dtype.is_floating_point:
            raise SchemaError(f"{name} is {parameter.dtype}: only floating parameters can be trained together")
        first_names[id(parameter)] = name
        tensors.append(TensorSpec(name=name, shape=tuple(parameter.shape)))
    if not tensors:
        raise SchemaError("the model has no parameter that requires a gradient")
    buffers = _buffers_of(model, aliases)
    return Schema(tensors=tuple(tensors), aliases=tuple(aliases), buffers=buffers)


def _buffers_of(model: torch.nn.Module, aliases: list[tuple[str, str]]) -> tuple[BufferSpec, ...]:
    """Those that are kept with the model; names that share one are put to the aliases."""
    kept = model.state_dict(keep_vars=True).keys()
    first_names: dict[int, str] = {}
    buffers: list[BufferSpec] = []
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name not in kept:
            continue
        if id(buffer) in first_names:
            aliases.append((name, first_names[id(buffer)]))
            continue
        first_names[id(buffer)] = name
        buffers.append(_buffer_spec(name, buffer))
    return tuple(buffers)


def _buffer_spec(name: str, buffer: torch.Tensor) -> BufferSpec:
    if torch.nn.parameter.is_lazy(buffer):
        raise SchemaError(f"{name} has no shape yet: run one batch through the model before joining")
    if buffer.layout != torch.strided or buffer.dtype not in (*FLOATS, *INTEGERS):
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in (*FLOATS, *INTEGERS))
        raise SchemaError(
            f"buffer {name} is {buffer.dtype}, {buffer.layout}: only dense buffers can be shared, of {known}; "
            "register it with persistent=False, and every site keeps its own"
        )
    shape = (*buffer.shape, 2) if buffer.is_complex() else tuple(buffer.shape)
    return BufferSpec(name=name, shape=shape, kind=FLOATING if buffer.dtype in FLOATS else INTEGER)


def difference(expected: Schema, found: Schema, whose: str = "the run's") -> str:
    """One line that names the first tensor that differs, "" when none does."""
    wanted, has = _described(expected), _described(found)
    for name, shape in wanted.items():
        if name not in has:
            return f"the model differs from {whose}: {name} {shape} is expected and is missing"
        if has[name] != shape:
            return f"the model differs from {whose}: {name}: expected {shape}, found {has[name]}"
    for name, shape in has.items():
        if name not in wanted:
            return f"the model differs from {whose}: {name} {shape} is not expected"
    if expected != found:
        return f"the model differs from {whose}: {_other_order_or_tie(expected, found)}"
    return ""


def _described(schema: Schema) -> dict[str, str]:
    tensors = {f"tensor {tensor.name}": f"{list(tensor.shape)}" for tensor in schema.tensors}
    return tensors | {f"buffer {buffer.name}": f"{list(buffer.shape)} {buffer.kind}" for buffer in schema.buffers}


def _other_order_or_tie(expected: Schema, found: Schema) -> str:
    for wanted, has in zip(expected.parts, found.parts, strict=True):
        if wanted.name != has.name:
            return f"its tensors have another order: expected {wanted.name}, found {has.name} in its place"
    wanted_ties, ties = dict(expected.aliases), dict(found.aliases)
    for name in [*wanted_ties, *ties]:
        if wanted_ties.get(name) != ties.get(name):
            ways = [
                "absent" if first is None else f"tied to {first}" for first in (wanted_ties.get(name), ties.get(name))
            ]
            return f"tensor {name}: expected {ways[0]}, found {ways[1]}"
    wanted_name, name = next((one, other) for one, other in zip(wanted_ties, ties, strict=True) if one != other)
    return f"its tied names have another order: expected {wanted_name}, found {name} in its place"
