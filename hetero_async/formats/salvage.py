"""What is whole of a damaged segment: every record that still has its checksums, wherever it lies.

Whether such a record belongs to the log is not known from it alone: it does when its chain is the one that the record
before it ends with. shell/mending.py puts them together.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from crc32c import crc32c

from hetero_async.formats.frames import RECORD_BYTES_MAX
from hetero_async.formats.segment import (
    RECORD_HEADER_BYTES,
    RECORD_MAGIC,
    SEGMENT_HEADER_BYTES,
    RecordHeader,
    chain_after,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Salvaged:
    """A whole record at these offsets of its segment, and the chain before and after it."""

    offset: int
    end: int
    lsn: int
    chain: bytes
    chain_after: bytes
    durable_lsn: int


def salvage(segment: bytes) -> Iterator[Salvaged]:
    """Whole records in the order in which they lie there."""
    offset = SEGMENT_HEADER_BYTES
    while (offset := segment.find(RECORD_MAGIC, offset)) >= 0:
        found = _record_at(segment, offset)
        if found is not None:
            yield found
        offset = offset + 1 if found is None else found.end


def _record_at(segment: bytes, offset: int) -> Salvaged | None:
    header = RecordHeader.unpack(segment[offset : offset + RECORD_HEADER_BYTES])
    if header is None or header.record_bytes > RECORD_BYTES_MAX or offset + header.padded_bytes > len(segment):
        return None
    start, end = offset + RECORD_HEADER_BYTES, offset + header.padded_bytes
    body = start + header.record_bytes
    record, payload = segment[start:body], segment[body : body + header.payload_bytes]
    padding = segment[body + header.payload_bytes : end]
    if crc32c(payload, crc32c(record)) != header.body_crc or padding.strip(b"\0"):
        return None
    return Salvaged(
        offset=offset,
        end=end,
        lsn=header.lsn,
        chain=header.chain,
        chain_after=chain_after(header.lsn, header.term, header.chain, record, payload),
        durable_lsn=header.durable_lsn,
    )
