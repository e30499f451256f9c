"""Looking at what a run has left on disk: its log verified, audited, replayed, exported."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hetero_async.complaints import SERVER
from hetero_async.config import Node, RunConfig
from hetero_async.core.records import Entry
from hetero_async.core.state import Kept, State
from hetero_async.errors import LogCorrupt, UserError
from hetero_async.ports import Checkpoint
from hetero_async.replay import fold, replay, start_of
from hetero_async.shell import refusals
from hetero_async.shell.best import DirectoryBest
from hetero_async.shell.disk import write_durably
from hetero_async.shell.refusals import load_refusals
from hetero_async.shell.segments import end_of, read_log, run_of, segment_paths
from hetero_async.shell.store import CheckpointStore
from hetero_async.shell.threads import in_thread
from hetero_async.tensors.model import ServerModel
from hetero_async.watch.audit import Audit, audit
from hetero_async.watch.verify import Verdict, verify
from hetero_async.watch.without import Rebuilt, left_out, rebuild


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


def export_best(config: RunConfig, out: Path) -> Kept:
    """Write the parameters that were measured best as safetensors. Raises UserError where none are known."""
    _check_place(out)
    node = _furthest_here(config)
    checkpoint = CheckpointStore(node.checkpoints, config.run.name, in_thread).load_newest()
    state = start_of(checkpoint)
    for entry in read_log(node.log, config.run.name, checkpoint.lsn if checkpoint else 0):
        fold(entry, state)
    if state.best is None:
        wanted = config.server.keep_best
        why = f"no evaluation has given {wanted} yet" if wanted else "set keep_best in the [server] table of run.toml"
        raise UserError(f"{node.directory} holds no best parameters: {why}")
    content = DirectoryBest(node.best).read(state.best.term, state.best.lsn)
    try:
        write_durably(out, content)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}") from None
    return state.best


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
