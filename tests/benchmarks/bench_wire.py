"""How near a payload of 1 GB comes to what CURVE alone carries, from the push to the receipt for it.

Both over the loopback between two processes, taking turns. The server is the real one with its lanes, its log and its
disk, but for the tensors: its model takes every payload as it is, since what looking at it costs is in `ingest`.
"""

import itertools
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import zmq
from benchmarks.figures import Figures
from benchmarks.lives import BenchRun, verb_life
from benchmarks.pusher import Content, Pusher, run_pushers, seen_by
from e2e.harness import free_port

from hetero_async import assembly
from hetero_async.config import RunConfig
from hetero_async.core.admission import Facts
from hetero_async.core.records import Delta, Entry, Stepped
from hetero_async.formats.chunks import CHUNK_BYTES
from hetero_async.tensors.model import ServerModel

PAYLOAD_BYTES = 1000 * CHUNK_BYTES
NUMEL = 1000
TURNS = 5


class Blind(ServerModel):
    """Takes every delta as it is, and merges none."""

    def payload_limit(self, schema: bytes) -> int:
        return PAYLOAD_BYTES

    def inspect(self, codec: str, payload: bytes) -> Facts:
        return Facts(norm=1.0, scale=1.0)

    def apply(self, entry: Entry) -> None:
        if not isinstance(entry.record, Delta | Stepped):
            super().apply(entry)


def blind_life(run_toml: str, verb: list[str], output: str, cores: list[int]) -> None:
    assembly.ServerModel = Blind  # type: ignore[misc]
    verb_life(run_toml, verb, output, cores)


def push_random(run_toml: str, worker: str, out: str, hold: str) -> None:
    """A delta of random bytes whenever `hold` is gone."""
    content = Content.of_bytes(NUMEL, os.urandom(PAYLOAD_BYTES))
    run_pushers([Pusher(RunConfig.load(Path(run_toml)), worker, content, hold=Path(hold))], Path(out))


def raw_receiver(port: int, secret: bytes, told: Connection) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        socket.bind(f"tcp://127.0.0.1:{port}")
        told.send("bound")
        while True:
            for _ in range(PAYLOAD_BYTES // CHUNK_BYTES):
                route, _ = socket.recv_multipart(copy=False)
            socket.send_multipart([route.bytes, b"all here"])


class Raw:
    """Two processes and CURVE between them, nothing else."""

    def __init__(self) -> None:
        public, secret = zmq.curve_keypair()
        told, tells = multiprocessing.get_context("spawn").Pipe()
        port = free_port()
        self.process = multiprocessing.get_context("spawn").Process(
            target=raw_receiver, args=(port, secret, tells), daemon=True
        )
        self.process.start()
        assert told.recv() == "bound"
        self.chunk = os.urandom(CHUNK_BYTES)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.CURVE_SERVERKEY, public)
        own_public, own_secret = zmq.curve_keypair()
        self.socket.setsockopt(zmq.CURVE_PUBLICKEY, own_public)
        self.socket.setsockopt(zmq.CURVE_SECRETKEY, own_secret)
        self.socket.connect(f"tcp://127.0.0.1:{port}")

    def seconds(self) -> float:
        began = time.perf_counter()
        for _ in range(PAYLOAD_BYTES // CHUNK_BYTES):
            self.socket.send(self.chunk, copy=False)
        self.socket.recv()
        return time.perf_counter() - began

    def close(self) -> None:
        self.process.kill()
        self.socket.close(linger=0)
        self.context.term()


@pytest.mark.timeout(300)
def test_wire(figures: Figures, tmp_path: Path) -> None:
    raw = Raw()
    out, hold = tmp_path / "seen.json", tmp_path / "hold"
    with BenchRun(tmp_path / "run", workers=1, merge="per-push", norm_gate=0.0) as run:
        run.serve(life=blind_life)
        [worker] = run.names
        run.beside("pusher", push_random, run_toml=str(run.config.path), worker=worker, out=str(out), hold=str(hold))
        turns = []
        for seq in itertools.count(1):
            run.wait(lambda seq=seq: seq in seen_by(out).get(worker, {}).get("acknowledged", {}), "acknowledged")
            seen = seen_by(out)[worker]
            raw_seconds = raw.seconds()
            if seq > 1:
                turns.append((seen["acknowledged"][seq] - seen["pushed"][seq], raw_seconds))
            if len(turns) == TURNS:
                break
            hold.unlink()
    raw.close()
    rates = [(PAYLOAD_BYTES / own / 1e6, PAYLOAD_BYTES / floor / 1e6) for own, floor in turns]
    figures.add("wire: a payload of 1 GB, pushed until receipted, against CURVE alone", rates, "MB/s", at_least=0.6)
