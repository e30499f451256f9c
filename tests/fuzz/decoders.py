"""Every decoder that bytes from outside reach, as a function of bytes that must end in one of two ways.

A value, or the one error that the decoder promises. Anything else (another exception, a wrong value, too much memory)
is a finding. `test_decoders.py` feeds them with hypothesis, `soak.py` with atheris; findings are kept in `found/`.
"""

import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash

from hetero_async.config import RunConfig
from hetero_async.core.messages import Ack, Push
from hetero_async.core.publish_note import PublishNote
from hetero_async.core.records import Entry, Left
from hetero_async.errors import ConfigError, LogCorrupt, PeerError
from hetero_async.formats import frames, segment, snapshot
from hetero_async.formats.chunks import CHUNK_BYTES, Assembly
from hetero_async.formats.compression import compress, decompress
from hetero_async.formats.parts import pack_parts, unpack_parts
from hetero_async.formats.shipment import pack_shipment, unpack_shipment
from hetero_async.shell.keys import _parse
from hetero_async.shell.quarantine import load_quarantine
from hetero_async.shell.refusals import NOTES, load_refusals
from hetero_async.tables import template
from hetero_async.tensors.buffers import buffers_in, with_buffers
from hetero_async.tensors.codecs import CODECS, decode_payload
from hetero_async.tensors.model import ServerModel
from hetero_async.tensors.replica import read_object, write_object
from hetero_async.tensors.schema import BufferSpec, Schema

