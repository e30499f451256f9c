"""The tensors' half of the run's state on the server: parameters θ, the rule's buffers, the shadow θ̂, pending deltas.

Fulfils ports.Model. All vectors are flat fp32 on the CPU, in the schema's order. `apply` is the only thing that changes
them, and only by records, so the same log gives the same bits. A merge is one pass over blocks that fit in a cache.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError

from hetero_async.core.admission import Cause, Facts, NotAdmitted
from hetero_async.core.messages import PUBLISH, SNAPSHOT
from hetero_async.core.publish_note import PublishNote
from hetero_async.core.records import Delta, Entry, Genesis, Published, Stepped
from hetero_async.errors import LogCorrupt, PeerError, UserError
from hetero_async.formats.parts import pack_parts, unpack_parts
from hetero_async.ports import ModelSnapshot
from hetero_async.tensors import outer
from hetero_async.tensors.codecs import BLOCK, CODECS, decode_payload, encode_payload, open_payload
from hetero_async.tensors.replica import hash_of, read_object, write_object
from hetero_async.tensors.schema import Schema, difference

# Elements per block of a pass: 256 KiB of fp32, so that a block of every vector involved stays in a core's cache.
PASS_BLOCK = 1024 * BLOCK
# Publishes are held for workers that fall behind: at least the newest two, so that whoever is at work on the last one
# still gets it, at most so many, and no more of them than a snapshot has bytes.
PUBLISHES_HELD_MIN = 2
PUBLISHES_HELD_MAX = 256
SNAPSHOTS_HELD = 2
NOTHING_PUBLISHED = PublishNote(number=0, version=0, codec="fp32", merged=(), shadow_hash=b"")
# Bytes a payload may have beyond its codec's: zstd's frame and what it adds to what it cannot shrink.
PAYLOAD_SLACK_BYTES = 64 * 1024
# A schema may claim any size; so much is the book of chunks that the receiver keeps for it a few megabytes.
INITIAL_BYTES_MAX = 1 << 40


@dataclass(frozen=True, slots=True)
class Pending:
    codec: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Standing:
    """A shadow and its publish. Replaced as one, never written to: `fetch` reads it in another thread."""

    note: PublishNote
    shadow: torch.Tensor


class ServerModel:
    """Empty until Genesis is applied or a snapshot is loaded."""

    def __init__(self) -> None:
        self.schema: Schema | None = None
        self.theta = torch.empty(0)
        self.buffers: list[torch.Tensor] = []
        self._constants = b""
        self._pending: dict[int, Pending] = {}
        self._standing = Standing(NOTHING_PUBLISHED, torch.empty(0))
        self._publishes: dict[int, bytes] = {}
        self._snapshots: dict[int, bytes] = {}

    @property
    def shadow(self) -> torch.Tensor:
        """θ̂, what workers hold. Not to be written to."""
        return self._standing.shadow

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
        match entry.record:
            case Genesis() as genesis:
                self._begin(genesis, entry.payload)
            case Delta() as delta:
                self._pending[entry.lsn] = Pending(delta.codec, entry.payload)
            case Stepped() as stepped:
                self._step(stepped)
            case Published() as published:
                self._publish(published)

    def _begin(self, genesis: Genesis, payload: bytes) -> None:
        packed_schema, upload = unpack_parts(payload, 2)
        parameters, constants = unpack_parts(upload, 2)
        schema = Schema.from_bytes(bytes(packed_schema))
        self.theta = decode_payload("fp32", bytes(parameters), schema.numel)
        if hash_of(self.theta) != genesis.parameters_hash:
            raise LogCorrupt("the initial parameters are not those that the genesis record names")
        self._constants = bytes(constants)
        self.buffers = [torch.zeros_like(self.theta) for _ in range(outer.buffers_of(genesis.settings.rule))]
        note = replace(NOTHING_PUBLISHED, shadow_hash=genesis.parameters_hash)
        self._standing = Standing(note, self.theta.clone())
        self.schema = schema  # last: from here on there is something to fetch

    def _step(self, stepped: Stepped) -> None:
        """One pass: decode a block of every delta, weighted mean, rule. No decoded delta is ever whole."""
        numel = self.theta.numel()
        merged = [self._pending.pop(lsn) for lsn in stepped.deltas]
        raws = [(CODECS[delta.codec], open_payload(delta.codec, delta.payload, numel)) for delta in merged]
        g, decoded = torch.empty(PASS_BLOCK), torch.empty(PASS_BLOCK)
        coefficients = (stepped.decay, stepped.intake, stepped.gain, stepped.pull)
        for start, stop in _blocks(numel):
            mean, one = g[: stop - start].zero_(), decoded[: stop - start]
            for (codec, raw), weight in zip(raws, stepped.weights, strict=True):
                codec.decode(raw, numel, start, one)
                mean.add_(one.mul_(weight))
            buffers = [buffer[start:stop] for buffer in self.buffers]
            outer.step(self.theta[start:stop], buffers, mean, one, coefficients)

    def _publish(self, published: Published) -> None:
        """θ̂ ← θ̂ + D(C(θ − θ̂)). What the codec lost stays in θ − θ̂ and goes with the next publish."""
        before = self._standing.shadow
        change = torch.sub(self.theta, before)
        for m in self.buffers if published.ahead else ():
            change.sub_(torch.mul(m, published.ahead))
        payload = encode_payload(published.codec, change)
        shadow = decode_payload(published.codec, payload, before.numel()).add_(before)
        note = PublishNote(
            number=published.number,
            version=published.version,
            codec=published.codec,
            merged=published.merged,
            shadow_hash=hash_of(shadow),
        )
        self._publishes = self._held({**self._publishes, note.number: write_object(note, payload)})
        self._standing = Standing(note, shadow)

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
            raw = open_payload(codec, payload, numel)
        except PeerError as error:
            return _unreadable(error)
        facts = _facts(lambda start, out: CODECS[codec].decode(raw, numel, start, out), numel)
        theta = self.theta  # an outer step may be writing to it: either side of that step will do for a scale
        parameters_norm = math.sqrt(float(torch.dot(theta, theta)))
        return replace(facts, scale=max(parameters_norm, math.sqrt(numel)))

    def inspect_initial(self, schema: bytes, upload: bytes) -> Facts:
        try:
            parameters, constants = unpack_parts(upload, 2)
            flat = decode_payload("fp32", bytes(parameters), Schema.from_bytes(schema).numel)
            _constants(bytes(constants))
        except PeerError as error:
            return _unreadable(error)
        return _facts(lambda start, out: out.copy_(flat[start : start + out.numel()]), flat.numel())

    def genesis_payload(self, schema: bytes, upload: bytes) -> tuple[bytes, bytes]:
        parameters, _ = unpack_parts(upload, 2)
        flat = decode_payload("fp32", bytes(parameters), Schema.from_bytes(schema).numel)
        return pack_parts(schema, upload), hash_of(flat)

    def payload_limit(self, schema: bytes) -> int:
        """Initial parameters come with the model's constants, which may be as large again."""
        if self.schema is not None:
            return 5 * self.schema.numel + PAYLOAD_SLACK_BYTES
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
        if kind != SNAPSHOT or self.schema is None:
            return None
        standing = self._standing
        if number == standing.note.number and number not in self._snapshots:
            note = replace(standing.note, codec="fp32")
            made = {**self._snapshots, number: write_object(note, encode_payload("fp32", standing.shadow))}
            self._snapshots = dict(sorted(made.items())[-SNAPSHOTS_HELD:])
        return self._snapshots.get(number)

    def newest_publish(self) -> int:
        return self._standing.note.number

    def oldest_publish(self) -> int:
        """The smallest n for which publishes n … the newest are all held; the next number when none is."""
        return min(self._publishes, default=self._standing.note.number + 1)

    # --- checkpoints, hashes, export ---

    def model_hash(self) -> bytes:
        whole = xxhash.xxh3_128()
        for vector in (self.theta, *self.buffers, self._standing.shadow):
            whole.update(vector.numpy().data)
        return whole.digest()

    def snapshot(self) -> ModelSnapshot:
        assert self.schema is not None, "a run without parameters has nothing to keep"
        arrays = {
            "parameters": self.theta.numpy().copy(),
            "shadow": self._standing.shadow.numpy(),  # nobody writes to it
            "schema": _bytes_array(self.schema.to_bytes()),
            "constants": _bytes_array(self._constants),
            "publish": _bytes_array(write_object(self._standing.note, b"")),
        }
        arrays |= {f"buffer/{number}": buffer.numpy().copy() for number, buffer in enumerate(self.buffers)}
        arrays |= {
            f"pending/{lsn}": _bytes_array(pack_parts(delta.codec.encode(), delta.payload))
            for lsn, delta in self._pending.items()
        }
        return ModelSnapshot(arrays=arrays, model_hash=self.model_hash())

    def load(self, snapshot: ModelSnapshot) -> None:
        """Raises LogCorrupt when what was loaded does not hash to what the snapshot says."""
        try:
            self._load(snapshot.arrays)
        except (PeerError, KeyError) as error:
            raise LogCorrupt(f"the checkpoint's arrays cannot be read: {error}") from error
        if self.model_hash() != snapshot.model_hash:
            raise LogCorrupt("the checkpoint's parameters do not hash to what its manifest says")

    def _load(self, arrays: Mapping[str, numpy.ndarray]) -> None:
        self.schema = Schema.from_bytes(arrays["schema"].tobytes())
        self.theta = _vector(arrays["parameters"])
        self._constants = arrays["constants"].tobytes()
        note, _ = read_object(arrays["publish"].tobytes())
        self._standing = Standing(note, _vector(arrays["shadow"]))
        kept = sum(name.startswith("buffer/") for name in arrays)
        self.buffers = [_vector(arrays[f"buffer/{number}"]) for number in range(kept)]
        self._pending = dict(_pending(arrays))
        self._publishes, self._snapshots = {}, {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The whole model under its own names: trained parameters in fp32, all else as the first worker had it."""
        assert self.schema is not None, "no run has begun"
        return _named(self.theta, self.schema, self._constants)

    def published(self) -> "PublishedParameters":
        """Beside no `apply`."""
        assert self.schema is not None, "no run has begun"
        return PublishedParameters(self._standing.shadow, self.schema, self._constants)

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


@dataclass(frozen=True, slots=True)
class PublishedParameters:
    """The model as one publish shows it."""

    shadow: torch.Tensor
    schema: Schema
    constants: bytes

    def packed(self, about: Mapping[str, str]) -> bytes:
        """As a safetensors file, under the model's own names; `about` is its metadata."""
        return safetensors.torch.save(_named(self.shadow, self.schema, self.constants), dict(about))


def _named(flat: torch.Tensor, schema: Schema, constants: bytes) -> dict[str, torch.Tensor]:
    tensors = _constants(constants)
    start = 0
    for tensor in schema.tensors:
        tensors[tensor.name] = flat[start : start + tensor.numel].view(tensor.shape).clone()
        start += tensor.numel
    for alias, first in schema.aliases:
        tensors[alias] = tensors[first].clone()
    return tensors


def _blocks(numel: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + PASS_BLOCK, numel)) for start in range(0, numel, PASS_BLOCK))


