"""Puts concrete shells behind the ports: the only place that knows both a loop and what it runs on."""

import contextlib
import functools
import importlib.metadata
import itertools
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import trio

from hetero_async.actors.supervisor import RestartWindow, supervise
from hetero_async.archiving import Archiving
from hetero_async.config import ENV_RUN, ENV_WORKER, Node, RunConfig
from hetero_async.core.messages import Fence, Position, StatusReport, StatusRequest
from hetero_async.core.records import Entry, changed_for_good
from hetero_async.core.state import State
from hetero_async.errors import ConfigError, LogCorrupt, UserError, WorkerDied
from hetero_async.node import Parts, begin_serving, stand_by
from hetero_async.ports import Checkpoint, Observer, Witness
from hetero_async.replay import fold, replay, start_of
from hetero_async.serve import Serving
from hetero_async.shell import refusals
from hetero_async.shell.archive import open_archive
from hetero_async.shell.dial import DialLink, Endpoint, open_dial_link
from hetero_async.shell.holdings import DirectoryHoldings
from hetero_async.shell.keys import AllowList, create_keypair, load_public
from hetero_async.shell.link import open_server_link
from hetero_async.shell.log import FileLog
from hetero_async.shell.promise import FilePromises
from hetero_async.shell.refusals import RefusalNotes, load_refusals
from hetero_async.shell.segments import read_log, run_of
from hetero_async.shell.store import CheckpointStore
from hetero_async.shell.telemetry import NullObserver
from hetero_async.shell.threads import abandonable, in_thread
from hetero_async.tensors.model import ServerModel
from hetero_async.watch.audit import Audit, audit
from hetero_async.watch.verify import Verdict, verify
from hetero_async.watch.without import Rebuilt, left_out, rebuild

Status = dict[str, Any]

# A finished server waits so long for workers to fetch the last publish and say bye.
FAREWELL_SECONDS = 30.0
STATUS_SECONDS = 5.0
STATUS_RETRY_SECONDS = 0.1
# Another node, asked where it stands, that has not answered in this time cannot be reached.
ASK_SECONDS, ASK_AGAIN_SECONDS = 4.0, 1.0
# A worker that dies more often than this within the period is not helped by starting it again.
WORKER_RESTARTS = 10
WORKER_RESTART_PERIOD_SECONDS = 60.0
WORKER_BACKOFF_SECONDS = 1.0


# --- servers and standbys ---


async def serve_run(config: RunConfig, name: str, exit_when_finished: bool, observer: Observer) -> None:
    """Recover the run from its node's directory and serve it until told to stop. Raises Deposed."""
    async with _open_parts(config, name, observer) as parts:
        serving = await begin_serving(parts)
        observer.event("serving", run=config.run.name, address=config.node(name).control, version=_version(serving))
        await _until_stopped(serving, exit_when_finished)


