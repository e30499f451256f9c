"""The log's bytes: what was packed is scanned, and whatever else stands there is told apart from it."""

import io
import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from hetero_async.core.messages import Ack
from hetero_async.core.records import Entry, Left, Metric
from hetero_async.errors import ConfigError, LogCorrupt
from hetero_async.formats import frames
from hetero_async.formats.segment import (
    FIRST_CHAIN,
    RECORD_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    Scanner,
    SegmentHeader,
    pack,
)

HEADER = SegmentHeader(run="demo", first_lsn=1, chain=FIRST_CHAIN)
ENTRIES = [
    Entry(lsn=1, term=1, record=Left(worker="w1", reason="bye")),
    Entry(lsn=2, term=1, record=Left(worker="w2", reason="silent"), payload=b"a payload of 24 bytes..."),
    Entry(lsn=3, term=2, record=Metric(worker="w1", name="loss", value=2.5, version=7), payload=bytes(100) + b"!"),
]


def packed(entries: list[Entry] = ENTRIES) -> list[bytes]:
    chain, records = FIRST_CHAIN, []
    for entry in entries:
        record, chain = pack(entry, chain)
        records.append(record)
    return records


def segment_of(*records: bytes, zeros: int = 0) -> bytes:
    return HEADER.pack() + b"".join(records) + bytes(zeros)


def scanner_of(segment: bytes, is_last: bool = True) -> Scanner:
    return Scanner(io.BytesIO(segment), name="1.log", is_last=is_last)


def flipped(blob: bytes, at: int) -> bytes:
    return blob[:at] + bytes([blob[at] ^ 1 << at % 8]) + blob[at + 1 :]


def test_entries_come_back_with_a_clean_end() -> None:
    scanner = scanner_of(segment_of(*packed()))
    assert list(scanner) == ENTRIES
    assert scanner.torn == ""
    assert (scanner.header, scanner.last_lsn, scanner.term) == (HEADER, 3, 2)
    assert scanner.chain == pack(ENTRIES[2], pack(ENTRIES[1], pack(ENTRIES[0], FIRST_CHAIN)[1])[1])[1]


@pytest.mark.parametrize("zeros", [0, 1, 8, 55, 56, 57, 3 << 20])
@pytest.mark.parametrize("is_last", [True, False])
def test_preallocated_zeros_are_a_clean_end(zeros: int, is_last: bool) -> None:
    scanner = scanner_of(segment_of(*packed(), zeros=zeros), is_last)
    assert list(scanner) == ENTRIES
    assert scanner.torn == ""
    assert scanner.offset == SEGMENT_HEADER_BYTES + sum(len(record) for record in packed())


def test_every_record_begins_at_a_multiple_of_8() -> None:
    assert all(len(record) % 8 == 0 for record in packed())
    assert len(HEADER.pack()) == SEGMENT_HEADER_BYTES


LAST_BYTES = len(packed()[2])


@pytest.mark.parametrize("kept", range(LAST_BYTES))
@pytest.mark.parametrize("zeros", [0, LAST_BYTES + 4096])
def test_the_last_record_cut_at_any_byte_is_torn(kept: int, zeros: int) -> None:
    first, second, last = packed()
    segment = segment_of(first, second, last[:kept], zeros=zeros)
    scanner = scanner_of(segment)
    found = list(scanner)
    if len(found) == 2:
        assert scanner.last_lsn == 2
        assert bool(scanner.torn) == bool(last[:kept].strip(b"\0"))
        assert scanner.tail() == last[:kept].rstrip(b"\0")
    else:  # what was cut is zero anyway: the end of the payload's padding
        assert zeros and not last[kept:].strip(b"\0")
        assert found == ENTRIES


@pytest.mark.parametrize("at", range(len(segment_of(*packed(), zeros=64))))
def test_a_flipped_bit_is_corrupt_or_a_torn_tail_but_never_an_entry(at: int) -> None:
    segment = segment_of(*packed(), zeros=64)
    last_start = len(segment) - 64 - LAST_BYTES
    if at < last_start:
        with pytest.raises(LogCorrupt, match=r"1.log: offset \d+: "):
            list(scanner_of(flipped(segment, at)))
        return
    scanner = scanner_of(flipped(segment, at))
    try:
        found = list(scanner)
    except LogCorrupt:
        return
    assert scanner.torn
    assert found == (ENTRIES if at >= len(segment) - 64 else ENTRIES[:2])


@pytest.mark.parametrize("at", range(SEGMENT_HEADER_BYTES, len(segment_of(*packed(), zeros=64))))
def test_in_an_older_segment_nothing_is_torn(at: int) -> None:
    with pytest.raises(LogCorrupt, match=r"1.log: offset \d+: record \d: "):
        list(scanner_of(flipped(segment_of(*packed(), zeros=64), at), is_last=False))


def test_an_older_segment_that_ends_in_a_record_is_corrupt() -> None:
    with pytest.raises(LogCorrupt, match="record 3: the file ends inside it"):
        list(scanner_of(segment_of(*packed())[:-8], is_last=False))


FIRST, SECOND, LAST = packed()
OTHER_SECOND = pack(replace(ENTRIES[1], payload=b"another payload, 24 byte"), pack(ENTRIES[0], FIRST_CHAIN)[1])[0]
FALLING = packed([replace(ENTRIES[0], term=3), replace(ENTRIES[1], term=2)])


