"""A peer with an admitted key that says what a test wants, where a worker would say what the protocol wants."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import torch
import trio
import xxhash
from sim.scenario import PUPPET, ScriptedWorld

from hetero_async.core.messages import (
    DELTA,
    Ack,
    Bye,
    Heartbeat,
    Hello,
    Lease,
    LeaseRequest,
    Message,
    Nack,
    Push,
    Want,
    Welcome,
)
from hetero_async.core.ranges import Ranges
from hetero_async.core.records import Left
from hetero_async.ports import Lane
from hetero_async.sim.network import DialEnd
from hetero_async.sim.plan import SERVER, WorkerPlan
from hetero_async.sim.process import Process
from hetero_async.tensors.codecs import encode_payload
from hetero_async.tensors.follower import Follower
from hetero_async.tensors.replica import Replica
from hetero_async.transfers import send_chunks

BEAT_SECONDS = 1.0


class Puppet:
    """`heard`: everything that it was told, in its order."""

    def __init__(self, world: ScriptedWorld, process: Process) -> None:
        self.incarnation = self.seq = 0
        self.heard: list[Message] = []
        self.wanted: list[Want] = []
        self._world = world
        student = world.workload.student(WorkerPlan(name="puppet", site="puppet", step_seconds=1.0), 0)
        self._follower = Follower(Replica(student.model))
        self._end = DialEnd(world.network, process, [SERVER])
        self._blobs: dict[int, bytes] = {}
        self._requests = 0

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end.run)
            nursery.start_soon(self._hear, self._end.control)
            nursery.start_soon(self._hear, self._end.bulk)
            nursery.start_soon(self._beat)

    async def _hear(self, lane: Lane) -> None:
        while True:
            message = (await lane.receive()).message
            self.heard.append(message)
            if isinstance(message, Want) and message.kind == DELTA and (blob := self._blobs.get(message.number)):
                self.wanted.append(message)
                await send_chunks(self._end.bulk, self._end.server.key, message, blob, xxhash.xxh3_128_digest(blob))

    async def _beat(self) -> None:
        while True:
            await trio.sleep(BEAT_SECONDS)
            if self.incarnation and self._end.connection:  # a silent one is dialled anew
                await self.say(self.heartbeat())

    def heartbeat(self, incarnation: int = 0) -> Heartbeat:
        return Heartbeat(
            incarnation=incarnation or self.incarnation, state="training", steps=0, steps_per_second=0.0, publish=0,
            bytes_up=0, bytes_down=0,
        )  # fmt: skip

    async def say(self, message: Message, payload: bytes = b"") -> None:
        lane = self._end.bulk if isinstance(message, Push) else self._end.control
        assert await lane.send(self._end.server.key, message, payload)

    async def ask(self, message: Message, *answers: type, payload: bytes = b"") -> Message:
        """Say it, and wait for the next message of one of these kinds."""
        known = len(self.heard)
        await self.say(message, payload)

        def answer() -> list[Message]:
            return [heard for heard in self.heard[known:] if isinstance(heard, answers)]

        await self._world.until(answer, f"the puppet's {type(message).__name__} is answered", seconds=10)
        return answer()[0]

    async def join(self) -> Welcome:
        hello = Hello(
            run=self._world.plan.settings.run, software="simulated", schema_hash=self._follower.schema_hash,
            last_seq=self.seq, claims=(), device="cpu", dtype="fp32", life=b"puppet" + bytes([self.incarnation]),
        )  # fmt: skip
        welcome = await self.ask(hello, Welcome, payload=self._follower.schema)
        assert isinstance(welcome, Welcome)
        self.incarnation = welcome.incarnation
        return welcome

    async def lease(self, count: int, held: Ranges = ()) -> Ranges:
        self._requests += 1
        request = LeaseRequest(
            incarnation=self.incarnation, number=self._requests, held=held, samples=count, batch=count,
            dataset_samples=self._world.plan.dataset_samples,
        )  # fmt: skip
        lease = await self.ask(request, Lease)
        assert isinstance(lease, Lease)
        return lease.ranges

    def told(self, kind: type) -> list[Message]:
        return [message for message in self.heard if isinstance(message, kind)]

    def delta(self, ranges: Ranges, value: float = 1e-3) -> tuple[Push, bytes]:
        """The next delta, on the newest anchor, with this value for every parameter."""
        self.seq += 1
        payload = encode_payload("fp32", torch.full_like(self._world.serving.model.theta, value))
        push = Push(
            incarnation=self.incarnation, seq=self.seq, anchor=self._world.state.publish, anchor_term=1, steps=1,
            ranges=ranges,
            codec="fp32", payload_bytes=len(payload), payload_hash=xxhash.xxh3_128_digest(payload),
        )  # fmt: skip
        return push, payload

    async def push(self, push: Push, payload: bytes) -> Ack | Nack:
        """Offer it as a worker does, hand over what is asked for, and wait for the answer."""
        self._blobs[push.seq] = payload
        # What the judge would have seen at a worker's outbox.
        if (PUPPET, push.seq) not in self._world.judge.story.deltas:
            self._world.judge.account(PUPPET).saved[push.seq] = (push, payload)
        answer = await self.ask(push, Ack, Nack)
        assert isinstance(answer, Ack | Nack)
        return answer

    async def refused(self, push: Push, payload: bytes = b"", **changes: object) -> str:
        """The reason why the delta is refused, with these of its fields changed. Nothing may come of it."""
        known = self._standing()
        answer = await self.push(replace(push, **changes), payload)  # type: ignore[arg-type]
        assert isinstance(answer, Nack), f"{answer} to {push}"
        assert self._standing() == known
        return answer.reason

    def _standing(self) -> tuple[object, ...]:
        """Everything of it that is in the run's state."""
        state = self._world.state
        return replace(state.members[PUPPET]), state.ledger.held(PUPPET), len(self._world.deltas(PUPPET))


@contextlib.asynccontextmanager
async def open_puppet(world: ScriptedWorld) -> AsyncIterator[Puppet]:
    """One that has joined. At the end it leaves, and whatever it still leases goes to others."""
    await world.until(lambda: world.deltas("w0"), "there is a run")
    process = world.processes[PUPPET] = Process(PUPPET, "site0")
    puppet = Puppet(world, process)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(puppet.run)
        await world.until(lambda: puppet._end.connection, "it is connected")
        await puppet.join()
        yield puppet
        await puppet.say(Bye(incarnation=puppet.incarnation))
        await world.until(lambda: len(world.records(Left, PUPPET)), "it has left")
        nursery.cancel_scope.cancel()
