"""What happens inside the processes that the harness forks: the real server and real workers, with faults to order.

Nothing of the product is replaced. A server's life is `hetero-async serve` with a disk that may fail or kill at some
call, and with a witness: what state and model hashed to after each batch, and what was promised to whom, are written
down before anybody hears of it. All intervals of waiting are shortened, so that a test waits for work and not for time.
"""

import errno
import gc
import io
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trio
from e2e import tiny

import hetero_async.assembly
import hetero_async.looking
import hetero_async.session
from hetero_async import bulk, cli, node, train, transfers
from hetero_async.checkpoints import Checkpointer
from hetero_async.config import ENV_RUN, ENV_WORKER, RunConfig
from hetero_async.core import standby as core_standby
from hetero_async.core import worker as core_worker
from hetero_async.core.events import Ready
from hetero_async.core.messages import Ack, Heartbeat
from hetero_async.core.records import Delta, Entry
from hetero_async.core.state import State
from hetero_async.core.worker_events import Vitals
from hetero_async.serve import Serving
from hetero_async.shell import disk, log, store, wire

WITNESS, PROMISED, CALLS, WITHHOLD = "witness", "promised", "disk-calls.json", "withhold-acks"
HEARTBEATS = "heartbeats"
DISK_CALLS = ("write", "fdatasync", "fsync", "fallocate", "truncate", "rename", "unlink")
TAKES_SPACE = {"write", "fallocate"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What the server's disk does at its `at`-th call (0: never). `full` lasts for `seconds`."""

    kind: str = "die"  # die: before the call, or in the middle of a write | die after | full | fail
    at: int = 0
    only: str = ""  # count only the calls of this name
    seconds: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPlan:
    fault: Fault = Fault()
    die_after_delta: int = 0  # SIGKILL when that many deltas are durable, before anybody is told
    take_along: str = ""  # and this worker with it
    segment_bytes: int = 1 << 20
    skips_no_checkpoint: bool = False  # one that is due waits for the one before, however slow the disk is
    hold_checkpoints: str = ""  # a file: while it is there, the disk takes no checkpoint
    exit_when_finished: bool = True


def node_life(run_toml: str, verb: Sequence[str], output: str, plan: ServerPlan) -> None:
    """`verb`: serve, or standby --name NAME."""
    speak_to(output)
    _hurry()
    directory = Path(run_toml).parent
    log.SEGMENT_BYTES = plan.segment_bytes
    calls = Calls(plan.fault)
    calls.watch()
    _die_after_delta(directory, plan)
    if plan.skips_no_checkpoint:
        _skip_no_checkpoint()
    if plan.hold_checkpoints:
        _hold_checkpoints(Path(plan.hold_checkpoints))
    node.Serving = _witnessed(directory)
    sys.argv = ["hetero-async", *verb, "--run", run_toml, *(["--exit-when-finished"] * plan.exit_when_finished)]
    try:
        cli.main()
    except SystemExit as ending:
        if ending.code:
            raise
    (directory / CALLS).write_text(json.dumps(calls.made))


def worker_life(
    run_toml: str,
    worker: str,
    output: str,
    script: Callable[..., None],
    awaited: Sequence[str],
    options: dict[str, Any],
) -> None:
    speak_to(output)
    _hurry()
    os.environ |= {ENV_RUN: run_toml, ENV_WORKER: worker}
    directory = RunConfig.load(Path(run_toml)).worker_directory(worker)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "pid").write_text(str(os.getpid()))
    _note_heartbeats(directory)
    _begin_together(directory, awaited)
    script(**options)


def _note_heartbeats(directory: Path) -> None:
    """What it says, whether anybody hears it or not."""
    heartbeat = Vitals.heartbeat

    def noted(self: Vitals, incarnation: int, publish: int, round_trip_ms: int) -> Heartbeat:
        _note(directory / HEARTBEATS, f"{self.steps} {self.doing}")
        return heartbeat(self, incarnation, publish, round_trip_ms)

    Vitals.heartbeat = noted  # type: ignore[method-assign]


def _begin_together(directory: Path, awaited: Sequence[str]) -> None:
    """Nobody trains before all of these have joined once: on a busy machine the run would be over before."""
    join = hetero_async.join

    def joined(*arguments: Any, **more: Any) -> hetero_async.Session:
        session = join(*arguments, **more)
        (directory / "joined").touch()
        while not all((directory.parent / other / "joined").exists() for other in awaited):
            time.sleep(0.01)
        return session

    hetero_async.join = joined


