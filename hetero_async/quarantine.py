"""Keys that are let in but not heard: whoever does again and again what no honest worker does.

The server's own list, beside the operator's allowed.json: the loops and the link report strikes and ask it about every
message, `status` shows it, and only the operator takes a key off it. shell/keys.py keeps it in a file, so that a
restart lets nobody out.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import trio

from hetero_async.ports import Observer, Peer

# So many strikes within the period: a broken worker is told each time, and has had its chances.
STRIKES_MAX = 10
STRIKE_PERIOD_SECONDS = 600.0
REASON_LENGTH_MAX = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """Whose key it was when it was shut out, and what for."""

    worker: str
    reason: str


def keep_nothing(_: Mapping[bytes, Quarantined]) -> None:
    """For a server that needs to remember nobody after its end."""


class Quarantine:
    def __init__(
        self,
        observer: Observer,
        keys: Mapping[bytes, Quarantined] | None = None,
        save: Callable[[Mapping[bytes, Quarantined]], None] = keep_nothing,
    ) -> None:
        """`keys`: who is in it from before; `save` is told of every change."""
        self.keys: dict[bytes, Quarantined] = dict(keys or {})
        self._observer = observer
        self._save = save
        self._strikes: dict[bytes, deque[float]] = {}

    def strike(self, peer: Peer, reason: str) -> None:
        """Only workers are shut out: without its operator or its standby, a run would be worse off than with them."""
        if peer.role != "worker" or peer.key in self.keys:
            return
        now = trio.current_time()
        strikes = self._strikes.setdefault(peer.key, deque(maxlen=STRIKES_MAX))
        strikes.append(now)
        if len(strikes) == STRIKES_MAX and strikes[0] >= now - STRIKE_PERIOD_SECONDS:
            self._shut_out(peer, reason)

    def _shut_out(self, peer: Peer, reason: str) -> None:
        del self._strikes[peer.key]
        told = f"{STRIKES_MAX} times refused, at last: {reason:.{REASON_LENGTH_MAX}}"
        self.keys[peer.key] = Quarantined(worker=peer.worker, reason=told)
        self._save(self.keys)
        self._observer.event("quarantined", worker=peer.worker, key=peer.key.decode(), reason=reason)

    def refusal(self, key: bytes) -> str:
        """What to tell the holder of this key; "" when it is not in quarantine."""
        if (found := self.keys.get(key)) is None:
            return ""
        return (
            f"quarantined: {found.reason}; when it is mended, the operator can: hetero-async keys lift '{key.decode()}'"
        )

    def lift(self, key: bytes) -> bool:
        """Hear a key again from its next message on. False: it was not in quarantine."""
        found = self.keys.pop(key, None)
        if found is not None:
            self._save(self.keys)
            self._observer.event("quarantine lifted", worker=found.worker, key=key.decode())
        return found is not None

    def listed(self) -> list[dict[str, str]]:
        """As plain values, for the status."""
        return [
            {"key": key.decode(), "worker": found.worker, "reason": found.reason} for key, found in self.keys.items()
        ]
