"""The status of a run as plain values, read off a server's or a standby's machine; `watch.status` draws it."""

from dataclasses import asdict
from typing import Any

from hetero_async.core import pace, ranges
from hetero_async.core.members import Presence
from hetero_async.core.server import Server
from hetero_async.core.standby import Standby
from hetero_async.core.state import Kept, State
from hetero_async.core.trend import Trend


def summary(server: Server, trend: Trend, now_ms: int) -> dict[str, Any]:
    """JSON-able. The shell adds what only it knows: bytes, the log, whether it is paused."""
    state, replication = server.state, server.replication
    told = outline(server.settings.run, state, trend, now_ms)
    told["state"] = "finished" if state.is_finished else "training" if state.active else "waiting for workers"
    told["deltas"]["refused"] = sum(server.presences.refusals.values())
    told["refusals"] = dict(server.presences.refusals)
    rates = server.presences.rate
    reference = pace.reference_rate(map(rates, state.active))  # once for all: this is asked every second
    told["workers"] = [
        _worker(
            state,
            worker,
            server.presences.of(worker),
            pace.steps_for(rates(worker), reference, server.settings, server.windows.longer),
            now_ms,
        )
        for worker in sorted(state.members)
    ]
    told["durability"] = replication.rules.durability
    told["partner"] = replication.partner
    told["standbys"] = [
        {
            "standby": name,
            "lag": max(0, state.lsn - standing.confirmed),
            "in_reach": not replication.is_away(name, now_ms),
            "seconds_since_heard": (now_ms - standing.heard_ms) / 1000,
        }
        for name, standing in sorted(replication.standings.items())
    ]
    return told


def standby_summary(
    run: str, state: State, trend: Trend, standby: Standby, now_ms: int, silence_ms: int
) -> dict[str, Any]:
    """The same of a standby, as far as its log goes."""
    told = outline(run, state, trend, now_ms)
    if standby.hears_server(now_ms, silence_ms):
        told["state"] = f"standing by for {standby.server}, {standby.lag} records behind"
    else:
        told["state"] = "standing by: no server in reach"
    told["standby"] = {
        "name": standby.name,
        "server": standby.server,
        "lag": standby.lag,
        "is_partner": standby.partner == standby.name,
        "hears_server": standby.hears_server(now_ms, silence_ms),
    }
    return told


def outline(run: str, state: State, trend: Trend, now_ms: int) -> dict[str, Any]:
    """What the log alone says."""
    trained, rate = ranges.size(state.ledger.trained), trend.samples_per_second(now_ms)
    return {
        "run": run,
        "state": "",
        "term": state.term,
        "server": state.server,
        "version": state.version,
        "publish": state.publish,
        "trained": trained,
        "positions": state.ledger.positions,
        "samples_per_second": rate,
        "eta_seconds": (state.ledger.positions - trained) / rate if rate > 0 else None,
        "deltas": {
            "acknowledged": sum(member.deltas for member in state.members.values()),
            "refused": 0,
            "pending": len(state.pending),
        },
        "refusals": {},
        "evaluation": _kept(state.evaluation),
        "best": _kept(state.best),
        "metrics": {name: _metric(trend, name, *newest) for name, newest in state.metrics.items()},
        "workers": [_worker(state, worker, None, 0, now_ms) for worker in sorted(state.members)],
    }


def _metric(trend: Trend, name: str, value: float, version: int) -> dict[str, Any]:
    """`curve`: [version, value] from the oldest to the newest that this process has seen."""
    told: dict[str, Any] = {"value": value, "version": version}
    if curve := trend.curves.get(name):
        told |= {"curve": curve.points, "lowest": curve.lowest, "highest": curve.highest}
    return told


def _kept(kept: Kept | None) -> dict[str, Any] | None:
    return None if kept is None else {key: getattr(kept, key) for key in ("worker", "version", "name", "value")}


def _worker(state: State, worker: str, heard: Presence | None, steps_per_round: int, now_ms: int) -> dict[str, Any]:
    member = state.members[worker]
    presence = heard or Presence(heard_ms=now_ms, doing="")
    return {
        "site": member.site,
        "worker": worker,
        "device": presence.device,
        "dtype": presence.dtype,
        "state": presence.doing if member.active else "away",
        "incarnation": member.incarnation,
        "alive": member.active,
        "steps": member.steps,
        "steps_per_second": presence.steps_per_second if member.active else 0.0,
        "steps_per_round": steps_per_round,
        "staleness": presence.staleness,
        "bytes_up": presence.bytes_up,
        "bytes_down": presence.bytes_down,
        "samples": member.samples,
        "deltas": member.deltas,
        "refused": presence.refused,
        "probe": presence.probe,
        "seconds_since_heard": (now_ms - presence.heard_ms) / 1000,
        "shares": presence.lately.shares() if member.active else None,
        "usage": asdict(presence.usage),
    }