def together_life(run_toml: str, workers: Sequence[str], output: str, options: dict[str, Any]) -> None:
    """Several workers in one process, for tests in which none of them dies."""
    speak_to(output)
    _hurry()
    config = RunConfig.load(Path(run_toml))
    failed: list[BaseException] = []
    all_joined = threading.Barrier(len(workers))
    threading.excepthook = lambda failure: failed.append(failure.exc_value or SystemExit())
    threads = [
        threading.Thread(target=tiny.train_as, args=(config, worker, all_joined), kwargs=options, name=worker)
        for worker in workers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failed:
        raise failure


def command_life(words: Sequence[str], directory: str, output: str, errors: str, typed: str) -> None:
    """`hetero-async WORDS` as it stands, without the seconds that its imports take; `typed` answers its questions."""
    speak_to(output, errors)
    os.chdir(directory)
    sys.stdin = io.StringIO(typed)
    sys.argv = ["hetero-async", *words]
    cli.main()


def speak_to(output: str, errors: str = "") -> None:
    for descriptor, path in ((1, output), (2, errors or output)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    torch.set_num_threads(1)
    gc.freeze()  # what was inherited stays shared: no collection writes to it


def _hurry() -> None:
    """Shorter intervals everywhere; no limit that decides about a peer's life is touched."""
    core_worker.HELLO_EVERY_MS = core_worker.LEASE_EVERY_MS = 50
    core_worker.HEARTBEAT_EVERY_MS = 100
    core_worker.OFFER_AGAIN_MS = 300
    core_standby.FOLLOW_EVERY_MS = core_standby.CONFIRM_EVERY_MS = 50
    transfers.STALL_MS = 2_000
    bulk.UPLOAD_CHECK_SECONDS = train.TICK_SECONDS = 0.02
    wire.RETRY_MS_MIN, wire.RETRY_MS_MAX = 10, 100


# --- the witness ---


def _witnessed(directory: Path) -> type[Serving]:
    """Serving that writes down what it came to, and what it promised, before it can be killed for it."""

    class WitnessedServing(Serving):
        async def _settle(self) -> None:
            await super()._settle()
            state = self.machine.state
            if state.settings is not None:
                hashes = f"{state.digest().hex()} {self.model.model_hash().hex()}"
                _note(directory / WITNESS, f"{state.term} {state.lsn} {hashes}")

        async def _send(self, ready: Ready) -> None:
            is_withheld = (directory / WITHHOLD).exists()
            for outgoing in ready.messages:
                if isinstance(outgoing.message, Ack) and not is_withheld:
                    _note(directory / PROMISED, f"{outgoing.to} {outgoing.message.seq} {outgoing.message.lsn}")
            kept = [out for out in ready.messages if not (is_withheld and isinstance(out.message, Ack))]
            await super()._send(Ready(ready.records, tuple(kept)))

    return WitnessedServing


def _note(path: Path, line: str) -> None:
    """One write, so that a line is there whole or not at all."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(descriptor, line.encode() + b"\n")
    os.close(descriptor)


# --- faults ---


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal is under way


def _die_after_delta(directory: Path, plan: ServerPlan) -> None:
    append, seen = log.FileLog.append, itertools.count(1)

    async def dying(self: log.FileLog, entries: Sequence[Entry]) -> None:
        await append(self, entries)
        for entry in entries:
            if isinstance(entry.record, Delta) and next(seen) == plan.die_after_delta:
                if plan.take_along:
                    pid = int((directory / "workers" / plan.take_along / "pid").read_text())
                    os.kill(pid, signal.SIGKILL)
                die()

    if plan.die_after_delta:
        log.FileLog.append = dying  # type: ignore[method-assign]


def _skip_no_checkpoint() -> None:
    """A server merges on while a checkpoint is written, and skips what falls due meanwhile: not this one."""
    consider = Checkpointer.consider

    async def patient(self: Checkpointer, state: State) -> None:
        while self.is_busy and state.version > self._version:  # noqa: ASYNC110
            await trio.sleep(0.001)
        await consider(self, state)

    Checkpointer.consider = patient  # type: ignore[method-assign]


def _hold_checkpoints(hold: Path) -> None:
    """As on a disk that is slow; `HOLD.reached` says of which record the one is that waits."""
    write = store.CheckpointStore._write

    def held(self: store.CheckpointStore, lsn: int, manifest: store.Describe, arrays: store.Pieces) -> None:
        hold.with_suffix(".reached").write_text(str(lsn))
        while hold.exists():
            time.sleep(0.01)
        write(self, lsn, manifest, arrays)

    store.CheckpointStore._write = held  # type: ignore[method-assign]


class Calls:
    """Every call by which the server changes its disk, counted; the fault strikes at one of them."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.made: list[str] = []
        self._lock = threading.Lock()
        self._counted = 0
        self._full_until = 0.0

    def watch(self) -> None:
        for name in DISK_CALLS:
            setattr(disk.Disk, name, self._watched(name, getattr(disk.Disk, name)))
        store.shutil.rmtree = self._watched("rmtree", store.shutil.rmtree)  # type: ignore[attr-defined]

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            is_struck = self._is_struck(name)
            if is_struck and self.fault.kind == "die":
                _tear(name, arguments)
                die()
            if is_struck and self.fault.kind == "fail":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if is_struck and self.fault.kind == "full":
                self._full_until = time.monotonic() + self.fault.seconds
            if name in TAKES_SPACE and time.monotonic() < self._full_until:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            answer = call(*arguments)
            if is_struck and self.fault.kind == "die after":
                die()
            return answer

        return watched

    def _is_struck(self, name: str) -> bool:
        with self._lock:
            self.made.append(name)
            self._counted += self.fault.only in ("", name)
            return self.fault.only in ("", name) and self._counted == self.fault.at


def _tear(name: str, arguments: tuple[Any, ...]) -> None:
    """A process that dies while it writes has written a part."""
    if name == "write":
        _, descriptor, buffers, offset = arguments
        whole = b"".join(bytes(buffer) for buffer in buffers)
        os.pwrite(descriptor, whole[: len(whole) // 2], offset)