def _unreadable(error: PeerError) -> Facts:
    return Facts(refusal=NotAdmitted(f"unreadable: {error}", Cause.UNREADABLE))


def _facts(decode: Callable[[int, torch.Tensor], object], numel: int) -> Facts:
    """One dot product a block says both how long a vector is and whether all of it is finite."""
    block, total = torch.empty(PASS_BLOCK), 0.0
    for start, stop in _blocks(numel):
        piece = block[: stop - start]
        decode(start, piece)
        total += float(torch.dot(piece, piece))
    if not math.isfinite(total):
        reason = "not finite: it holds a NaN, an infinity or values beyond fp32's squares"
        return Facts(refusal=NotAdmitted(reason, Cause.INFINITE))
    return Facts(norm=math.sqrt(total))


def _constants(packed: bytes) -> dict[str, torch.Tensor]:
    """What of the model is not trained. Raises PeerError, for a dtype that this torch does not know as well."""
    try:
        return safetensors.torch.load(packed)
    except (SafetensorError, KeyError) as error:
        raise PeerError(f"not a model's other tensors: {error}") from error


def _bytes_array(data: bytes) -> numpy.ndarray:
    return numpy.frombuffer(data, dtype=numpy.uint8)


def _vector(array: numpy.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(numpy.float32, copy=True))


def _pending(arrays: Mapping[str, numpy.ndarray]) -> Iterator[tuple[int, Pending]]:
    for lsn in sorted(int(name.removeprefix("pending/")) for name in arrays if name.startswith("pending/")):
        codec, payload = unpack_parts(arrays[f"pending/{lsn}"].tobytes(), 2)
        yield lsn, Pending(bytes(codec).decode(), bytes(payload))
