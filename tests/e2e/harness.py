"""Runs with real processes, sockets and files: starts, kills and restarts them, waits for what shall come, and judges.

Importing torch takes seconds, so one process imports everything once, and each server's and worker's life is forked
from that. Every wait has a deadline, and tells on failure what everybody had said by then.
"""

import functools
import itertools
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import trio
from e2e import tiny
from e2e.lives import HEARTBEATS, PROMISED, WITNESS, ServerPlan, command_life, node_life, together_life, worker_life

from hetero_async import asking, looking, roster
from hetero_async.asking import Status
from hetero_async.config import RunConfig
from hetero_async.core.records import Beacon, Delta, Entry
from hetero_async.core.state import State
from hetero_async.replay import replay
from hetero_async.shell.segments import read_log
from hetero_async.tables import template
from hetero_async.tensors.model import ServerModel
from hetero_async.watch.verify import Verdict

T = TypeVar("T")

LOOK_SECONDS = 0.01
PATIENCE_SECONDS = 120.0
SAID_LINES_MAX = 25

# More threads than one would not survive a fork, and two cores have no use for them.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
FORKS = multiprocessing.get_context("forkserver")
PRELOADED = ["e2e.lives", "e2e.tiny", "trio.testing", "torch._dynamo"]  # the last comes with the first optimizer
# A Process of this context can be looked at by one thread at a time.
FORKS_LOCK = threading.Lock()

# Outside the range from which the kernel gives ports to outgoing connections: a killed server finds its own again.
PORTS = itertools.cycle(random.Random(os.getpid()).sample(range(20_000, 32_000), 12_000))


@functools.cache
def start_fork_server() -> None:
    """Where Python would do it by itself, it would not find our modules: it gives that process no path to them."""
    FORKS.set_forkserver_preload(PRELOADED)
    usual = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    forkserver.ensure_running()
    del os.environ["PYTHONPATH"]
    if usual is not None:
        os.environ["PYTHONPATH"] = usual


def free_port() -> int:
    for port in PORTS:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("12,000 ports and none is free")


def free_ports() -> dict[str, str]:
    return {"address": f"tcp://127.0.0.1:{free_port()}", "bulk_address": f"tcp://127.0.0.1:{free_port()}"}


