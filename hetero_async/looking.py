"""Looking at a run from outside: status, its log verified, audited, replayed, exported; having a standby promoted."""

import contextlib
import functools
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import trio

from hetero_async.assembly import endpoints
from hetero_async.complaints import SERVER
from hetero_async.config import Node, RunConfig
from hetero_async.core.messages import StatusReport, StatusRequest
from hetero_async.core.records import Entry
from hetero_async.core.state import State
from hetero_async.errors import LogCorrupt, UserError
from hetero_async.ports import Checkpoint, Observer
from hetero_async.replay import fold, replay, start_of
from hetero_async.shell import refusals
from hetero_async.shell.admin import NotServing, ask
from hetero_async.shell.dial import DialLink, open_dial_link, until_stopped
from hetero_async.shell.refusals import load_refusals
from hetero_async.shell.segments import end_of, read_log, run_of, segment_paths
from hetero_async.shell.store import CheckpointStore
from hetero_async.shell.threads import in_thread
from hetero_async.tensors.model import ServerModel
from hetero_async.watch.audit import Audit, audit
from hetero_async.watch.verify import Verdict, verify
from hetero_async.watch.without import Rebuilt, left_out, rebuild

Status = dict[str, Any]

STATUS_SECONDS = 5.0
STATUS_RETRY_SECONDS = 0.1
# All others are asked, twice, and a server that hands over is waited for.
PROMOTION_SECONDS = 40.0


def nodes_here(config: RunConfig) -> list[Node]:
    """Those that this host can be, as far as its key files tell."""
    return [node for node in config.nodes().values() if (config.keys / f"{node.name}.secret").exists()]


@contextlib.asynccontextmanager
async def open_status(
    config: RunConfig, observer: Observer, how_long: Callable[[], str] = until_stopped
) -> AsyncIterator[Callable[[], Awaitable[Status | None]]]:
    """The question how the run stands; the answer is None when there is none (in time).

    On the server's host the operator's socket is asked, elsewhere the server, with a key that it lets in.
    `how_long`: as in open_dial_link.
    """
    if nodes_here(config):
        yield functools.partial(_ask_here, config)
        return
    secret = _key_to_ask_with(config)
    async with open_dial_link(endpoints(config), secret_path=secret, observer=observer, how_long=how_long) as link:

        async def ask_there() -> Status | None:
            with trio.move_on_after(STATUS_SECONDS):
                return await _ask_status(link)
            return None

        yield ask_there


def for_one_question() -> str:
    """How long a server is tried by somebody who asks once."""
    return f"until {STATUS_SECONDS:g} s have passed"


def why_no_status(config: RunConfig) -> str:
    if nodes_here(config):
        return f"no server answers on {config.directory}; start it with: hetero-async serve --run {config.path}"
    asked = ", ".join(endpoint.control for endpoint in endpoints(config))
    return f"no answer from {asked} in {STATUS_SECONDS:g} s"


async def _ask_here(config: RunConfig) -> Status | None:
    """Where several run on one host, the one that serves."""
    answers: list[Status] = []
    for node in nodes_here(config):
        with contextlib.suppress(NotServing):
            answers.append(await ask(node.admin, "status"))
    return min(answers, key=lambda status: "standby" in status, default=None)


async def promote(config: RunConfig, name: str, in_spite: bool) -> list[str]:
    """Have a standby of this host take over. What stands against it, in lines; none: it does."""
    answer: list[str] = await ask(config.node(name).admin, "promote", PROMOTION_SECONDS, in_spite=in_spite)
    return answer


async def lift(config: RunConfig, key: str) -> str:
    """Have the server of this host hear a quarantined key again; whose it is. Raises NotServing, UserError."""
    for node in nodes_here(config):
        with contextlib.suppress(NotServing):
            if "standby" not in await ask(node.admin, "status"):
                return str(await ask(node.admin, "lift", key=key))
    raise NotServing(f"no server is running on {config.directory}: a key is lifted where it runs")


def _key_to_ask_with(config: RunConfig) -> Path:
    """An operator's own key where there is one, else a worker's, who is not disturbed by it."""
    names = ["operator", *(worker for _, worker in config.workers())]
    paths = [config.keys / f"{name}.secret" for name in names]
    return next((path for path in paths if path.exists()), paths[0])


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
    checkpoint, entries = oldest_start(log)
    return verify(checkpoint, entries, ServerModel(), _notes_beside(log), progress)


def _notes_beside(log: Path) -> list[Path]:
    """A standby's directory lies within the run's, where the workers' are."""
    for directory in (log.parent, log.absolute().parent.parent):
        if notes := sorted(directory.glob("workers/*/acknowledged.jsonl")):
            return notes
    return []


def audit_directory(log: Path) -> Audit:
    """Who contributed what to the run whose log lies in `log`, and what the server beside it refused."""
    return audit(*oldest_start(log), load_refusals(log.parent / refusals.NAME))


def replay_without(log: Path, names: Sequence[str], out: Path | None, progress: Callable[[int], None]) -> Rebuilt:
    """The run's parameters without those named, written to `out` as safetensors. Raises UserError, LogCorrupt."""
    if out is not None:
        _check_place(out)
    checkpoint, entries = oldest_start(log)
    state = start_of(checkpoint)
    for entry in entries:
        fold(entry, state)
    chosen = left_out(names, state)
    rebuilt = rebuild(*oldest_start(log), chosen, progress)
    if out is not None:
        rebuilt.model.export(out)
    return rebuilt


def oldest_start(log: Path) -> tuple[Checkpoint | None, Iterator[Entry]]:
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
    """Write the newest parameters on this host as safetensors. Server and standbys may be running. Raises UserError."""
    _check_place(out)
    node = _furthest_here(config)
    checkpoint = CheckpointStore(node.checkpoints, config.run.name, in_thread).load_newest()
    entries = read_log(node.log, config.run.name, checkpoint.lsn if checkpoint else 0)
    model = ServerModel()
    state = replay(checkpoint, entries, model)
    if state.settings is None:
        raise UserError(f"{node.directory} holds no parameters yet: no worker has joined the run")
    model.export(out)
    return state


def _check_place(out: Path) -> None:
    """Before a log is replayed for minutes. Raises UserError for a file that cannot be made there."""
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no directory {out.parent}; make it first")
    if out.is_dir():
        raise UserError(f"{out} is a directory; name the file to write")


def _furthest_here(config: RunConfig) -> Node:
    """Where several nodes have logs on this host: what a deposed one has in a lower term is not the run's."""
    held = [node for node in config.nodes().values() if segment_paths(node.log)]
    return max(held, key=lambda node: end_of(node.log), default=config.node(SERVER))
