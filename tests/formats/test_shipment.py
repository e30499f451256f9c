"""Records on their way to a standby: they come as they were, or are refused."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shell.small_log import entries_of

from hetero_async.core.messages import Wait
from hetero_async.core.records import Entry, Left
from hetero_async.errors import PeerError
from hetero_async.formats import frames
from hetero_async.formats.parts import pack_parts
from hetero_async.formats.shipment import CHAIN_BYTES, ENTRIES_MAX, PLACE, pack_shipment, unpack_shipment

CHAIN = bytes(range(CHAIN_BYTES))
RECORD = frames.encode(Left(worker="w", reason="bye"), frames.RECORD_BYTES_MAX)
PLACED = PLACE.pack(1, 1)
COUNT_1 = struct.pack("<I", 1)


def test_what_was_packed_comes_out() -> None:
    entries = entries_of(7, 9) + entries_of(10, 10, payload_bytes=0, term=3)
    assert unpack_shipment(pack_shipment(CHAIN, entries)) == (CHAIN, entries)


@given(
    st.binary(min_size=CHAIN_BYTES, max_size=CHAIN_BYTES),
    st.lists(
        st.builds(
            Entry,
            lsn=st.integers(0, 2**64 - 1),
            term=st.integers(0, 2**64 - 1),
            record=st.builds(Left, worker=st.just("w"), reason=st.text(max_size=20)),
            payload=st.binary(max_size=50),
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_any_records_come_out_as_they_were(chain: bytes, entries: list[Entry]) -> None:
    assert unpack_shipment(pack_shipment(chain, entries)) == (chain, entries)


def shipment(*entries: bytes, chain: bytes = CHAIN, count: bytes = COUNT_1) -> bytes:
    return pack_parts(chain, count, pack_parts(*entries))


ENTRY = pack_parts(PLACED, RECORD, b"")


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        shipment(ENTRY)[:-1],
        shipment(ENTRY) + b"\0",
        shipment(ENTRY, chain=CHAIN[:-1]),
        shipment(ENTRY, chain=CHAIN + b"\0"),
        shipment(ENTRY, count=b"\1"),
        shipment(count=struct.pack("<I", 0)),
        shipment(ENTRY, count=struct.pack("<I", 2)),
        shipment(ENTRY, ENTRY),
        shipment(count=struct.pack("<I", 0xFFFFFFFF)),
        shipment(*[ENTRY] * (ENTRIES_MAX + 1), count=struct.pack("<I", ENTRIES_MAX + 1)),
        shipment(pack_parts(PLACED[:-1], RECORD, b"")),
        shipment(pack_parts(PLACED + b"\0", RECORD, b"")),
        shipment(pack_parts(PLACED, RECORD)),
        shipment(pack_parts(PLACED, b"", b"")),
        shipment(pack_parts(PLACED, b"\xff" * 20, b"")),
        shipment(pack_parts(PLACED, RECORD[:-1], b"")),
    ],
)
def test_anything_else_is_refused(hostile: bytes) -> None:
    assert unpack_shipment(shipment(ENTRY))[1][0].lsn == 1
    with pytest.raises(PeerError):
        unpack_shipment(hostile)


def test_a_message_is_no_record() -> None:
    message = frames.encode(Wait(reason="-"), frames.RECORD_BYTES_MAX)
    with pytest.raises(PeerError, match="a Wait is not a record"):
        unpack_shipment(shipment(pack_parts(PLACED, message, b"")))


@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 255))
def test_damaged_bytes_are_refused_or_other_records_but_never_a_crash(noise: bytes, at: int, byte: int) -> None:
    good = bytearray(pack_shipment(CHAIN, entries_of(1, 3)))
    good[at % len(good)] = byte
    for blob in (noise, bytes(good), bytes(good[:at])):
        try:
            chain, entries = unpack_shipment(blob)
        except PeerError:
            continue
        assert len(chain) == CHAIN_BYTES and entries
