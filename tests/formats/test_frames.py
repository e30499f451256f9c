"""Every message survives the wire, and no bytes whatever get past the decoder but as a value or a PeerError."""

import contextlib
import math
from dataclasses import fields, replace
from typing import Any, get_type_hints

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetero_async.core.heartbeat import Usage
from hetero_async.core.messages import MESSAGE_TYPES, Ack, Chunk, Heartbeat, Lease, Nack, PublishReady
from hetero_async.core.probe import Digest
from hetero_async.core.publish_note import PublishNote
from hetero_async.core.records import RECORD_TYPES, Genesis, Left, Published, Range, RunSettings
from hetero_async.errors import PeerError
from hetero_async.formats import frames

INTEGERS = st.integers(0, 2**63 - 1)
TEXTS = st.text(max_size=256)
RANGES = st.lists(st.integers(0, 2**63 - 1), max_size=20, unique=True).map(
    lambda ends: tuple(zip(sorted(ends)[::2], sorted(ends)[1::2], strict=False))
)
VALUES: dict[object, st.SearchStrategy[Any]] = {
    int: INTEGERS,
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    str: TEXTS,
    bytes: st.binary(max_size=64),
    tuple[Range, ...]: RANGES,
    tuple[int, ...]: st.lists(INTEGERS, max_size=9).map(tuple),
    tuple[str, ...]: st.lists(TEXTS, max_size=9).map(tuple),
    tuple[float, ...]: st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=9).map(tuple),
    tuple[tuple[str, int], ...]: st.lists(st.tuples(TEXTS, INTEGERS), max_size=9).map(tuple),
    tuple[tuple[str, float], ...]: st.lists(
        st.tuples(TEXTS, st.floats(allow_nan=False, allow_infinity=False)), max_size=9
    ).map(tuple),
}


def values_of(kind: type) -> st.SearchStrategy[Any]:
    hints = get_type_hints(kind)
    return st.builds(kind, **{field.name: VALUES[hints[field.name]] for field in fields(kind)})


VALUES[RunSettings] = values_of(RunSettings)
VALUES[Usage] = values_of(Usage)
VALUES[Digest] = values_of(Digest)
ACK = Ack(seq=3, lsn=17)


def packed(name: object, values: object) -> bytes:
    return msgpack.packb([name, values])


def test_a_message_comes_back_as_it_was() -> None:
    assert frames.decode(frames.encode(ACK)) == ACK


@pytest.mark.parametrize("kind", [*MESSAGE_TYPES, *RECORD_TYPES], ids=lambda kind: kind.__name__)
def test_every_message_and_record_comes_back_as_it_was(kind: type) -> None:
    @given(values_of(kind))
    def comes_back(value: Any) -> None:
        assert frames.decode(frames.encode(value)) == value

    comes_back()


@given(st.binary(max_size=300))
def test_random_bytes_are_a_value_or_refused(data: bytes) -> None:
    with contextlib.suppress(PeerError):
        frames.encode(frames.decode(data))


JSON_LIKE = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats() | st.text(max_size=9) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
)


@given(st.sampled_from([*MESSAGE_TYPES, *RECORD_TYPES]), st.data())
def test_fields_of_any_type_are_a_value_or_refused(kind: type, data: st.DataObject) -> None:
    values = {field.name: data.draw(JSON_LIKE) for field in fields(kind)}
    with contextlib.suppress(PeerError):
        frames.encode(frames.decode(packed(kind.__name__, values)))


@given(st.sampled_from([*MESSAGE_TYPES, *RECORD_TYPES]), st.data())
def test_a_cut_or_flipped_message_is_a_value_or_refused(kind: type, data: st.DataObject) -> None:
    good = frames.encode(data.draw(values_of(kind)))
    at = data.draw(st.integers(0, len(good) - 1))
    flipped = good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :]
    with pytest.raises(PeerError):
        frames.decode(good[:at])
    with contextlib.suppress(PeerError):
        frames.encode(frames.decode(flipped))


