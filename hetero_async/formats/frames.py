"""Messages and records as bytes: msgpack of `[type name, {field: value}]`, checked against the dataclass.

Used for what travels (link), what is logged (segment) and what lies in the outbox. Whatever the bytes are, `decode`
returns a value of a known type within its bounds or raises PeerError, in bounded memory. Tensors never come through
here: they ride beside the header as opaque payload.
"""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import TypeAlias, TypeVar, get_type_hints

import msgpack  # type: ignore[import-untyped]

from hetero_async.core.heartbeat import Usage
from hetero_async.core.messages import MESSAGE_TYPES, Message
from hetero_async.core.probe import Digest
from hetero_async.core.publish_note import PublishNote
from hetero_async.core.records import RECORD_TYPES, Range, Record, RunSettings
from hetero_async.errors import PeerError

# A control header must fit beside others in a socket's small queue. A million empty maps would fill 70 times their
# size in memory, so the lengths inside are limited as well.
HEADER_BYTES_MAX = 64 * 1024
# Records name every worker of the run (`Published.merged`); they come from our own log, behind a checksum.
RECORD_BYTES_MAX = 1024 * 1024
ARRAY_LENGTH_MAX = 4096
MAP_LENGTH_MAX = 64
TEXT_LENGTH_MAX = 256
REASON_LENGTH_MAX = 1024  # for people to read
BYTES_LENGTH_MAX = 64  # hashes and keys
INTEGER_STOP = 2**63
UTF8_BYTES_PER_CHARACTER_MAX = 4

Value: TypeAlias = Message | Record | PublishNote
Check: TypeAlias = Callable[[object], object]
First = TypeVar("First")
Second = TypeVar("Second")


def encode(value: Value, limit: int = HEADER_BYTES_MAX) -> bytes:
    """Raises ValueError for a value that `decode` would refuse or return changed."""
    try:
        packed: bytes = msgpack.packb([type(value).__name__, _fields(value)], default=_fields)
        decoded = decode(packed, limit)
    except (PeerError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"cannot be written as a header: {error}") from error
    if decoded != value:
        raise ValueError(f"would be read back differently: {value!r:.200}")
    return packed


def decode(data: bytes, limit: int = HEADER_BYTES_MAX) -> Value:
    """Raises PeerError for anything that is not exactly one value of a known type."""
    if len(data) > limit:
        raise PeerError(f"a header of {len(data)} bytes, at most {limit} are allowed")
    match _unpack(data):
        case [str(name), values]:
            if name not in TYPES:
                raise PeerError(f"unknown message {_shown(name)}")
            return _build(TYPES[name], values)  # type: ignore[return-value]
        case other:
            raise PeerError(f"expected [type, fields], got {_shown(other)}")


def _fields(value: object) -> dict[str, object]:
    """Dataclass → map, one level; msgpack asks again for what lies within."""
    return {field.name: getattr(value, field.name) for field in fields(value)}  # type: ignore[arg-type]


def _unpack(data: bytes) -> object:
    try:
        return msgpack.unpackb(
            data,
            object_pairs_hook=_without_duplicates,
            max_array_len=ARRAY_LENGTH_MAX,
            max_map_len=MAP_LENGTH_MAX,
            max_str_len=UTF8_BYTES_PER_CHARACTER_MAX * REASON_LENGTH_MAX,
            max_bin_len=BYTES_LENGTH_MAX,
            max_ext_len=0,
        )
    # The library's own words may quote hostile bytes; its exceptions' names say enough.
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise PeerError(f"not msgpack within its limits ({type(error).__name__})") from error


def _without_duplicates(pairs: list[tuple[object, object]]) -> dict[object, object]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise PeerError("a map names the same key twice")
    return unique


def _build(kind: type, values: object) -> object:
    checks = CHECKS_OF[kind]
    if not isinstance(values, dict) or values.keys() != checks.keys():
        found = ", ".join(_shown(key) for key in values) if isinstance(values, dict) else _shown(values)
        raise PeerError(f"{kind.__name__} has the fields {', '.join(checks) or 'none'}; got {found or 'none'}")
    try:
        return kind(**{name: check(values[name]) for name, check in checks.items()})
    except PeerError as error:
        raise PeerError(f"{kind.__name__}: {error}") from error