async def stand_by_run(config: RunConfig, name: str, exit_when_finished: bool, observer: Observer) -> None:
    """Follow whichever node serves the run, and serve it when that is gone, until told to stop."""
    node = config.node(name)
    secret = config.keys / f"{name}.secret"
    others = endpoints(config, without=name)
    async with (
        _open_parts(config, name, observer) as parts,
        open_dial_link(others, secret_path=secret, observer=observer) as dialling,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(_stop_on_signal, nursery.cancel_scope)
        observer.event("standing by", run=config.run.name, address=node.control, lsn=parts.log.last_lsn)
        serving = await stand_by(parts, dialling, lambda _: None)
        observer.event("serving", run=config.run.name, address=node.control, version=_version(serving))
        await _until_stopped(serving, exit_when_finished)
        nursery.cancel_scope.cancel()


def _version(serving: Serving) -> int:
    return serving.machine.state.version


@contextlib.asynccontextmanager
async def _open_parts(config: RunConfig, name: str, observer: Observer) -> AsyncIterator[Parts]:
    """All that a node lives on: its log locked, its addresses taken. Raises ConfigError, LogCorrupt, DiskFull."""
    node = config.node(name)
    log = FileLog.open(node.log, config.run.name, in_thread)
    observer = notes = RefusalNotes(node.log.parent / refusals.NAME, observer)
    try:
        async with (
            open_server_link(
                control=node.control,
                bulk=node.bulk,
                secret_path=config.keys / f"{name}.secret",
                allowed=AllowList(config.keys / "allowed.json"),
                observer=observer,
            ) as link,
            open_witness(config) as witness,
        ):
            yield Parts(
                name=name,
                software=importlib.metadata.version("hetero-async"),
                settings=config.settings(),
                rules=config.durability(),
                checkpoint_every=config.server.checkpoint_every,
                keep_log=config.server.keep_log,
                log=log,
                store=CheckpointStore(node.checkpoints, config.run.name, in_thread),
                promises=FilePromises(node.directory / "promised-term"),
                make_model=ServerModel,
                listening=link,
                blocking=in_thread,
                observer=observer,
                witness=witness,
                ask=functools.partial(ask_nodes, config, name),
                check=functools.partial(_check_settings, config),
                archiving=_archiving(config, node, observer),
            )
    finally:
        notes.write()
        log.close()


def endpoints(config: RunConfig, without: str = "") -> list[Endpoint]:
    """Every node of the run, with its pinned key. Raises ConfigError for a key file that is missing."""
    return [
        Endpoint(
            name=node.name,
            key=load_public(config.keys / f"{node.name}.public"),
            control=node.control,
            bulk=node.bulk,
        )
        for node in config.nodes().values()
        if node.name != without
    ]


async def ask_nodes(config: RunConfig, name: str, term: int) -> dict[str, Position | None]:
    """Tell all other nodes, as this one, of a term (0: only ask); where each stands, None: it did not answer."""
    positions: dict[str, Position | None] = {}

    async def ask(other: Endpoint) -> None:
        positions[other.name] = None
        secret = config.keys / f"{name}.secret"
        with trio.move_on_after(ASK_SECONDS):
            async with open_dial_link([other], secret_path=secret, observer=NullObserver()) as link:
                positions[other.name] = await _asked(link, Fence(term=term))

    async with trio.open_nursery() as nursery:
        for other in endpoints(config, without=name):
            nursery.start_soon(ask, other)
    return dict(sorted(positions.items()))


async def _asked(link: DialLink, fence: Fence) -> Position:
    while True:
        with trio.move_on_after(ASK_AGAIN_SECONDS):
            while not await link.control.send(link.server.key, fence):  # noqa: ASYNC110, the deadline ends it
                await trio.sleep(STATUS_RETRY_SECONDS)
            while not isinstance(message := (await link.control.receive()).message, Position):
                pass
            return message


def _check_settings(config: RunConfig, state: State) -> None:
    if state.settings is None:
        return
    changed = changed_for_good(state.settings, config.settings())
    if changed:
        name = changed[0]
        logged, wanted = getattr(state.settings, name), getattr(config.settings(), name)
        raise ConfigError(
            f"{config.directory} holds a run with {name} = {logged!r}, and run.toml says {wanted!r}: "
            "this cannot change any more; put it back, or choose another run.directory"
        )


def _archiving(config: RunConfig, node: Node, observer: Observer) -> Archiving | None:
    if not config.server.archive:
        return None
    return Archiving(
        run=config.run.name,
        archive=open_archive(config.server.archive, config.path.parent),
        holdings=DirectoryHoldings(node.log, node.checkpoints),
        blocking=in_thread,
        network=abandonable,
        observer=observer,
    )


async def _archive_rest(serving: Serving) -> None:
    """Nobody waits for the server any more, so it may wait a while for the archive."""
    if (archiving := serving.archiving) is None:
        return
    serving.observer.event("archiving the rest", seconds_at_most=FAREWELL_SECONDS)
    with trio.move_on_after(FAREWELL_SECONDS) as waiting:
        await archiving.finish()
    told = "archive incomplete" if waiting.cancelled_caught or archiving.alarm else "archive complete"
    serving.observer.event(told, lsn=archiving.lsn, checkpoint=archiving.checkpoint_lsn)


async def _until_stopped(serving: Serving, exit_when_finished: bool) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_stop_on_signal, nursery.cancel_scope)
        nursery.start_soon(serving.run)
        if exit_when_finished:
            await serving.finished.wait()
            with trio.move_on_after(FAREWELL_SECONDS):
                await serving.deserted.wait()
            nursery.cancel_scope.cancel()
    await _archive_rest(serving)


async def _stop_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            scope.cancel()
            return


# --- workers of a site ---


async def work(config: RunConfig, site: str, command: Sequence[str], observer: Observer) -> None:
    """Start the site's workers, start again what dies, return when all have ended well."""
    if site not in config.sites:
        raise UserError(f'run.toml knows no site "{site}"; it has: {", ".join(sorted(config.sites))}')
    children = {
        name: functools.partial(_run_worker, config, name, command, observer)
        for where, name in config.workers()
        if where == site
    }
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_stop_on_signal, nursery.cancel_scope)
        await supervise(
            children,
            RestartWindow(WORKER_RESTARTS, WORKER_RESTART_PERIOD_SECONDS),
            backoff_seconds=WORKER_BACKOFF_SECONDS,
            report=lambda report: observer.event("worker restarts", reason=str(report)),
        )
        nursery.cancel_scope.cancel()


async def _run_worker(config: RunConfig, name: str, command: Sequence[str], observer: Observer) -> None:
    """One life of one worker. Raises WorkerDied unless it ended with exit code 0."""
    environment = {**os.environ, ENV_RUN: str(config.path.resolve()), ENV_WORKER: name}
    directory = config.worker_directory(name)
    directory.mkdir(parents=True, exist_ok=True)
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            functools.partial(trio.run_process, list(command), env=environment, check=False)
        )
        (directory / "pid").write_text(str(process.pid))
        observer.event("worker started", worker=name, pid=process.pid)
    if process.returncode:
        raise WorkerDied(f"{name} ended with {_ending(process.returncode)}")
    observer.event("worker ended", worker=name)


