"""A link of 2 Mbit/s, full of deltas for a minute: the site behind it must not look dead."""

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from e2e.throttle import Throttle

from hetero_async.core.messages import DELTA, Beat, Chunk, Heartbeat, Want
from hetero_async.formats.chunks import CHUNK_BYTES, CREDITS
from hetero_async.shell.keys import AllowList, create_keypair, load_public
from hetero_async.shell.link import SILENCE_SECONDS, ServerLink, WorkerLink, open_server_link, open_worker_link
from hetero_async.shell.telemetry import LineObserver

BITS_PER_SECOND = 2e6
FULL_SECONDS = 55.0  # of test; several times every time-out that could end a connection but the bulk's own
BEAT_SECONDS = 1.0


@dataclass(slots=True)
class Tally:
    asked: int = 0
    answered: int = 0
    worst_seconds: float = 0.0
    chunks: list[int] = field(default_factory=list)


def test_no_heartbeat_is_missed_while_the_bulk_lane_is_full(tmp_path: Path) -> None:
    tally = trio.run(fill_for_a_while, tmp_path)
    print(f"{tally.answered} of {tally.asked} answered, the slowest in {tally.worst_seconds:.2f} s, {tally.chunks=}")
    assert tally.answered == tally.asked >= 0.8 * FULL_SECONDS / (BEAT_SECONDS + 1)
    assert tally.chunks == list(range(len(tally.chunks)))  # in order, none lost: the connection held
    assert len(tally.chunks) * CHUNK_BYTES > 0.8 * FULL_SECONDS * BITS_PER_SECOND / 8