def refolded(record: bytes, change: Callable[[bytearray], None]) -> bytes:
    """A record changed by somebody who also repairs its checksums."""
    header, body = bytearray(record[:RECORD_HEADER_BYTES]), bytearray(record[RECORD_HEADER_BYTES:])
    change(body)
    sizes = struct.unpack_from("<IQ", header, 24)
    header[4:8] = struct.pack("<I", crc32c(bytes(body[: sum(sizes)])))
    header[-4:] = struct.pack("<I", crc32c(bytes(header[:-4])))
    return bytes(header + body)


def as_message(body: bytearray) -> None:
    ack = frames.encode(Ack(seq=3, lsn=9))
    body[: len(ack)] = ack


@pytest.mark.parametrize(
    ("records", "what"),
    [
        ((FIRST, LAST), "record 2: found record 3 in its place"),
        ((FIRST, FIRST), "record 2: found record 1 in its place"),
        ((SECOND,), "record 1: found record 2 in its place"),
        ((FIRST, OTHER_SECOND, LAST), "record 3: it does not continue the record before it"),
        ((*FALLING,), "record 2: term 2 after term 3"),
        ((FIRST, b"garbage!", SECOND), "record 2: the header fails its checksum"),
        ((FIRST, SECOND[:64], bytes(len(SECOND) - 64), LAST), "record 2: the body fails its checksum"),
        ((FIRST, bytes(len(SECOND)), LAST), "record 2: the header fails its checksum"),
        ((refolded(FIRST, as_message),), "record 1: not msgpack|record 1: .*fields"),
        ((refolded(FIRST, lambda body: body.__setitem__(-1, 1)), SECOND), "record 1: its padding is not zero"),
    ],
)
def test_records_out_of_place_are_corrupt(records: tuple[bytes, ...], what: str) -> None:
    with pytest.raises(LogCorrupt, match=what):
        list(scanner_of(segment_of(*records, zeros=4096)))


def test_a_record_far_behind_a_bad_one_is_found() -> None:
    with pytest.raises(LogCorrupt, match="record 2"):
        list(scanner_of(segment_of(FIRST, b"garbage!", bytes((5 << 20) - 40), LAST)))


def test_what_looks_like_a_record_inside_a_torn_payload_does_not_make_it_corrupt() -> None:
    """A worker chooses its payload; it must not be able to make a torn tail look like corruption."""
    trojan, _ = pack(replace(ENTRIES[0], payload=packed()[2] + b"to be torn"), FIRST_CHAIN)
    scanner = scanner_of(segment_of(trojan[:-16], zeros=4096))
    assert list(scanner) == []
    assert scanner.torn == "the body fails its checksum"


@pytest.mark.parametrize("kept", [(False, True, True), (True, False, True), (False, False, True), (True, False, False)])
def test_of_records_written_together_any_may_be_missing_after_a_power_cut(kept: tuple[bool, ...]) -> None:
    """The disk had written some sectors of the one write, in an order of its own."""
    records, chain = [], FIRST_CHAIN
    for entry in ENTRIES:
        record, chain = pack(entry, chain, 0)
        records.append(record)
    found = [record if is_kept else bytes(len(record)) for record, is_kept in zip(records, kept, strict=True)]
    scanner = scanner_of(segment_of(*found, zeros=64))
    assert list(scanner) == ENTRIES[: kept.index(False)]
    assert bool(scanner.torn) == any(kept[kept.index(False) :])


class LiveFile(io.BytesIO):
    """Shows a half-written record once, then the file as the writer has finished it."""

    def __init__(self, half_written: bytes, finished: bytes) -> None:
        super().__init__(half_written)
        self._finished = finished

    def read(self, count: int | None = -1, /) -> bytes:
        at = self.tell()
        found = super().read(count)
        if at > SEGMENT_HEADER_BYTES:
            self.seek(0)
            self.write(self._finished)
            self.seek(at + len(found))
        return found


def test_a_record_that_a_live_writer_finishes_meanwhile_is_not_corrupt() -> None:
    finished = segment_of(FIRST, SECOND, LAST)
    half_written = segment_of(FIRST[:-8], zeros=8 + len(SECOND) + len(LAST))
    assert list(Scanner(LiveFile(half_written, finished), name="1.log", is_last=True)) == ENTRIES


@given(st.binary(max_size=400))
def test_random_bytes_are_no_segment(junk: bytes) -> None:
    with pytest.raises(LogCorrupt):
        scanner_of(junk)


@given(st.binary(max_size=400))
def test_random_bytes_behind_the_records_are_a_torn_tail(junk: bytes) -> None:
    scanner = scanner_of(segment_of(*packed()) + junk)
    assert list(scanner) == ENTRIES
    assert bool(scanner.torn) == bool(junk.strip(b"\0"))


def test_another_format_version_is_named() -> None:
    header = bytearray(HEADER.pack())
    header[8:12] = struct.pack("<I", 6)
    header[-4:] = struct.pack("<I", crc32c(bytes(header[:-4])))
    with pytest.raises(ConfigError, match="log format 6, this software reads 5"):
        scanner_of(bytes(header))


def test_a_record_out_of_bounds_is_not_packed() -> None:
    with pytest.raises(ValueError, match="header"):
        pack(Entry(lsn=1, term=1, record=Left(worker="w" * 257, reason="")), FIRST_CHAIN)


class FailingFile(io.BytesIO):
    def read(self, count: int | None = -1, /) -> bytes:
        raise OSError(5, "Input/output error")


def test_a_segment_that_cannot_be_read_is_corrupt() -> None:
    with pytest.raises(LogCorrupt, match="offset 0: cannot be read: Input/output error"):
        Scanner(FailingFile(), name="1.log", is_last=True)
