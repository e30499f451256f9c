"""What outlasting a crash costs: pauses by checkpoints, the server's memory, and the time that a restart takes.

MILLIONS parameters. The server and its workers, which push the same int4 delta again and again, are real processes; a
checkpoint's pause is measured in this one, on the real model, store and disk.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import trio
from benchmarks.bench_merging import CODEC, CORES, Server, pass_over
from benchmarks.figures import Figures, on_threads, seconds
from benchmarks.lives import BenchRun, peak_bytes, resident_bytes
from benchmarks.pusher import seen_by

from hetero_async.core.records import Delta, Stepped
from hetero_async.ports import Checkpoint
from hetero_async.shell.segments import read_log
from hetero_async.shell.store import CheckpointStore
from hetero_async.shell.threads import in_thread

MILLIONS = int(os.environ.get("MILLIONS", "100"))
NUMEL = MILLIONS * 1_000_000
STATE_BYTES = 12 * NUMEL  # θ, one momentum, θ̂
TURNS = 5
FEW, MORE = 2, 6
CHECKPOINTS = 2
DELTAS = 20


@pytest.mark.timeout(600)
def test_checkpoint(figures: Figures, tmp_path: Path) -> None:
    """Of a merge that comes while the checkpoint is written: what it takes longer than one without, and the freezing.

    It comes at once, before a byte is written, which is the worst: all that it changes must be copied first.
    """
    with on_threads(CORES):
        server = Server(NUMEL, tmp_path / "log")
        state = [torch.ones(NUMEL) for _ in range(3)]
        store = CheckpointStore(tmp_path / "checkpoints", "bench", in_thread)
        turns = []
        for turn in range(TURNS + 1):
            server.push()
            plain = seconds(server.run.step)
            server.push()
            frozen: list[Checkpoint] = []
            pause = seconds(lambda turn=turn, frozen=frozen: frozen.append(taken(server, turn)))
            slowed = seconds(server.run.step)
            trio.run(store.save, frozen.pop())
            copies: list[torch.Tensor] = []
            copy = seconds(lambda copies=copies: copies.extend(vector.clone() for vector in state))
            server.run.entries.clear()
            turns.append((pause + max(0.0, slowed - plain), copy))
        server.log.close()
    figures.add(f"checkpoint: pause by it at the worst moment, {MILLIONS} M parameters", turns[1:], "s", at_most=1.3)


def taken(server: Server, lsn: int) -> Checkpoint:
    model = server.model.snapshot()
    return Checkpoint(run="bench", lsn=lsn + 1, term=1, chain=bytes(16), state={}, state_hash=bytes(16), model=model)


@pytest.mark.timeout(600)
def test_memory(figures: Figures, tmp_path: Path) -> None:
    peaks = {workers: peak(tmp_path / str(workers), workers) for workers in (FEW, MORE)}
    name = f"memory: server's peak, {MILLIONS} M parameters"
    per_parameter = [(peaks[FEW] / NUMEL, STATE_BYTES / NUMEL)]
    figures.add(f"{name}, {FEW} workers, against its state", per_parameter, "B", at_most=1.6)
    figures.add(f"{name}, {MORE} workers against {FEW}", [(peaks[MORE] / NUMEL, peaks[FEW] / NUMEL)], "B", at_most=1.05)


def peak(directory: Path, workers: int) -> int:
    """Of a run with two checkpoints, beyond what the process had before there was a run."""
    with BenchRun(
        directory, workers=workers, codec_up=CODEC, codec_down=CODEC, max_staleness=64, server={"checkpoint_every": 2}
    ) as run:
        server = run.serve()
        run.wait(lambda: "serving run" in server.said, "it serves")
        before = resident_bytes(server.pid)
        run.push(run.names, NUMEL, CODEC, directory / "seen.json", follows=True)
        run.wait(lambda: server.said.count(" checkpoint ") >= CHECKPOINTS, "two checkpoints", seconds=500)
        return peak_bytes(server.pid) - before


@pytest.mark.timeout(600)
def test_recover(figures: Figures, tmp_path: Path) -> None:
    """Killed when 20 deltas are in the log behind the checkpoint, until a worker hears of one more."""
    out = tmp_path / "seen.json"
    with BenchRun(
        tmp_path / "run", workers=4, codec_up=CODEC, codec_down=CODEC, max_staleness=64,
        server={"checkpoint_every": 1 << 20},
    ) as run:  # fmt: skip
        server = run.serve()
        run.push(run.names, NUMEL, CODEC, out)
        run.wait(lambda: len([*acknowledged_after(out, 0.0)]) >= DELTAS, "20 deltas", seconds=500)
        server.kill()
        killed = time.monotonic()
        run.serve()
        first = run.wait(lambda: min(acknowledged_after(out, killed), default=0.0), "acknowledged again", seconds=500)
        log = run.config.node("server").log
        read = seconds(lambda: [path.read_bytes() for path in sorted(log.glob("*.log"))])
        deltas = sum(isinstance(entry.record, Delta) for entry in read_log(log, None))
        merges = sum(isinstance(entry.record, Stepped) for entry in read_log(log, None))
    with on_threads(CORES):
        again = Server(NUMEL, tmp_path / "again")
        theta, momentum = torch.zeros(NUMEL), torch.zeros(NUMEL)
        pass_over(theta, momentum)
        ingest = min(seconds(again.window) / len(again.payloads) for _ in range(2))
        again.log.close()
    name = (
        f"recover: SIGKILL to acknowledgement, {MILLIONS} M, {deltas} deltas in {merges} merges, against ingesting them"
    )
    figures.add(name, [(first - killed, read + deltas * ingest)], "s", at_most=1.5)


def acknowledged_after(out: Path, moment: float) -> Iterator[float]:
    return (at for one in seen_by(out).values() for at in one["acknowledged"].values() if at > moment)
