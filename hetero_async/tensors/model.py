"""The tensors' half of the run's state on the server: parameters θ, the rule's momenta, the shadow θ̂, pending deltas.

Fulfils ports.Model. All vectors are flat fp32 on the CPU, in the schema's order; the model's own buffers, which a merge
averages and a publish shows as they are, lie beside them as buffers.py has them. `apply` is the only thing that changes
them, and only by records, so the same log gives the same bits. A merge is one pass over blocks that fit in a cache.
"""

import contextlib
import functools
import math
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError

from hetero_async.arrays import Array
from hetero_async.core import ranges
from hetero_async.core.admission import Cause, Facts, NotAdmitted
from hetero_async.core.messages import INITIAL, PUBLISH, SNAPSHOT
from hetero_async.core.publish_note import PublishNote
from hetero_async.core.records import Delta, Entry, Genesis, Published, Stepped
from hetero_async.errors import LogCorrupt, PeerError, UserError
from hetero_async.formats.compression import compress
from hetero_async.formats.parts import pack_parts, unpack_parts
from hetero_async.ports import ModelSnapshot
from hetero_async.tensors import outer, passes
from hetero_async.tensors.beginning import NOTHING_PUBLISHED, coarse, constants_of, initial
from hetero_async.tensors.buffers import (
    Changes,
    Specs,
    Values,
    buffers_in,
    changes_between,
    first_infinite,
    is_same,
    numbers_of,
    payload_bytes_max,
    put_into,
    with_buffers,
    without_buffers,
)
from hetero_async.tensors.buffers import merged as buffers_merged
from hetero_async.tensors.codecs import CODECS, encode_payload, open_payload
from hetero_async.tensors.frozen import Frozen
from hetero_async.tensors.passes import Crew
from hetero_async.tensors.pending import InMemory, Pending, PendingDeltas, Shelf
from hetero_async.tensors.replica import hash_of, read_object, write_object
from hetero_async.tensors.schema import Schema, difference

# Publishes are held for workers that fall behind: at least the newest two, so that whoever is at work on the last one
# still gets it, at most so many, and no more of them than a snapshot has bytes.
PUBLISHES_HELD_MIN = 2
PUBLISHES_HELD_MAX = 256
SNAPSHOTS_HELD = 2
# Bytes a payload may have beyond its codec's: zstd's frame and what it adds to what it cannot shrink.
PAYLOAD_SLACK_BYTES = 64 * 1024
# Deltas that a merge has open at once.
MERGED_AT_ONCE = 4
# A schema may claim any size; so much is the book of chunks that the receiver keeps for it a few megabytes.
INITIAL_BYTES_MAX = 1 << 40


@dataclass(frozen=True, slots=True)
class Standing:
    """A shadow and its publish. Replaced as one, never written to: `fetch` reads it in another thread."""

    note: PublishNote
    shadow: torch.Tensor
    buffers: Values