def _shown(value: object) -> str:
    """Scalars as they are, the rest by type: the repr of hostile nesting costs more than its bytes."""
    return f"{value!r:.80}" if isinstance(value, int | float | str | bytes) else type(value).__name__


# --- one check a field type: what msgpack gave → the field's value, or PeerError ---


def _integer(value: object) -> int:
    if type(value) is not int or not 0 <= value < INTEGER_STOP:
        raise PeerError(f"expected a whole number from 0 to 2**63 - 1, got {_shown(value)}")
    return value


def _number(value: object) -> float:
    if type(value) is not float or not math.isfinite(value):
        raise PeerError(f"expected a finite float, got {_shown(value)}")
    return value


def _flag(value: object) -> bool:
    if type(value) is not bool:
        raise PeerError(f"expected true or false, got {_shown(value)}")
    return value


def _binary(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise PeerError(f"expected bytes, got {_shown(value)}")
    return value


def _text_up_to(length_max: int) -> Callable[[object], str]:
    def check(value: object) -> str:
        if not isinstance(value, str) or len(value) > length_max:
            raise PeerError(f"expected text of at most {length_max} characters, got {_shown(value)}")
        return value

    return check


def _pair_of(
    first: Callable[[object], First], second: Callable[[object], Second]
) -> Callable[[object], tuple[First, Second]]:
    def check(value: object) -> tuple[First, Second]:
        match value:
            case [left, right]:
                return first(left), second(right)
            case other:
                raise PeerError(f"expected a pair, got {_shown(other)}")

    return check


def _many(item: Callable[[object], First]) -> Callable[[object], tuple[First, ...]]:
    def check(values: object) -> tuple[First, ...]:
        if not isinstance(values, list):
            raise PeerError(f"expected an array, got {_shown(values)}")
        return tuple(item(value) for value in values)

    return check


def _ranges(value: object) -> tuple[Range, ...]:
    ranges = _many(_pair_of(_integer, _integer))(value)
    end = 0
    for start, stop in ranges:
        if not end <= start < stop:
            raise PeerError(
                f"range {start}..{stop} after position {end}: ranges ascend, are not empty and do not overlap"
            )
        end = stop
    return ranges


CHECKS: dict[object, Check] = {
    int: _integer,
    float: _number,
    bool: _flag,
    bytes: _binary,
    str: _text_up_to(TEXT_LENGTH_MAX),
    tuple[Range, ...]: _ranges,
    tuple[int, ...]: _many(_integer),
    tuple[float, ...]: _many(_number),
    tuple[str, ...]: _many(_text_up_to(TEXT_LENGTH_MAX)),
    tuple[tuple[str, int], ...]: _many(_pair_of(_text_up_to(TEXT_LENGTH_MAX), _integer)),
    tuple[tuple[str, float], ...]: _many(_pair_of(_text_up_to(TEXT_LENGTH_MAX), _number)),
    RunSettings: lambda values: _build(RunSettings, values),
    Usage: lambda values: _build(Usage, values),
    Digest: lambda values: _build(Digest, values),
}


def _checks_of(kind: type) -> dict[str, Check]:
    """Resolved once, at import: a field of a type that has no check fails there and not on the wire."""
    checks = {name: CHECKS[hint] for name, hint in get_type_hints(kind).items()}
    if "reason" in checks:
        checks["reason"] = _text_up_to(REASON_LENGTH_MAX)
    return checks


TYPES: dict[str, type] = {kind.__name__: kind for kind in (*MESSAGE_TYPES, *RECORD_TYPES)}
CHECKS_OF: dict[type, dict[str, Check]] = {
    kind: _checks_of(kind) for kind in (*TYPES.values(), RunSettings, Usage, Digest)
}
assert len(TYPES) == len(MESSAGE_TYPES) + len(RECORD_TYPES), "two types share a name"
