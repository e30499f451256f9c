"""A checkpoint's two files as bytes: `model.safetensors` (the arrays) and `manifest.json` (all the rest).

shell/store.py writes and reads them. The manifest vouches for both: it carries its own checksum and the array file's.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import xxhash

from hetero_async.arrays import Array
from hetero_async.errors import ConfigError, LogCorrupt

FORMAT_VERSION = 7
# The safetensors format: the length of its head, the head in JSON filled up with blanks, the arrays.
HEAD_LENGTH = struct.Struct("<Q")
HEAD_ALIGNMENT_BYTES = 8
DTYPES = {"float64": "F64", "int64": "I64", "float32": "F32", "uint8": "U8"}
FIELD_TYPES: dict[str, type] = {
    "run": str,
    "lsn": int,
    "term": int,
    "chain": str,
    "state": dict,
    "state_hash": str,
    "model_hash": str,
    "file_hash": str,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    run: str
    lsn: int
    term: int
    chain: bytes  # of the log, after that record
    state: dict[str, object]  # JSON-able
    state_hash: bytes
    model_hash: bytes
    file_hash: bytes  # xxh3_128 of model.safetensors


def encode_arrays(arrays: Mapping[str, Array]) -> Iterator[bytes | memoryview]:
    """The safetensors file in pieces: what it says of the arrays, then each one's own memory, which is not copied.

    `safetensors` itself makes one piece of it, as large as all arrays together.
    """
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))  # as `safetensors` does
    described, end = {}, 0
    for name, array in ordered:
        start, end = end, end + array.nbytes
        described[name] = {"dtype": DTYPES[array.dtype.name], "shape": array.shape, "data_offsets": (start, end)}
    head = json.dumps(described, separators=(",", ":")).encode()
    head += b" " * (-len(head) % HEAD_ALIGNMENT_BYTES)
    yield HEAD_LENGTH.pack(len(head)) + head
    for _, array in ordered:
        if isinstance(array, numpy.ndarray):
            yield numpy.ascontiguousarray(array).reshape(-1).view(numpy.uint8).data
        else:
            yield from array.pieces()


def encode_manifest(manifest: Manifest) -> bytes:
    values = {
        "format": FORMAT_VERSION,
        "run": manifest.run,
        "lsn": manifest.lsn,
        "term": manifest.term,
        "chain": manifest.chain.hex(),
        "state": manifest.state,
        "state_hash": manifest.state_hash.hex(),
        "model_hash": manifest.model_hash.hex(),
        "file_hash": manifest.file_hash.hex(),
    }
    return _text({"checksum": _checksum(values), "manifest": values})


def decode_manifest(packed: bytes, name: str) -> Manifest:
    """Raises LogCorrupt; ConfigError when other software wrote it."""
    values = _checked(packed, name)
    if values.get("format") != FORMAT_VERSION:
        raise ConfigError(f"{name}: checkpoint format {values.get('format')}, this software reads {FORMAT_VERSION}")
    if any(type(values.get(name)) is not kind for name, kind in FIELD_TYPES.items()):
        raise LogCorrupt(f"{name}: lacks a field, or has one of a wrong type")
    try:
        hashes = {name: bytes.fromhex(values[name]) for name in ("chain", "state_hash", "model_hash", "file_hash")}
    except ValueError as error:
        raise LogCorrupt(f"{name}: a hash is not hexadecimal: {error}") from error
    return Manifest(run=values["run"], lsn=values["lsn"], term=values["term"], state=values["state"], **hashes)


def _checked(packed: bytes, name: str) -> dict[str, Any]:
    try:
        document = json.loads(packed)
        values = document["manifest"]
        is_whole = isinstance(values, dict) and document["checksum"] == _checksum(values)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise LogCorrupt(f"{name}: cannot be read ({type(error).__name__})") from error
    if not is_whole:
        raise LogCorrupt(f"{name}: fails its checksum")
    return values  # type: ignore[no-any-return]


def _checksum(values: dict[str, Any]) -> str:
    """Of the text: JSON keeps keys in order and floats exact, so text → values → text is the same text."""
    return xxhash.xxh3_128_hexdigest(_text(values))


def _text(values: dict[str, Any]) -> bytes:
    return json.dumps(values, separators=(",", ":")).encode()