DUPLICATE = b"\x92\xa3Ack\x83" + b"\xa3seq\x01" + b"\xa3lsn\x01" + b"\xa3seq\x02"
HOSTILE = {
    "nothing": b"",
    "trailing bytes": frames.encode(ACK) + b"\0",
    "unknown type": packed("Exec", {}),
    "a class that is no message": packed("RunSettings", {}),
    "no type": packed(7, {}),
    "three parts": msgpack.packb(["Ack", {"seq": 1, "lsn": 1}, 1]),
    "no array": msgpack.packb({"Ack": 1}),
    "fields as an array": packed("Ack", [1, 2]),
    "unknown field": packed("Ack", {"seq": 1, "lsn": 1, "more": 1}),
    "missing field": packed("Ack", {"seq": 1}),
    "duplicate field": DUPLICATE,
    "bool for int": packed("Ack", {"seq": True, "lsn": 1}),
    "float for int": packed("Ack", {"seq": 1.0, "lsn": 1}),
    "negative": packed("Ack", {"seq": -1, "lsn": 1}),
    "2**63": packed("Ack", {"seq": 2**63, "lsn": 1}),
    "text for bytes": packed("Chunk", {"kind": "delta", "number": 1, "index": 0, "total_bytes": 1, "total_hash": "x"}),
    "bytes for text": packed("Nack", {"seq": 1, "reason": b"x"}),
    "bad utf-8": b"\x92\xa3\xff\xfe\xfd\x80",
    "long reason": packed("Nack", {"seq": 1, "reason": "x" * 1025}),
    "long text": packed("Left", {"worker": "x" * 257, "reason": ""}),
    "pair of three": packed("Lease", {"number": 1, "ranges": [[1, 2, 3]], "samples": 1}),
    "empty range": packed("Lease", {"number": 1, "ranges": [[1, 1]], "samples": 1}),
    "backward range": packed("Lease", {"number": 1, "ranges": [[2, 1]], "samples": 1}),
    "overlapping ranges": packed("Lease", {"number": 1, "ranges": [[0, 4], [3, 5]], "samples": 1}),
    "descending ranges": packed("Lease", {"number": 1, "ranges": [[4, 5], [0, 1]], "samples": 1}),
    "ext type": packed("Ack", {"seq": msgpack.ExtType(5, b"x"), "lsn": 1}),
    "empty ext type": packed("Ack", {"seq": msgpack.ExtType(5, b""), "lsn": 1}),
    "timestamp": packed("Ack", {"seq": msgpack.Timestamp(1), "lsn": 1}),
    "ext type as key": b"\x92\xa3Ack\x81\xc7\x00\x05\x01",
    "deep nesting": b"\x91" * 60_000 + b"\x90",
    "1000 deep": b"\x91" * 1000 + b"\x90",
    "deep type name": msgpack.packb([[[[]]], {}]),
    "wide array": b"\xdd\xff\xff\xff\xff",
    "wide map": b"\xdf\xff\xff\xff\xff",
    "array of 4097": packed("Stepped", {"version": 1, "deltas": [1] * 4097, "weights": [], "gain": 1.0}),
    "map of 65": packed("Ack", {str(key): key for key in range(65)}),
    "64 KiB of empty maps": b"\xdc\xff\xff" + b"\x80" * 65_000,
    "too large": packed("Ack", {"seq": 1, "lsn": 1}) + bytes(64 * 1024),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(PeerError) as refusal:
        frames.decode(data)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1, "1.0"])
def test_a_float_must_be_finite_and_a_float(value: object) -> None:
    with pytest.raises(PeerError, match=r"MetricReport: .*finite float"):
        frames.decode(
            packed(
                "MetricReport", {"incarnation": 1, "figures": [["loss", value]], "publish": 1, "is_evaluation": False}
            )
        )


BEAT = Heartbeat(incarnation=1, state="", steps=1, steps_per_second=1.0, publish=0, bytes_up=0, bytes_down=0)


@pytest.mark.parametrize(
    "value",
    [
        replace(ACK, seq=-1),
        replace(ACK, seq=True),
        replace(ACK, seq=2**64),
        replace(BEAT, steps_per_second=1),
        replace(BEAT, steps_per_second=math.nan),
        replace(BEAT, state="\ud800"),
        Left(worker="w", reason="x" * 1025),
        Lease(number=1, ranges=((1, 2), (1, 3)), samples=1),
        Lease(number=1, ranges=[(1, 2)], samples=1),
        Lease(number=1, ranges=([1, 2],), samples=1),
        Chunk(kind="delta", number=1, index=0, total_bytes=1, total_hash=bytes(65)),
        RunSettings(run="x"),
        {"Ack": 1},
        object(),
    ],
    ids=lambda value: f"{value!r:.80}".partition(" at 0x")[0],
)
def test_what_would_be_refused_is_not_sent(value: Any) -> None:
    with pytest.raises(ValueError, match=r"header|differently"):
        frames.encode(value)


def test_a_reason_may_be_longer_than_other_text() -> None:
    nack = Nack(seq=1, reason="ä" * 1024)
    assert frames.decode(frames.encode(nack)) == nack


def test_touching_ranges_are_allowed() -> None:
    lease = Lease(number=1, ranges=((0, 4), (4, 5)), samples=9)
    assert frames.decode(frames.encode(lease)) == lease


def test_a_record_may_be_larger_than_a_message() -> None:
    published = Published(
        number=1, version=1, codec="int8", merged=tuple((f"site-{n:06d}/worker-{n:06d}", n) for n in range(4096))
    )
    with pytest.raises(ValueError, match="at most 65536"):
        frames.encode(published)
    large = frames.encode(published, frames.RECORD_BYTES_MAX)
    assert frames.decode(large, frames.RECORD_BYTES_MAX) == published
    with pytest.raises(PeerError, match="at most 65536"):
        frames.decode(large)


def test_nested_settings_are_checked_too() -> None:
    genesis = Genesis(key="k", settings=RunSettings(run="demo"), schema_hash=b"s", parameters_hash=b"p")
    name, values = msgpack.unpackb(frames.encode(genesis))
    values["settings"]["max_staleness"] = -1
    with pytest.raises(PeerError, match=r"Genesis: RunSettings: .*whole number"):
        frames.decode(packed(name, values))


def test_a_publish_note_is_a_value_like_any_other() -> None:
    note = PublishNote(number=1, version=2, codec="int8", merged=(("w", 3),), shadow_hash=bytes(16))
    assert frames.decode(frames.encode(note)) == note
    assert frames.decode(frames.encode(note)) != PublishReady(number=1, version=2)
