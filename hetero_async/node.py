"""A node's life: stand by, serve, or first the one and then the other. The same in production and in the simulator.

It is given its parts and opens nothing. Whoever calls it starts it again after a crash; what it knew is on its disk.
"""

from collections.abc import Callable, Mapping

from hetero_async.core.messages import Position
from hetero_async.core.records import Entry
from hetero_async.core.reign import Reign
from hetero_async.core.server import Server
from hetero_async.core.standby import Standby
from hetero_async.core.state import State
from hetero_async.core.trend import Trend
from hetero_async.errors import Deposed, first_error
from hetero_async.parts import Parts
from hetero_async.ports import (
    DialLink,
    Model,
)
from hetero_async.reigning import begin
from hetero_async.replay import recover
from hetero_async.serve import Serving
from hetero_async.standby import Diverged, StandingBy


async def begin_serving(parts: Parts) -> Serving:
    """Recover, and make sure that nobody reigns or has more of this reign. Raises Deposed, ConfigError, LogCorrupt."""
    model = parts.make_model()
    trend = Trend()
    state = _recover(parts, model, trend)
    parts.check(state)
    positions = await parts.ask(0)
    _refuse_if_behind(parts.name, state, positions)  # before anything is written where they have something else
    reign = None
    if parts.witness is not None:
        reign = await begin(parts.witness, parts.name, state, parts.lease_seconds, parts.observer)
    else:
        _refuse_if_deposed(parts.name, state, positions)
        _refuse_if_anothers(parts.name, state)
    return _serving(parts, state, trend, model, reign)


def _refuse_if_deposed(name: str, state: State, positions: Mapping[str, Position | None]) -> None:
    for other, position in positions.items():
        if position is not None and position.term > state.term:
            raise Deposed(
                f"{other} follows or serves in term {position.term}, and this log ends in term {state.term}: "
                f"start this one as a standby (hetero-async standby --name {name})"
            )


def _refuse_if_anothers(name: str, state: State) -> None:
    """Nobody may be there to say so, and two that went on in one term would part for good."""
    if state.lsn and state.server != name:
        raise Deposed(
            f"{state.server} reigns in term {state.term}, in which this log ends: start this one as a standby; if "
            f"{state.server} is lost, promote it (hetero-async promote --name {name})"
        )


def _refuse_if_behind(name: str, state: State, positions: Mapping[str, Position | None]) -> None:
    """A standby gets only what is durable here: where it has more of this reign, a disk has lost it."""
    for other, position in positions.items():
        if position is not None and position.last_term == state.term and position.lsn > state.lsn:
            raise Deposed(
                f"{other} has record {position.lsn} of this term and this log ends with record {state.lsn}: what was "
                f"durable here is lost; promote {other} and start this one as a standby "
                f"(hetero-async standby --name {name})"
            )


def _serving(parts: Parts, state: State, trend: Trend, model: Model, reign: Reign | None) -> Serving:
    term = reign.term if reign else state.term
    machine = Server(parts.settings, state, parts.rules, parts.name, term, parts.secret, parts.keep_best)
    return Serving(parts, machine, model, reign, trend)


async def stand_by(parts: Parts, dialling: DialLink, shown: Callable[[StandingBy], None]) -> Serving:
    """Follow the server until it is for this one to serve. Raises RefusedError, ConfigError, LogCorrupt.

    `shown` is given the standby whenever it begins anew, for the operator's word and questions.
    """
    while True:
        model = parts.make_model()
        trend = Trend()
        state = _recovered(parts, model, trend)
        parts.check(state)
        standing = _standing(parts, dialling, state, trend, model)
        shown(standing)
        diverged: Diverged | None = None
        try:
            reign = await standing.run()
        except* Diverged as group:
            diverged = first_error(group)
        if diverged is None:
            # In the operator's reign the witness, if there is one, knows of it as well.
            return _serving(parts, state, trend, model, reign)
        await _mend(parts, diverged)


def _standing(parts: Parts, dialling: DialLink, state: State, trend: Trend, model: Model) -> StandingBy:
    machine = Standby(
        name=parts.name,
        run=parts.settings.run,
        software=parts.software,
        state=state,
        promised=parts.promises.load(),
    )
    return StandingBy(parts, machine, state, model, dialling, trend)


def _recovered(parts: Parts, model: Model, trend: Trend) -> State:
    """As a server recovers; but a log that ends before its checkpoint is one that was to begin anew behind it."""
    checkpoint = parts.store.load_newest()
    if checkpoint is not None and parts.log.last_lsn < checkpoint.lsn:
        parts.log.reset(checkpoint.lsn, checkpoint.term, checkpoint.chain)
    if checkpoint is None and parts.log.first_lsn > 1:
        parts.log.reset()
    return _recover(parts, model, trend)


def _recover(parts: Parts, model: Model, trend: Trend) -> State:
    def seen(entry: Entry, state: State) -> None:
        trend.see(entry)
        if parts.best is not None:
            parts.best.seen(entry, model)

    return recover(parts.log, parts.store, model, parts.observer, seen)


async def _mend(parts: Parts, diverged: Diverged) -> None:
    """Make the log one that the server's can continue."""
    if diverged.is_behind:
        return  # the checkpoint is there, and the log is begun anew behind it by the next recovery
    aside = await parts.blocking(_cut, parts, diverged.lsn)
    parts.observer.event(
        "cut",
        lsn=diverged.lsn,
        reason="records of this log that no other has were never acknowledged in the run as it went on",
        aside=", ".join(map(str, aside)) or "nothing",
    )


def _cut(parts: Parts, lsn: int) -> list[object]:
    parts.store.drop_after(lsn)
    return list(parts.log.cut(lsn))
