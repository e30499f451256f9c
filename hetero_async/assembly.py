"""Puts concrete shells behind the ports: the only place that knows both a loop and what it runs on."""

import contextlib
import functools
import itertools
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import trio

from hetero_async.actors.supervisor import RestartWindow, supervise
from hetero_async.config import ENV_RUN, ENV_WORKER, RunConfig
from hetero_async.core.messages import StatusReport, StatusRequest
from hetero_async.core.records import Entry
from hetero_async.core.server import Server, changed_for_good
from hetero_async.core.state import State
from hetero_async.errors import ConfigError, LogCorrupt, UserError, WorkerDied
from hetero_async.ports import Checkpoint, Link, Observer
from hetero_async.replay import recover, replay
from hetero_async.serve import Serving
from hetero_async.shell.keys import AllowList, create_keypair, load_public
from hetero_async.shell.link import SOFTWARE, open_server_link, open_worker_link
from hetero_async.shell.log import FileLog, read_log, run_of
from hetero_async.shell.memory import give_memory_back
from hetero_async.shell.quarantine import open_quarantine
from hetero_async.shell.store import CheckpointStore
from hetero_async.shell.threads import in_thread
from hetero_async.tensors.model import ServerModel
from hetero_async.watch.verify import Verdict, verify

Status = dict[str, Any]

# A finished server waits so long for workers to fetch the last publish and say bye.
FAREWELL_SECONDS = 30.0
STATUS_SECONDS = 5.0
STATUS_RETRY_SECONDS = 0.1
# A worker that dies more often than this within the period is not helped by starting it again.
WORKER_RESTARTS = 10
WORKER_RESTART_PERIOD_SECONDS = 60.0
WORKER_BACKOFF_SECONDS = 1.0


# --- server ---


async def serve_run(config: RunConfig, exit_when_finished: bool, observer: Observer) -> None:
    """Recover the run from its directory and serve it until told to stop."""
    give_memory_back()
    log = FileLog.open(config.log, config.run.name, in_thread)
    try:
        store = CheckpointStore(config.checkpoints, config.run.name, in_thread)
        model = ServerModel()
        state = recover(log, store, model, observer)
        _check_settings(config, state)
        machine = Server(config.settings(), state)
        quarantine = open_quarantine(config.keys / "quarantine.json", observer)
        async with open_server_link(
            control=config.server.address,
            bulk=config.server.bulk,
            secret_path=config.keys / "server.secret",
            allowed=AllowList(config.keys / "allowed.json"),
            observer=observer,
            quarantine=quarantine,
        ) as link:
            observer.event("serving", run=config.run.name, address=config.server.address, version=state.version)
            serving = Serving(
                machine=machine,
                model=model,
                log=log,
                store=store,
                link=link,
                blocking=in_thread,
                observer=observer,
                checkpoint_every=config.server.checkpoint_every,
                keep_log=config.server.keep_log,
                quarantine=quarantine,
                software=SOFTWARE,
            )
            await _until_stopped(serving, exit_when_finished)
    finally:
        log.close()


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


async def _until_stopped(serving: Serving, exit_when_finished: bool) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_stop_on_signal, nursery.cancel_scope)
        nursery.start_soon(serving.run)
        if exit_when_finished:
            await serving.finished.wait()
            with trio.move_on_after(FAREWELL_SECONDS):
                await serving.deserted.wait()
            nursery.cancel_scope.cancel()


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
    server = load_public(config.keys / "server.public")
    async with open_worker_link(
        control=config.server.address,
        bulk=config.server.bulk,
        server_key=server,
        secret_path=config.keys / "operator.secret",
        observer=observer,
    ) as link:

        async def ask() -> Status | None:
            with trio.move_on_after(STATUS_SECONDS):
                return await _ask_status(link, server)
            return None

        yield ask


async def _ask_status(link: Link, server: bytes) -> Status:
    while not await link.control.send(server, StatusRequest()):  # noqa: ASYNC110, the caller's deadline ends it
        await trio.sleep(STATUS_RETRY_SECONDS)
    while True:
        incoming = await link.control.receive()
        if isinstance(incoming.message, StatusReport):
            status: Status = json.loads(incoming.payload)
            return status


def verify_directory(log: Path, progress: Callable[[int], None]) -> Verdict:
    """Verify the run whose log lies in `log`, beside its checkpoints and its workers' outboxes where they are."""
    checkpoint, entries = _oldest_start(log)
    outboxes = sorted(log.parent.glob("workers/*/acknowledged.jsonl"))
    return verify(checkpoint, entries, ServerModel(), outboxes, progress)


def _oldest_start(log: Path) -> tuple[Checkpoint | None, Iterator[Entry]]:
    """Genesis where the log still has it, else the oldest checkpoint, and the entries from there on."""
    entries = read_log(log, None)
    first = next(entries, None)
    if first is None:
        raise UserError(f"{log}: holds no record yet")
    if first.lsn == 1:
        return None, itertools.chain([first], entries)
    store = CheckpointStore(log.parent / "checkpoints", run_of(log), in_thread)
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
    create_keypair(config.keys / "server")
    allowed.admit(create_keypair(config.keys / "operator"), role="admin", site=config.server.site, worker="operator")
    for site, worker in config.workers():
        allowed.admit(create_keypair(config.keys / worker), role="worker", site=site, worker=worker)
    return config
