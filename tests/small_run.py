"""A short run's log made by hand: the real core and the real codecs, without sockets, files or training."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import xxhash

from hetero_async.core.admission import Facts
from hetero_async.core.events import Applied, Provided, Received, Tick
from hetero_async.core.messages import Ack, Hello, Lease, LeaseRequest, Message, Push
from hetero_async.core.records import Entry, RunSettings
from hetero_async.core.server import Server
from hetero_async.core.state import State
from hetero_async.tensors.codecs import encode_payload
from hetero_async.tensors.model import ServerModel
from hetero_async.tensors.replica import Replica

SAMPLES = 64
BATCH = 8


def tiny_model() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))


@dataclass
class SmallRun:
    """`entries` is the log, `acks` what workers were told: worker, seq, payload hash; `pushed` are the deltas.

    `keys` names the keys of workers that do not have the usual one.
    """

    settings: RunSettings = field(default_factory=lambda: RunSettings(run="small", samples=SAMPLES, merge="per-push"))
    make_model: Callable[[], torch.nn.Module] = tiny_model
    entries: list[Entry] = field(default_factory=list)
    acks: list[tuple[str, int, str]] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)
    pushed: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = ServerModel()
        self.server = Server(self.settings, State())
        self.replica = Replica(self.make_model())
        schema = self.replica.schema.to_bytes()
        payload, parameters_hash = self.model.genesis_payload(schema, self.replica.initial_upload())
        self.server.step(
            Provided(
                now_ms=0,
                worker="a-0",
                key=self.key_of("a-0"),
                schema_hash=self.replica.schema.hash,
                parameters_hash=parameters_hash,
                payload=payload,
            )
        )
        self.settle()

    def key_of(self, worker: str) -> str:
        return self.keys.get(worker, f"key-of-{worker}")

    def settle(self) -> list[Message]:
        """What serve.py does: append, apply, send."""
        told: list[Message] = []
        ready = self.server.ready()
        while ready.records or ready.messages:
            self.entries.extend(ready.records)
            for entry in ready.records:
                self.model.apply(entry)
            told.extend(outgoing.message for outgoing in ready.messages)
            if ready.records:
                hashed = Applied(oldest_publish=self.model.oldest_publish(), model_hash=self.model.model_hash())
                self.server.step(hashed)
            ready = self.server.ready()
        return told

    def say(self, worker: str, message: Message, payload: bytes = b"", facts: Facts | None = None) -> list[Message]:
        received = Received(
            now_ms=0,
            worker=worker,
            key=self.key_of(worker),
            site="a",
            message=message,
            payload=payload,
            facts=facts or Facts(),
        )
        self.server.step(received)
        self.server.step(Tick(now_ms=0))
        return self.settle()

    def join(self, worker: str) -> None:
        hello = Hello(
            run="small",
            software="0",
            schema_hash=self.replica.schema.hash,
            last_seq=0,
            claims=(),
            device="cpu",
            dtype="fp32",
            life=len(self.entries).to_bytes(8),
        )
        self.say(worker, hello, self.replica.schema.to_bytes())

    def lease(self, worker: str) -> Lease:
        """A batch; the same again as long as it is not pushed."""
        request = LeaseRequest(
            incarnation=self.server.state.members[worker].incarnation,
            number=1,
            held=(),
            samples=BATCH,
            batch=BATCH,
            dataset_samples=SAMPLES,
        )
        (lease,) = [message for message in self.say(worker, request) if isinstance(message, Lease)]
        return lease

    def push(self, worker: str, codec: str = "int8", scale: float = 0.01) -> None:
        """Lease a batch, train on it (noise will do), push, be acknowledged."""
        member = self.server.state.members[worker]
        lease = self.lease(worker)
        delta = torch.randn(self.replica.schema.numel, generator=torch.Generator().manual_seed(len(self.entries)))
        self.pushed.append(delta * scale)
        payload = encode_payload(codec, delta * scale)
        push = Push(
            incarnation=member.incarnation,
            seq=member.last_seq + 1,
            anchor=self.server.state.publish,
            anchor_term=1,
            steps=1,
            ranges=lease.ranges,
            codec=codec,
            payload_bytes=len(payload),
            payload_hash=xxhash.xxh3_128_digest(payload),
        )
        for message in self.say(worker, push, payload, self.model.inspect(codec, payload)):
            if isinstance(message, Ack):
                self.acks.append((worker, message.seq, push.payload_hash.hex()))
