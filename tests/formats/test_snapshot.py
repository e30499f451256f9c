"""Checkpoint files and multi-part payloads: whole, or refused."""

import json
from dataclasses import replace
from typing import Any

import numpy
import pytest
import safetensors.numpy
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from hetero_async.errors import ConfigError, LogCorrupt, PeerError
from hetero_async.formats.parts import pack_parts, unpack_parts
from hetero_async.formats.snapshot import Manifest, decode_manifest, encode_arrays, encode_manifest

MANIFEST = Manifest(
    run="demo",
    lsn=12,
    term=2,
    chain=b"c" * 16,
    state={"version": 3, "norms": [0.1, 1e300], "members": {"w1": {"last_seq": 4}}, "leased": [[0, 5]]},
    state_hash=b"s" * 16,
    model_hash=b"m" * 16,
    file_hash=b"f" * 16,
)


def test_a_manifest_comes_back() -> None:
    assert decode_manifest(encode_manifest(MANIFEST), "manifest.json") == MANIFEST


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(st.dictionaries(st.text(), JSON_VALUES, max_size=5))
def test_any_state_comes_back(state: dict[str, object]) -> None:
    manifest = replace(MANIFEST, state=state)
    assert decode_manifest(encode_manifest(manifest), "manifest.json") == manifest


@pytest.mark.parametrize("at", range(len(encode_manifest(MANIFEST))))
def test_a_flipped_bit_in_a_manifest_is_found(at: int) -> None:
    blob = bytearray(encode_manifest(MANIFEST))
    blob[at] ^= 1
    with pytest.raises(LogCorrupt, match=r"manifest.json: "):
        decode_manifest(bytes(blob), "manifest.json")


@pytest.mark.parametrize("end", range(0, len(encode_manifest(MANIFEST)), 7))
def test_a_cut_manifest_is_found(end: int) -> None:
    with pytest.raises(LogCorrupt):
        decode_manifest(encode_manifest(MANIFEST)[:end], "manifest.json")


@given(st.binary(max_size=100) | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
def test_random_bytes_are_no_manifest(blob: bytes) -> None:
    with pytest.raises(LogCorrupt):
        decode_manifest(blob, "manifest.json")


def test_deep_nesting_is_no_manifest() -> None:
    with pytest.raises(LogCorrupt):
        decode_manifest(b"[" * 100_000, "manifest.json")


def manifest_with(**changes: Any) -> bytes:
    values = json.loads(encode_manifest(MANIFEST))["manifest"] | changes
    text = json.dumps(values, separators=(",", ":")).encode()
    return json.dumps({"checksum": xxhash.xxh3_128_hexdigest(text), "manifest": values}).encode()


@pytest.mark.parametrize(
    "changes",
    [
        {"lsn": "12"},
        {"lsn": True},
        {"state": []},
        {"state_hash": "xyz"},
        {"run": None},
        {"chain": None},
        {"chain": "x"},
    ],
)
def test_a_manifest_with_a_field_of_a_wrong_type_is_refused(changes: dict[str, Any]) -> None:
    assert decode_manifest(manifest_with(), "manifest.json") == MANIFEST
    with pytest.raises(LogCorrupt):
        decode_manifest(manifest_with(**changes), "manifest.json")


def test_another_format_version_is_named() -> None:
    with pytest.raises(ConfigError, match="checkpoint format 8, this software reads 7"):
        decode_manifest(manifest_with(format=8), "manifest.json")


@pytest.mark.parametrize(
    "array",
    [
        numpy.arange(12, dtype=numpy.float32).reshape(3, 4),
        numpy.arange(12, dtype=numpy.float32).reshape(3, 4).T,
        numpy.arange(12, dtype=numpy.uint8)[::2],
        numpy.array(2.5, dtype=numpy.float64),
        numpy.zeros((0, 3), dtype=numpy.int64),
    ],
    ids=["contiguous", "transposed", "strided", "scalar", "empty"],
)
def test_arrays_come_back_whatever_their_layout(array: numpy.ndarray) -> None:
    found = safetensors.numpy.load(b"".join(encode_arrays({"a": array})))["a"]
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    numpy.testing.assert_array_equal(found, array)


def test_the_file_is_what_safetensors_would_make_of_it() -> None:
    arrays = {
        "b": numpy.arange(3, dtype=numpy.uint8),
        "a": numpy.ones((2, 2), dtype=numpy.float32),
        "momentum": numpy.array([0.9]),
    }
    assert b"".join(encode_arrays(arrays)) == safetensors.numpy.save(arrays)


@given(st.lists(st.binary(max_size=20), max_size=5))
def test_parts_come_back(parts: list[bytes]) -> None:
    assert unpack_parts(pack_parts(*parts), len(parts)) == parts


def test_a_part_may_be_any_buffer() -> None:
    floats = memoryview(numpy.ones(3, dtype=numpy.float32))
    assert unpack_parts(pack_parts(bytearray(b"a"), floats), 2) == [b"a", floats.tobytes()]


@given(st.binary(max_size=100), st.integers(0, 4))
def test_random_bytes_are_parts_or_refused(blob: bytes, count: int) -> None:
    try:
        parts = unpack_parts(blob, count)
    except PeerError:
        return
    assert pack_parts(*parts) == blob


@pytest.mark.parametrize(
    ("blob", "count"),
    [
        (b"", 1),
        (pack_parts(b"a", b"b"), 1),
        (pack_parts(b"a", b"b"), 3),
        (pack_parts(b"a", b"b") + b"x", 2),
        (pack_parts(b"a", b"b")[:-1], 2),
        (b"\xff" * 8 + b"a", 1),
    ],
)
def test_malformed_parts_are_refused(blob: bytes, count: int) -> None:
    with pytest.raises(PeerError):
        unpack_parts(blob, count)