class Life:
    """One process."""

    def __init__(self, name: str, output: Path, target: Callable[..., None], *arguments: object) -> None:
        self.name = name
        self.output = output
        start_fork_server()
        self._process = FORKS.Process(target=target, args=arguments, name=name, daemon=True)
        with FORKS_LOCK:
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def exit_code(self) -> int | None:
        with FORKS_LOCK:
            return self._process.exitcode

    @property
    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and gone on return."""
        if self.exit_code is None:
            self.signal(signal.SIGKILL)
        self.ending()

    def ending(self, seconds: float = PATIENCE_SECONDS) -> int:
        """The exit code, when it has ended by itself."""
        until(lambda: self.exit_code is not None, f"{self.name} ends", seconds, lambda: self.said)
        assert self.exit_code is not None
        return self.exit_code


def until(holds: Callable[[], T], what: str, seconds: float, story: Callable[[], str]) -> T:
    """The first true answer. Fails with what was waited for, and the story so far."""
    deadline = time.monotonic() + seconds
    while not (answer := holds()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}\n{story()}")
        time.sleep(LOOK_SECONDS)
    return answer


@dataclass(frozen=True, slots=True)
class Answer:
    exit_code: int
    output: str
    errors: str


def forked(tmp_path: Path, *words: object, typed: str = "") -> Answer:
    """One command, from the process that has everything imported, and what it printed."""
    number = len(list(tmp_path.glob("command-*.errors")))
    output, errors = tmp_path / f"command-{number}.output", tmp_path / f"command-{number}.errors"
    told = [str(word) for word in words], str(tmp_path), str(output), str(errors), typed
    life = Life("command", errors, command_life, *told)
    return Answer(life.ending(), output.read_text(), errors.read_text().strip())


class Silent:
    def event(self, name: str, **fields: object) -> None:
        pass


class Run:
    """A run in its own directory: one site of so many workers, or several. Leaving it kills whatever still lives.

    `standbys`: their names; in what looks at a log, `node` says whose.
    """

    def __init__(
        self, directory: Path, *, workers: int = 2, sites: dict[str, int] | None = None, samples: int = 1600,
        server: dict[str, Any] | None = None, standbys: Sequence[str] = (), witness: dict[str, Any] | None = None,
        **training: Any,
    ) -> None:  # fmt: skip
        text = template(
            run={"name": "tiny", "samples": samples},
            sites=sites or {"here": workers},
            server={**free_ports(), "dashboard": "", "checkpoint_every": 4, "keep_log": True, **(server or {})},
            training={"steps_per_round": 8, "lease_ttl_seconds": 3.0, **training},
            standbys={name: {"site": name, "dashboard": "", **self.place(name)} for name in standbys},
            witness=witness,
        )
        self.config: RunConfig = roster.initialize(directory, text)
        self.names = [worker for _, worker in self.config.workers()]
        self.lives: list[Life] = []

    def place(self, site: str) -> dict[str, str]:
        """Where a standby at that site is reached."""
        return free_ports()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for life in self.lives:
            life.kill()

    # --- processes ---

    def start_server(self, **plan: Any) -> Life:
        return self._start_node("server", ["serve"], **plan)

    def start_standby(self, name: str, **plan: Any) -> Life:
        return self._start_node(name, ["standby", "--name", name], **plan)

    def _start_node(self, name: str, verb: Sequence[str], **plan: Any) -> Life:
        output = self._output(name)
        return self._start(name, output, node_life, str(self.config.path), verb, str(output), ServerPlan(**plan))

    def start_worker(
        self, worker: str, script: Callable[..., None] = tiny.train, *, awaited: Sequence[str] = (), **options: Any
    ) -> Life:
        """It trains when all that it awaits have joined."""
        output = self._output(worker)
        told = str(self.config.path), worker, str(output), script, awaited, options
        return self._start(worker, output, worker_life, *told)

    def start_workers(self, script: Callable[..., None] = tiny.train, **options: Any) -> list[Life]:
        return [self.start_worker(worker, script, awaited=self.names, **options) for worker in self.names]

    def start_together(self, **options: Any) -> Life:
        """All workers in one process."""
        output = self._output("workers")
        return self._start("workers", output, together_life, str(self.config.path), self.names, str(output), options)

    def _output(self, name: str) -> Path:
        return self.config.directory / f"{name}-{len(self.lives)}.output"

    def _start(self, name: str, output: Path, target: Callable[..., None], *arguments: object) -> Life:
        life = Life(name, output, target, *arguments)
        self.lives.append(life)
        return life

    # --- looking ---

    def wait(self, holds: Callable[[], T], what: str, seconds: float = PATIENCE_SECONDS) -> T:
        return until(holds, what, seconds, self.story)

    def story(self) -> str:
        lines = []
        for life in self.lives:
            lines += [f"--- {life.name} (pid {life.pid}, exit code {life.exit_code}):"]
            lines += life.said.splitlines()[-SAID_LINES_MAX:]
        return "\n".join(lines)

    def entries(self, node: str = "server") -> Iterator[Entry]:
        """What the log holds now; the server may be writing it."""
        log = self.config.node(node).log
        return read_log(log, None) if list(log.glob("*.log")) else iter(())

    def deltas(self, worker: str = "", node: str = "server") -> list[Delta]:
        return [delta for delta in self.records(Delta, node) if worker in ("", delta.worker)]

    def records(self, kind: type[T], node: str = "server") -> list[T]:
        return [entry.record for entry in self.entries(node) if isinstance(entry.record, kind)]

    def status(self) -> Status:
        return trio.run(self._ask)

    async def _ask(self) -> Status:
        with trio.fail_after(PATIENCE_SECONDS):
            async with asking.open_status(self.config, Silent()) as ask:
                while True:
                    with trio.move_on_after(0.5):  # a question that met a dying server is asked again
                        if answer := await ask():
                            return answer

    def results(self, worker: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.config.worker_directory(worker) / "results.json").read_text())
        return found

    def unanswered(self, worker: str) -> list[str]:
        return sorted(path.name for path in self.config.worker_directory(worker).glob("*.delta"))

    def acknowledged(self, worker: str) -> list[int]:
        """The seqs that the worker noted."""
        notes = self.config.worker_directory(worker) / "acknowledged.jsonl"
        return [json.loads(line)["seq"] for line in notes.read_text().splitlines()] if notes.exists() else []

    def heartbeats(self, worker: str) -> list[tuple[int, str]]:
        """Its steps and what it does, as it said from time to time, whether anybody heard it or not."""
        notes = self.config.worker_directory(worker) / HEARTBEATS
        said = (line.split(" ", 1) for line in notes.read_text().splitlines()) if notes.exists() else iter(())
        return [(int(steps), doing) for steps, doing in said]

    # --- the end ---

    def finish(self, *lives: Life, node: str = "server") -> Verdict:
        """Wait until these (all that still live) have ended well, then hold every promise against the log."""
        for life in lives or [life for life in self.lives if life.exit_code is None]:
            self.wait(lambda life=life: life.exit_code is not None, f"{life.name} ends")
            assert life.exit_code == 0, f"{life.name} ended with {life.exit_code}\n{self.story()}"
        return self.check(node)

    def check(self, node: str = "server") -> Verdict:
        verdict = looking.verify_directory(self.config.node(node).log, lambda _: None)
        assert verdict.is_ok, "\n".join(verdict.lines())
        assert verdict.state.is_finished, f"{verdict.lines()}\n{self.story()}"
        self._check_promises(verdict, node)
        self._check_witness(node)
        return verdict

    def _check_promises(self, verdict: Verdict, node: str) -> None:
        """Everything that any life of any server promised is in the log at the place it named."""
        deltas = [(entry.lsn, entry.record) for entry in self.entries(node) if isinstance(entry.record, Delta)]
        kept = {(delta.worker, delta.seq, lsn) for lsn, delta in deltas}
        promised = {(worker, int(seq), int(lsn)) for worker, seq, lsn in self._lines(PROMISED)}
        assert promised
        forgotten = {promise for promise in promised - kept if promise[2] > verdict.from_lsn}
        assert not forgotten, f"acknowledged, and not in the log: {forgotten}"
        last = {worker: member.last_seq for worker, member in verdict.state.members.items()}
        assert all(seq <= last[worker] for worker, seq, _ in promised)

    def _check_witness(self, node: str) -> None:
        """What every life of a server saw after each of its batches is what a replay of the log comes to.

        A term has one server, so term and number name a record, also where one was deposed with records of its own.
        """
        witnessed = {(int(term), int(lsn)): (state, model) for term, lsn, state, model in self._lines(WITNESS)}
        compared: list[int] = []
        model = ServerModel()

        def compare(entry: Entry, state: State) -> None:
            if (state.term, entry.lsn) in witnessed:
                found = state.digest().hex(), model.model_hash().hex()
                assert found == witnessed[state.term, entry.lsn], f"after record {entry.lsn}"
                compared.append(entry.lsn)

        start, entries = looking.oldest_start(self.config.node(node).log)
        state = replay(start, entries, model, compare)
        last_beacon = max(entry.lsn for entry in self.entries(node) if isinstance(entry.record, Beacon))
        # What came after it, a server that is told to stop may have written and not looked at any more.
        assert last_beacon <= max(compared) <= state.lsn

    def _lines(self, name: str) -> list[list[str]]:
        path = self.config.directory / name
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []
