"""Admitted workers that speak the protocol well and mean no good: they join, lease, and offer deltas that cost memory.

Blocking and many in one thread, so that a hundred of them cost an attacker little.
"""

import contextlib
from dataclasses import dataclass, field
from threading import Event

import zmq
from hostile.attacks import Target, secure

from hetero_async.core.messages import Chunk, Hello, Lease, LeaseRequest, Message, Push, Want, Welcome
from hetero_async.formats.chunks import chunk_count, slice_chunk
from hetero_async.formats.frames import decode
from hetero_async.shell.link import SOFTWARE
from hetero_async.shell.wire import TERM, pack

ASK_AGAIN_ROUNDS = 20
POLL_MS = 100


@dataclass
class Member:
    """It hands over all chunks of its delta but the last, and holds the place; `is_whole`: the last as well."""

    target: Target
    schema: bytes
    payload: bytes
    payload_hash: bytes
    is_whole: bool
    incarnation: int = 0
    seq: int = 0
    offer: Push | None = None
    sockets: "list[zmq.Socket[bytes]]" = field(default_factory=list)

    def connect(self, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        for port in (self.target.control, self.target.bulk):
            raw = context.socket(zmq.DEALER)
            raw.setsockopt(zmq.LINGER, 0)
            secure(raw, self.target, "member")
            raw.connect(f"tcp://127.0.0.1:{port}")
            self.sockets.append(raw)

    def insist(self) -> None:
        """Say again whatever is due now."""
        control, bulk = self.sockets
        if not self.incarnation:
            hello = Hello(
                run="tiny", software=SOFTWARE, schema_hash=b"", last_seq=0, claims=(), device="cpu", dtype="fp32",
                life=self.target.public[:8],
            )  # fmt: skip
            say(control, hello, self.schema)
        elif self.offer is None:
            request = LeaseRequest(
                incarnation=self.incarnation, number=1, held=(), samples=8, batch=8, dataset_samples=DATASET_SAMPLES
            )
            say(control, request)
        else:
            say(bulk, self.offer)

    def hear(self, message: Message) -> None:
        match message:
            case Welcome():
                self.incarnation, self.seq, self.offer = message.incarnation, message.last_seq + 1, None
            case Lease(ranges=ranges) if ranges and self.offer is None:
                self.offer = Push(
                    incarnation=self.incarnation, seq=self.seq, anchor=0, anchor_term=1, steps=1, ranges=ranges,
                    codec="fp32",
                    payload_bytes=len(self.payload), payload_hash=self.payload_hash,
                )  # fmt: skip
            case Want():
                self._hand_over(message)

    def _hand_over(self, want: Want) -> None:
        count = chunk_count(len(self.payload))
        for index in range(want.first, min(want.first + want.count, count if self.is_whole else count - 1)):
            chunk = Chunk(
                kind=want.kind, number=want.number, index=index, total_bytes=len(self.payload),
                total_hash=self.payload_hash,
            )  # fmt: skip
            say(self.sockets[1], chunk, bytes(slice_chunk(self.payload, index)))


DATASET_SAMPLES = 100_000


def say(raw: "zmq.Socket[bytes]", message: Message, payload: bytes = b"") -> None:
    with contextlib.suppress(zmq.Again):
        raw.send_multipart(pack(message, payload), zmq.DONTWAIT)


def hold_places(members: list[Member], stop: Event) -> None:
    with zmq.Context() as context:
        context.setsockopt(zmq.MAX_SOCKETS, 4096)
        poller = zmq.Poller()
        owner = {}
        for member in members:
            member.connect(context)
            for raw in member.sockets:
                poller.register(raw, zmq.POLLIN)
                owner[raw] = member
        rounds = 0
        while not stop.is_set():
            if rounds % ASK_AGAIN_ROUNDS == 0:
                for member in members:
                    member.insist()
            rounds += 1
            for raw, _ in poller.poll(POLL_MS):
                with contextlib.suppress(zmq.Again):
                    while not stop.is_set():
                        message = decode(raw.recv_multipart(zmq.DONTWAIT)[0][TERM.size :])
                        owner[raw].hear(message)  # type: ignore[arg-type]
        for raw in owner:
            raw.close()