class ServerModel:
    """Empty until Genesis is applied or a snapshot is loaded."""

    def __init__(self, shelf: Shelf | None = None) -> None:
        self.schema: Schema | None = None
        self.theta = torch.empty(0)
        self.momenta: list[torch.Tensor] = []
        self.buffers: Values = ()
        self._constants = b""
        self._initial = b""
        self._pending = PendingDeltas(shelf or InMemory())
        self._standing = Standing(NOTHING_PUBLISHED, torch.empty(0), ())
        self._publishes: dict[int, bytes] = {}
        self._snapshots: dict[int, bytes] = {}
        self._norm = 0.0  # of θ
        self._hash = b""  # of all of them, until one changes
        self._frozen: list[weakref.ref[Frozen]] = []
        self._crew = Crew()

    @property
    def shadow(self) -> torch.Tensor:
        """θ̂, what workers hold. Not to be written to."""
        return self._standing.shadow

    @property
    def _specs(self) -> Specs:
        return self.schema.buffers if self.schema is not None else ()

    # --- the log ---

    def apply(self, entry: Entry) -> None:
        """Raises LogCorrupt where a payload is not what its record says."""
        try:
            self._apply(entry)
        except PeerError as error:
            raise LogCorrupt(
                f"record {entry.lsn} ({type(entry.record).__name__}) cannot be applied: {error}"
            ) from error

    def _apply(self, entry: Entry) -> None:
        if isinstance(entry.record, Genesis | Stepped | Published):
            self._hash = b""
        match entry.record:
            case Genesis() as genesis:
                self._begin(genesis, entry.payload)
            case Delta() as delta:
                self._pending.add(entry.lsn, delta.codec, entry.payload, ranges.size(delta.ranges))
            case Stepped() as stepped:
                self._step(stepped)
            case Published() as published:
                self._publish(published)

    def _begin(self, genesis: Genesis, payload: bytes) -> None:
        packed_schema, upload = unpack_parts(payload, 2)
        parameters, constants = unpack_parts(upload, 2)
        schema = Schema.from_bytes(bytes(packed_schema))
        self.theta, self.buffers = initial(bytes(packed_schema), parameters, constants)
        if hash_of(self.theta, self.buffers) != genesis.parameters_hash:
            raise LogCorrupt("the initial parameters are not those that the genesis record names")
        self._constants = bytes(constants)
        self.momenta = [torch.zeros_like(self.theta) for _ in range(outer.buffers_of(genesis.settings.rule))]
        self._norm = passes.norm(self._crew, _reading(self.theta), schema.numel)
        note = replace(NOTHING_PUBLISHED, shadow_hash=genesis.parameters_hash)
        self._standing = Standing(note, self.theta.clone(), self.buffers)
        self._initial = coarse(schema.buffers, self.theta, self.buffers)
        self.schema = schema  # last: from here on there is something to fetch

    def _step(self, stepped: Stepped) -> None:
        frozen = [vector for frozen in self._frozen if (vector := frozen()) is not None]
        coefficients = (stepped.decay, stepped.intake, stepped.gain, stepped.pull)
        weighed = list(zip(self._pending.of(stepped.deltas), stepped.weights, strict=True))
        mean, given = None, list[tuple[int, Changes]]()
        while len(weighed) > MERGED_AT_ONCE:
            mean = torch.zeros_like(self.theta) if mean is None else mean
            passes.add(self._crew, mean, self._opened(weighed[:MERGED_AT_ONCE], given))
            del weighed[:MERGED_AT_ONCE]
        deltas = self._opened(weighed, given)
        self._norm = passes.merge(self._crew, self.theta, self.momenta, deltas, coefficients, mean, frozen)
        self.buffers = buffers_merged(self.buffers, given)
        self._pending.drop(stepped.deltas)

    def _opened(self, weighed: Sequence[tuple[Pending, float]], given: list[tuple[int, Changes]]) -> passes.Weighed:
        """Of these few, as `passes.merge` takes them; opened, all of a crowd would be more than the model. `given` is
        told of each one's samples and buffers."""

        def opened(delta: Pending) -> tuple[torch.Tensor, Changes]:
            return self._pending.opened(delta, self._specs, self.theta.numel())

        found = self._crew.each(opened, [delta for delta, _ in weighed])
        given += [(delta.samples, changes) for (delta, _), (_, changes) in zip(weighed, found, strict=True)]
        return [(CODECS[delta.codec], raw, w) for (delta, w), (raw, _) in zip(weighed, found, strict=True)]

    def _publish(self, published: Published) -> None:
        """θ̂ ← θ̂ + D(C(θ − θ̂)). What the codec lost stays in θ − θ̂ and goes with the next publish."""
        codec, before = CODECS[published.codec], self._standing.shadow
        raw, shadow = passes.follow(self._crew, self.theta, before, codec)
        coded = compress(raw.numpy().data)
        payload = with_buffers(self._specs, coded, changes_between(self._standing.buffers, self.buffers))
        note = PublishNote(
            number=published.number,
            version=published.version,
            codec=published.codec,
            merged=published.merged,
            shadow_hash=hash_of(shadow, self.buffers),
        )
        self._publishes = self._held({**self._publishes, note.number: write_object(note, payload)})
        self._standing = Standing(note, shadow, self.buffers)

    def _held(self, publishes: dict[int, bytes]) -> dict[int, bytes]:
        snapshot_bytes = 4 * self.theta.numel()
        while len(publishes) > PUBLISHES_HELD_MIN and (
            len(publishes) > PUBLISHES_HELD_MAX or sum(map(len, publishes.values())) > snapshot_bytes
        ):
            del publishes[min(publishes)]
        return publishes

    # --- what workers send and fetch ---

    def inspect(self, codec: str, payload: bytes) -> Facts:
        numel = self.theta.numel()
        try:
            raw = open_payload(codec, without_buffers(self._specs, payload), numel)
            infinite = first_infinite(self._specs, buffers_in(self._specs, payload))
        except PeerError as error:
            return _unreadable(error)
        if infinite:
            reason = f"not finite: buffer {infinite} holds a NaN or an infinity"
            return Facts(refusal=NotAdmitted(reason, Cause.INFINITE))
        facts = self._facts(functools.partial(CODECS[codec].decode, raw, numel), numel)
        return replace(facts, scale=max(self._norm, math.sqrt(numel)))

    def inspect_initial(self, schema: bytes, upload: bytes) -> Facts:
        try:
            parameters, constants = unpack_parts(upload, 2)
            flat, _ = initial(schema, parameters, constants)
        except PeerError as error:
            return _unreadable(error)
        return self._facts(_reading(flat), flat.numel())

    def genesis_payload(self, schema: bytes, upload: bytes) -> tuple[bytes, bytes]:
        parameters_hash = hash_of(*initial(schema, *unpack_parts(upload, 2)))  # first: both need as much memory again
        return pack_parts(schema, upload), parameters_hash

    def payload_limit(self, schema: bytes) -> int:
        """Initial parameters come with the model's constants, which may be as large again."""
        if self.schema is not None:
            return 5 * self.schema.numel + payload_bytes_max(self.schema.buffers) + PAYLOAD_SLACK_BYTES
        try:
            return min(16 * Schema.from_bytes(schema).numel + (1 << 30), INITIAL_BYTES_MAX)
        except PeerError:
            return 0

    def mismatch(self, schema: bytes) -> str:
        try:
            found = Schema.from_bytes(schema)
        except PeerError as error:
            return str(error)
        return difference(self.schema, found) if self.schema is not None else ""

    def fetch(self, kind: str, number: int) -> bytes | None:
        if kind == PUBLISH:
            return self._publishes.get(number)
        if kind == INITIAL:
            return self._initial or None
        if kind != SNAPSHOT or self.schema is None:
            return None
        standing = self._standing
        if number == standing.note.number and number not in self._snapshots:
            note = replace(standing.note, codec="fp32")
            coded = encode_payload("fp32", standing.shadow)
            payload = with_buffers(self._specs, coded, dict(enumerate(standing.buffers)))
            made = {**self._snapshots, number: write_object(note, payload)}
            self._snapshots = dict(sorted(made.items())[-SNAPSHOTS_HELD:])
        return self._snapshots.get(number)

    def newest_publish(self) -> int:
        return self._standing.note.number

    def oldest_publish(self) -> int:
        """The smallest n for which publishes n … the newest are all held; the next number when none is."""
        return min(self._publishes, default=self._standing.note.number + 1)

    def _facts(self, read: passes.Reader, numel: int) -> Facts:
        """One dot product a block says both how long a vector is and whether all of it is finite."""
        norm = passes.norm(self._crew, read, numel)
        if not math.isfinite(norm):
            reason = "not finite: it holds a NaN, an infinity or values beyond fp32's squares"
            return Facts(refusal=NotAdmitted(reason, Cause.INFINITE))
        return Facts(norm=norm)

    # --- checkpoints, hashes, export ---

    def model_hash(self) -> bytes:
        if not self._hash:
            vectors = self.theta, *self.momenta, self._standing.shadow, *self.buffers, *self._standing.buffers
            self._hash = xxhash.xxh3_128_digest(b"".join(self._crew.each(hash_of, vectors)))
        return self._hash

    def snapshot(self) -> ModelSnapshot:
        assert self.schema is not None, "a run without parameters has nothing to keep"
        frozen = {"parameters": Frozen(self.theta)}
        frozen |= {f"momentum/{number}": Frozen(momentum) for number, momentum in enumerate(self.momenta)}
        self._frozen = [weakref.ref(vector) for vector in frozen.values()]
        arrays: dict[str, Array] = {
            **frozen,
            "shadow": self._standing.shadow.numpy(),  # nobody writes to it
            "schema": _bytes_array(self.schema.to_bytes()),
            "constants": _bytes_array(self._constants),
            "initial": _bytes_array(self._initial),
            "publish": _bytes_array(write_object(self._standing.note, b"")),
        }
        arrays |= self._pending.arrays()
        for name, values in (("buffers", self.buffers), ("shadow_buffers", self._standing.buffers)):
            arrays[name] = _bytes_array(with_buffers(self._specs, b"", dict(enumerate(values))))
        return ModelSnapshot(arrays=arrays, model_hash=self.model_hash())

    def load(self, snapshot: ModelSnapshot) -> None:
        """Raises LogCorrupt when what was loaded does not hash to what the snapshot says."""
        try:
            self._load({name: numpy.asarray(array) for name, array in snapshot.arrays.items()})
        except (PeerError, KeyError) as error:
            raise LogCorrupt(f"the checkpoint's arrays cannot be read: {error}") from error
        if self.model_hash() != snapshot.model_hash:
            raise LogCorrupt("the checkpoint's parameters do not hash to what its manifest says")

    def _load(self, arrays: Mapping[str, numpy.ndarray]) -> None:
        self.schema = Schema.from_bytes(arrays["schema"].tobytes())
        self.theta = _vector(arrays["parameters"])
        self._norm = passes.norm(self._crew, _reading(self.theta), self.theta.numel())
        self._constants = arrays["constants"].tobytes()
        self._initial = arrays["initial"].tobytes()
        note, _ = read_object(arrays["publish"].tobytes())
        self.buffers, shadow_buffers = (
            tuple(buffers_in(self._specs, arrays[name].tobytes()).values()) for name in ("buffers", "shadow_buffers")
        )
        self._standing = Standing(note, _vector(arrays["shadow"]), shadow_buffers)
        kept = sum(name.startswith("momentum/") for name in arrays)
        self.momenta = [_vector(arrays[f"momentum/{number}"]) for number in range(kept)]
        self._pending.load(arrays)
        self._publishes, self._snapshots = {}, {}
        self._hash = b""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What the run trains, in fp32, and its buffers in the dtypes that the first worker had them in, under the
        model's own names."""
        return self._named(self.theta, self.buffers)

    def published(self) -> "PublishedParameters":
        """Beside no `apply`."""
        standing = self._standing
        return PublishedParameters(functools.partial(self._named, standing.shadow, standing.buffers))

    def _named(self, flat: torch.Tensor, buffers: Values) -> dict[str, torch.Tensor]:
        assert self.schema is not None, "no run has begun"
        tensors = constants_of(self._constants)
        start = 0
        for tensor in self.schema.tensors:
            tensors[tensor.name] = flat[start : start + tensor.numel].view(tensor.shape).clone()
            start += tensor.numel
        for spec, numbers in zip(self.schema.buffers, buffers, strict=True):
            if not is_same(numbers_of(tensors[spec.name]), numbers):
                put_into(tensors[spec.name], numbers)
        for alias, first in self.schema.aliases:
            tensors[alias] = tensors[first].clone()
        return tensors

    def export(self, path: Path) -> None:
        """Write `state_dict` as safetensors; the file appears whole or not at all. Raises UserError."""
        unfinished = path.with_name(f"{path.name}.new")
        try:
            safetensors.torch.save_file(self.state_dict(), unfinished)
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
            unfinished.replace(path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):  # there may be none
                unfinished.unlink()
            raise UserError(f"{path}: cannot be written: {error}") from None


def _unreadable(error: PeerError) -> Facts:
    return Facts(refusal=NotAdmitted(f"unreadable: {error}", Cause.UNREADABLE))


@dataclass(frozen=True, slots=True)
class PublishedParameters:
    """The model as one publish shows it."""

    named: Callable[[], dict[str, torch.Tensor]]

    def packed(self, about: Mapping[str, str]) -> bytes:
        """As a safetensors file, under the model's own names; `about` is its metadata."""
        return safetensors.torch.save(self.named(), dict(about))


def _reading(flat: torch.Tensor) -> passes.Reader:
    return lambda start, out: out.copy_(flat[start : start + out.numel()])


def _bytes_array(data: bytes) -> numpy.ndarray:
    return numpy.frombuffer(data, dtype=numpy.uint8)


def _vector(array: numpy.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(numpy.float32, copy=True))
