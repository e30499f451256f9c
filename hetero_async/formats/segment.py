"""The log's bytes: segment header, record frames, and the scanner that says where good bytes end and why.

Pure but for reading from the file object that it is given; shell/log.py writes what `pack` returns. A segment is its
header, then records one after the other, each padded to 8 bytes, then zeros (preallocated space) to the file's end.
Every record carries the chain hash of all before it, so that none can be missing, swapped or from another log.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import xxhash
from crc32c import crc32c

from hetero_async.core.records import RECORD_TYPES, Entry, Record
from hetero_async.errors import ConfigError, LogCorrupt, PeerError
from hetero_async.formats import frames

FORMAT_VERSION = 7
SEGMENT_MAGIC = b"HAsegmnt"
RECORD_MAGIC = b"HArc"
ALIGNMENT = 8
FIRST_CHAIN = bytes(16)  # before record 1
RUN_NAME_BYTES = 64
BLOCK_BYTES = 1024 * 1024
# No file is longer, and sums of offsets stay within what a system call takes.
PAYLOAD_BYTES_MAX = 1 << 48

CRC = struct.Struct("<I")
# magic, format version, run's name, first lsn, chain before it; then crc32c
SEGMENT = struct.Struct(f"<8sI{RUN_NAME_BYTES}sQ16s")
SEGMENT_HEADER_BYTES = SEGMENT.size + CRC.size
# magic, crc32c of the body, lsn, term, bytes of the record, bytes of its payload, chain before it, and the last lsn
# that was durable when it was written; then crc32c
RECORD = struct.Struct("<4sIQQIQ16sQ")
RECORD_HEADER_BYTES = RECORD.size + CRC.size
# What a record's chain hash begins with: lsn, term, bytes of the record, chain before it.
LINK = struct.Struct("<QQI16s")
assert SEGMENT_HEADER_BYTES % ALIGNMENT == RECORD_HEADER_BYTES % ALIGNMENT == 0


def segment_file(first_lsn: int) -> str:
    """The name of the segment's file in a log's directory."""
    return f"{first_lsn:020d}.log"


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentHeader:
    run: str
    first_lsn: int
    chain: bytes  # of the record before the first

    def pack(self) -> bytes:
        run = self.run.encode()
        assert len(run) <= RUN_NAME_BYTES, f"the run's name has more than {RUN_NAME_BYTES} bytes"
        return _with_crc(SEGMENT.pack(SEGMENT_MAGIC, FORMAT_VERSION, run, self.first_lsn, self.chain))

    @classmethod
    def unpack(cls, packed: bytes, name: str) -> "SegmentHeader":
        """Raises LogCorrupt; ConfigError when other software wrote it."""
        if len(packed) < SEGMENT_HEADER_BYTES or packed[: len(SEGMENT_MAGIC)] != SEGMENT_MAGIC:
            raise LogCorrupt(f"{name}: offset 0: does not begin like a log segment")
        if not _has_crc(packed):
            raise LogCorrupt(f"{name}: offset 0: the segment's header fails its checksum")
        _, version, run, first_lsn, chain = SEGMENT.unpack(packed[: SEGMENT.size])
        if version != FORMAT_VERSION:
            raise ConfigError(f"{name}: log format {version}, this software reads {FORMAT_VERSION}: use a matching one")
        return cls(run=run.rstrip(b"\0").decode(), first_lsn=first_lsn, chain=chain)


def pack(entry: Entry, chain: bytes, durable_lsn: int | None = None) -> tuple[bytes, bytes]:
    """An entry's bytes in the log, and the chain after it. Raises ValueError when its record is out of bounds.

    `durable_lsn`: records up to this one were durable before this one is written; None: all before it.
    """
    durable_lsn = entry.lsn - 1 if durable_lsn is None else durable_lsn
    assert isinstance(entry.record, RECORD_TYPES), f"{type(entry.record).__name__} is not a record"
    record = frames.encode(entry.record, frames.RECORD_BYTES_MAX)
    body_crc = crc32c(entry.payload, crc32c(record))
    sizes = len(record), len(entry.payload)
    header = _with_crc(RECORD.pack(RECORD_MAGIC, body_crc, entry.lsn, entry.term, *sizes, chain, durable_lsn))
    padding = bytes(_padding(sum(sizes)))
    chain = chain_after(entry.lsn, entry.term, chain, record, entry.payload)
    return b"".join((header, record, entry.payload, padding)), chain


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordHeader:
    body_crc: int
    lsn: int
    term: int
    record_bytes: int
    payload_bytes: int
    chain: bytes
    durable_lsn: int

    @property
    def padded_bytes(self) -> int:
        body_bytes = self.record_bytes + self.payload_bytes
        return RECORD_HEADER_BYTES + body_bytes + _padding(body_bytes)

    @classmethod
    def unpack(cls, packed: bytes) -> "RecordHeader | None":
        """None unless the checksum is right: before that, no length in it may drive anything."""
        if len(packed) < RECORD_HEADER_BYTES or packed[: len(RECORD_MAGIC)] != RECORD_MAGIC or not _has_crc(packed):
            return None
        _, body_crc, lsn, term, record_bytes, payload_bytes, chain, durable_lsn = RECORD.unpack(packed[: RECORD.size])
        return cls(
            body_crc=body_crc,
            lsn=lsn,
            term=term,
            record_bytes=record_bytes,
            payload_bytes=payload_bytes,
            chain=chain,
            durable_lsn=durable_lsn,
        )


class UnfinishedError(Exception):
    """Bytes that a crash in the middle of a write can leave. `resume_at`: where a later record could stand."""

    def __init__(self, reason: str, resume_at: int) -> None:
        super().__init__(reason)
        self.resume_at = resume_at


class Scanner:
    """Iterate for the entries of one segment; when that ends, the attributes say how.

    Raises LogCorrupt, naming file, offset, record and what is wrong. The first bad record is torn, not corrupt, only
    in the last segment and when no later record knows it as durable. Records that were written together with it may
    follow: a power cut keeps any sectors of an unfinished write, and none of these records was ever acknowledged.
    """

    def __init__(self, file: BinaryIO, *, name: str, is_last: bool, term: int = 0) -> None:
        self._file = file
        self._name = name
        self._is_last = is_last
        self.header = SegmentHeader.unpack(self._read(0, SEGMENT_HEADER_BYTES), name)
        self.offset = SEGMENT_HEADER_BYTES  # end of the last good record
        self.last_lsn = self.header.first_lsn - 1
        self.term = term
        self.chain = self.header.chain
        self.torn = ""  # why the tail is torn; empty: a clean end

    def __iter__(self) -> Iterator[Entry]:
        while True:
            try:
                entry = self._next()
            except UnfinishedError as unfinished:
                if self._is_torn(unfinished):
                    self.torn = str(unfinished)
                    return
                entry = self._next_again()
            if entry is None:
                return
            yield entry

    def tail(self) -> bytes:
        """What stands behind the last good record, without the zeros of preallocation."""
        return self._read(self.offset, self._size() - self.offset).rstrip(b"\0")

    def _next(self) -> Entry | None:
        """The entry at `offset`, moving behind it; None at a clean end."""
        packed = self._read(self.offset, RECORD_HEADER_BYTES)
        if not packed.strip(b"\0") and self._is_zero_from(self.offset):
            return None
        header = RecordHeader.unpack(packed)
        if header is None:
            raise UnfinishedError("the header fails its checksum", self.offset + ALIGNMENT)
        self._check_place(header)
        record, payload = self._body(header)
        entry = Entry(lsn=header.lsn, term=header.term, record=self._decode(record), payload=payload)
        self.chain = chain_after(header.lsn, header.term, header.chain, record, payload)
        self.offset += header.padded_bytes
        self.last_lsn, self.term = header.lsn, header.term
        return entry

    def _next_again(self) -> Entry | None:
        """Where it was durable once, a live writer may have finished this one since it was read; else it is corrupt."""
        try:
            return self._next()
        except UnfinishedError as unfinished:
            raise self._corrupt(str(unfinished)) from unfinished

    def _check_place(self, header: RecordHeader) -> None:
        """A header with a good checksum is no torn write: what contradicts its place was never written here."""
        if header.lsn != self.last_lsn + 1:
            raise self._corrupt(f"found record {header.lsn} in its place")
        if header.chain != self.chain:
            raise self._corrupt("it does not continue the record before it")
        if header.term < self.term:
            raise self._corrupt(f"term {header.term} after term {self.term}")
        if header.record_bytes > frames.RECORD_BYTES_MAX:
            raise self._corrupt(f"{header.record_bytes} bytes, at most {frames.RECORD_BYTES_MAX} are allowed")
        if header.payload_bytes > PAYLOAD_BYTES_MAX:
            raise self._corrupt(f"a payload of {header.payload_bytes} bytes, at most {PAYLOAD_BYTES_MAX} are allowed")

    def _body(self, header: RecordHeader) -> tuple[bytes, bytes]:
        end = self.offset + header.padded_bytes
        if end > self._size():
            raise UnfinishedError("the file ends inside it", end)
        start = self.offset + RECORD_HEADER_BYTES
        record = self._read(start, header.record_bytes)
        payload = self._read(start + header.record_bytes, header.payload_bytes)
        if crc32c(payload, crc32c(record)) != header.body_crc:
            raise UnfinishedError("the body fails its checksum", end)
        padding = start + header.record_bytes + header.payload_bytes
        if self._read(padding, end - padding).strip(b"\0"):
            raise UnfinishedError("its padding is not zero", end)
        return record, payload

    def _decode(self, packed: bytes) -> Record:
        try:
            record = frames.decode(packed, frames.RECORD_BYTES_MAX)
        except PeerError as error:
            raise self._corrupt(str(error)) from error
        if not isinstance(record, RECORD_TYPES):
            raise self._corrupt(f"a {type(record).__name__} is not a record")
        return record  # type: ignore[return-value]

    def _is_torn(self, unfinished: UnfinishedError) -> bool:
        return self._is_last and not self._was_whole(unfinished.resume_at)

    def _was_whole(self, offset: int) -> bool:
        """Is the bad record further on in the file, or one that was written when it was durable?"""
        while block := self._read(offset, BLOCK_BYTES + RECORD_HEADER_BYTES):
            at = block.find(RECORD_MAGIC)
            while at >= 0:
                header = RecordHeader.unpack(block[at : at + RECORD_HEADER_BYTES])
                if header is not None and (header.lsn == self.last_lsn + 1 or header.durable_lsn > self.last_lsn):
                    return True
                at = block.find(RECORD_MAGIC, at + 1)
            offset += BLOCK_BYTES
        return False

    def _is_zero_from(self, offset: int) -> bool:
        while block := self._read(offset, BLOCK_BYTES):
            if block != bytes(len(block)):
                return False
            offset += len(block)
        return True

    def _corrupt(self, reason: str) -> LogCorrupt:
        return LogCorrupt(f"{self._name}: offset {self.offset}: record {self.last_lsn + 1}: {reason}")

    def _size(self) -> int:
        return self._file.seek(0, 2)

    def _read(self, offset: int, count: int) -> bytes:
        """Fewer than `count` bytes only at the file's end."""
        try:
            self._file.seek(offset)
            read = self._file.read(count)
            while len(read) < count and (more := self._file.read(count - len(read))):
                read += more
        except OSError as error:
            raise LogCorrupt(f"{self._name}: offset {offset}: cannot be read: {error.strerror}") from error
        return read


def _with_crc(packed: bytes) -> bytes:
    return packed + CRC.pack(crc32c(packed))


def _has_crc(packed: bytes) -> bool:
    return packed == _with_crc(packed[: -CRC.size])


def _padding(body_bytes: int) -> int:
    return -body_bytes % ALIGNMENT


def chain_after(lsn: int, term: int, chain: bytes, record: bytes, payload: bytes) -> bytes:
    """The same on server and standby, though each knows other records as durable when it writes this one."""
    after = xxhash.xxh3_128(LINK.pack(lsn, term, len(record), chain))
    after.update(record)
    after.update(payload)
    return after.digest()
