"""What a standby is sent: what it asked for, and nothing more until it asks again."""

from dataclasses import dataclass, field
from pathlib import Path

import trio
import trio.testing
from shell.small_log import entries_of, inline, open_log

from hetero_async.core.messages import RECORDS, Chunk, Message, Want
from hetero_async.feed import Feed
from hetero_async.formats.chunks import CHUNK_BYTES, CREDITS
from hetero_async.formats.shipment import unpack_shipment
from hetero_async.ports import Incoming, Peer

STANDBY = Peer(key=b"b", role="standby", site="b", worker="b")


@dataclass
class Lane:
    """A lane whose other end is the test."""

    sent: list[tuple[Chunk, bytes]] = field(default_factory=list)

    async def receive(self) -> Incoming:
        raise AssertionError("a feed is told what came")

    async def send(self, key: bytes, message: Message, payload: bytes | memoryview = b"") -> bool:
        await trio.lowlevel.checkpoint()
        assert key == STANDBY.key and isinstance(message, Chunk)
        self.sent.append((message, bytes(payload)))
        return True


def test_a_standby_that_asks_nothing_more_is_sent_nothing_more_however_long_the_log_grows(tmp_path: Path) -> None:
    lane = Lane()

    async def main() -> None:
        log = open_log(tmp_path / "log")
        feed = Feed(log=log, store=None, lane=lane, blocking=inline)  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(feed.run)
            await ask(feed, Want(kind=RECORDS, number=1, first=0, count=1))
            for lsn in range(1, 50):
                await log.append(entries_of(lsn, lsn))
                feed.grown()
                await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        log.close()

    trio.run(main)
    [(chunk, shipment)] = lane.sent
    assert chunk.number == 1
    assert unpack_shipment(shipment)[1] == entries_of(1, 1), "the first there was; what came later waits in the log"


def test_a_standby_that_asks_for_too_much_is_sent_its_credits(tmp_path: Path) -> None:
    lane = Lane()
    large = entries_of(1, 1, payload_bytes=2 * CREDITS * CHUNK_BYTES)

    async def main() -> None:
        log = open_log(tmp_path / "log")
        await log.append(large)
        feed = Feed(log=log, store=None, lane=lane, blocking=inline)  # type: ignore[arg-type]
        await ask(feed, Want(kind=RECORDS, number=1, first=0, count=1000))
        log.close()

    trio.run(main)
    assert [chunk.index for chunk, _ in lane.sent] == list(range(CREDITS))


async def ask(feed: Feed, want: Want) -> None:
    await feed.wanted(Incoming(peer=STANDBY, message=want, payload=b""), want)
