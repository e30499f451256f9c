"""Puts concrete shells behind the ports of a node: the server, or a standby that may become it.

agent.py starts a site's workers, whose own shells are in session.py; asking.py asks nodes from outside, looking.py
reads what they have on disk.
"""

import contextlib
import functools
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import trio

from hetero_async.actors.supervisor import RestartWindow, supervise
from hetero_async.archiving import Archiving
from hetero_async.asking import ask_nodes, endpoints
from hetero_async.best import BestKeeper
from hetero_async.config import Node, RunConfig
from hetero_async.core.evaluating import KeepBest
from hetero_async.core.records import changed_for_good
from hetero_async.core.state import State
from hetero_async.errors import ConfigError, DiskFull
from hetero_async.node import begin_serving, stand_by
from hetero_async.parts import Parts
from hetero_async.ports import Observer, Peer, Witness
from hetero_async.serve import DISK_FULL_RETRY_SECONDS, Serving
from hetero_async.shell import refusals
from hetero_async.shell.admin import Verb, open_admin, serve_admin
from hetero_async.shell.archive import open_archive
from hetero_async.shell.best import DirectoryBest
from hetero_async.shell.dial import DialLink, open_dial_link
from hetero_async.shell.holdings import DirectoryHoldings
from hetero_async.shell.keys import AllowList, load_secret
from hetero_async.shell.link import SOFTWARE, open_server_link
from hetero_async.shell.log import FileLog
from hetero_async.shell.memory import set_manners
from hetero_async.shell.notify import keep_notified
from hetero_async.shell.promise import FilePromises
from hetero_async.shell.quarantine import open_quarantine
from hetero_async.shell.refusals import RefusalNotes
from hetero_async.shell.shelf import FileShelf
from hetero_async.shell.signals import stop_on_signal
from hetero_async.shell.store import CheckpointStore
from hetero_async.shell.telemetry import SeldomObserver
from hetero_async.shell.threads import abandonable, in_thread
from hetero_async.shell.witness import open_witness
from hetero_async.standby import StandingBy
from hetero_async.tensors.model import ServerModel
from hetero_async.watch.chronicle import Chronicle, open_chronicle

# Where a SettingsReport to a standby has the list of keys that are let in.
ALLOWED = "allowed"
# Beside the log of a node that has ever served: what deploy/node tries first when it is started again.
HAS_SERVED = "has-served"
# A finished server waits so long for workers to fetch the last publish and say bye.
FAREWELL_SECONDS = 30.0
# And for one that measures the last publish as long as that takes; it is looked at so often.
FAREWELL_LOOK_SECONDS = 1.0
# Rests between them keep it from ever coming to so many: the run goes on without its operator's socket.
OPERATOR_RESTARTS = 1000
OPERATOR_RESTART_PERIOD_SECONDS = 60.0
OPERATOR_BACKOFF_SECONDS = 1.0


# --- servers and standbys ---


async def serve_run(config: RunConfig, name: str, exit_when_finished: bool, observer: Observer) -> None:
    """Recover the run from its node's directory and serve it until told to stop. Raises Deposed."""
    with _open_chronicle(config, name, observer) as chronicle:
        async with _open_parts(config, name, chronicle) as parts:
            serving = await begin_serving(parts)
            with open_admin(config.node(name).admin) as listener:
                await _serve(config, parts, serving, listener, chronicle, exit_when_finished)


async def stand_by_run(config: RunConfig, name: str, exit_when_finished: bool, observer: Observer) -> None:
    """Follow whichever node serves the run, and serve it when that is gone, until told to stop."""
    node, secret = config.node(name), config.keys / f"{name}.secret"
    with _open_chronicle(config, name, observer) as chronicle:
        async with _open_parts(config, name, chronicle) as parts:
            with open_admin(node.admin) as listener:
                observer.event("standing by", run=config.run.name, address=node.control, lsn=parts.log.last_lsn)
                others = endpoints(config, without=name)
                async with open_dial_link(others, secret_path=secret, observer=observer) as dialling:
                    serving = await _stand_by(parts, dialling, listener, chronicle)
                if serving is not None:
                    await _serve(config, parts, serving, listener, chronicle, exit_when_finished)


async def _stand_by(
    parts: Parts, dialling: DialLink, listener: trio.socket.SocketType, chronicle: Chronicle
) -> Serving | None:
    """The server that it has become; None when it was told to stop."""
    present: list[StandingBy] = []
    serving: Serving | None = None

    def shown(standing: StandingBy) -> None:
        present[:] = [standing]

    async def promote(in_spite: bool = False) -> list[str]:
        return await present[0].takeover.at_word(parts.ask, in_spite=in_spite)

    verbs: dict[str, Verb] = {"status": lambda: chronicle.shown_in(present[0].status()), "promote": promote}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_on_signal, nursery.cancel_scope)
        nursery.start_soon(keep_notified)
        nursery.start_soon(_answer_operator, listener, verbs, parts.observer)
        nursery.start_soon(chronicle.follow, lambda: present[0].look() if present else None)
        serving = await stand_by(parts, dialling, shown)
        nursery.cancel_scope.cancel()
    return serving


