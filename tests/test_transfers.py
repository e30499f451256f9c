"""Pulling an object over a lane that drops, repeats and reorders."""

import random
from collections.abc import Sequence

import pytest
import trio
import xxhash

from hetero_async.core.messages import Chunk, Message, Want
from hetero_async.errors import PeerError
from hetero_async.formats.chunks import CHUNK_BYTES, CREDITS
from hetero_async.ports import Incoming
from hetero_async.transfers import STALL_MS, Pull, send_chunks

BLOB = random.Random(0).randbytes(CHUNK_BYTES * 20 + 123)


class Recorder:
    """A lane that keeps what it is given."""

    def __init__(self, room: int = 1000) -> None:
        self.sent: list[tuple[Message, bytes]] = []
        self.room = room

    async def send(self, key: bytes, message: Message, payload: bytes = b"") -> bool:
        if len(self.sent) >= self.room:
            return False
        self.sent.append((message, payload))
        return True

    async def receive(self) -> Incoming:
        raise AssertionError("nobody receives here")


def answered(wants: Sequence[Want], blob: bytes = BLOB) -> list[tuple[Chunk, bytes]]:
    lane = Recorder()
    for want in wants:
        trio.run(send_chunks, lane, b"key", want, blob, xxhash.xxh3_128_digest(blob))
    return [(message, payload) for message, payload in lane.sent if isinstance(message, Chunk)]


def test_an_object_comes_over_whole_and_no_more_than_the_credits_are_ever_under_way() -> None:
    pull = Pull("publish", 7, 0, limit=len(BLOB))
    under_way = answered(pull.wants())
    while not pull.is_complete:
        assert 0 < len(under_way) <= CREDITS
        pull.add(*under_way.pop(0), now_ms=1)
        under_way += answered(pull.wants()) if not pull.is_complete else []
    assert pull.assembly is not None
    assert pull.assembly.result() == BLOB


@pytest.mark.parametrize("seed", range(5))
def test_loss_repetition_and_disorder_cost_only_time(seed: int) -> None:
    chance = random.Random(seed)
    pull = Pull("delta", 1, 0, limit=len(BLOB))
    wants = pull.wants()
    for now_ms in range(0, 10_000_000, 10_000):
        arriving = [chunk for chunk in answered(wants) for _ in range(chance.choice([0, 1, 1, 2]))]
        chance.shuffle(arriving)
        for chunk, payload in arriving:
            pull.add(chunk, payload, now_ms)
        if pull.is_complete:
            break
        wants = pull.ask_again(now_ms)
    assert pull.assembly is not None
    assert pull.assembly.result() == BLOB


def test_what_takes_as_long_as_the_chunks_before_it_is_not_called_lost() -> None:
    pull = Pull("delta", 1, 0, limit=len(BLOB))
    pull.size(len(BLOB), xxhash.xxh3_128_digest(BLOB))
    assert not pull.is_overdue(STALL_MS), "a chunk over a thin link"
    assert pull.is_overdue(STALL_MS + 1)
    pull.add(*answered(pull.wants())[0], now_ms=400)
    assert [pull.is_overdue(now_ms) for now_ms in (401, 400 + 800, 400 + 801)] == [False, False, True]
    pull.ask_again(2000)
    assert not pull.is_overdue(2001), "asked again just now"


def test_a_small_object_is_called_lost_as_much_sooner_as_it_is_smaller() -> None:
    pull = Pull("delta", 1, 0, limit=len(BLOB))
    pull.size(CHUNK_BYTES // 8, bytes(16))
    assert [pull.is_overdue(now_ms) for now_ms in (STALL_MS // 8, STALL_MS // 8 + 1)] == [False, True]


def test_an_object_over_the_limit_is_refused_before_its_first_chunk_is_kept() -> None:
    pull = Pull("publish", 7, 0, limit=len(BLOB) - 1)
    with pytest.raises(PeerError, match="at most"):
        pull.add(*answered(pull.wants())[0], now_ms=1)


def test_a_full_lane_ends_the_answer_and_the_receiver_asks_again() -> None:
    lane = Recorder(room=3)
    want = Want(kind="publish", number=1, first=0, count=CREDITS)
    trio.run(send_chunks, lane, b"key", want, BLOB, b"h" * 16)
    assert [message.index for message, _ in lane.sent if isinstance(message, Chunk)] == [0, 1, 2]


def test_nobody_gets_more_at_once_than_the_credits_however_much_he_asks_for() -> None:
    want = Want(kind="publish", number=1, first=2, count=10**9)
    assert [chunk.index for chunk, _ in answered([want])] == list(range(2, 2 + CREDITS))
    assert answered([Want(kind="publish", number=1, first=10**9, count=1)]) == []


def test_what_the_object_before_took_is_waited_for_this_one() -> None:
    """A small delta over a thin link, of one chunk: nothing of itself says how long that takes."""
    pull = Pull("delta", 2, 0, limit=len(BLOB), expected_ms=2500)
    pull.size(CHUNK_BYTES // 8, b"")
    assert [pull.is_overdue(now_ms) for now_ms in (STALL_MS // 8 + 1, 5000, 5001)] == [False, False, True]
    quick = Pull("delta", 3, 0, limit=len(BLOB), expected_ms=5)
    quick.size(CHUNK_BYTES // 8, b"")
    assert [quick.is_overdue(now_ms) for now_ms in (STALL_MS // 8, STALL_MS // 8 + 1)] == [False, True]


def test_what_is_late_over_a_thin_link_is_asked_for_again_ever_more_seldom() -> None:
    pull = Pull("publish", 1, 0, limit=len(BLOB))
    asked, now_ms = [], 0
    while now_ms < 240_000:
        now_ms += 500
        if pull.is_stalled(now_ms):
            asked.append(now_ms // 1000)
            assert pull.ask_again(now_ms) == pull.wants()
    assert asked == [8, 24, 56, 116, 176, 236]
    pull.add(*answered(pull.wants())[0], now_ms=now_ms)
    assert (pull.slowest_ms, pull.repeats) == (240_000, 0), "it took as long as that, however often it was asked for"


def test_what_the_link_took_before_is_not_asked_for_twice() -> None:
    pull = Pull("publish", 2, 0, limit=len(BLOB), expected_ms=9_000)
    assert [pull.is_stalled(now_ms) for now_ms in (STALL_MS, 17_999, 18_000)] == [False, False, True]
    pull.add(*answered(pull.wants())[0], now_ms=12_000)
    assert [pull.is_stalled(now_ms) for now_ms in (12_000 + 23_999, 12_000 + 24_000)] == [False, True]


def test_a_question_that_waits_for_records_is_repeated_as_often_as_ever() -> None:
    pull = Pull("records", 5, 0, limit=len(BLOB))
    for now_ms in range(STALL_MS, 20 * STALL_MS, STALL_MS):
        assert pull.is_stalled(now_ms)
        pull.ask_again(now_ms)
    chunk, payload = answered([Want(kind="records", number=5, first=0, count=1)])[0]
    pull.add(chunk, payload, now_ms=30 * STALL_MS)
    assert pull.slowest_ms == 0, "that nothing came says nothing of the link"
