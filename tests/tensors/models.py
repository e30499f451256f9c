"""Models and logs that several tests of the tensors use. Imported, never collected."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from hetero_async.core.outer import RULES
from hetero_async.core.records import Delta, Entry, Genesis, Published, Record, RunSettings, Stepped
from hetero_async.core.state import Member, PendingDelta, State
from hetero_async.tensors.buffers import Changes, with_buffers
from hetero_async.tensors.codecs import encode_payload
from hetero_async.tensors.model import ServerModel
from hetero_async.tensors.pending import Shelf
from hetero_async.tensors.replica import Replica


class Awkward(torch.nn.Module):
    """All that a state_dict can hold: tied, frozen, buffers, without dimensions, without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 6)
        self.frozen = torch.nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.norm = torch.nn.BatchNorm1d(6)
        self.temperature = torch.nn.Parameter(torch.tensor(1.5))
        self.nothing = torch.nn.Parameter(torch.empty(0, 3))
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.frozen(self.embedding(tokens)))
        logits: torch.Tensor = self.head(hidden) * self.temperature
        return logits


class Flat(torch.nn.Module):
    """One vector: for what depends on its length alone."""

    def __init__(self, numel: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.vector = torch.nn.Parameter(values(numel, seed=99).to(dtype))


def values(numel: int, seed: int) -> torch.Tensor:
    """Reproducible on any kind of CPU, unlike randn; both signs, sizes over several powers of two."""
    spread = torch.rand(numel, generator=torch.Generator().manual_seed(seed)).sub_(0.5)
    return spread.mul_(spread).mul_(spread)


def at_merge(version: int) -> State:
    """What a rule decides on: two workers, of whom both have pushed."""
    pending = {n: PendingDelta(worker=f"w{n}", seq=1, anchor_version=version, steps=1, samples=1) for n in range(2)}
    members = {f"w{n}": Member(site="a", active=True) for n in range(2)}
    return State(version=version, members=members, pending=pending)


class Run:
    """A server's model, fed with a log that is written as it goes."""

    def __init__(self, model: torch.nn.Module, settings: RunSettings | None = None, shelf: Shelf | None = None) -> None:
        self.replica = Replica(model)
        self.server = ServerModel(shelf)
        self.entries: list[Entry] = []
        self._deltas: list[int] = []
        self._version = self._publish = 0
        schema = self.replica.schema
        payload, parameters_hash = self.server.genesis_payload(schema.to_bytes(), self.replica.initial_upload())
        self._settings = settings = settings or RunSettings(run="test")
        genesis = Genesis(key="k", settings=settings, schema_hash=schema.hash, parameters_hash=parameters_hash)
        self.append(genesis, payload)

    def append(self, record: Record, payload: bytes = b"") -> Entry:
        entry = Entry(lsn=len(self.entries) + 1, term=1, record=record, payload=payload)
        self.entries.append(entry)
        self.server.apply(entry)
        return entry

    def push(self, delta: torch.Tensor, codec: str = "fp32", buffers: Changes | None = None, samples: int = 1) -> bytes:
        payload = with_buffers(self.replica.schema.buffers, encode_payload(codec, delta), buffers or {})
        self.take(replace(DELTA, seq=len(self.entries), codec=codec, ranges=((0, samples),)), payload)
        return payload

    def take(self, record: Delta, payload: bytes) -> None:
        self._deltas.append(self.append(record, payload).lsn)

    def step(self, weights: Sequence[float] | None = None, gain: float = 0.7) -> None:
        """Merge all that is pending, with equal weights unless told otherwise."""
        deltas, self._deltas = tuple(self._deltas), []
        settings = replace(self._settings, outer_learning_rate=gain)
        coefficients = RULES[settings.rule].coefficients(at_merge(self._version), settings)._asdict()
        self._version += 1
        weights = tuple(weights or [1 / len(deltas)] * len(deltas))
        self.append(Stepped(version=self._version, deltas=deltas, weights=weights, **coefficients))

    def publish(self, codec: str = "fp32", merged: tuple[tuple[str, int], ...] = ()) -> int:
        self._publish += 1
        self.append(Published(number=self._publish, version=self._version, codec=codec, merged=merged))
        return self._publish


DELTA = Delta(
    worker="a/0",
    incarnation=1,
    seq=1,
    anchor_version=0,
    steps=1,
    ranges=((0, 1),),
    codec="fp32",
    norm=1.0,
    payload_hash=b"",
)


def eventful(numel: int, rule: str) -> Run:
    """A log with every codec, uneven weights, several steps and publishes; ends with a delta still pending."""
    run = Run(Flat(numel), RunSettings(run="test", rule=rule, momentum=0.9))
    for round_number, codec in enumerate(("int8", "int4", "bf16", "fp32")):
        for worker in range(3):
            run.push(values(numel, seed=10 * round_number + worker), codec)
        run.step(weights=(0.5, 0.3, 0.2), gain=0.7 / (round_number + 1))
        run.publish(codec)
    run.push(values(numel, seed=77), "int4")
    return run
