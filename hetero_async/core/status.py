"""The status of a run as plain values, read off the server's machine; `watch.status` draws it."""

from typing import Any

from hetero_async.core import ranges
from hetero_async.core.members import Presence
from hetero_async.core.server import Server


def summary(server: Server, now_ms: int) -> dict[str, Any]:
    """JSON-able. The shell adds what only it knows: bytes, the log, whether it is paused."""
    state = server.state
    trained = ranges.size(state.ledger.trained)
    return {
        "run": server.settings.run,
        "state": "finished" if state.is_finished else "training" if state.active else "waiting for workers",
        "term": state.term,
        "version": state.version,
        "publish": state.publish,
        "trained": trained,
        "positions": state.ledger.positions,
        "deltas": {
            "acknowledged": sum(member.deltas for member in state.members.values()),
            "refused": sum(server.presences.refusals.values()),
            "pending": len(state.pending),
        },
        "refusals": dict(server.presences.refusals),
        "metrics": {name: {"value": value, "version": version} for name, (value, version) in state.metrics.items()},
        "workers": [_worker(server, worker, now_ms) for worker in sorted(state.members)],
    }


def _worker(server: Server, worker: str, now_ms: int) -> dict[str, Any]:
    member = server.state.members[worker]
    presence = server.presences.of(worker) or Presence(heard_ms=now_ms)
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
        "steps_per_round": server.steps_for(worker),
        "staleness": presence.staleness,
        "bytes_up": presence.bytes_up,
        "bytes_down": presence.bytes_down,
        "samples": member.samples,
        "deltas": member.deltas,
        "refused": presence.refused,
        "seconds_since_heard": (now_ms - presence.heard_ms) / 1000,
    }
