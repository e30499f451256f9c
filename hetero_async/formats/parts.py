"""Several byte strings in one payload, each after its length (u64, little-endian).

Used for what a single payload must carry together: schema and parameters, note and coded bytes, message and delta.
"""

import struct

from hetero_async.errors import PeerError

LENGTH = struct.Struct("<Q")


def pack_parts(*parts: bytes | bytearray | memoryview) -> bytes:
    return b"".join(piece for part in parts for piece in (LENGTH.pack(memoryview(part).nbytes), part))


def unpack_parts(blob: bytes | bytearray | memoryview, count: int) -> list[memoryview]:
    """Views into `blob`, not copies. Raises PeerError unless it is exactly `count` parts."""
    rest = memoryview(blob)
    parts: list[memoryview] = []
    for number in range(count):
        if len(rest) < LENGTH.size:
            raise PeerError(f"a payload of {count} parts ends before part {number}")
        (length,) = LENGTH.unpack(rest[: LENGTH.size])
        rest = rest[LENGTH.size :]
        if length > len(rest):
            raise PeerError(f"part {number} of {count} claims {length} bytes, {len(rest)} are left")
        parts.append(rest[:length])
        rest = rest[length:]
    if rest:
        raise PeerError(f"{len(rest)} bytes follow the last of {count} parts")
    return parts
