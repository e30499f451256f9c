"""Records on their way to a standby: a stretch of the log as one object, with the chain that it continues.

Not the log's own bytes: each side writes down for itself what it knew to be durable. The receiver hashes the chain
anew, so what it holds is the sender's history or is refused.
"""

import struct
from collections.abc import Sequence

from hetero_async.core.records import RECORD_TYPES, Entry
from hetero_async.errors import PeerError
from hetero_async.formats import frames
from hetero_async.formats.parts import pack_parts, unpack_parts

# lsn, term
PLACE = struct.Struct("<QQ")
CHAIN_BYTES = 16
# Records that travel together, by the bytes of their payloads; a larger record travels alone.
SHIPMENT_BYTES = 4 * 1024 * 1024
ENTRIES_MAX = 4096


def pack_shipment(chain: bytes, entries: Sequence[Entry]) -> bytes:
    """`chain`: after the record before the first of them."""
    packed = (
        pack_parts(
            PLACE.pack(entry.lsn, entry.term), frames.encode(entry.record, frames.RECORD_BYTES_MAX), entry.payload
        )
        for entry in entries
    )
    return pack_parts(chain, struct.pack("<I", len(entries)), pack_parts(*packed))


def unpack_shipment(blob: bytes) -> tuple[bytes, list[Entry]]:
    """Raises PeerError for anything that `pack_shipment` does not make."""
    chain, count, packed = unpack_parts(blob, 3)
    if len(chain) != CHAIN_BYTES or len(count) != 4:
        raise PeerError("a shipment of records does not begin with a chain and a count")
    (entries,) = struct.unpack("<I", count)
    if not 0 < entries <= ENTRIES_MAX:
        raise PeerError(f"a shipment of {entries} records, 1 to {ENTRIES_MAX} are allowed")
    return bytes(chain), [_entry(part) for part in unpack_parts(packed, entries)]


def _entry(packed: memoryview) -> Entry:
    place, record, payload = unpack_parts(packed, 3)
    if len(place) != PLACE.size:
        raise PeerError("a record without its place")
    lsn, term = PLACE.unpack(place)
    decoded = frames.decode(bytes(record), frames.RECORD_BYTES_MAX)
    if not isinstance(decoded, RECORD_TYPES):
        raise PeerError(f"a {type(decoded).__name__} is not a record")
    return Entry(lsn=lsn, term=term, record=decoded, payload=bytes(payload))  # type: ignore[arg-type]