async def _serve(
    config: RunConfig,
    parts: Parts,
    serving: Serving,
    listener: trio.socket.SocketType,
    chronicle: Chronicle,
    exit_when_finished: bool,
) -> None:
    node, state = config.node(parts.name), serving.machine.state
    (node.directory / HAS_SERVED).touch()
    parts.observer.event("serving", run=config.run.name, address=node.control, term=state.term, version=state.version)
    verbs: dict[str, Verb] = {"status": lambda: chronicle.shown_in(serving.status()), "lift": serving.lift}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_on_signal, nursery.cancel_scope)
        nursery.start_soon(keep_notified)
        nursery.start_soon(_answer_operator, listener, verbs, parts.observer)
        nursery.start_soon(serving.run)
        nursery.start_soon(chronicle.follow, serving.look)
        if exit_when_finished:
            await serving.finished.wait()
            with trio.move_on_after(FAREWELL_SECONDS) as farewell:
                await serving.deserted.wait()
            while farewell.cancelled_caught and state.evaluation is not None:  # noqa: ASYNC110, its worker lives
                await trio.sleep(FAREWELL_LOOK_SECONDS)
            nursery.cancel_scope.cancel()
    chronicle.hand(serving.look())  # how it ended
    await _archive_rest(serving)


def _open_chronicle(config: RunConfig, name: str, observer: Observer) -> AbstractContextManager[Chronicle]:
    """What the run is like over time, kept beside the node's log, and shown where run.toml says."""
    node = config.node(name)
    return open_chronicle(
        node.directory, observer, functools.partial(_show, node.dashboard) if node.dashboard else None
    )


async def _show(url: str, chronicle: Chronicle) -> None:
    from hetero_async.watch import dashboard  # a web server, which nobody else needs

    await dashboard.show(url, chronicle)


@contextlib.asynccontextmanager
async def _open_parts(config: RunConfig, name: str, observer: Observer) -> AsyncIterator[Parts]:
    """All that a node lives on: its log locked, its addresses taken. Raises ConfigError, LogCorrupt, DiskFull."""
    set_manners()
    node = config.node(name)
    log = await _open_log(node.log, config.run.name, observer)
    seldom = SeldomObserver(observer)
    observer = notes = RefusalNotes(node.log.parent / refusals.NAME, seldom)
    allowed = AllowList(config.allowed)
    quarantine = open_quarantine(config.keys / "quarantine.json", observer)
    try:
        async with (
            open_server_link(
                control=node.control,
                bulk=node.bulk,
                secret_path=config.keys / f"{name}.secret",
                allowed=allowed,
                observer=observer,
                quarantine=quarantine,
            ) as link,
            _open_witness(config) as witness,
        ):
            yield Parts(
                name=name,
                secret=load_secret(config.keys / f"{name}.secret"),
                software=SOFTWARE,
                settings=config.settings(),
                rules=config.durability(),
                checkpoint_every=config.server.checkpoint_every,
                keep_log=config.server.keep_log,
                log=log,
                store=CheckpointStore(node.checkpoints, config.run.name, in_thread),
                promises=FilePromises(node.directory / "promised-term"),
                make_model=lambda: ServerModel(FileShelf(node.directory)),
                listening=link,
                blocking=in_thread,
                observer=observer,
                witness=witness,
                ask=functools.partial(ask_nodes, config, name),
                check=functools.partial(_check_settings, config),
                archiving=_archiving(config, node, observer),
                keep_best=KeepBest(config.server.keep_best, config.server.keep_best_is == "max"),
                best=BestKeeper(DirectoryBest(node.best), in_thread, observer) if config.server.keep_best else None,
                quarantine=quarantine,
                told=functools.partial(_told, config, allowed),
                adopt_list=functools.partial(_adopt_list, allowed, observer),
            )
    finally:
        notes.write()
        seldom.tell_the_rest()
        log.close()


async def _open_log(directory: Path, run: str, observer: Observer) -> FileLog:
    """A disk that is full at the start is waited for, like one that fills up later."""
    is_paused = False
    while True:
        try:
            log = FileLog.open(directory, run, in_thread)
        except DiskFull as error:
            if not is_paused:
                observer.event("log paused", reason=str(error))
            is_paused = True
            await trio.sleep(DISK_FULL_RETRY_SECONDS)
        else:
            if is_paused:
                observer.event("log resumed")
            return log


@contextlib.asynccontextmanager
async def _open_witness(config: RunConfig) -> AsyncIterator[Witness | None]:
    if not config.witness.etcd:
        yield None
        return
    async with open_witness(config.witness.etcd, config.run.name, config.witness.lease_seconds) as witness:
        yield witness


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


def _told(config: RunConfig, allowed: AllowList, asking: Peer) -> dict[str, Any]:
    """The settings, and how to know the other nodes: by the keys with which they are let in here. A standby also
    learns who else is let in."""
    keys = {peer.worker: peer.key.decode() for peer in allowed.peers() if peer.role == "standby"}
    if asking.role == "standby":
        return config.told_to_standbys() | {"keys": keys, ALLOWED: allowed.told()}
    return config.told_to_sites() | {"keys": keys}


def _adopt_list(allowed: AllowList, observer: Observer, payload: bytes) -> None:
    """From a SettingsReport, if that has one: a server of an older version tells none."""
    try:
        told = json.loads(payload)
        if isinstance(told, dict) and ALLOWED in told and allowed.adopt(told[ALLOWED]):
            observer.event("keys changed", reason="as on the server's host", let_in=len(told[ALLOWED]))
    except (ValueError, RecursionError, ConfigError) as error:
        observer.event("allow-list unusable", reason=f"the server's: {error}; the last good one stays")


async def _answer_operator(listener: trio.socket.SocketType, verbs: Mapping[str, Verb], observer: Observer) -> None:
    """A verb that crashes must not take the run with it."""
    await supervise(
        {"operator's socket": functools.partial(serve_admin, listener, verbs)},
        RestartWindow(OPERATOR_RESTARTS, OPERATOR_RESTART_PERIOD_SECONDS),
        backoff_seconds=OPERATOR_BACKOFF_SECONDS,
        report=lambda crash: observer.event("crash", report=crash),
    )
