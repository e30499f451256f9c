"""What a model looks like to the run: its distinct trainable tensors in order, and which names share them.

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


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One trainable tensor. Its dtype is no part of this: sites may train in different ones, all floating."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    tensors: tuple[TensorSpec, ...]
    aliases: tuple[tuple[str, str], ...]  # a tied parameter's other name → its first

    @property
    def numel(self) -> int:
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def hash(self) -> bytes:
        return xxhash.xxh3_128_digest(self.to_bytes())

    def to_bytes(self) -> bytes:
        tensors = [[tensor.name, list(tensor.shape)] for tensor in self.tensors]
        return json.dumps({"tensors": tensors, "aliases": self.aliases}, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Schema":
        """Raises PeerError for anything that `to_bytes` would not write."""
        if len(data) > SCHEMA_BYTES_MAX:
            raise PeerError(f"a schema of {len(data)} bytes, at most {SCHEMA_BYTES_MAX} are allowed")
        try:
            content = json.loads(data)
            tensors = tuple(_spec(name, shape) for name, shape in content["tensors"])
            aliases = tuple((_text(alias), _text(first)) for alias, first in content["aliases"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise PeerError(f"not a schema: {error}") from None
        schema = cls(tensors=tensors, aliases=aliases)
        if schema.to_bytes() != data:
            raise PeerError("not a schema: it is not written in its one form")
        schema._check_names()
        return schema

    def _check_names(self) -> None:
        firsts = {tensor.name for tensor in self.tensors}
        names = [*(tensor.name for tensor in self.tensors), *(alias for alias, _ in self.aliases)]
        if len(set(names)) < len(names):
            raise PeerError("not a schema: it names a tensor twice")
        if not all(first in firsts for _, first in self.aliases):
            raise PeerError("not a schema: a tied name stands for a tensor that it does not have")


def _spec(name: object, shape: object) -> TensorSpec:
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
        raise ValueError(f"shape {shape!r:.60}")
    return TensorSpec(name=_text(name), shape=tuple(shape))


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
    """Raises SchemaError for a trainable parameter that is not floating, and for a model without any."""
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
    return Schema(tensors=tuple(tensors), aliases=tuple(aliases))


def difference(expected: Schema, found: Schema, whose: str = "the run's") -> str:
    """One line that names the first tensor that differs, "" when none does."""
    wanted = {tensor.name: tensor.shape for tensor in expected.tensors}
    has = {tensor.name: tensor.shape for tensor in found.tensors}
    for name, shape in wanted.items():
        if name not in has:
            return f"the model differs from {whose}: tensor {name} {list(shape)} is expected and is missing"
        if has[name] != shape:
            return f"the model differs from {whose}: tensor {name}: expected {list(shape)}, found {list(has[name])}"
    for name, shape in has.items():
        if name not in wanted:
            return f"the model differs from {whose}: tensor {name} {list(shape)} is not expected"
    if expected != found:
        return f"the model differs from {whose}: {_other_order_or_tie(expected, found)}"
    return ""


def _other_order_or_tie(expected: Schema, found: Schema) -> str:
    for wanted, has in zip(expected.tensors, found.tensors, strict=True):
        if wanted != has:
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
