"""A run's status on its way to whoever asks: JSON, compressed, since a thousand workers' rows would not fit a frame."""

import json
from collections.abc import Mapping
from typing import Any

import zstandard

from hetero_async.errors import PeerError
from hetero_async.formats.compression import compress, decompress

# Ten thousand workers' rows; it bounds what an asker can be made to allocate.
STATUS_BYTES_MAX = 16 * 1024 * 1024


def pack_status(status: Mapping[str, Any]) -> bytes:
    return compress(json.dumps(status).encode())


def unpack_status(payload: bytes | memoryview) -> dict[str, Any]:
    """Raises PeerError."""
    try:
        size = zstandard.get_frame_parameters(payload).content_size
    except zstandard.ZstdError as error:
        raise PeerError(f"the status is not a zstd frame: {error}") from error
    if size > STATUS_BYTES_MAX:
        raise PeerError(f"a status of {size} bytes, at most {STATUS_BYTES_MAX} are allowed")
    try:
        status = json.loads(decompress(payload, size))
    except (ValueError, RecursionError) as error:
        raise PeerError("the status is not JSON") from error
    if not isinstance(status, dict):
        raise PeerError("the status is no JSON object")
    return status
