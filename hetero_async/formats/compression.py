"""zstd for payloads, with every frame's promises checked before a byte of it is unpacked.

Used by the codecs. Compressors are made per call (10 µs): they must not be shared between threads.
"""

import zstandard

from hetero_async.errors import PeerError

# Levels up to 19 use windows of at most 8 MiB; 20 to 22 take the whole content as their window, and with it the
# receiver's memory.
LEVEL_MAX = 19
WINDOW_BYTES_MAX = 8 * 1024 * 1024


def compress(raw: bytes | bytearray | memoryview, level: int = 1) -> bytes:
    """One frame that states its size and carries a checksum: without it a flipped bit passes unseen."""
    assert 1 <= level <= LEVEL_MAX, f"level {level}: 1 to {LEVEL_MAX} are allowed"
    return zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True).compress(raw)


def decompress(frame: bytes | bytearray | memoryview, expected_bytes: int) -> bytes:
    """Exactly `expected_bytes`, or PeerError. What the caller expects, not the frame, sizes the memory.

    The library ignores `max_output_size` where a frame states its own size, so the statement is compared first.
    """
    try:
        _check_parameters(zstandard.get_frame_parameters(frame), expected_bytes)
        raw = _unpack(frame, expected_bytes)
    except (zstandard.ZstdError, MemoryError) as error:
        raise PeerError(f"not a whole zstd frame: {error}") from error
    if len(raw) != expected_bytes:
        raise PeerError(f"a zstd frame held {len(raw)} bytes, expected {expected_bytes}")
    return raw


def _check_parameters(found: zstandard.FrameParameters, expected_bytes: int) -> None:
    if found.content_size != expected_bytes:
        raise PeerError(f"a zstd frame states {found.content_size} bytes, expected {expected_bytes}")
    if found.window_size > WINDOW_BYTES_MAX:
        raise PeerError(f"a zstd frame asks for a window of {found.window_size} bytes, at most {WINDOW_BYTES_MAX}")
    if not found.has_checksum:
        raise PeerError("a zstd frame has no checksum")
    if found.dict_id:
        raise PeerError(f"a zstd frame needs dictionary {found.dict_id}, none is in use")


def _unpack(frame: bytes | bytearray | memoryview, expected_bytes: int) -> bytes:
    decompressor = zstandard.ZstdDecompressor()
    if expected_bytes:
        return decompressor.decompress(frame, max_output_size=expected_bytes, allow_extra_data=False)
    # For an empty frame the one-shot call looks at nothing but the header, so neither end nor junk would be noticed.
    stream = decompressor.decompressobj()
    raw = stream.decompress(frame)
    if not stream.eof or stream.unused_data:
        raise zstandard.ZstdError("an empty frame with a wrong end")
    return raw
