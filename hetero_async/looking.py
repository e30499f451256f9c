"""Looking at what a run has left on disk: its log verified, audited, replayed, exported."""

from collections.abc import Callable, Sequence
from pathlib import Path

from hetero_async.config import RunConfig
from hetero_async.core.state import Kept, State
from hetero_async.errors import UserError
from hetero_async.folders import check_pattern, write_folder
from hetero_async.remains import furthest_here, oldest_start
from hetero_async.replay import fold, replay, start_of
from hetero_async.shell import refusals
from hetero_async.shell.best import DirectoryBest
from hetero_async.shell.disk import write_durably
from hetero_async.shell.refusals import load_refusals
from hetero_async.shell.segments import read_log
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


def export(config: RunConfig, out: Path) -> State:
    """Write the newest parameters on this host as safetensors. Server and standbys may be running. Raises UserError."""
    _check_place(out)
    state, model = _newest(config)
    model.export(out)
    return state


def export_folder(config: RunConfig, out: Path, like: Path, prefix: str, shard_size: str) -> State:
    """The same as a folder that transformers loads, with the config and tokenizer of `like`. Raises UserError.

    Only names that begin with `prefix` are written, without it.
    """
    _check_place_of_folder(out)
    check_pattern(like)
    state, model = _newest(config)
    assert model.schema is not None
    tensors = model.state_dict()
    within = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if not within:
        raise UserError(f'--prefix {prefix}: no name of the run begins so; one of them is "{min(tensors)}"')
    tied = {alias.removeprefix(prefix) for alias, _ in model.schema.aliases}
    write_folder(out, within, tied, like, shard_size)
    return state


def _newest(config: RunConfig) -> tuple[State, ServerModel]:
    node = furthest_here(config)
    checkpoint = CheckpointStore(node.checkpoints, config.run.name, in_thread).load_newest()
    entries = read_log(node.log, config.run.name, checkpoint.lsn if checkpoint else 0)
    model = ServerModel()
    state = replay(checkpoint, entries, model)
    if state.settings is None:
        raise UserError(f"{node.directory} holds no parameters yet: no worker has joined the run")
    return state, model


def export_best(config: RunConfig, out: Path) -> Kept:
    """Write the parameters that were measured best as safetensors. Raises UserError where none are known."""
    _check_place(out)
    node = furthest_here(config)
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


def _check_place_of_folder(out: Path) -> None:
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no directory {out.parent}; make it first")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already, and nothing is written over; name a folder to make")
