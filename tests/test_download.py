"""Over which lane a worker asks for what it fetches."""

import random
from dataclasses import dataclass, field

import trio
import trio.testing
import xxhash

from hetero_async.core.messages import PUBLISH, SNAPSHOT, Chunk, Message, Want
from hetero_async.download import Download
from hetero_async.formats.chunks import CHUNK_BYTES, CREDITS, slice_chunk
from hetero_async.ports import Peer
from hetero_async.traffic import Traffic
from hetero_async.transfers import STALL_MS

BLOB = random.Random(0).randbytes(CHUNK_BYTES * 12)


SERVER = Peer(key=b"key", role="server", site="", worker="")


@dataclass
class Lane:
    is_open: bool = True
    sent: list[Message] = field(default_factory=list)

    async def send(self, key: bytes, message: Message, payload: bytes | memoryview = b"") -> bool:
        await trio.lowlevel.checkpoint()
        if self.is_open:
            self.sent.append(message)
        return self.is_open

    def taken(self) -> list[Message]:
        taken, self.sent = self.sent, []
        return taken


@dataclass
class Wires:
    control: Lane = field(default_factory=Lane)
    bulk: Lane = field(default_factory=Lane)
    generation: int = 1
    server: Peer = SERVER


def chunk(kind: str, number: int, index: int, blob: bytes = BLOB) -> tuple[Chunk, bytes]:
    digest = xxhash.xxh3_128_digest(blob)
    told = Chunk(kind=kind, number=number, index=index, total_bytes=len(blob), total_hash=digest)
    return told, bytes(slice_chunk(blob, index))


def first(kind: str, number: int) -> Want:
    return Want(kind=kind, number=number, first=0, count=1)


def test_what_begins_a_download_passes_what_is_sent_and_the_rest_follows_the_chunks() -> None:
    async def main() -> None:
        wires = Wires()
        download = Download(wires, Traffic())  # type: ignore[arg-type]
        await download.follow((SNAPSHOT, 3))
        assert (wires.control.taken(), wires.bulk.taken()) == ([], [first(SNAPSHOT, 3)]), "so the server knows the way"
        small = bytes(100)
        assert await download.add(*chunk(SNAPSHOT, 3, 0, small)) is not None
        download.end()

        await download.follow((PUBLISH, 4))
        assert (wires.control.taken(), wires.bulk.taken()) == ([first(PUBLISH, 4)], [])
        assert await download.add(*chunk(PUBLISH, 4, 0)) is None
        assert wires.control.taken() == [], "as many as there are chunks; heartbeats are few"
        assert wires.bulk.taken() == [Want(kind=PUBLISH, number=4, first=1, count=CREDITS)]

        wires.generation += 1
        download.end()
        await download.follow((PUBLISH, 5))
        assert (wires.control.taken(), wires.bulk.taken()) == ([], [first(PUBLISH, 5)]), "another connection"

    trio.run(main)


def test_while_bulk_takes_nothing_the_server_does_not_know_the_way() -> None:
    async def main() -> None:
        wires = Wires(bulk=Lane(is_open=False))
        download = Download(wires, Traffic())  # type: ignore[arg-type]
        for number in (1, 2):
            await download.follow((PUBLISH, number))
            assert wires.control.taken() == []
        wires.bulk.is_open = True
        await trio.sleep(STALL_MS / 1000)
        await download.follow((PUBLISH, 2))
        assert wires.bulk.taken() == [first(PUBLISH, 2)], "said again where it can be answered"

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.01))


def test_what_was_under_way_on_a_connection_that_is_gone_is_asked_for_at_once() -> None:
    async def main() -> None:
        wires = Wires()
        download = Download(wires, Traffic())  # type: ignore[arg-type]
        await download.follow((PUBLISH, 1))
        assert await download.add(*chunk(PUBLISH, 1, 0)) is None
        wires.bulk.taken()
        download.reconnected()
        await download.follow((PUBLISH, 1))
        assert wires.bulk.taken() == [Want(kind=PUBLISH, number=1, first=1, count=CREDITS)]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.01))
