"""A worker's machine on a bench: what it is told, and what it then owes."""

from hetero_async.core.messages import (
    Hello,
    LeaseRequest,
    Message,
    Push,
    Welcome,
)
from hetero_async.core.worker import Worker
from hetero_async.core.worker_events import Anchor, Cut, Heard, Owed, Tick, Vitals

HELLO = Hello(run="r", software="0", schema_hash=b"s", last_seq=0, claims=(), device="cpu", dtype="fp32", life=b"first")
WELCOME = Welcome(
    incarnation=1, last_seq=0, granted=(), publish=0, common=0, seed=7, codec="int8", stretch=4, life=b"first"
)  # fmt: skip


class Bench:
    def __init__(self, *, joined: bool = True) -> None:
        self.worker = Worker(HELLO)
        self.now_ms = 1000
        if joined:
            self.hear(WELCOME)

    def hear(self, message: Message, term: int = 0) -> Owed:
        self.worker.step(Heard(now_ms=self.now_ms, message=message, term=term))
        return self.worker.ready()

    def cut(self, *consumed: tuple[int, int], anchor: int = 0) -> Owed:
        self.worker.step(
            Cut(
                now_ms=self.now_ms, anchor=Anchor(anchor, self.worker.term), steps=4, ranges=consumed, codec="int8",
                payload_bytes=9,
                payload_hash=b"%d" % consumed[0][0],
            )
        )  # fmt: skip
        return self.worker.ready()

    def wait(self, milliseconds: int, **vitals: object) -> Owed:
        self.now_ms += milliseconds
        self.worker.step(Tick(now_ms=self.now_ms, vitals=Vitals(**vitals)))  # type: ignore[arg-type]
        return self.worker.ready()


def offered(owed: Owed) -> list[int]:
    return [message.seq for message in owed.bulk if isinstance(message, Push)]


def only(owed: Owed, kind: type) -> list[Message]:
    return [message for message in owed.control if isinstance(message, kind)]


def ask(bench: Bench) -> int:
    (request,) = only(bench.wait(500, wanted_samples=16), LeaseRequest)
    assert isinstance(request, LeaseRequest)
    return request.number