# Of a vector that has whole blocks and a partial one.
NUMEL = 200
# A scratch file for decoders that read files; in memory where the machine has that.
SHARED_MEMORY = Path("/dev/shm")
SCRATCH = Path(tempfile.mkdtemp(prefix="hetero-async-fuzz-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))

ACK = frames.encode(Ack(seq=3, lsn=17))
PUSH = frames.encode(
    Push(
        incarnation=1, seq=2, anchor=3, anchor_term=1, steps=4, ranges=((0, 8), (9, 11)), codec="int8", payload_bytes=9,
        payload_hash=bytes(16),
    )
)  # fmt: skip
NOTE = PublishNote(number=1, version=1, codec="fp32", merged=(("w", 1),), shadow_hash=bytes(16))
SCHEMA = b'{"tensors":[["a",[2,3]],["b",[]]],"aliases":[["c","a"]],"buffers":[["d",[2],"floating"],["e",[],"integer"]]}'
MANIFEST = snapshot.encode_manifest(
    snapshot.Manifest(
        run="r",
        lsn=1,
        term=1,
        chain=bytes(16),
        state={"a": [1, {}]},
        state_hash=bytes(16),
        model_hash=bytes(16),
        file_hash=bytes(16),
    )
)
SEGMENT_HEADER = segment.SegmentHeader(run="r", first_lsn=1, chain=segment.FIRST_CHAIN).pack()
RECORD = segment.pack(Entry(lsn=1, term=1, record=Left(worker="w", reason="x"), payload=b"abc"), segment.FIRST_CHAIN)[0]
ALLOWED = json.dumps({"#" * 40: {"role": "worker", "site": "a", "worker": "a-0"}}).encode()
QUARANTINE = json.dumps({"#" * 40: {"worker": "a-0", "reason": "why"}}).encode()
REFUSALS = json.dumps(
    {"#" * 40: {"worker": "a-0", "kinds": {"not finite": {"count": 2, "last": "not finite", "at": 1.5}}}}
).encode()
LEAVING = [Entry(lsn=lsn, term=1, record=Left(worker="w", reason="x"), payload=b"abc") for lsn in (1, 2)]
SHIPMENT = pack_shipment(segment.FIRST_CHAIN, LEAVING)
RUN_TOML = template(run={"name": "r"}, sites={"a": 1}).encode()
VECTOR = torch.linspace(-1, 1, NUMEL)
BUFFERS = (
    BufferSpec(name="mean", shape=(5,), kind="floating"), BufferSpec(name="count", shape=(), kind="integer"),
    BufferSpec(name="mask", shape=(2, 2), kind="floating"),
)  # fmt: skip
BUFFER_VALUES = {0: VECTOR[:5], 1: torch.tensor([7])}


def header(data: bytes) -> None:
    with contextlib.suppress(PeerError):
        value = frames.decode(data)
        assert frames.decode(frames.encode(value)) == value


def record(data: bytes) -> None:
    with contextlib.suppress(PeerError):
        value = frames.decode(data, frames.RECORD_BYTES_MAX)
        assert frames.decode(frames.encode(value, frames.RECORD_BYTES_MAX), frames.RECORD_BYTES_MAX) == value


def chunks(data: bytes) -> None:
    """Two bytes say the size, then each byte an index; the rest of the data is the object."""
    total = int.from_bytes(data[:2], "little") * 97
    indexes, content = data[2:10], (data[10:] or b"\0") * (CHUNK_BYTES // max(1, len(data[10:])) + 1)
    with contextlib.suppress(PeerError):
        assembly = Assembly(total, xxhash.xxh3_128_digest(content[:total]), 4 * CHUNK_BYTES)
        for index in indexes:
            assembly.wanted()
            size = CHUNK_BYTES if index % 2 else min(CHUNK_BYTES, max(0, total - (index - 128) * CHUNK_BYTES))
            assembly.add(index - 128, content[:size])
            if index % 16 == 15:
                assembly.lost()
            if assembly.complete:
                assert len(assembly.result()) == total


def zstd_frame(data: bytes) -> None:
    """The first byte says what is expected."""
    expected = 37 * data[0] if data else 0
    with contextlib.suppress(PeerError):
        assert len(decompress(data[1:], expected)) == expected


def payload_of(codec: str) -> Callable[[bytes], None]:
    def payload(data: bytes) -> None:
        with contextlib.suppress(PeerError):
            assert decode_payload(codec, data, NUMEL).shape == (NUMEL,)

    return payload


def values_of(codec: str) -> Callable[[bytes], None]:
    """What zstd's checksum lets pass: any bytes of the right size. What comes of them is judged by its norm."""
    model = ServerModel()
    model.theta = torch.zeros(NUMEL)
    size = CODECS[codec].raw_bytes(NUMEL)

    def values(data: bytes) -> None:
        raw = (data + bytes(size))[:size]
        facts = model.inspect(codec, compress(raw))
        # Not every place that topk can name is one; to the others any bytes of the right number are values.
        with contextlib.suppress(*[PeerError] * (codec == "topk")):
            flat = decode_payload(codec, compress(raw), NUMEL)
            assert facts.refusal is not None or flat.isfinite().all()
            assert facts.refusal is not None or facts.norm >= 0

    return values


def publish(data: bytes) -> None:
    with contextlib.suppress(PeerError):
        read_object(data)


def buffers(data: bytes) -> None:
    with contextlib.suppress(PeerError):
        changes = buffers_in(BUFFERS, data)
        assert all(numbers.numel() == BUFFERS[index].numel for index, numbers in changes.items())
        assert dict(buffers_in(BUFFERS, with_buffers(BUFFERS, b"", changes))).keys() == changes.keys()


def parts(data: bytes) -> None:
    count = data[0] % 5 if data else 0
    with contextlib.suppress(PeerError):
        assert pack_parts(*unpack_parts(data[1:], count)) == data[1:]


def shipment(data: bytes) -> None:
    """As a standby's server sends them."""
    with contextlib.suppress(PeerError):
        chain, entries = unpack_shipment(data)
        assert unpack_shipment(pack_shipment(chain, entries)) == (chain, entries)


def shipped_record(data: bytes) -> None:
    """With lengths that fit: the first byte is that of its place, the rest its record."""
    place_bytes, content = data[:1] or b"\0", data[1:]
    place, record = content[: place_bytes[0]], content[place_bytes[0] :]
    shipment(pack_parts(segment.FIRST_CHAIN, b"\1\0\0\0", pack_parts(pack_parts(place, record, b"abc"))))


def schema(data: bytes) -> None:
    with contextlib.suppress(PeerError):
        assert Schema.from_bytes(data).to_bytes() == data


def initial_parameters(data: bytes) -> None:
    """As the first worker uploads them; a length that fits, so that what lies behind it is reached."""
    model = ServerModel()
    model.inspect_initial(SCHEMA, data)
    model.inspect_initial(SCHEMA, pack_parts(compress(bytes(4 * 7)), data))


def log_segment(data: bytes) -> None:
    with contextlib.suppress(LogCorrupt, ConfigError):
        list(segment.Scanner(io.BytesIO(data), name="fuzzed", is_last=True))


def log_record(data: bytes) -> None:
    """Behind a good segment header, with checksums that fit: nothing but the content can be wrong."""
    head, rest = data[: segment.RECORD.size - 8], data[segment.RECORD.size - 8 :]
    fields = (segment.RECORD_MAGIC + head[4:].ljust(segment.RECORD.size - 4, b"\0"))[: segment.RECORD.size]
    whole = segment._with_crc(fields) + rest
    with contextlib.suppress(LogCorrupt, ConfigError):
        list(segment.Scanner(io.BytesIO(SEGMENT_HEADER + whole), name="fuzzed", is_last=True))


def manifest(data: bytes) -> None:
    with contextlib.suppress(LogCorrupt, ConfigError):
        snapshot.decode_manifest(data, "fuzzed")


def manifest_values(data: bytes) -> None:
    """With a checksum that fits."""
    try:
        values = json.loads(data)
        whole = snapshot._text({"checksum": snapshot._checksum(values), "manifest": values})
    except (ValueError, RecursionError):
        return
    manifest(whole)


def allowed_list(data: bytes) -> None:
    path = SCRATCH / "allowed.json"
    path.write_bytes(data)
    with contextlib.suppress(ConfigError):
        _parse(path)


def quarantine(data: bytes) -> None:
    path = SCRATCH / "quarantine.json"
    path.write_bytes(data)
    with contextlib.suppress(ConfigError):
        load_quarantine(path)


def refusals(data: bytes) -> None:
    path = SCRATCH / "refusals.json"
    path.write_bytes(data)
    with contextlib.suppress(ConfigError):
        NOTES.dump_json(load_refusals(path))


def run_toml(data: bytes) -> None:
    path = SCRATCH / "run.toml"
    path.write_bytes(data)
    with contextlib.suppress(ConfigError):
        RunConfig.load(path)


Decoder = Callable[[bytes], None]
# Name → the decoder, and what good input looks like.
DECODERS: dict[str, tuple[Decoder, list[bytes]]] = {
    "header": (header, [ACK, PUSH]),
    "record": (record, [frames.encode(NOTE), frames.encode(Left(worker="w", reason="x"))]),
    "chunks": (chunks, [b"\x10\x00\x80abc", b"\xff\xff\x80\x81\x82\x83\x84\x85\x86\x87abc"]),
    "zstd-frame": (zstd_frame, [b"\x01" + compress(bytes(37))]),
    **{f"{name}-payload": (payload_of(name), [_coded]) for name, codec in CODECS.items()
       for _coded in [compress(codec.encode(VECTOR).numpy().tobytes())]},
    **{f"{name}-values": (values_of(name), [codec.encode(VECTOR).numpy().tobytes()]) for name, codec in CODECS.items()},
    "publish": (publish, [write_object(NOTE, b"abc")]),
    "buffers": (buffers, [with_buffers(BUFFERS, b"coded", BUFFER_VALUES)]),
    "parts": (parts, [b"\x02" + pack_parts(b"a", b"bc")]),
    "shipment": (shipment, [SHIPMENT]),
    "shipped-record": (shipped_record, [b"\x10" + bytes(16) + frames.encode(Left(worker="w", reason="x"))]),
    "schema": (schema, [SCHEMA]),
    "initial-parameters": (initial_parameters, [pack_parts(compress(bytes(28)), b"\x08" + bytes(7) + b"{}      ")]),
    "log-segment": (log_segment, [SEGMENT_HEADER + RECORD]),
    "log-record": (log_record, [RECORD]),
    "manifest": (manifest, [MANIFEST]),
    "manifest-values": (manifest_values, [json.dumps(json.loads(MANIFEST)["manifest"]).encode()]),
    "allowed-list": (allowed_list, [ALLOWED]),
    "quarantine": (quarantine, [QUARANTINE]),
    "refusals": (refusals, [REFUSALS]),
    "run-toml": (run_toml, [RUN_TOML]),
}  # fmt: skip
