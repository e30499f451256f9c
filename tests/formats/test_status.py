"""A status as it travels: as large as a run of thousands of workers needs, and no larger than its reader allows."""

import json
import random

import pytest
from watch.statuses import status, worker

from hetero_async.errors import PeerError
from hetero_async.formats.chunks import CHUNK_BYTES
from hetero_async.formats.compression import compress
from hetero_async.formats.status import STATUS_BYTES_MAX, pack_status, unpack_status


def test_five_thousand_workers_fit_one_frame() -> None:
    chance = random.Random(5)
    rows = [
        worker(
            worker=f"s{number % 50}-{number}", steps=chance.randrange(10**6), steps_per_second=chance.random(),
            bytes_up=chance.randrange(10**9), bytes_down=chance.randrange(10**9), samples=chance.randrange(10**7),
        )
        for number in range(5000)
    ]  # fmt: skip
    told = status(workers=rows)
    packed = pack_status(told)
    assert len(json.dumps(told)) > 2 * CHUNK_BYTES > 2 * len(packed)
    assert unpack_status(packed) == told


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"", "not a zstd frame"),
        (b"{}", "not a zstd frame"),
        (compress(b"{"), "not JSON"),
        (compress(b"[" * 100_000), "not JSON"),
        (compress(b"\xff"), "not JSON"),
        (compress(b"[1]"), "no JSON object"),
        (compress(bytes(STATUS_BYTES_MAX + 1)), "at most 16777216 are allowed"),
        (compress(b"{}")[:-1], "not a whole zstd frame"),
    ],
)
def test_what_is_no_status_is_refused(payload: bytes, why: str) -> None:
    with pytest.raises(PeerError, match=why):
        unpack_status(payload)
