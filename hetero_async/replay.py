"""The one way to turn a log back into a run: recovery, standby, verify and export all come through here."""

from collections.abc import Callable, Iterable

from hetero_async.core.records import Beacon, Entry
from hetero_async.core.state import State
from hetero_async.errors import LogCorrupt
from hetero_async.ports import Checkpoint, Log, Model, Observer, Store


def ignore(entry: Entry, state: State) -> None:
    """Nobody looks on."""


def recover(
    log: Log, store: Store, model: Model, observer: Observer, seen: Callable[[Entry, State], None] = ignore
) -> State:
    """What a server goes on from: its newest whole checkpoint and the log from there. Raises LogCorrupt."""
    checkpoint = store.load_newest()
    for warning in store.warnings:
        observer.event("checkpoint damaged", reason=warning)
    after = checkpoint.lsn if checkpoint else 0
    state = replay(checkpoint, log.entries(after), model, seen)
    observer.event("recovered", from_checkpoint=after, lsn=state.lsn, state_hash=state.digest().hex())
    return state


def start_of(checkpoint: Checkpoint | None) -> State:
    """The state before the first entry. Raises LogCorrupt."""
    if checkpoint is None:
        return State()
    state = State.load(checkpoint.state)
    if state.digest() != checkpoint.state_hash:
        raise LogCorrupt(f"the checkpoint at record {checkpoint.lsn} does not hash to what its manifest says")
    return state


def fold(entry: Entry, state: State) -> None:
    """The state's half of one record. Raises LogCorrupt where it contradicts those before it."""
    try:
        state.fold(entry)
    except (AssertionError, KeyError) as error:
        raise LogCorrupt(f"record {entry.lsn} ({type(entry.record).__name__}) cannot be: {error}") from error


def replay(
    checkpoint: Checkpoint | None,
    entries: Iterable[Entry],
    model: Model,
    seen: Callable[[Entry, State], None] = ignore,
) -> State:
    """Fold and apply every entry after the checkpoint. Raises LogCorrupt where the log contradicts itself.

    `seen` is called after each entry with the state it led to.
    """
    state = start_of(checkpoint)
    if checkpoint is not None:
        model.load(checkpoint.model)
    for entry in entries:
        apply(entry, state, model)
        seen(entry, state)
    return state


def apply(entry: Entry, state: State, model: Model) -> None:
    """One record of a log that another process has written. Raises LogCorrupt where it contradicts what came before."""
    fold(entry, state)
    model.apply(entry)
    if isinstance(entry.record, Beacon) and model.model_hash() != entry.record.model_hash:
        raise LogCorrupt(f"record {entry.lsn}: the parameters differ from those that were logged")