def _ending(returncode: int) -> str:
    return f"exit code {returncode}" if returncode > 0 else f"signal {signal.Signals(-returncode).name}"


# --- looking at a run ---


@contextlib.asynccontextmanager
async def open_status(config: RunConfig, observer: Observer) -> AsyncIterator[Callable[[], Awaitable[Status | None]]]:
    """A connection to the server and the question how it stands; the answer is None when none comes in time."""
    async with open_dial_link(
        endpoints(config), secret_path=config.keys / "operator.secret", observer=observer
    ) as link:

        async def ask() -> Status | None:
            with trio.move_on_after(STATUS_SECONDS):
                return await _ask_status(link)
            return None

        yield ask


async def _ask_status(link: DialLink) -> Status:
    while not await link.control.send(link.server.key, StatusRequest()):  # noqa: ASYNC110, the caller's deadline ends it
        await trio.sleep(STATUS_RETRY_SECONDS)
    while True:
        incoming = await link.control.receive()
        if isinstance(incoming.message, StatusReport):
            status: Status = json.loads(incoming.payload)
            if not status.get("standby", {}).get("hears_server"):
                return status
            link.turn(status["standby"]["server"])
            return await _ask_status(link)


def verify_directory(log: Path, progress: Callable[[int], None]) -> Verdict:
    """Verify the run whose log lies in `log`, beside its checkpoints and its workers' outboxes where they are."""
    checkpoint, entries = _oldest_start(log)
    outboxes = sorted(log.parent.glob("workers/*/acknowledged.jsonl"))
    return verify(checkpoint, entries, ServerModel(), outboxes, progress)


def audit_directory(log: Path) -> Audit:
    """Who contributed what to the run whose log lies in `log`, and what the server beside it refused."""
    return audit(*_oldest_start(log), load_refusals(log.parent / refusals.NAME))


def replay_without(log: Path, names: Sequence[str], out: Path | None, progress: Callable[[int], None]) -> Rebuilt:
    """The run's parameters without those named, written to `out` as safetensors. Raises UserError, LogCorrupt."""
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no directory {out.parent}; make it first")
    checkpoint, entries = _oldest_start(log)
    state = start_of(checkpoint)
    for entry in entries:
        fold(entry, state)
    chosen = left_out(names, state)
    rebuilt = rebuild(*_oldest_start(log), chosen, progress)
    if out is not None:
        rebuilt.model.export(out)
    return rebuilt


def _oldest_start(log: Path) -> tuple[Checkpoint | None, Iterator[Entry]]:
    """Genesis where the log still has it, else the oldest checkpoint, and the entries from there on."""
    entries = read_log(log, None)
    first = next(entries, None)
    if first is not None and first.lsn == 1:
        return None, itertools.chain([first], entries)
    store = CheckpointStore(log.parent / "checkpoints", run_of(log), in_thread)
    if first is None:
        checkpoint = store.load_newest()
        if checkpoint is None:
            raise UserError(f"{log}: holds no record yet")
        return checkpoint, read_log(log, None, checkpoint.lsn)
    # A power cut may have brought back one that was dropped; the log does not reach back to it any more.
    reached = [lsn for lsn in store.lsns() if lsn + 1 >= first.lsn]
    if not reached:
        raise LogCorrupt(f"{log}: begins at record {first.lsn}, and no checkpoint reaches so far")
    checkpoint = store.load(reached[0])
    return checkpoint, read_log(log, None, checkpoint.lsn)


def export(config: RunConfig, out: Path) -> State:
    """Write the newest parameters in the run's directory as safetensors. The server may be running."""
    store = CheckpointStore(config.checkpoints, config.run.name, in_thread)
    checkpoint = store.load_newest()
    entries = read_log(config.log, config.run.name, checkpoint.lsn if checkpoint else 0)
    model = ServerModel()
    state = replay(checkpoint, entries, model)
    if state.settings is None:
        raise UserError(f"{config.directory} holds no parameters yet: no worker has joined the run")
    model.export(out)
    return state


# --- a new run ---


def initialize(directory: Path, run_toml: str) -> RunConfig:
    """Write run.toml, the keys of server, operator and every worker, and the list of who is let in.

    Raises ConfigError when there is a run already.
    """
    path = directory / "run.toml"
    if path.exists():
        raise ConfigError(f"{path}: there is one already; remove it, or choose another directory")
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(run_toml)
    config = RunConfig.load(path)
    config.keys.mkdir(parents=True, exist_ok=True, mode=0o700)
    allowed = AllowList(config.keys / "allowed.json")
    for node in config.nodes().values():
        allowed.admit(create_keypair(config.keys / node.name), role="standby", site=node.site, worker=node.name)
    allowed.admit(create_keypair(config.keys / "operator"), role="admin", site=config.server.site, worker="operator")
    for site, worker in config.workers():
        allowed.admit(create_keypair(config.keys / worker), role="worker", site=site, worker=worker)
    return config


@contextlib.asynccontextmanager
async def open_witness(config: RunConfig) -> AsyncIterator[Witness | None]:
    """The witness that run.toml names, or None."""
    yield None
